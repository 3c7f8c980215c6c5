"""Testing a trained learner, and what is reported: a line for people, keys for programs."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from experiments import learners, tasks
from experiments.command_line import UsageError, run_flag_values
from meta_jax.core import Criterion, MetaLearner, PyTree
from meta_jax.training import checkpoints
from meta_jax.training.evaluation import Score, confidence_interval, make_evaluate
from meta_jax.training.outer_step import init_train_state

_SPLITS = ("train", "val", "test", "trainval")


def metric_of(metrics: dict) -> str:
    """The metric that a result reports: 'accuracy', or 'mse' in regression."""
    return "accuracy" if "accuracy" in metrics else "mse"


def make_test(
    learner: MetaLearner,
    criterion: Criterion,
    source: tasks.Tasks,
    *,
    split: str,
    episodes: int,
    seed: int = 0,
) -> Callable[[PyTree, PyTree], tuple[str, Score]]:
    """A test that is compiled once, on episodes drawn from a fixed seed.

    The same seed gives the same episodes to every learner and every time.

    Returns:
      A function (params, state) -> the metric's name and its score: mean accuracy in per cent, or
      mean squared error.
    """
    evaluate = make_evaluate(learner, source.sampler, criterion, episodes=episodes)
    key = jax.random.fold_in(jax.random.key(seed), 1 + _SPLITS.index(split))

    def test(params: PyTree, state: PyTree) -> tuple[str, Score]:
        metrics = evaluate(params, state, source.data, key)
        name = metric_of(metrics)
        return name, confidence_interval(metrics[name] * (100 if name == "accuracy" else 1))

    return test


def result(
    values: flags.FlagValues,
    name: str,
    score: Score,
    *,
    batch_norm: str,
    split: str,
    episodes: int,
    seconds: float,
) -> dict:
    """The contents of result.json; accuracy and ci95 are in per cent."""
    return {
        "learner": values.learner,
        "dataset": values.dataset,
        "split": split,
        "ways": values.ways,
        "shots": values.shots,
        "queries": values.queries,
        "episodes": episodes,
        name: round(score.mean, 4),
        "ci95": round(score.ci95, 4),
        "batch_norm": batch_norm,
        "transductive": batch_norm == "batch",
        "steps": values.steps,
        "seed": values.seed,
        "seconds": round(seconds, 1),
    }


def score_text(name: str, score: Score) -> str:
    """A score as people read it."""
    if name == "accuracy":
        return f"{score.mean:.2f} % ± {score.ci95:.2f}"
    return f"{score.mean:.3f} ± {score.ci95:.3f}"


def line(found: dict) -> str:
    """The one human-readable line of a result."""
    name = metric_of(found)
    shots = f"{found['shots']}-shot"
    task = f"{found['ways']}-way {shots}" if name == "accuracy" else shots
    score = score_text(name, Score(found[name], found["ci95"]))
    return (
        f"{found['split']} {name} {score} ({task}, {found['episodes']} episodes, "
        f"batch norm {found['batch_norm']})"
    )


def evaluate(
    folder: Path,
    *,
    checkpoint: str,
    split: str,
    episodes: int,
    seed: int,
    data_dir: str | None,
    overrides: dict,
) -> dict:
    """Tests the learner of a workdir, or of shipped weights, which are a workdir in small.

    Args:
      folder: holds flags.txt and checkpoints/.
      checkpoint: 'best' or 'latest'.
      split: of the classes to test on.
      episodes: how many.
      seed: of the episodes.
      data_dir: where the data lie.
      overrides: flags of the run that the test changes.

    Returns:
      The keys of result.json.

    Raises:
      UsageError, DataError, CheckpointError: what is asked for cannot be had.
    """
    path = folder / "flags.txt"
    if not path.exists():
        raise UsageError(f"no flags.txt in {folder}: name the workdir of a training run")
    values = run_flag_values(path)
    if values.train_ways is None:
        values.train_ways = values.ways
    if values.eval_every == 0 and checkpoint == "best":
        raise UsageError(
            "the run had no validation, so no best checkpoint: use --checkpoint=latest"
        )
    for name, value in overrides.items():
        setattr(values, name, value)
    try:
        learner, criterion = learners.build_learner(values)
        splits = tasks.load(values, data_dir)
        source = tasks.tasks(splits, split, tasks.test_spec(values))
    except ValueError as error:
        raise UsageError(str(error)) from error
    params, state, seconds = _restore(folder / "checkpoints", checkpoint, learner, source, values)
    test = make_test(learner, criterion, source, split=split, episodes=episodes, seed=seed)
    name, score = test(params, state)
    return result(
        values,
        name,
        score,
        batch_norm=learners.network(values).batch_norm,
        split=split,
        episodes=episodes,
        seconds=seconds,
    )


def _restore(
    folder: Path,
    checkpoint: str,
    learner: MetaLearner,
    source: tasks.Tasks,
    values: flags.FlagValues,
) -> tuple[PyTree, PyTree, float]:
    """Parameters, state, and the seconds that training them took."""
    optimizer = learners.build_optimizer(values)
    like = jax.eval_shape(
        lambda data: init_train_state(learner, optimizer, source.sampler, data, 0), source.data
    )
    if checkpoint == "best":
        learned = {"params": like.params, "state": like.state}
        learned, metadata = checkpoints.restore(folder / "best", learned)
        return learned["params"], learned["state"], metadata["seconds"]
    if checkpoint != "latest":
        raise UsageError(f"unknown checkpoint '{checkpoint}': choose best or latest")
    found = checkpoints.restore_latest(folder, like)
    if found is None:
        raise UsageError(f"no checkpoint in {folder}: train first")
    train_state, metadata, warnings = found
    for warning in warnings:
        print(warning, file=sys.stderr)
    return train_state.params, train_state.state, metadata["seconds"]
