"""The record of a run, config.json: it claims a workdir, and is compared by value.

The steps of a run may grow, and so may its seeds; dials of memory may change. Settings of the outer
optimizer may change where its state keeps its structure. What changed, and from which step on, is
written into `history`.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from meta_jax import registry
from meta_jax.core import PyTree
from meta_jax.lookup import UsageError
from meta_jax.precision import record_precision, recorded_precision
from meta_jax.shapes import shape_difference
from meta_jax.training.checkpoints import latest_step
from meta_jax.training.record import CONFIG_FILE, read_config, write_config

_GROWS = ("steps", "seeds")
# What changes memory and time alone.
_DIALS = ("task_chunk", "tasks.placement", "tasks.device_memory")


def claim_workdir(
    workdir: Path,
    config: Mapping[str, Any],
    given: Collection[str] | None = None,
    *,
    params: PyTree | None = None,
) -> None:
    """Writes config.json into a new workdir, or checks that an old one is of the same run.

    A setting that is newer than an old record has the default that it was trained with, unless it
    is given.

    Args:
      workdir: The folder.
      config: The record of the run.
      given: Flags that were given; all may have been if None.
      params: Parameters of the run, arrays or shapes; without them no setting of the optimizer may
        change.

    Raises:
      UsageError: the workdir holds something else, or was trained with other settings.
    """
    if not (workdir / "config.json").exists():
        if not _is_unused(workdir):
            raise UsageError(f"{workdir} is not empty and no workdir of ours: name another one")
        write_config(workdir, config)
        return
    found = read_config(workdir)
    refused = differences(found, config, given)
    changed = _changes(found, config, given)
    if params is not None and _keeps_optimizer_state(found, config, params):
        refused = [name for name in refused if not name.startswith("optimizer.")]
    if refused:
        raise UsageError(_refusal(workdir, refused, compared=params is not None))
    if changed:
        entry = {"step": _reached(workdir), "changed": changed}
        write_config(workdir, {**config, "history": [*found.get("history", []), entry]})


def _is_unused(workdir: Path) -> bool:
    """Whether a folder is absent, or holds nothing but a record whose writing was cut short."""
    if not workdir.exists():
        return True
    unfinished = f"{CONFIG_FILE}.new"
    return workdir.is_dir() and all(path.name == unfinished for path in workdir.iterdir())


def _reached(workdir: Path) -> int:
    """Steps that were trained, under the seed that has most of them."""
    folders = [workdir / "checkpoints", *workdir.glob("seed_*/checkpoints")]
    return max(latest_step(folder) or 0 for folder in folders)


def _refusal(workdir: Path, refused: Collection[str], *, compared: bool) -> str:
    settings = ", ".join(refused)
    if compared and any(name.startswith("optimizer.") for name in refused):
        settings += "; those of the optimizer change the structure of its state"
    return (
        f"{workdir} was trained with other settings ({settings}): name another workdir, or give "
        "the settings of its config.json"
    )


def default_workdir(
    config: Mapping[str, Any],
    given: Collection[str] | None = None,
    *,
    parent: Path = Path("runs"),
) -> tuple[Path, str]:
    """Chooses the workdir of a run for which none is named: LEARNER_TASKS, or with a number.

    Args:
      config: The record of the run.
      given: Flags that were given; all may have been if None.
      parent: Folder of the workdirs.

    Returns:
      The first of LEARNER_TASKS, LEARNER_TASKS-2, ... that is free or holds a run of the same
      settings, which may have fewer steps; and why it was chosen, in words.
    """
    first = path = parent / run_name(config)
    number = 1
    while not _is_unused(path):
        if _same_run(path, config, given):
            return path, "goes on, since its settings are the same"
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path, "new" if number == 1 else f"new, since {first} holds something else"


def run_name(config: Mapping[str, Any]) -> str:
    """The name of a run by its learner and tasks, as a folder may be called.

    Examples:
      >>> run_name({"learner": {"name": "maml"}, "tasks": {"name": "folder:/data/my cats/"}})
      'maml_my_cats'
      >>> run_name({"learner": {"name": "own.module:learn"}, "tasks": {"name": "features:a/b.npz"}})
      'learn_b_npz'
    """
    names = []
    for kind in ("learner", "tasks"):
        # The path of a folder, the function of somebody's own.
        last = Path(config[kind]["name"].rpartition(":")[2])
        names.append(re.sub(r"\W+", "_", last.name or last.resolve().name).strip("_") or kind)
    return "_".join(names)


def _same_run(workdir: Path, config: Mapping[str, Any], given: Collection[str] | None) -> bool:
    try:
        return not differences(read_config(workdir), config, given)
    except UsageError:  # no workdir of ours, or a damaged one
        return False


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], given: Collection[str] | None = None
) -> list[str]:
    """Names of the flags in which two records differ, where this matters.

    Args:
      found: The older record.
      wanted: The newer one.
      given: Names of the flags that were given; all may have been if None.
    """

    def grown(name: str, values: list[Any]) -> bool:
        return name in _GROWS and None not in values and values[0] <= values[1]

    changes = _changes(found, wanted, given).items()
    return [name for name, values in changes if name not in _DIALS and not grown(name, values)]


def _changes(
    found: Mapping[str, Any], wanted: Mapping[str, Any], given: Collection[str] | None
) -> dict[str, list[Any]]:
    """[older value, newer value] by flag, of all that differ."""
    old, new = as_flags(found), as_flags(wanted)
    changed = {}
    for name in sorted({*old, *new}):
        newer = name not in old and given is not None and name not in given
        if old.get(name) != new.get(name) and not newer:
            changed[name] = [old.get(name), new.get(name)]
    return changed


def _keeps_optimizer_state(
    found: Mapping[str, Any], wanted: Mapping[str, Any], params: PyTree
) -> bool:
    """Whether the optimizers of two records have states of the same structure and shapes."""
    names = [(config["optimizer"] or {}).get("name") for config in (found, wanted)]
    if None in names or names[0] != names[1]:
        return False
    try:
        ours, theirs = (
            jax.eval_shape(_recorded_optimizer(config).init, params) for config in (found, wanted)
        )
    except (TypeError, ValueError, KeyError):  # somebody's own that has changed since, or damage
        return False
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and not shape_difference(
        ours, theirs
    )


def _recorded_optimizer(config: Mapping[str, Any]) -> Any:
    component = registry.find("optimizer", config["optimizer"]["name"])
    known = registry.settings(component, reserved=("steps",))
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["optimizer"].items()
        if name in known
    }
    return registry.build_optimizer(component, config["run"]["steps"], settings)


# ---- Several seeds of one run.


def with_seed(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The record of a run under another seed."""
    return {**config, "run": {**config["run"], "seed": seed}}


