"""The record of a run, config.json: it claims a workdir, and is compared by value."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from meta_jax.lookup import UsageError
from meta_jax.training.trained import read_config, write_config


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
