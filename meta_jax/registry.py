"""Components by name: learners, networks, task sources, optimizers.

A component is a factory, registered where it is defined. Its settings are its own keyword
parameters: flags, `--help`, defaults, choices and the record of a run are read from its signature
and its docstring, and are listed nowhere else. Your own component needs no registration to be named
in a flag, as 'package.module:function'; where Python code builds it, a record can build it again if
its factory is registered.
"""

import enum
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar

import jax

from meta_jax.backend import compiled_when_called
from meta_jax.citations import cite
from meta_jax.concrete import check_finite
from meta_jax.core import (
    Array,
    Batch,
    Config,
    Episode,
    Loss,
    LossAux,
    MetaLearner,
    Network,
    Objective,
    PyTree,
    check_batch,
    check_episode,
)
from meta_jax.lookup import UsageError, load_attribute
from meta_jax.objectives import as_objective
from meta_jax.precision import record_precision, recorded_precision, with_precision
from meta_jax.ranges import Range, check_ranges

__all__ = [
    "Component",
    "Setting",
    "build",
    "build_optimizer",
    "cite",
    "component",
    "find",
    "learner",
    "names",
    "network",
    "optimizer",
    "settings",
    "summary",
    "tasks",
]

Kind = Literal["learner", "network", "tasks", "optimizer", "rule", "family", "estimator"]
P = ParamSpec("P")
R = TypeVar("R")
# A default that depends on what a learner is given: (network, objective) -> value.
Default = Callable[[Network | None, Objective], Any]


class Setting(NamedTuple):
    """One keyword parameter of a factory that a flag can set.

    Attributes:
      name: Name of the parameter.
      type: Type: bool, int, float, str, or tuple for several ints.
      default: Default; `inspect.Parameter.empty` where it must be given.
      choices: Values of a Literal, else ().
      optional: Whether None is a value.
      doc: Sentences on it in the docstring.
      range: Numbers that it may have, where the annotation says.
    """

    name: str
    type: type
    default: Any
    choices: tuple[Any, ...]
    optional: bool
    doc: str
    range: Range | None = None


class Component(NamedTuple):
    """A factory and how it is found.

    Attributes:
      kind: Kind of the component.
      name: Name as registered, or 'package.module:function'.
      factory: Function of its settings that builds it.
      network: A learner's usual network; None where it has its own.
      normalisation: A learner's usual normalisation.
      optimizer: A learner's usual outer optimizer.
      run: Usual settings of a run with it, such as {"task_batch": 16}.
      tasks: A learner's usual tasks.
    """

    kind: Kind
    name: str
    factory: Callable[..., Any]
    network: str | None
    normalisation: str | None
    optimizer: str | None
    run: Mapping[str, int] = {}
    tasks: str = "glyphs"


_REGISTERED: dict[tuple[Kind, str], Component] = {}


def _register(component: Component) -> None:
    _check_parameters(component)
    _REGISTERED[component.kind, component.name] = component


def _check_parameters(component: Component) -> None:
    """Refuses a setting called as the component itself is in a record.

    Raises:
      UsageError: there is one.
    """
    parameter = parameters(component.factory).get("name")
    if parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY:
        raise UsageError(
            f"{component.name} has a setting called 'name', by which records call the component: "
            "rename it"
        )


def learner(
    name: str,
    *,
    network: str | None = "conv4",
    normalisation: str | None = None,
    optimizer: str = "adam",
    tasks: str = "glyphs",
    run: Mapping[str, int] | None = None,
    defaults: Mapping[str, Default] | None = None,
) -> Callable[[Callable[P, MetaLearner]], Callable[P, MetaLearner]]:
    """Registers a factory of learners.

    The factory takes a network first (but where `network` is None), and settings by keyword, among
    them `objective`, which the tasks choose. What it returns says which learner it is, in `config`.

    Args:
      name: Name that `--learner` takes where the module is imported already, as ours are; yours is
        'package.module:function' there.
      network: Name of the network that it is used with by default; None where it has its own.
      normalisation: Default mode of that network's normalisation; None for the network's own.
      optimizer: Name of the outer optimizer that it is used with by default.
      tasks: Name of the tasks that it is used with by default.
      run: Usual settings of a training run by their flags, such as {"task_batch": 16}: what the
        binaries take where a flag is not given.
      defaults: Functions (network, objective) -> value that resolve settings left at None, by
        setting.

    Returns:
      The decorator.
    """

    def decorate(factory: Callable[P, MetaLearner]) -> Callable[P, MetaLearner]:
        wrapped = _configured(factory, name, takes_network=network is not None, defaults=defaults)
        usual = (network, normalisation, optimizer, run or {}, tasks)
        _register(Component("learner", name, wrapped, *usual))
        return wrapped

    return decorate


