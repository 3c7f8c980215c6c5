"""What was trained, in a folder that says all about itself: `config.json` and `checkpoints/`.

`config.json` names the learner, the network and all their settings, the tasks' objective and
preprocessing, and the shapes of a task. So a trained learner is built again from the folder alone,
without its data and its optimizer.
"""

import functools
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax import registry
from meta_jax.core import (
    Config,
    Episode,
    MetaLearner,
    Normalisation,
    Objective,
    PyTree,
    Tasks,
    check_metrics,
)
from meta_jax.data.polarity import Ink
from meta_jax.lookup import UsageError, load_attribute, local_path
from meta_jax.networks.frozen import frozen
from meta_jax.networks.normalisation import BATCH_MODES, is_transductive
from meta_jax.objectives import as_objective, check_several_ways
from meta_jax.serving.classifier import Classifier, adapt_classifier, form_of
from meta_jax.training import checkpoints
from meta_jax.training.optimizers import averaged_path
from meta_jax.training.writers import write_text

_FILE = "config.json"


class Trained(NamedTuple):
    """A trained learner, and what one must know to use it."""

    learner: MetaLearner
    params: PyTree
    state: PyTree
    objective: Objective
    preprocessing: Mapping[str, Any] | None  # what was done to the inputs, such as the image size
    config: Mapping[str, Any]  # the contents of config.json
    metadata: Mapping[str, Any] = {}  # what else the checkpoint says, such as 'step' and 'seconds'

    def adapt(
        self,
        inputs: Any,
        labels: Sequence[Any],
        *,
        normalisation: Normalisation | None = None,
        polarity: Ink | None = None,
    ) -> Classifier:
        """Builds a classifier of somebody's own classes from a few labelled examples.

        Args:
          inputs: Images (paths, Pillow images, arrays of any size; see `meta_jax.serving.prepare`),
            or other inputs of the shape trained on, [n, ...].
          labels: Name or integer of each input's class.
          normalisation: Mode of the network's normalisation, by default that of the training. A
            learner trained in the mode 'batch' must be told: 'support' or 'one_at_a_time' make each
            answer independent of the other queries, 'batch' does not.
          polarity: Polarity of the images that come, 'ink_light' or 'ink_dark', where the learner
            was trained on one; by default the border of each image tells.

        Raises:
          UsageError: inputs, labels or a mode that do not fit the learner.

        Examples:
          >>> model = load_pretrained("glyphs-prototypical")
          >>> images = np.random.default_rng(0).integers(0, 2, (4, 28, 28)).astype(bool)
          >>> classifier = model.adapt(images, ["a", "a", "b", "b"], polarity="ink_light")
          >>> classifier(images).shape, classifier.classes
          ((4, 2), ('a', 'b'))
        """
        learner, name = self.learner, (self.config["learner"] or {}).get("name", "the learner")
        if normalisation is not None:
            learner = _with_normalisation(json.dumps(self.config["learner"]), normalisation)
        mode = normalisation_of(learner.config)
        if normalisation is None and is_transductive(mode):
            raise UsageError(
                f"{name} was trained with normalisation 'batch', in which an answer depends on the "
                "other queries: choose normalisation 'support', 'one_at_a_time', or 'batch' itself"
            )
        return adapt_classifier(
            learner,
            self.params,
            self.state,
            self.objective,
            inputs,
            labels,
            form=form_of(self.config, task_like(self.config["example"]))._replace(
                polarity=polarity
            ),
            name=name,
            normalisation=mode,
        )

    def freeze(self) -> Callable[[PyTree], np.ndarray]:
        """Builds the function that embeds inputs with the trained network.

        Returns:
          A function from inputs as in training, [n, ...], to embeddings: see
          `meta_jax.networks.frozen`.

        Raises:
          UsageError: the learner trains no embedding network of its own, or its normalisation makes
            an embedding depend on other inputs.
        """
        record = (self.config["learner"] or {}).get("network")
        if not record or "network" not in self.params:
            raise UsageError("this learner has no embedding network that could be frozen")
        network = registry.build("network", record)
        return frozen(network, self.params["network"], self.state["network"])


# ---- The record.


