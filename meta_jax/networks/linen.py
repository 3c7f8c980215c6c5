"""The door through which flax Linen modules enter."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, MomentsUse, Network, Normalisation, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.adapters import (
    find_switches,
    finite_mask,
    joint_mask,
    keep_types,
    merge_tree,
    resolve_mode,
    rows_mask,
    split_tree,
)
from meta_jax.networks.normalisation import check_moments

if TYPE_CHECKING:  # a module needs nothing of flax but itself, so `import meta_jax` stays quick
    import flax.linen as nn

# Collections that modules fill on every call; they are no state.
_PASSING = ("intermediates", "perturbations", "losses")


def from_linen(
    module: "nn.Module",
    *,
    normalisation: Normalisation | None = None,
    switches: Mapping[str, bool] | None = None,
) -> Network:
    """Builds a network from a flax Linen module.

    Dropout follows `train`, and `nn.BatchNorm` the moments that are asked for, whatever the module
    itself says of them. Parameters are {'weights', 'normalisation'}, the latter those of batch,
    layer, group, instance and RMS norms, each in the module's own structure; every other collection
    is the network's state. Running averages take in moments at the rate of the module's `momentum`.

    Args:
      module: A Linen module called on one input, an array [n, ...] or a pytree of them. Where its
        `__call__` takes a switch (`train`, `training`, `deterministic`, `use_running_average` and
        the like), it gets it.
      normalisation: Mode of its batch norm: 'batch', 'running', 'support' or 'one_at_a_time', or
        'none', which keeps the moments that it has; if None, 'running' where the module has batch
        norm and 'none' elsewhere.
      switches: By name, the value in training of parameters of `__call__` that follow training
        under names of their own.

    Returns:
      The network; randomness of any stream (`self.make_rng("noise")`) draws from the `key` given to
      `apply`, in tests too: let the module ask its switch.

    Raises:
      UsageError: no Linen module, a mode that the module cannot have, or a parameter of `__call__`
        whose meaning is not known; and when it is applied without a key, a module that draws at
        random.

    Examples:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> network = from_linen(nn.Dense(3))
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> network.apply(params, state, jnp.ones((2, 5)), key=None, train=True)[0].shape
      (2, 3)
    """
    _check_module(module)
    what = f"the Linen module {type(module).__name__}"
    guessed = normalisation is None
    mode = resolve_mode(normalisation, not guessed or mentions_batch_norm(module), what)
    call = find_switches(module.__call__, what, inputs=1, declared=switches)
    adapter = _Adapter(module, call, what, mode, guessed)
    return Network(partial(_init, adapter), partial(_apply, adapter), mode)


def _check_module(module: Any) -> None:
    import flax.linen as nn

    if isinstance(module, type) and issubclass(module, nn.Module):
        name = module.__name__
        raise UsageError(f"from_linen needs a module, not the class {name}: give {name}(...)")
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"from_linen needs a flax Linen module, not a {type(module).__name__}: wrap an NNX "
            "module with from_nnx, functions with from_functions"
        )


class _Adapter(NamedTuple):
    """A module and how it is called."""

    module: "nn.Module"
    switches: Callable[[bool, MomentsUse], dict[str, bool]]
    name: str
    normalisation: Normalisation
    guessed: bool  # whether the mode follows from `mentions_batch_norm`


def _init(adapter: _Adapter, key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
    import flax.linen as nn

    norms: dict[tuple[str, ...], bool] = {}  # by path, whether it is a batch norm
    kinds = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm, nn.RMSNorm)

    def note(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, kinds):
            norms[tuple(context.module.path)] = isinstance(context.module, nn.BatchNorm)
        return call(*args, **kwargs)

    control = _Control(train=False, moments="stored", mask=None, name=adapter.name)
    params_key, other_key = jax.random.split(key)
    rngs = {"params": params_key, "dropout": other_key}
    with nn.intercept_methods(control), nn.intercept_methods(note):
        switches: dict[str, Any] = adapter.switches(False, "stored")
        variables: Mapping[str, Any] = adapter.module.init(rngs, x, **switches)
    _check_batch_norm(adapter, any(norms.values()))
    state = {
        name: collection
        for name, collection in variables.items()
        if name != "params" and name not in _PASSING
    }
    return split_tree(variables.get("params", {}), norms), state


def _check_batch_norm(adapter: _Adapter, found: bool) -> None:
    """Refuses a mode that does not fit what the module has, now that it has been called."""
    if found and adapter.normalisation == "none" and adapter.guessed:
        raise UsageError(
            f"{adapter.name} has batch norm where none was expected: name its mode with "
            "normalisation='running', or another"
        )
    if not found and adapter.normalisation != "none":
        raise UsageError(
            f"{adapter.name} has no batch norm, and normalisation='{adapter.normalisation}' asks "
            "for its moments: use normalisation='none'"
        )


def _apply(
    adapter: _Adapter,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    import flax.linen as nn

    check_moments(moments)
    rngs = None
    if key is not None:
        params_key, dropout_key = jax.random.split(key)
        rngs = {"params": params_key, "dropout": dropout_key}  # other collections take the former
    control = _Control(train=train, moments=moments, mask=mask, name=adapter.name)
    switches: dict[str, Any] = adapter.switches(train, moments)
    variables = {"params": merge_tree(params), **state}
    with nn.intercept_methods(control), _randomness_needs_a_key(adapter.name):
        y, new_state = adapter.module.apply(
            variables, x, rngs=rngs, mutable=list(state), **switches
        )
    changes = train or moments in ("update", "replace")
    return y, keep_types(dict(new_state), dict(state)) if changes else state


@contextlib.contextmanager
def _randomness_needs_a_key(name: str) -> Iterator[None]:
    import flax.errors

    try:
        yield
    except flax.errors.InvalidRngError as error:
        raise UsageError(
            f"{name} draws at random ({str(error).split(' (http')[0]}), and no key was given: give "
            "apply a key, or let the module draw while training alone"
        ) from error


class _Control:
    """Calls batch norms with the moments asked for and dropout as `train` says; others as they are.

    An interceptor of Linen's method calls.
    """

    def __init__(self, *, train: bool, moments: MomentsUse, mask: Array | None, name: str) -> None:
        self.train, self.moments, self.mask, self.name = train, moments, mask, name

    def __call__(
        self, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
    ) -> Any:
        import flax.linen as nn

        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, nn.BatchNorm):
            return self._batch_norm(module, call, args, kwargs)
        if isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention):
            bound = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
            given = bound.arguments.pop("deterministic", None) or module.deterministic
            bound.arguments["deterministic"] = not self.train or bool(given)
            with _attributes(module, deterministic=None):
                return call(*bound.args[1:], **bound.kwargs)
        return call(*args, **kwargs)

    def _batch_norm(
        self, module: Any, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        x = args[0] if args else kwargs["x"]
        settings, real = {"use_running_average": True}, None
        if self.moments != "stored":
            mask = joint_mask(rows_mask(self.mask, x, self.name), kwargs.get("mask"))
            mask, real = finite_mask(mask)
            settings = {"use_running_average": False, "mask": mask}
        if self.moments == "batch":
            real = False  # its moments are not kept
        momentum = 0.0 if self.moments == "replace" else module.momentum
        with _attributes(module, use_running_average=None, momentum=momentum):
            if real is None or module.is_initializing():
                return call(x, **settings)
            stored = {name: module.get_variable("batch_stats", name) for name in ("mean", "var")}
            y = call(x, **settings)
            for name, old in stored.items():
                new = module.get_variable("batch_stats", name)
                module.put_variable("batch_stats", name, jnp.where(real, new, old))
            return y


@contextlib.contextmanager
def _attributes(module: Any, **values: Any) -> Iterator[None]:
    """Other values of a module's settings for one call; Linen freezes them once they are set."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