def network(name: str) -> Callable[[Callable[P, Network]], Callable[P, Network]]:
    """Registers a factory of networks, all of whose parameters are settings."""

    def decorate(factory: Callable[P, Network]) -> Callable[P, Network]:
        wrapped = _configured(factory, name, takes_network=False)
        _register(Component("network", name, wrapped, None, None, None))
        return wrapped

    return decorate


def component(kind: Kind, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a factory of another kind: task sources, optimizers and what else has a flag."""

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        checked = with_ranges(factory, name)
        _register(Component(kind, name, checked, None, None, None))
        return checked

    return decorate


def with_ranges(factory: Callable[P, R], name: str) -> Callable[P, R]:
    """A factory that refuses settings out of the ranges in its annotations.

    Args:
      factory: The factory.
      name: Its name in messages.
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        check_ranges(name, signature.bind(*args, **kwargs).arguments, ranges(factory))
        return factory(*args, **kwargs)

    return build


def tasks(
    name: str, *, run: Mapping[str, int] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a factory of task sources; a positional-only parameter is what follows 'NAME:'.

    Args:
      name: Name that `--tasks` takes.
      run: Usual settings of a training run by their flags, such as {"shots": 10}.

    Returns:
      The decorator.
    """

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        wrapped = _configured(factory, name, takes_network=False)
        _register(Component("tasks", name, wrapped, None, None, None, run or {}))
        return wrapped

    return decorate


def optimizer(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a factory of outer optimizers; its `steps` gets the number of outer steps."""
    return component("optimizer", name)


def _configured(
    factory: Callable[..., Any],
    name: str,
    *,
    takes_network: bool,
    defaults: Mapping[str, Default] | None = None,
) -> Callable[..., Any]:
    """A factory that fills in the defaults that depend on others, and records its settings."""
    signature = inspect.signature(factory)
    positional = [
        p.name
        for p in signature.parameters.values()
        if p.kind is p.POSITIONAL_ONLY and not (takes_network and p.name == "network")
    ]
    recorded = _recorded_name(factory, name)
    variadic = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(factory)
    def build(*arguments: Any, **settings: Any) -> Any:
        bound = signature.bind(*arguments, **settings)
        bound.apply_defaults()
        given = dict(bound.arguments)
        if "objective" in given:
            given["objective"] = as_objective(given["objective"])
        network = given.get("network") if takes_network else None
        if takes_network:
            _check_network(network, name)
        for setting, default in (defaults or {}).items():
            if given.get(setting) is None:
                given[setting] = default(network, given["objective"])
        check_ranges(name, given, ranges(factory))
        bound.arguments.update(given)
        built = factory(*bound.args, **bound.kwargs)
        if "config" not in getattr(built, "_fields", ()):
            raise UsageError(
                f"{name} returns {_described(built)}, not a meta_jax MetaLearner, Network or "
                "TaskSource: build one, a flax module with from_linen or from_nnx"
            )
        if isinstance(built, MetaLearner):
            built = _compiled_when_called(built)
        # What follows 'NAME:' belongs to the name, as load_source takes it.
        full_name = ":".join([recorded, *(str(given.pop(one)) for one in positional)])
        for others in variadic:
            given |= given.pop(others, {})
        # A factory built on another registered one is recorded under its own name.
        return built._replace(config={"name": full_name, **_recorded(given)})

    return build


def _described(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _compiled_when_called(learner: MetaLearner) -> MetaLearner:
    """A learner whose functions do not run operation by operation in a notebook."""
    check = functools.partial(_check_task, getattr(learner.evaluate, "check", check_episode))
    return learner._replace(
        init=compiled_when_called(learner.init),
        adapt=compiled_when_called(learner.adapt, static=("train",), check=_check_support),
        predict=compiled_when_called(learner.predict, static=("train",), check=_check_queries),
        evaluate=compiled_when_called(learner.evaluate, check=check),
        loss=_checked_loss(learner.loss),
    )


# Numbers are looked at where they come in from Python; in what is compiled there are none.


def _check_support(params: PyTree, state: PyTree, support: Any, key: Array, *, train: bool) -> None:
    del params, state, key, train
    if isinstance(support, Batch):
        check_batch(support, "support")


def _check_queries(
    params: PyTree, adapted: Any, x: PyTree, key: Array, *, train: bool, mask: Array | None = None
) -> None:
    del params, adapted, key, train
    check_finite(x, "x", mask)


def _checked_loss(loss: Loss) -> Loss:
    @functools.wraps(loss)
    def checked(params: PyTree, state: PyTree, task: Any, key: Array) -> tuple[Array, LossAux]:
        _check_task(check_episode, params, state, task, key)
        return loss(params, state, task, key)

    return checked


def _check_task(
    check: Callable[[Episode], None], params: PyTree, state: PyTree, task: Any, key: Array
) -> None:
    del params, state, key
    if isinstance(task, Episode):
        check(task)


def _recorded_name(factory: Callable[..., Any], name: str) -> str:
    """The name by which a record finds a factory again, in another process too."""
    module = factory.__module__
    if ":" in name or module == "__main__" or module.split(".")[0] == "meta_jax":
        return name
    return f"{module}:{factory.__qualname__}"


def _check_network(network: Any, learner: str) -> None:
    if not isinstance(network, Network):
        raise TypeError(
            f"{learner} needs a meta_jax Network, not a {type(network).__name__}: wrap a flax "
            "Linen module with meta_jax.from_linen, an NNX module with from_nnx, functions with "
            "from_functions"
        )


def _recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a component's arguments; others by their name, where they have one."""
    return {name: _record(value) for name, value in arguments.items()}


def _record(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, Network | MetaLearner):
        return value.config
    if isinstance(value, jax.sharding.Mesh):
        return None  # where something is computed is no part of what it is
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):  # text is of another type than the factory asks for
        return {"python": str(value)}
    if isinstance(getattr(value, "name", None), str):  # an objective, an adjoint
        return value.name or None
    if isinstance(value, list | tuple):
        return [_record(item) for item in value]
    # Somebody's function or transformation: known by its name, not to be built again from it.
    return {"python": getattr(value, "__qualname__", type(value).__name__)}


def names(kind: Kind) -> tuple[str, ...]:
    """Names of the registered components of a kind, in the order of their definition."""
    return tuple(name for found, name in _REGISTERED if found == kind)


def find(kind: Kind, name: str) -> Component:
    """A component by its name.

    Args:
      kind: Kind of the component.
      name: Name as registered, or 'package.module:function' for somebody's own.

    Returns:
      The component. A function of somebody's own that is not registered as a learner is used with
      conv4.

    Raises:
      UsageError: an unknown name, a module that cannot be imported, or no such function in it.
    """
    if (kind, name) in _REGISTERED:
        return _REGISTERED[kind, name]
    if ":" not in name:
        raise UsageError(
            f"unknown {kind} '{name}': choose one of {', '.join(names(kind))}, or name your own as "
            "package.module:function"
        )
    factory = load_attribute(name)
    if not callable(factory):
        raise UsageError(f"{name} is a {type(factory).__name__}, not a function that builds {kind}")
    for registered in _REGISTERED.values():
        if registered.kind == kind and registered.factory is factory:
            return registered._replace(name=name)
    takes_network = kind == "learner" and "network" in parameters(factory)
    if kind in ("learner", "network", "tasks"):
        factory = _configured(factory, name, takes_network=takes_network)
    network, optimizer = ("conv4" if takes_network else None), ("adam" if takes_network else None)
    found = Component(kind, name, factory, network, None, optimizer)
    _check_parameters(found)
    return found


def build(kind: Kind, config: Config) -> Any:
    """Builds the learner or network that a record describes, as its `config` has it.

    Args:
      kind: 'learner' or 'network'.
      config: Its name and settings.

    Raises:
      UsageError: an unknown name, a setting that it does not have, or one that was given from
        Python and cannot be built again from a record.
    """
    precision = recorded_precision(config)
    if kind == "network" and precision != "float32":
        return with_precision(build(kind, record_precision(config, "float32")), precision)
    found = find(kind, config["name"])
    known = parameters(found.factory)
    passes_others = any(one.kind is one.VAR_KEYWORD for one in known.values())
    arguments: dict[str, Any] = {}
    for name, value in config.items():
        if name == "name":
            continue
        if name not in known and not passes_others:
            raise UsageError(
                f"{config['name']} has no setting '{name}' in this version of meta_jax: it has "
                f"{', '.join(known)}"
            )
        if name == "network":
            arguments[name] = build("network", value)
        elif isinstance(value, dict):
            if name not in known or value != _record(known[name].default):
                raise UsageError(
                    f"{config['name']} was built in Python with {name}={value.get('python')}, "
                    "which a record cannot hold: build the learner as it was, and restore its "
                    "parameters"
                )
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    first = [n for n, one in known.items() if one.kind is one.POSITIONAL_ONLY and n in arguments]
    by_position = [arguments.pop(name) for name in first]
    return found.factory(*by_position, **arguments)


def settings(component: Component, *, reserved: tuple[str, ...] = ()) -> dict[str, Setting]:
    """The settings of a component by name, from its factory's signature and docstring.

    Parameters whose type no flag can express (functions, networks, meshes) are left out: they are
    Python's alone.

    Args:
      component: Component, from `find`.
      reserved: Names of parameters that somebody else gives, such as 'objective'.
    """
    factory = component.factory
    hints = _type_hints(factory, component.name)
    docs = argument_docs(factory)
    found = {}
    for name, parameter in parameters(factory).items():
        of_python = parameter.kind in _NO_SETTING or (component.network and name == "network")
        if name in reserved or of_python:
            continue
        usual = str if parameter.default in (None, inspect.Parameter.empty) else None
        read = _read_type(hints.get(name, usual or type(parameter.default)))
        if read is not None:
            kind, choices, optional = read
            allowed = _range_of(hints.get(name))
            doc = docs.get(name, "")
            found[name] = Setting(name, kind, parameter.default, choices, optional, doc, allowed)
    return found


_NO_SETTING = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)


def _type_hints(factory: Callable[..., Any], name: str) -> dict[str, Any]:
    factory = inspect.unwrap(factory)
    while isinstance(factory, functools.partial):
        factory = factory.func
    try:
        return typing.get_type_hints(factory, include_extras=True)
    except (NameError, TypeError) as error:
        raise UsageError(
            f"the annotations of {name} cannot be read ({error}): correct them"
        ) from error


@functools.cache
def ranges(factory: Callable[..., Any]) -> Mapping[str, Range]:
    """The ranges of a factory's settings by name, from its annotations.

    Raises:
      UsageError: the annotations cannot be read.
    """
    name = getattr(factory, "__name__", type(factory).__name__)
    hints = _type_hints(factory, name)
    found = {setting: _range_of(hint) for setting, hint in hints.items()}
    return {setting: allowed for setting, allowed in found.items() if allowed is not None}


def _range_of(annotation: Any) -> Range | None:
    """The range in an annotation such as `Positive | None`; None where it has none."""
    for member in _members(annotation):
        for extra in getattr(member, "__metadata__", ()):
            if isinstance(extra, Range):
                return extra
    return None


def _members(annotation: Any) -> list[Any]:
    """The types that a union is of; others alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A factory's parameters by name."""
    return dict(inspect.signature(factory).parameters)


def build_optimizer(found: Component, steps: int, given: Mapping[str, Any]) -> Any:
    """Builds an outer optimizer.

    Args:
      found: Component, from `find`; where its factory has a parameter `steps`, it gets them.
      steps: Number of outer steps.
      given: Settings.

    Raises:
      UsageError: what it builds is no optax transformation.
    """
    parameter = parameters(found.factory).get("steps")
    by_position = parameter is not None and parameter.kind is parameter.POSITIONAL_ONLY
    own = {} if parameter is None or by_position else {"steps": steps}
    optimizer = found.factory(*([steps] if by_position else []), **own, **given)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise UsageError(
            f"{found.name} returns {_described(optimizer)}, not an optax.GradientTransformation"
        )
    return optimizer


def _read_type(annotation: Any) -> tuple[type, tuple[Any, ...], bool] | None:
    """(type, choices, whether None is allowed) of an annotation; None where no flag can say it."""
    members = _members(annotation)
    optional = type(None) in members
    for member in members:
        if typing.get_origin(member) is Annotated:
            member = typing.get_args(member)[0]
        if typing.get_origin(member) is Literal:
            return str, typing.get_args(member), optional
        if member in (bool, int, float, str):
            return member, (), optional
        if typing.get_origin(member) is tuple and set(typing.get_args(member)) <= {int, ...}:
            return tuple, (), optional
    return None


def argument_docs(factory: Callable[..., Any]) -> dict[str, str]:
    """The sentences on each argument in a Google-style docstring, by argument."""
    import docstring_parser

    style = docstring_parser.DocstringStyle.GOOGLE
    parsed = docstring_parser.parse(inspect.getdoc(factory) or "", style)
    docs = {}
    for param in parsed.params:
        for name in param.arg_name.split(","):
            docs[name.strip()] = " ".join((param.description or "").split())
    return docs


def summary(component: Component) -> str:
    """The first sentence of a component's docstring."""
    doc = inspect.getdoc(component.factory) or ""
    return doc.split("\n\n")[0].replace("\n", " ")