def make_config(
    learner: MetaLearner,
    tasks: Tasks,
    *,
    source: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Builds the record of a training run, the contents of its `config.json`.

    Args:
      learner: The method.
      tasks: Training tasks; their objective and the shapes of one task are recorded.
      source: Name and settings of the source of the tasks.
      preprocessing: What is done to the inputs before the learner sees them.
      optimizer: Name and settings of the outer optimizer.
      run: Settings of the run, such as its steps and its seed.

    Raises:
      UsageError: the objective has no name by which it is found again, its metric has a name of
        `RESERVED_METRICS` (but 'loss'), episodes of classification have one way, or the record is
        not JSON.
    """
    objective = tasks.objective
    check_metrics({objective.metric} - {"loss"})
    if not objective.name:
        raise UsageError(
            f"the objective of metric '{objective.metric}' has no name: name it as it is imported, "
            "objective._replace(name='package.module:attribute')"
        )
    task = jax.eval_shape(tasks.sample, jax.random.key(0), tasks.data)
    y: Any = task.query.y if isinstance(task, Episode) else None
    if objective.kind == "classification" and getattr(y, "ndim", 0) == 2:
        check_several_ways(y)
    config = {
        "version": importlib.metadata.version("meta_jax"),
        "learner": learner.config,
        "tasks": {
            **(source or {}),
            "objective": objective.name,
            "preprocessing": preprocessing,
        },
        "optimizer": optimizer,
        "run": run,
        "example": describe_task(task),
    }
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise UsageError(f"the record of this run is not JSON: {error}") from error


def write_config(folder: Path | str, config: Mapping[str, Any]) -> None:
    """Writes `folder/config.json`, in place of an older one; makes the folder."""
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _FILE, json.dumps(config, indent=1) + "\n")


def read_config(folder: Path | str) -> dict[str, Any]:
    """Reads `folder/config.json`.

    Raises:
      UsageError: it is missing or damaged.
    """
    path = local_path(folder) / _FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"no {_FILE} in {folder}: name the workdir of a training run or a folder of weights"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: restore it from a copy") from error
    _check_config(path, config)
    return config


_NULL = type(None)
# What a record must hold, as JSON has it; a learner built in Python of parts without names is null.
_RECORDED: dict[str, dict[type, str]] = {
    "learner": {dict: "an object", _NULL: "null"},
    "learner.name": {str: "a string"},
    "tasks": {dict: "an object"},
    "tasks.objective": {str: "a string"},
    "run": {dict: "an object", _NULL: "null"},
    "example": {dict: "an object", str: "a string", _NULL: "null"},
}


def _check_config(path: Path, config: Any) -> None:
    """Refuses a record that lacks something, or has it in another type.

    Raises:
      UsageError: it is damaged; the message names the first place.
    """
    if not isinstance(config, dict):
        raise UsageError(f"{path} is damaged: it holds no object; restore it from a copy")
    for place, kinds in _RECORDED.items():
        parent, _, name = place.rpartition(".")
        within = config[parent] if parent else config
        if within is None:
            continue
        if name not in within or not isinstance(within[name], tuple(kinds)):
            found = json.dumps(within[name])[:80] if name in within else "missing"
            raise UsageError(
                f"{path} is damaged: {place} is {found}, where {' or '.join(kinds.values())} is "
                "expected; restore it from a copy"
            )


def describe_task(task: PyTree) -> Any:
    """Describes the structure, shapes and dtypes of a task, in what JSON can hold.

    Args:
      task: Dictionaries, tuples and NamedTuples of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The description; None where something else is in it.

    Examples:
      >>> describe_task({"x": jnp.zeros((3, 2)), "mask": None})
      {'dict': {'x': 'float32[3, 2]', 'mask': None}}
    """
    try:
        return _describe(task)
    except TypeError:
        return None


def _describe(tree: PyTree) -> Any:
    if tree is None:
        return None
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {name: _describe(value) for name, value in tree.items()}}
    kind = type(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields") and "<locals>" not in kind.__qualname__:
        fields = {name: _describe(getattr(tree, name)) for name in getattr(tree, "_fields", ())}
        return {"type": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    if kind in (list, tuple):
        return {kind.__name__: [_describe(value) for value in tree]}
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}{list(tree.shape)}"
    raise TypeError(f"a {type(tree).__name__} cannot be described")


def task_like(description: Any) -> PyTree:
    """Builds a task of `jax.ShapeDtypeStruct`s from its description.

    Args:
      description: What `describe_task` gave.

    Raises:
      UsageError: it is no description, or a type in it is not found.
    """
    try:
        return _task_like(description)
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(
            f"{json.dumps(description)[:80]} describes no task, such as 'float32[3, 2]' does: "
            f"restore {_FILE} from a copy"
        ) from error


def _task_like(description: Any) -> PyTree:
    if description is None:
        return None
    if isinstance(description, str):
        shape, dtype = checkpoints.shape_of(description), checkpoints.dtype_of(description)
        return jax.ShapeDtypeStruct(shape, dtype)
    if "dict" in description:
        return {name: _task_like(value) for name, value in description["dict"].items()}
    if "type" in description:
        fields = {name: _task_like(value) for name, value in description["fields"].items()}
        return load_attribute(description["type"])(**fields)
    ((kind, values),) = description.items()
    items = [_task_like(value) for value in values]
    return tuple(items) if kind == "tuple" else items


# ---- Reading and writing.


def save_trained(folder: Path | str, trained: Trained) -> None:
    """Writes a folder that `load` reads.

    Args:
      folder: Where to write; made if it is not there.
      trained: What was trained, its config from `make_config` or `load`.

    Raises:
      CheckpointError: the disk is full.

    Examples:
      Training in Python, without the binaries::

        config = make_config(learner, tasks)
        save_trained("weights", Trained(learner, params, state, tasks.objective, None, config))
        load("weights").learner.evaluate(...)
    """
    learned = {"params": trained.params}
    if trained.learner.state_scope == "shared":
        learned["state"] = trained.state
    checkpoints.save(
        local_path(folder) / "checkpoints",
        "best",
        learned,
        dict(trained.metadata),
        config=trained.learner.config,
    )
    write_config(folder, {**trained.config, "learner": trained.learner.config})


def load(
    folder: Path | str,
    *,
    checkpoint: Literal["best", "latest"] = "best",
    learner_settings: Mapping[str, Any] | None = None,
    network_settings: Mapping[str, Any] | None = None,
    learner: MetaLearner | None = None,
    example: Any = None,
) -> Trained:
    """Loads a trained learner from its folder alone: no dataset, no optimizer.

    Args:
      folder: A workdir, or a folder of weights: `config.json` and `checkpoints/`.
      checkpoint: Which one: best on validation, or the latest step.
      learner_settings: Settings of the learner to change, such as {'eval_steps': 10}.
      network_settings: Settings of the network to change: the mode of normalisation, among
        `BATCH_MODES`.
      learner: The learner itself, where it was built in Python of parts that have no name; its
        config must be the recorded one.
      example: A task, where the record has none: one whose type is no tuple or dictionary.

    Returns:
      The learner, its parameters (the averaged ones, where the optimizer averaged) and state; its
      `adapt` builds a classifier of somebody's own classes.

    Raises:
      UsageError: there is no record, a setting does not exist or must not change, or the learner
        cannot be built from the record.
      CheckpointError: there is no such checkpoint, it is damaged, or it is another learner's.
    """
    folder = local_path(folder)
    config = read_config(folder)
    if learner is None:
        learner = _build(folder, config["learner"], learner_settings, network_settings)
    elif learner_settings or network_settings:
        raise UsageError("learner is given, so its settings are its own: leave the settings out")
    else:
        checkpoints.check_config(folder, config["learner"], learner.config)
    params, state, metadata = load_parameters(folder, checkpoint, learner=learner, example=example)
    tasks = config["tasks"]
    return Trained(
        learner,
        params,
        state,
        as_objective(tasks["objective"]),
        tasks.get("preprocessing"),
        {**config, "learner": learner.config},
        metadata,
    )


def _build(
    folder: Path,
    recorded: Config | None,
    learner_settings: Mapping[str, Any] | None,
    network_settings: Mapping[str, Any] | None,
) -> MetaLearner:
    """The learner of a record, with changed settings."""
    if recorded is None or recorded.get("network", {}) is None:
        what = "learner" if recorded is None else "network"
        raise UsageError(
            f"the {what} of {folder} was built in Python and has no name: build it as it was and "
            "give it as learner="
        )
    config = {**recorded, **_checked(registry.find("learner", recorded["name"]), learner_settings)}
    if network_settings:
        if "network" not in recorded:
            raise UsageError(f"{recorded['name']} has no network whose settings could change")
        config["network"] = _changed_network(recorded["network"], network_settings)
    return registry.build("learner", config)


@functools.lru_cache(maxsize=8)  # the same functions again, so that nothing is compiled anew
def _with_normalisation(record: str, mode: Normalisation) -> MetaLearner:
    """The learner of a record, as JSON, with another mode of its network's normalisation."""
    config = json.loads(record)
    return _build(Path((config or {}).get("name", "")), config, None, {"normalisation": mode})


def _checked(
    component: registry.Component, settings: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    known = inspect.signature(component.factory).parameters
    for name in settings or {}:
        if name not in known or name in ("network", "objective"):
            others = (other for other in known if other not in ("network", "objective"))
            raise UsageError(
                f"{component.name} has no setting '{name}' that a test may change: it has "
                f"{', '.join(others)}"
            )
    return settings or {}


def normalisation_of(record: Config | None) -> Normalisation:
    """The normalisation of a learner's network, by the learner's record; 'none' without one."""
    network = (record or {}).get("network")
    return registry.build("network", network).normalisation if network else "none"


def _changed_network(recorded: Config, settings: Mapping[str, Any]) -> Config:
    """A network's record with another mode of normalisation, which alone a test may change."""
    for name, value in settings.items():
        was = recorded.get(name)
        if value == was:
            continue
        if name != "normalisation":
            raise UsageError(
                f"{recorded['name']} was trained with {name}={was}: a test may change its "
                "normalisation alone"
            )
        if not {was, value} <= set(BATCH_MODES):
            raise UsageError(
                f"{recorded['name']} was trained with normalisation={was}, which a test cannot "
                f"change to {value}: only {', '.join(BATCH_MODES)} share their parameters"
            )
        if value == "running":
            raise UsageError(
                f"{recorded['name']} was trained with normalisation={was}, which keeps no running "
                "averages: choose batch, support or one_at_a_time"
            )
    return {**recorded, **settings}


def load_parameters(
    folder: Path | str,
    checkpoint: Literal["best", "latest"] = "best",
    *,
    learner: MetaLearner | None = None,
    example: Any = None,
) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Loads what was trained, for a learner that is at hand already.

    Args:
      folder: As in `load`.
      checkpoint: As in `load`.
      learner: The learner, which may have other settings than the recorded one where they change no
        shape; None for the recorded one.
      example: As in `load`.

    Returns:
      Parameters, state, and the checkpoint's metadata, such as 'step' and 'seconds'.

    Raises:
      UsageError, CheckpointError: as in `load`.
    """
    folder = local_path(folder)
    config = read_config(folder)
    learner = learner or _build(folder, config["learner"], None, None)
    if example is None:
        example = task_like(config.get("example"))
    if example is None:
        raise UsageError(f"{folder / _FILE} has no example of a task: give one as example=")
    path, contents = _read(folder / "checkpoints", checkpoint)
    checkpoints.check_config(path, contents.config, config["learner"])
    return *_parameters(path, contents, learner, example), contents.metadata


def _read(folder: Path, checkpoint: str) -> tuple[Path, checkpoints.Contents]:
    if checkpoint == "best":
        return folder / "best", checkpoints.read(folder / "best")
    if checkpoint != "latest":
        raise UsageError(f"unknown checkpoint '{checkpoint}': choose best or latest")
    found = checkpoints.read_latest(folder)
    if found is None:
        raise UsageError(f"no step checkpoint in {folder}: train first, or use checkpoint='best'")
    return folder, found[0]


def _parameters(
    path: Path, contents: checkpoints.Contents, learner: MetaLearner, example: Any
) -> tuple[PyTree, PyTree]:
    """Parameters and state in the learner's structure, their shapes compared with it."""
    key = jax.random.key(0)
    params, state = jax.eval_shape(learner.init, key, example)
    # Averages of the parameters are what was validated, so they stand for them.
    chosen = {
        name: contents.leaves[averaged_path(name, contents.leaves.keys())].astype(leaf.dtype)
        for name, leaf in contents.leaves.items()
        if name.startswith("params")
    }
    params = checkpoints.unflatten(path, chosen, {"params": params})["params"]
    if learner.state_scope == "task":
        # One state for each task of training: a new task begins with a new one.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)
        return params, jax.jit(learner.init)(key, zeros)[1]
    kept = {name: leaf for name, leaf in contents.leaves.items() if name.startswith("state")}
    return params, checkpoints.unflatten(path, kept, {"state": state})["state"]


# ---- Weights that come with the library.

_PRETRAINED = Path(__file__).parent.parent / "pretrained"


def pretrained_names() -> list[str]:
    """Names of the weights that come with the library."""
    return sorted(path.parent.name for path in _PRETRAINED.glob("*/config.json"))


def load_pretrained(name: str) -> Trained:
    """Loads weights that come with the library.

    Args:
      name: One of `pretrained_names()`, such as 'glyphs-prototypical': what it was trained on, and
        the method.

    Raises:
      UsageError: an unknown name.

    Examples:
      >>> load_pretrained("glyphs-prototypical").config["learner"]["name"]
      'prototypical'
    """
    if name not in pretrained_names():
        raise UsageError(f"no weights '{name}': choose one of {', '.join(pretrained_names())}")
    return load(_PRETRAINED / name)
