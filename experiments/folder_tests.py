"""Tests of what a folder holds: the workdir of a run, or shipped weights."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import protocols, runs
from experiments.recorded_tasks import check_fit, load_other_source, recorded_settings
from experiments.reports import Result, result
from experiments.testing import (
    Asked,
    answering_in_chunks,
    make_test,
    test_exact_answers,
    tested_from,
)
from meta_jax.core import Tasks
from meta_jax.data.omniglot import seen_characters
from meta_jax.data.omniglot_trials import load_trials
from meta_jax.data.source import EpisodeSize
from meta_jax.lookup import UsageError
from meta_jax.objectives import check_several_ways
from meta_jax.precision import Precision
from meta_jax.training import processes, trained
from meta_jax.training.evaluation import evaluate_each
from meta_jax.training.record import read_config

Settings = Mapping[str, Mapping[str, Any]]  # by component: 'learner', 'network', 'tasks'


def evaluate(
    folder: Path,
    asked: Asked,
    *,
    checkpoint: Literal["best", "latest"] = "best",
    size: Mapping[str, int] | None = None,
    tasks: str | None = None,
    settings: Settings | None = None,
    data_dir: str | None = None,
    protocol: str | None = None,
    precision: Precision | None = None,
) -> Result:
    """Tests the learner of a workdir, or of shipped weights, which are a workdir in small.

    Args:
      folder: Holds config.json and checkpoints/.
      asked: Split, number and seed of the episodes.
      checkpoint: 'best' or 'latest'.
      size: Ways, shots and queries where they are not the run's.
      tasks: Name of other tasks than the run's.
      settings: Settings of learner, network and tasks that replace the run's.
      data_dir: Where the data lie.
      protocol: Name of a protocol, which chooses the tasks and their settings; the size and number
        of episodes are still the caller's.
      precision: Precision in which the network computes, where it is not the run's.

    Raises:
      UsageError, CheckpointError: what is asked for cannot be had.
      RunError: the result is not finite.
    """
    settings, run = settings or {}, _tested_run(folder, checkpoint)
    if protocol is not None:
        tasks, settings = protocols.tasks_of(protocol, tasks, settings)
    wanted = runs.test_size(run)._replace(**(size or {}))
    try:
        loaded = _load(folder, checkpoint, settings, precision)
        source = load_other_source(
            loaded.config["tasks"], tasks, settings.get("tasks", {}), data_dir
        )
        drawn = source.tasks(asked.split, wanted, train=False)
        _check_size(drawn, wanted, size or {})
        runs.check_episodes("eval_episodes", asked.episodes)
        check_fit(loaded, drawn)
    except ValueError as error:
        raise UsageError(str(error)) from error
    drawn = drawn._replace(objective=loaded.objective)
    test = make_test(answering_in_chunks(loaded.learner, drawn, asked.query_chunk), drawn, asked)
    if processes.is_writer():
        episodes = f"{asked.episodes} episodes of the split '{asked.split}'"
        print(f"testing {folder} on {episodes}", file=sys.stderr)
    found = result(
        loaded.config,
        test(loaded.params, loaded.state),
        asked,
        size=wanted,
        tasks=tasks,
        seconds=_seconds(folder, checkpoint, loaded),
        protocol=protocol,
    )
    return found._replace(
        beside=test_exact_answers(drawn, asked),
        notes=_notes(loaded.config["tasks"], source.config or {}, asked.split),
    )


def _check_size(tasks: Tasks, wanted: EpisodeSize, given: Mapping[str, int]) -> None:
    """Refuses the size of an episode that its tasks do not have, or the memory does not hold.

    Raises:
      UsageError: there are no classes, one class alone, or too much.
    """
    if tasks.objective.kind == "classification":
        check_several_ways(jnp.zeros((1, wanted.ways)))
    elif "ways" in given:
        raise UsageError(f"--ways={wanted.ways} is of no use: these tasks have no classes")
    runs.check_episode_memory(tasks, wanted._asdict())


def evaluate_trials(
    folder: Path,
    path: str,
    *,
    checkpoint: Literal["best", "latest"] = "best",
    settings: Settings | None = None,
    precision: Precision | None = None,
) -> Result:
    """Tests the learner of a workdir on the 400 official one-shot trials of Omniglot.

    Args:
      folder: Holds config.json and checkpoints/.
      path: all_runs.zip, or the folder of its runs.
      checkpoint: 'best' or 'latest'.
      settings: Settings of learner and network that replace the run's.
      precision: Precision in which the network computes, where it is not the run's.

    Returns:
      The result, whose interval is that over the 20 runs.

    Raises:
      UsageError, CheckpointError: what is asked for cannot be had.
      RunError: the result is not finite.
    """
    _tested_run(folder, checkpoint)
    try:
        loaded = _load(folder, checkpoint, settings or {}, precision)
        form = recorded_settings(loaded.config["tasks"], "omniglot")
        form = {name: form[name] for name in ("image_size", "polarity") if name in form}
        trials = load_trials(path, **form)
        first = jax.tree.map(lambda leaf: leaf[0], trials)
        check_fit(loaded, Tasks(lambda key, data: data, first, loaded.objective))
    except ValueError as error:
        raise UsageError(str(error)) from error
    metrics = evaluate_each(loaded.learner, loaded.params, loaded.state, trials, jax.random.key(0))
    found = result(
        loaded.config,
        tested_from(loaded.objective, metrics),
        Asked(episodes=trials.query.y.shape[0]),
        size=EpisodeSize(trials.query.y.shape[2], 1, 1),
        tasks="omniglot",
        seconds=_seconds(folder, checkpoint, loaded),
        protocol="lake, official trials",
    )
    return found._replace(notes=_notes(loaded.config["tasks"], {"split_rule": "lake"}, "test"))


def _tested_run(folder: Path, checkpoint: str) -> Mapping[str, Any]:
    """The record of a run of one seed that has the checkpoint."""
    run = read_config(folder)["run"]
    if "seeds" in run:
        one = folder / f"seed_{run['seed']}"
        raise UsageError(
            f"{folder} holds trainings of {run['seeds']} seeds: name one of them, such as {one}"
        )
    if checkpoint == "best" and not run["eval_every"]:
        raise UsageError(
            "the run had no validation, so no best checkpoint: use --checkpoint=latest"
        )
    return run


def _load(
    folder: Path,
    checkpoint: Literal["best", "latest"],
    settings: Settings,
    precision: Precision | None,
) -> trained.Trained:
    return trained.load(
        folder,
        checkpoint=checkpoint,
        learner_settings=settings.get("learner"),
        network_settings=settings.get("network"),
        precision=precision,
    )


def _seconds(folder: Path, checkpoint: Literal["best", "latest"], loaded: trained.Trained) -> float:
    """Duration of the training."""
    _, _, metadata = trained.load_parameters(folder, checkpoint, learner=loaded.learner)
    return metadata["seconds"]


def _notes(recorded: Mapping[str, Any], tested: Mapping[str, Any], split: str) -> tuple[str, ...]:
    """That classes of the test were trained on, where another rule of the split is tested."""
    trained_by, tested_by = recorded.get("split_rule"), tested.get("split_rule")
    if split != "test" or trained_by is None or tested_by is None:
        return ()
    seen = seen_characters(trained_by, tested_by)
    if not seen:
        return ()
    return (
        f"these weights were trained by split_rule={trained_by}, with {seen} of the characters "
        f"that split_rule={tested_by} tests: no result of characters never seen",
    )
