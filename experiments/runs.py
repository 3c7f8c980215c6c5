"""A training run: its flags, what they build, and the record of it in config.json."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from absl import flags
from jax.sharding import Mesh

from experiments.command_line import (
    Chosen,
    given_settings,
    parse,
    resolved_settings,
)
from meta_jax import registry
from meta_jax.core import Episode, MetaLearner, Network, PyTree, Tasks
from meta_jax.data.source import EpisodeSize, TaskSource, find_source, load_source
from meta_jax.lookup import UsageError
from meta_jax.registry import Component, Kind
from meta_jax.training.loop import LoopConfig
from meta_jax.training.outer_step import task_mesh
from meta_jax.training.trained import make_config, read_config, write_config

SELECTIONS = ("learner", "network", "tasks", "optimizer")
_NETWORK_OF_VECTORS = "mlp"


# ---- Flags.


def define_run_flags(values: flags.FlagValues) -> None:
    """Defines the flags that make a run what it is, but for the settings of its components."""

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, values)

    def integer(name: str, default: int | None, text: str, lower_bound: int | None = 1) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound, flag_values=values)

    string("learner", "prototypical", f"Meta-learning method: {choices('learner')}.")
    string(
        "network",
        None,
        f"Network that embeds inputs, by default the learner's own: {choices('network')}.",
    )
    string("tasks", "glyphs", f"Source of the tasks: {choices('tasks')}.")
    string(
        "optimizer",
        None,
        f"Outer optimizer, by default the learner's usual one: {choices('optimizer')}.",
    )
    integer("ways", 5, "Classes of a test episode.")
    integer("shots", 1, "Support examples of each class in a test episode.")
    integer("queries", 15, "Query examples of each class in a test episode.")
    integer("train_ways", None, "Classes of a training episode, by default as in tests.")
    integer("train_shots", None, "Support examples in training, by default as in tests.")
    integer("train_queries", None, "Query examples in training, by default as in tests.")
    string("train_split", "train", "Split to train on, such as train or trainval.")
    integer("task_batch", 1, "Tasks of an outer step.")
    integer("task_chunk", None, "Tasks vmapped at a time, by default 1 on a CPU, all elsewhere.")
    integer("steps", 1000, "Outer steps; an old workdir goes on where there are more now.")
    integer("log_every", 50, "Outer steps in one compiled call and between lines of metrics.")
    integer("eval_every", 500, "Outer steps between validations; 0 for none.", 0)
    integer("checkpoint_every", 500, "Outer steps between checkpoints.")
    integer("val_episodes", 200, "Episodes of a validation.")
    integer("seed", 0, "Seed of the initial parameters and of the training tasks.", None)


def choices(kind: Kind) -> str:
    """The names of all components of a kind, and how somebody's own is named."""
    known = (_with_argument(kind, name) for name in registry.names(kind))
    return f"{', '.join(known)}, or package.module:function"


def _with_argument(kind: Kind, name: str) -> str:
    """A task source's name with what must follow it, as 'folder:PATH'."""
    parameters = registry.parameters(registry.find(kind, name).factory).values()
    argument = [p.name.upper() for p in parameters if p.kind is p.POSITIONAL_ONLY]
    return ":".join([name, *argument]) if kind == "tasks" else name


def choose(selected: Mapping[str, str | None]) -> list[Chosen]:
    """The components that a run's flags choose.

    Raises:
      UsageError: an unknown name, or a network for a learner that has its own.
    """
    learner = registry.find("learner", selected["learner"] or "")
    tasks = tasks_chosen(selected["tasks"])
    return [
        Chosen("learner", learner, reserved=("objective",), run=learner.run),
        *network_candidates(learner, selected["network"]),
        tasks._replace(run=tasks.component.run),
        optimizer_chosen(selected["optimizer"] or learner.optimizer or "adam"),
    ]


def tasks_chosen(name: str | None) -> Chosen:
    """A task source by the name that a flag gives; `--data_dir` is a flag of its own."""
    return Chosen("tasks", find_source(name or "")[0], reserved=("data_dir",))


def optimizer_chosen(name: str) -> Chosen:
    """An outer optimizer by its name; the number of steps is the run's."""
    return Chosen("optimizer", registry.find("optimizer", name), reserved=("steps",))


