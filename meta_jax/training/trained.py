"""What was trained, in a folder that says all about itself: `config.json` and `checkpoints/`.

A trained learner is built again from the folder alone, without its data and its optimizer.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax import registry
from meta_jax.concrete import check_finite
from meta_jax.core import Config, MetaLearner, Normalisation, Objective, PyTree
from meta_jax.data.polarity import Ink
from meta_jax.lookup import UsageError, local_path
from meta_jax.networks.frozen import frozen
from meta_jax.networks.normalisation import BATCH_MODES, is_transductive
from meta_jax.objectives import as_objective
from meta_jax.precision import Precision, record_precision
from meta_jax.serving.classifier import Classifier, adapt_classifier, form_of
from meta_jax.training import checkpoints
from meta_jax.training.optimizers import averaged_path
from meta_jax.training.record import CONFIG_FILE, read_config, task_like, write_config


class Trained(NamedTuple):
    """A trained learner, and what one must know to use it.

    Attributes:
      learner: The method.
      params: Its parameters.
      state: Its state.
      objective: Objective of the tasks it was trained on.
      preprocessing: What was done to the inputs, such as the image size.
      config: Contents of config.json.
      metadata: What else the checkpoint says, such as 'step' and 'seconds'.
    """

    learner: MetaLearner
    params: PyTree
    state: PyTree
    objective: Objective
    preprocessing: Mapping[str, Any] | None
    config: Mapping[str, Any]
    metadata: Mapping[str, Any] = {}

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
    precision: Precision | None = None,
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
      precision: Precision in which the network computes, by default as in training.
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
        recorded = config["learner"]
        if precision is not None:
            recorded = _in_precision(folder, recorded, precision)
        learner = _build(folder, recorded, learner_settings, network_settings)
    elif learner_settings or network_settings or precision:
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


def _in_precision(folder: Path, recorded: Config | None, precision: Precision) -> Config:
    """A learner's record with another precision of its network.

    Raises:
      UsageError: it has no network that could compute in it.
    """
    network = (recorded or {}).get("network")
    if recorded is None or not network:
        raise UsageError(
            f"the learner of {folder} has no network of a known name, whose precision could "
            "change: leave precision out"
        )
    return {**recorded, "network": record_precision(network, precision)}


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
        raise UsageError(f"{folder / CONFIG_FILE} has no example of a task: give one as example=")
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
        name: contents.leaves[averaged_path(name, contents.leaves.keys())]
        for name in contents.leaves
        if name.startswith("params")
    }
    stored = checkpoints.unflatten(path, chosen, {"params": params})["params"]
    # Weights may be stored in fewer bits than the learner computes in.
    params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), stored, params)
    try:
        check_finite(params, "parameters")
    except ValueError as error:
        raise checkpoints.CheckpointError(
            f"parameters of {path} are not finite: take another checkpoint, or train again"
        ) from error
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


def pretrained_folder(name: str) -> Path:
    """The folder of weights that come with the library.

    Args:
      name: One of `pretrained_names()`.

    Raises:
      UsageError: an unknown name.
    """
    if name not in pretrained_names():
        raise UsageError(f"no weights '{name}': choose one of {', '.join(pretrained_names())}")
    return _PRETRAINED / name


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
    return load(pretrained_folder(name))