def with_seeds(config: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """The record of a workdir that holds trainings of a run under several seeds, in folders."""
    return {**config, "run": {**config["run"], "seeds": seeds}}


def seeds_of(config: Mapping[str, Any]) -> range:
    """The seeds of a workdir, of which there may be several, by its record."""
    run = config["run"] or {}
    first = run.get("seed", 0)
    return range(first, first + run.get("seeds", 1))


def finished_result(
    workdir: Path,
    config: Mapping[str, Any],
    given: Collection[str] | None = None,
    *,
    episodes: int,
) -> dict[str, Any] | None:
    """The result of a run that came to its end already; None where there is more to do.

    Args:
      workdir: Folder of the run.
      config: The record of the run.
      given: Flags that were given; all may have been if None.
      episodes: Episodes of the test.
    """
    path = workdir / "result.json"
    if not path.exists() or differences(read_config(workdir), config, given):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = (record["steps"], record["episodes"]) == (config["run"]["steps"], episodes)
    except (ValueError, KeyError, TypeError):  # damaged: it is made again
        return None
    return record if same else None


# ---- Records by flags.


def as_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record by the flags that give it: 'learner', 'learner.inner_lr', 'ways'."""
    found = dict(config["run"] or {})
    for kind in ("learner", "tasks", "optimizer"):
        found |= _component_flags(kind, config[kind] or {})
    return found


def _component_flags(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    if kind == "network":  # float32 is not recorded
        found["precision"] = recorded_precision(record)
        record = record_precision(record, "float32")
    for name, value in record.items():
        if isinstance(value, Mapping) and "name" in value:  # a network in its learner
            found |= _component_flags(name, value)
        else:
            found[kind if name == "name" else f"{kind}.{name}"] = value
    return found


def given_flags(values: flags.FlagValues) -> set[str]:
    """Names of the flags that were given."""
    return {name for name in values if values[name].present}