def network_candidates(learner: Component, name: str | None) -> list[Chosen]:
    """The networks that a learner may be used with: one that is named, or else which fits.

    Raises:
      UsageError: an unknown name, or one given to a learner that has networks of its own.
    """
    if learner.network is None:
        if name is not None:
            raise UsageError(f"{learner.name} has networks of its own: leave --network out")
        return []
    if name is not None or learner.network == _NETWORK_OF_VECTORS:
        return [_network_chosen(learner, name or learner.network)]
    return [
        _network_chosen(learner, learner.network, "by default"),
        _network_chosen(learner, _NETWORK_OF_VECTORS, f"where {learner.network} does not fit"),
    ]


def _network_chosen(learner: Component, name: str, note: str = "") -> Chosen:
    component = registry.find("network", name)
    usual = {"normalisation": learner.normalisation}
    follows = learner.normalisation and "normalisation" in registry.parameters(component.factory)
    return Chosen("network", component, defaults=usual if follows else {}, note=note)


def run_values(arguments: list[str]) -> flags.FlagValues:
    """A run's flags from arguments, flagfiles among them, without the global flags.

    Raises:
      UsageError: they are no flags of a run.
    """
    values = flags.FlagValues()
    define_run_flags(values)
    flags.DEFINE_string("data_dir", None, "Folder of the data.", values)
    try:
        parse(values, ["", *arguments], selections=SELECTIONS, choose=choose)
    except flags.Error as error:
        raise UsageError(str(error)) from error
    return values


# ---- What flags build.


class Run(NamedTuple):
    """Everything that a training run is made of."""

    learner: MetaLearner
    training_learner: MetaLearner  # the same; its devices share the images of a lone task
    optimizer: optax.GradientTransformation
    source: TaskSource
    training: Tasks
    validation: Tasks | None  # None without validations
    testing: Tasks
    image_mesh: Mesh | None  # of `training_learner`
    loop: LoopConfig
    config: dict[str, Any]  # the contents of config.json


def test_size(run: Mapping[str, Any]) -> EpisodeSize:
    """How large a test episode is, by the record of a run."""
    return EpisodeSize(run["ways"], run["shots"], run["queries"])


def training_size(run: Mapping[str, Any]) -> EpisodeSize:
    """How large a training episode is, by the record of a run."""
    return EpisodeSize(run["train_ways"], run["train_shots"], run["train_queries"])


def load_tasks(values: flags.FlagValues) -> TaskSource:
    """The task source that the flags describe.

    Raises:
      UsageError: a setting that it does not have, or data that is not there.
    """
    chosen = tasks_chosen(values.tasks)
    given = given_settings(values, chosen)
    return load_source(values.tasks, **given, **data_dir_setting(chosen.component, values.data_dir))


def data_dir_setting(source: Component, data_dir: str | None) -> dict[str, str]:
    """`data_dir` as a setting, where it is given and the source has it."""
    known = registry.parameters(source.factory)
    return {"data_dir": data_dir} if data_dir is not None and "data_dir" in known else {}


