"""The record of a training run, `config.json`: what is trained, on what, and the shapes of a task.

It names the learner, the network and all their settings, the tasks' objective and preprocessing, so
that what was trained is built again from its folder alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from meta_jax.core import Episode, MetaLearner, PyTree, Tasks, check_metrics
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.data.streams import task_shapes
from meta_jax.lookup import UsageError, load_attribute, local_path
from meta_jax.objectives import check_several_ways
from meta_jax.reinforcement.environment import Problem
from meta_jax.training import checkpoints
from meta_jax.training.writers import write_text
from meta_jax.version import __version__

CONFIG_FILE = "config.json"
_ANY_SIZE = EpisodeSize(1, 1, 1)  # a trial has its own


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
    task = task_shapes(tasks)
    y: Any = task.query.y if isinstance(task, Episode) else None
    if objective.kind == "classification" and getattr(y, "ndim", 0) == 2:
        check_several_ways(y)
    config = {
        "version": __version__,
        "learner": learner.config,
        "tasks": {
            **(source or {}),
            "objective": objective.name,
            "preprocessing": preprocessing,
        },
        "optimizer": optimizer,
        "run": run,
        "example": _describe_problem(source) if isinstance(task, Problem) else describe_task(task),
    }
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise UsageError(f"the record of this run is not JSON: {error}") from error


def write_config(folder: Path | str, config: Mapping[str, Any]) -> None:
    """Writes `folder/config.json`, in place of an older one; makes the folder."""
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def read_config(folder: Path | str) -> dict[str, Any]:
    """Reads `folder/config.json`.

    Raises:
      UsageError: it is missing or damaged.
    """
    path = local_path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"no {CONFIG_FILE} in {folder}: name the workdir of a training run, or a folder of "
            "weights"
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
    "optimizer": {dict: "an object", _NULL: "null"},
    "run": {dict: "an object", _NULL: "null"},
    "example": {dict: "an object", str: "a string", _NULL: "null"},
}
_COMPONENTS = ("network", "rule", "family", "estimator")  # of a learner
# What it may hold beside that.
_IF_THERE: dict[str, dict[type, str]] = {
    "history": {list: "an array"},
    "tasks.name": {str: "a string"},
    "tasks.preprocessing": {dict: "an object", _NULL: "null"},
    **{f"learner.{name}": {dict: "an object", _NULL: "null"} for name in _COMPONENTS},
    **{
        f"run.{name}": {int: "a whole number"}
        for name in ("steps", "seed", "seeds", "ways", "shots", "queries")
    },
}
# What must be there where the object is that holds it.
_WITHIN = {f"learner.{name}.name": {str: "a string"} for name in _COMPONENTS}


def _check_config(path: Path, config: Any) -> None:
    """Refuses a record that lacks something, or has it in another type.

    Raises:
      UsageError: it is damaged; the message names the first place.
    """
    if not isinstance(config, dict):
        raise UsageError(f"{path} is damaged: it holds no object; restore it from a copy")
    for place, kinds in {**_RECORDED, **_IF_THERE, **_WITHIN}.items():
        *parents, name = place.split(".")
        within = config
        for parent in parents:
            within = (within or {}).get(parent)
        if within is None or (place in _IF_THERE and name not in within):
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
      >>> import jax.numpy as jnp
      >>> describe_task({"x": jnp.zeros((3, 2)), "mask": None})
      {'dict': {'x': 'float32[3, 2]', 'mask': None}}
    """
    try:
        return _describe(task)
    except TypeError:
        return None


def _describe_problem(source: Mapping[str, Any] | None) -> Any:
    """A task of reinforcement learning is described by the source of its environment."""
    return {"problem": dict(source)} if source and "name" in source else None


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
      description: The `example` of a record: what `describe_task` gave, or a source of problems.

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
            f"restore {CONFIG_FILE} from a copy"
        ) from error


def _task_like(description: Any) -> PyTree:
    if description is None:
        return None
    if isinstance(description, str):
        shape, dtype = checkpoints.shape_of(description), checkpoints.dtype_of(description)
        return jax.ShapeDtypeStruct(shape, dtype)
    if "problem" in description:
        tasks = load_source(**description["problem"]).tasks("train", _ANY_SIZE, train=False)
        return task_shapes(tasks)
    if "dict" in description:
        return {name: _task_like(value) for name, value in description["dict"].items()}
    if "type" in description:
        fields = {name: _task_like(value) for name, value in description["fields"].items()}
        return load_attribute(description["type"])(**fields)
    ((kind, values),) = description.items()
    items = [_task_like(value) for value in values]
    return tuple(items) if kind == "tuple" else items
