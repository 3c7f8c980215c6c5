"""What a training run is made of, built from its flags."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from absl import flags
from jax.sharding import Mesh

from experiments import run_flags
from experiments.command_line import Chosen, given_settings, resolved_settings
from meta_jax import registry
from meta_jax.core import Episode, MetaLearner, Network, PyTree, Tasks
from meta_jax.data.source import EpisodeSize, TaskSource, all_classes, load_source
from meta_jax.data.streams import task_shapes
from meta_jax.host import check_memory, device_memory
from meta_jax.lookup import UsageError
from meta_jax.networks.rematerialised import rematerialised
from meta_jax.precision import with_precision
from meta_jax.registry import Component
from meta_jax.shapes import shape_difference
from meta_jax.training.loop import LoopConfig
from meta_jax.training.outer_step import task_mesh
from meta_jax.training.record import describe_task, make_config


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
    name = run_flags.tasks_name(values)
    chosen = run_flags.tasks_chosen(name)
    given = given_settings(values, chosen)
    return load_source(name, **given, **data_dir_setting(chosen.component, values.data_dir))


def data_dir_setting(source: Component, data_dir: str | None) -> dict[str, str]:
    """`data_dir` as a setting, where it is given.

    Raises:
      UsageError: the source has no data folder.
    """
    if data_dir is None:
        return {}
    if not has_data_dir(source):
        raise UsageError(
            f"--data_dir={data_dir} is of no use: {source.name} reads no such folder: leave it out"
        )
    return {"data_dir": data_dir}


def has_data_dir(source: Component) -> bool:
    """Whether a task source reads its data from a folder that `--data_dir` names."""
    return "data_dir" in registry.parameters(source.factory)


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
        training, validation, testing = _tasks_by_use(source, run)
        if _trains_on_all_classes(values) and training.objective.kind == "classification":
            training = all_classes(training)
        check_used(values, training)
        network = fitting_network(values, training)
        if network is None and values.precision != "float32":
            raise UsageError(
                f"{values.learner} has networks of its own, which compute in float32: leave "
                f"--precision={values.precision} out"
            )
        body = build_network(values, network) if network else None
        if values.remat and body is None:
            raise UsageError(
                f"--remat is of no use: {values.learner} has networks of its own, so leave it out"
            )
        if network and body and values.network:
            check_inputs(body, network.component.name, training)
        learner = build_learner(values, body, training)
        optimizer, optimizer_record = build_optimizer(values, learner.updates_per_step)
        mesh = image_mesh(network, values.task_batch)
        training_learner = learner
        if network and mesh:
            sharing = build_network(values, network, mesh)
            training_learner = build_learner(values, sharing, training)
        check_sizes(learner, values.learner, training, testing, run)
        check_memory_of_run(learner, training, testing, run)
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


def _trains_on_all_classes(values: flags.FlagValues) -> bool:
    """Whether the learner trains one classifier of all classes, and asks for their number."""
    factory = registry.find("learner", values.learner).factory
    return "train_classes" in registry.parameters(factory)


def _run_record(values: flags.FlagValues) -> dict[str, Any]:
    sizes = {name: values[name].value for name in EpisodeSize._fields}
    run = sizes | {
        f"train_{name}": values[f"train_{name}"].value or size for name, size in sizes.items()
    }
    others = ("train_split", "task_batch", "task_chunk", "steps", "log_every", "eval_every")
    others += ("checkpoint_every", "val_episodes", "seed", "init_from")
    return run | {name: values[name].value for name in others}


def _source_record(values: flags.FlagValues) -> dict[str, Any]:
    name = run_flags.tasks_name(values)
    chosen = run_flags.tasks_chosen(name)
    return {"name": name, **resolved_settings(chosen, given_settings(values, chosen))}


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
    values: flags.FlagValues, updates_per_step: int = 1
) -> tuple[optax.GradientTransformation, dict[str, Any]]:
    """Builds the outer optimizer of a run, and its record.

    Args:
      values: Parsed flags.
      updates_per_step: Updates that the learner makes in an outer step.

    Raises:
      ValueError: settings that it does not have, or that do not fit each other.
    """
    name = values.optimizer or registry.find("learner", values.learner).optimizer or "adam"
    chosen = run_flags.optimizer_chosen(name)
    given = given_settings(values, chosen)
    optimizer = registry.build_optimizer(chosen.component, values.steps * updates_per_step, given)
    return optimizer, {"name": name, **resolved_settings(chosen, given)}


def fitting_network(values: flags.FlagValues, tasks: Tasks) -> Chosen | None:
    """The network of a run: what a flag says, or the learner's if the inputs fit it, or mlp.

    Args:
      values: Parsed flags.
      tasks: Tasks whose inputs it embeds.

    Returns:
      The component; None where the learner has networks of its own.
    """
    candidates = run_flags.network_candidates(
        registry.find("learner", values.learner), values.network
    )
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    usual, of_vectors = candidates
    x = example_inputs(tasks)
    if x is None or takes(usual.component.factory(**usual.defaults), x):
        return usual
    if takes(of_vectors.component.factory(**of_vectors.defaults), x):
        return of_vectors
    raise UsageError(
        f"no network of ours takes inputs {describe_task(x)}: name your own with --network"
    )


def example_inputs(tasks: Tasks) -> PyTree | None:
    """Shapes of a task's support inputs; None where a task is no episode."""
    task = example_task(tasks)
    return task.support.x if isinstance(task, Episode) else None