def build_run(values: flags.FlagValues, source: TaskSource) -> Run:
    """Builds what the flags describe; whatever can be refused is refused here.

    Args:
      values: Parsed flags of a run.
      source: Task source, from `load_tasks`.

    Raises:
      UsageError: settings that do not fit each other, the learner or the tasks.
    """
    run = _run_record(values)
    loop = LoopConfig(values.steps, values.log_every, values.eval_every, values.checkpoint_every)
    try:
        loop.check()
        optimizer, optimizer_record = build_optimizer(values)
        training, validation, testing = _tasks_by_use(source, run)
        network = fitting_network(values, training)
        body = build_network(values, network) if network else None
        learner = build_learner(values, body, training)
        mesh = image_mesh(network, values.task_batch)
        training_learner = learner
        if network and mesh:
            sharing = build_network(values, network, mesh)
            training_learner = build_learner(values, sharing, training)
        check_sizes(learner, values.learner, training, testing, run)
        config = make_config(
            learner,
            training,
            source=_source_record(values),
            preprocessing=source.preprocessing,
            optimizer=optimizer_record,
            run=run,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Run(
        learner,
        training_learner,
        optimizer,
        source,
        training,
        validation,
        testing,
        mesh,
        loop,
        config,
    )


def _run_record(values: flags.FlagValues) -> dict[str, Any]:
    sizes = {name: values[name].value for name in EpisodeSize._fields}
    run = sizes | {
        f"train_{name}": values[f"train_{name}"].value or size for name, size in sizes.items()
    }
    others = ("train_split", "task_batch", "task_chunk", "steps", "log_every", "eval_every")
    others += ("checkpoint_every", "val_episodes", "seed")
    return run | {name: values[name].value for name in others}


def _source_record(values: flags.FlagValues) -> dict[str, Any]:
    chosen = tasks_chosen(values.tasks)
    settings = resolved_settings(chosen, given_settings(values, chosen))
    return {"name": values.tasks, **settings}


def _tasks_by_use(source: TaskSource, run: Mapping[str, Any]) -> tuple[Tasks, Tasks | None, Tasks]:
    """Tasks of training, validation and tests; a split that is not used is not asked for."""
    if run["train_split"] == "test":
        raise UsageError("--train_split=test would train on the test's classes: name another split")
    training = source.tasks(run["train_split"], training_size(run), train=True)
    validation = None
    if run["eval_every"]:
        validation = source.tasks("val", test_size(run), train=False)
    return training, validation, source.tasks("test", test_size(run), train=False)


def build_optimizer(
    values: flags.FlagValues,
) -> tuple[optax.GradientTransformation, dict[str, Any]]:
    """Builds the outer optimizer of a run, and its record.

    Raises:
      ValueError: settings that it does not have, or that do not fit each other.
    """
    name = values.optimizer or registry.find("learner", values.learner).optimizer or "adam"
    chosen = optimizer_chosen(name)
    given = given_settings(values, chosen)
    optimizer = chosen.component.factory(values.steps, **given)
    return optimizer, {"name": name, **resolved_settings(chosen, given)}


def fitting_network(values: flags.FlagValues, tasks: Tasks) -> Chosen | None:
    """The network of a run: what a flag says, or the learner's if the inputs fit it, or mlp.

    Args:
      values: Parsed flags.
      tasks: Tasks whose inputs it embeds.

    Returns:
      The component; None where the learner has networks of its own.
    """
    candidates = network_candidates(registry.find("learner", values.learner), values.network)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    usual, of_vectors = candidates
    x = example_inputs(tasks)
    if x is None or takes(usual.component.factory(**usual.defaults), x):
        return usual
    return of_vectors


def example_inputs(tasks: Tasks) -> PyTree | None:
    """Shapes of a task's support inputs; None where a task is no episode."""
    task = example_task(tasks)
    return task.support.x if isinstance(task, Episode) else None


def example_task(tasks: Tasks) -> Any:
    """Shapes of a task."""
    return jax.eval_shape(tasks.sample, jax.random.key(0), tasks.data)


def takes(network: Network, x: PyTree) -> bool:
    """Whether a network can embed inputs of some shapes; images that are too small it can.

    Args:
      network: The network.
      x: Shapes of inputs, leaves [n, ...].
    """
    leaves = jax.tree.leaves(x)
    if len(leaves) == 1 and len(leaves[0].shape) == 4:
        return True  # an error of its own says more than the use of another network

    def embed(key: jax.Array, x: PyTree) -> jax.Array:
        params, state = network.init(key, x)
        return network.apply(params, state, x, key=key, train=False, moments="batch")[0]

    try:
        jax.eval_shape(embed, jax.random.key(0), x)
    except (TypeError, ValueError, AssertionError, IndexError, AttributeError):
        return False
    return True


def build_network(values: flags.FlagValues, chosen: Chosen, mesh: Mesh | None = None) -> Network:
    """Builds a network from the flags `--network.*`.

    Args:
      values: Parsed flags.
      chosen: Network component, from `fitting_network`.
      mesh: Devices that share the images of an episode.
    """
    given = given_settings(values, chosen)
    return chosen.component.factory(**given, **({"mesh": mesh} if mesh else {}))


def build_learner(values: flags.FlagValues, network: Network | None, tasks: Tasks) -> MetaLearner:
    """Builds a learner from the flags `--learner.*`, with the tasks' objective.

    Args:
      values: Parsed flags.
      network: Embedding network; None for a learner that has networks of its own.
      tasks: Tasks that it learns.
    """
    chosen = Chosen("learner", registry.find("learner", values.learner), reserved=("objective",))
    given = given_settings(values, chosen)
    if "objective" in registry.parameters(chosen.component.factory):
        given["objective"] = tasks.objective
    return chosen.component.factory(*([] if network is None else [network]), **given)


def image_mesh(network: Chosen | None, task_batch: int) -> Mesh | None:
    """The devices that share the images of a step's one task.

    None where it is not alone, or where the network cannot share: every device would compute the
    whole task.
    """
    if network is None or task_batch > 1:
        return None
    shares = "mesh" in registry.parameters(network.component.factory)
    return task_mesh(jax.device_count()) if shares else None


def check_sizes(
    learner: MetaLearner, name: str, training: Tasks, testing: Tasks, run: Mapping[str, Any]
) -> None:
    """Refuses tests of another size than training where the learner's parameters depend on it.

    Args:
      learner: The learner.
      name: Its name in messages.
      training, testing: Its tasks.
      run: The record of the run, with the sizes of episodes.

    Raises:
      UsageError: the parameters' shapes differ.
    """
    ours, theirs = (initial_shapes(learner, tasks) for tasks in (training, testing))
    difference = shape_difference(ours, theirs)
    if difference:
        sizes = zip(EpisodeSize._fields, training_size(run), test_size(run), strict=True)
        other = [
            f"--{n}={test} must equal --train_{n}={train}"
            for n, train, test in sizes
            if train != test
        ]
        raise UsageError(
            f"{name} has parameters whose shapes follow the size of an episode ({difference}): "
            f"{' or '.join(other)}"
        )


def initial_shapes(learner: MetaLearner, tasks: Tasks) -> PyTree:
    """Shapes of a learner's initial parameters and state.

    Raises:
      UsageError: the tasks are no episodes, and this learner wants some.
    """
    task = example_task(tasks)
    try:
        return jax.eval_shape(learner.init, jax.random.key(0), task)
    except AttributeError as error:
        if isinstance(task, Episode):
            raise
        raise UsageError(
            f"this learner has no use for tasks of type {type(task).__name__}: choose other tasks"
        ) from error


def shape_difference(first: PyTree, second: PyTree) -> str:
    """The first leaf at which two trees differ in shape or dtype, in words; '' where none does."""
    sides = [
        {
            jax.tree_util.keystr(
                path, simple=True, separator="/"
            ): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (first, second)
    ]
    for path in {**sides[0], **sides[1]}:
        there, here = (side.get(path, "nothing") for side in sides)
        if there != here:
            return f"{there} and {here} at {path}"
    return ""


# ---- The record.


def claim_workdir(
    workdir: Path, config: Mapping[str, Any], given: Collection[str] | None = None
) -> None:
    """Writes config.json into a new workdir, or checks that an old one is of the same run.

    The steps of an old run may grow. A setting that is newer than its record has the default that
    it was trained with, unless it is given.

    Args:
      workdir: The folder.
      config: The record of the run.
      given: Flags that were given; all may have been if None.

    Raises:
      UsageError: the workdir holds something else, or was trained with other settings.
    """
    if (workdir / "config.json").exists():
        found = read_config(workdir)
        changed = differences(found, config, given)
        if changed:
            raise UsageError(
                f"{workdir} was trained with other settings ({', '.join(changed)}): "
                "name another workdir, or give the settings of its config.json"
            )
        if config["run"]["steps"] == found["run"]["steps"]:
            return
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UsageError(f"{workdir} is not empty and no workdir of ours: name another one")
    write_config(workdir, config)


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], given: Collection[str] | None = None
) -> list[str]:
    """Names of the flags in which two records differ, where this matters.

    Args:
      found: The older record.
      wanted: The newer one.
      given: Names of the flags that were given; all may have been if None.
    """
    old, new = as_flags(found), as_flags(wanted)
    changed = []
    for name in sorted({*old, *new}):
        newer = name not in old and given is not None and name not in given
        grown = name == "steps" and name in old and old[name] <= new[name]
        if old.get(name) != new.get(name) and not newer and not grown:
            changed.append(name)
    return changed


def as_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record by the flags that give it: 'learner', 'learner.inner_lr', 'ways'."""
    found = dict(config["run"])
    for kind in ("learner", "tasks", "optimizer"):
        found |= _component_flags(kind, config[kind] or {})
    return found


def _component_flags(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in record.items():
        if isinstance(value, Mapping) and "name" in value:  # a network in its learner
            found |= _component_flags(name, value)
        else:
            found[kind if name == "name" else f"{kind}.{name}"] = value
    return found


def given_flags(values: flags.FlagValues) -> set[str]:
    """Names of the flags that were given."""
    return {name for name in values if values[name].present}