# ---- Does a module have batch norm? Compact modules say so only when they are called.


def mentions_batch_norm(module: "nn.Module") -> bool:
    """Whether a Linen module, its settings or its code speak of `nn.BatchNorm`.

    A guess from names, to choose a default before the module has seen an input; the `init` of
    `from_linen` compares it with what the module turns out to have.
    """
    import flax.linen as nn

    found: list[Any] = [module]
    seen: dict[int, Any] = {}  # holds what it has seen, so that no id is given twice
    while found:
        thing = found.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        kind = thing if isinstance(thing, type) else type(thing)
        if issubclass(kind, nn.BatchNorm):
            return True
        if inspect.isfunction(thing) and "BatchNorm" in _names(thing):
            return True
        found += _parts(thing)
    return False


def _parts(thing: Any) -> list[Any]:
    """What a module, a class of modules, a function or a container is made of."""
    import flax.linen as nn

    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, nn.Module):
        fields = [name for name in thing.__dataclass_fields__ if name != "parent"]
        return [type(thing), *(getattr(thing, name, None) for name in fields)]
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        own = [
            base for base in thing.__mro__ if not base.__module__.startswith(("flax.", "builtins"))
        ]
        return [inspect.unwrap(v) for base in own for v in vars(base).values() if callable(v)]
    if inspect.isfunction(thing):
        scope = [thing.__globals__.get(name) for name in _names(thing)]
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != _EMPTY]
        return [part for part in scope + cells if callable(part) or isinstance(part, list | tuple)]
    return []


_EMPTY = types.CellType()


def _names(function: types.FunctionType) -> set[str]:
    """The global names and attributes that a function and those inside it use."""
    codes = [function.__code__]
    for code in codes:  # grows while it is walked
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return {name for code in codes for name in code.co_names}