def example_task(tasks: Tasks) -> Any:
    """Shapes of a task."""
    return task_shapes(tasks)


def check_used(values: flags.FlagValues, tasks: Tasks) -> None:
    """Refuses sizes of an episode that its tasks do not have.

    Raises:
      UsageError: a number of classes is given, and the tasks have none.
    """
    if tasks.objective.kind == "classification":
        return
    for name in ("ways", "train_ways"):
        if values[name].present:
            raise UsageError(
                f"--{name}={values[name].value} is of no use: {run_flags.tasks_name(values)} "
                "has no classes, so leave it out"
            )


def check_inputs(network: Network, name: str, tasks: Tasks) -> None:
    """Refuses a network that cannot embed the inputs of its tasks.

    Args:
      network: The network.
      name: Its name in messages.
      tasks: The tasks.

    Raises:
      UsageError: it does not take inputs of these shapes.
    """
    x = example_inputs(tasks)
    if x is not None and not takes(network, x):
        raise UsageError(
            f"{name} does not take inputs {describe_task(x)}: choose another network or other tasks"
        )


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
    """Builds a network from the flags `--network.*` and `--precision`.

    Args:
      values: Parsed flags.
      chosen: Network component, from `fitting_network`.
      mesh: Devices that share the images of an episode.
    """
    given = given_settings(values, chosen)
    network = chosen.component.factory(**given, **({"mesh": mesh} if mesh else {}))
    network = with_precision(network, values.precision)
    return rematerialised(network) if values.remat else network


def build_learner(values: flags.FlagValues, network: Network | None, tasks: Tasks) -> MetaLearner:
    """Builds a learner from the flags `--learner.*`, with the tasks' objective.

    Args:
      values: Parsed flags.
      network: Embedding network; None for a learner that has networks of its own.
      tasks: Tasks that it learns.
    """
    component = registry.find("learner", values.learner)
    chosen = Chosen("learner", component, reserved=run_flags.GIVEN_TO_LEARNERS)
    given = given_settings(values, chosen)
    if _trains_on_all_classes(values):
        task = example_task(tasks)
        given["train_classes"] = task.query.y.shape[-1] if isinstance(task, Episode) else 1
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
    """Refuses tests of a size that the parameters of training do not fit.

    Args:
      learner: The learner.
      name: Its name in messages.
      training, testing: Its tasks.
      run: The record of the run, with the sizes of episodes.

    Raises:
      UsageError: the parameters' shapes differ, and the learner cannot do with those of training.
    """
    difference = misfit(learner, initial_shapes(learner, training), testing)
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


_TRAINING_COPIES = 4  # the parameters, their gradient, and two moments of an optimizer
_EPISODE_BYTES = 32  # of a validation's episode or a step's task: two random keys, a few metrics


def check_memory_of_run(
    learner: MetaLearner, training: Tasks, testing: Tasks, run: Mapping[str, Any]
) -> None:
    """Refuses what cannot fit the memory whatever is done: a lower bound of each part alone.

    Args:
      learner: The learner.
      training, testing: Its tasks.
      run: The record of the run.

    Raises:
      UsageError: something needs more than there is; the message has both numbers.
    """
    available = device_memory()
    params = _TRAINING_COPIES * _bytes(initial_shapes(learner, training))
    remedy = "choose fewer units, features or layers"
    check_memory("the learner", params, remedy, available=available)
    for prefix, tasks in (("train_", training), ("", testing)):
        check_episode_memory(tasks, {f"{prefix}{n}": run[prefix + n] for n in EpisodeSize._fields})
    for name in ("task_batch", "val_episodes"):
        check_episodes(name, run[name])


def check_episode_memory(tasks: Tasks, sizes: Mapping[str, int]) -> None:
    """Refuses an episode that the memory does not hold.

    Args:
      tasks: Its tasks.
      sizes: Its sizes by the names of their settings, for the message.

    Raises:
      UsageError: it is too large.
    """
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    needed = _bytes(example_task(tasks))
    check_memory(f"an episode of {text}", needed, "choose fewer", available=device_memory())


def check_episodes(name: str, number: int) -> None:
    """Refuses more episodes than the memory holds keys of.

    Args:
      name: Name of the setting.
      number: Its value.

    Raises:
      UsageError: there are too many.
    """
    needed = _EPISODE_BYTES * number
    check_memory(f"{name}={number}", needed, "choose fewer", available=device_memory())


def _bytes(shapes: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def misfit(learner: MetaLearner, trained: PyTree, tasks: Tasks) -> str:
    """What keeps a learner with parameters and state of given shapes from a test, or ''.

    A learner whose parameters follow the size of an episode may be able to test smaller ones.

    Args:
      learner: The learner.
      trained: Its parameters and state, or their shapes.
      tasks: Tasks of the test.
    """
    difference = shape_difference(trained, initial_shapes(learner, tasks))
    if difference:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)
        try:
            jax.eval_shape(learner.evaluate, *shapes, example_task(tasks), jax.random.key(0))
        except (TypeError, ValueError):
            return difference
    return ""


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
