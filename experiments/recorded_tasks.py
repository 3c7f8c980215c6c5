"""Tasks of a test by the record of a training: its own, or others of the same form."""

from collections.abc import Mapping
from typing import Any

from experiments import runs
from meta_jax import registry
from meta_jax.core import Tasks
from meta_jax.data.dataset import DataError
from meta_jax.data.source import TaskSource, find_source, load_source
from meta_jax.lookup import UsageError, local_path
from meta_jax.training import trained


def load_other_source(
    recorded: Mapping[str, Any],
    name: str | None,
    settings: Mapping[str, Any],
    data_dir: str | None,
) -> TaskSource:
    """The source of a test's tasks: the run's, or another that gives inputs of the same form.

    Args:
      recorded: Record of the run's tasks.
      name: Name of another source; None for the run's.
      settings: Settings that replace the run's.
      data_dir: Where the data lie.

    Raises:
      UsageError: an unknown source or setting, or data that is not there.
    """
    name = name or recorded["name"]
    component, argument = find_source(name)
    given = {
        **recorded_settings(recorded, name),
        **settings,
        **runs.data_dir_setting(component, data_dir),
    }
    try:
        return load_source(name, **given)
    except DataError as error:
        is_path = argument and not runs.has_data_dir(component)
        if not is_path or name != recorded["name"] or local_path(argument).exists():
            raise
        kind = name.partition(":")[0]
        raise UsageError(
            f"{error}; the run was trained on it: if it was moved, give --tasks={kind}:NEWPATH"
        ) from error


def recorded_settings(recorded: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings that a run's record gives to the source of a test.

    Args:
      recorded: Record of the run's tasks.
      name: Name of the source. One of the same kind, such as another folder, gets all that it was
        trained with; others what makes an input: its size and channels.
    """
    parameters = registry.parameters(find_source(name)[0].factory).values()
    known = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    form = recorded["preprocessing"] or {}
    same_kind = _is_same_kind(name, recorded["name"])
    found = {**form, **(recorded if same_kind else {})}
    if found.get("grey") is None and "channels" in form:
        found["grey"] = form["channels"] == 1  # whatever colours the images of another set have
    if same_kind and "split_fractions" not in recorded:
        # The rule of random splits when this was recorded: no class that was trained on is tested.
        found["split_fractions"] = "0.64,0.16,0.2"
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in found.items()
        if key in known
    }


def _is_same_kind(name: str, other: str) -> bool:
    try:
        return find_source(name)[0].factory is find_source(other)[0].factory
    except UsageError:  # a source of somebody's own that is gone
        return False


def check_fit(loaded: trained.Trained, tasks: Tasks) -> None:
    """Refuses tasks that a trained learner cannot be tested on.

    Raises:
      UsageError: their objective is of another kind, or parameters would have other shapes.
    """
    config, kind = loaded.config, tasks.objective.kind
    name, run = config["learner"]["name"], config["run"]
    if kind != loaded.objective.kind:
        raise UsageError(
            f"{name} was trained for {loaded.objective.kind}, and these tasks ask for {kind}: "
            "name other tasks"
        )
    difference = runs.misfit(loaded.learner, (loaded.params, loaded.state), tasks)
    if difference:
        raise UsageError(
            f"{name} was trained with parameters that do not fit these tasks ({difference}): test "
            f"it on inputs as in training, and on {run['train_ways']} ways"
        )
