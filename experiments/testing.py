"""Testing a trained learner, and what is reported: a line for people, keys for programs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from experiments import learners, tasks
from experiments.command_line import UsageError, run_flag_values
from meta_jax.core import Criterion, MetaLearner, PyTree
from meta_jax.training import checkpoints
from meta_jax.training.evaluation import (
    Score,
    confidence_interval,
    make_evaluate,
    make_evaluate_sequences,
)
from meta_jax.training.outer_step import init_train_state, task_mesh

_SPLITS = ("train", "val", "test", "trainval")


def metric_of(metrics: dict) -> str:
    """The metric that a result reports: 'accuracy', or 'mse' in regression."""
    return "accuracy" if "accuracy" in metrics else "mse"


class Tested(NamedTuple):
    """What a test found."""

    name: str  # the metric's
    score: Score  # mean accuracy in per cent, or mean squared error
    instances: tuple[Score, ...] = ()  # of the sequence protocol: at the 1st, 2nd, ... instance


def make_evaluation(
    learner: MetaLearner, criterion: Criterion, source: tasks.Tasks, *, protocol: str, episodes: int
) -> Callable[..., dict]:
    """`make_evaluate`, or `make_evaluate_sequences` where the protocol is 'sequence'."""
    share = {"episodes": episodes, "mesh": task_mesh(episodes)}
    if protocol == "sequence":
        return make_evaluate_sequences(learner, source.sampler, **share)
    return make_evaluate(learner, source.sampler, criterion, **share)


def make_test(
    learner: MetaLearner,
    criterion: Criterion,
    source: tasks.Tasks,
    *,
    split: str,
    episodes: int,
    protocol: str = "few_shot",
    seed: int = 0,
) -> Callable[[PyTree, PyTree], Tested]:
    """A test that is compiled once, on episodes drawn from a fixed seed.

    The same seed gives the same episodes to every learner and every time.

    Returns:
      A function (params, state) -> what was found.
    """
    evaluate = make_evaluation(learner, criterion, source, protocol=protocol, episodes=episodes)
    key = jax.random.fold_in(jax.random.key(seed), 1 + _SPLITS.index(split))

    def test(params: PyTree, state: PyTree) -> Tested:
        metrics = evaluate(params, state, source.data, key)
        name = metric_of(metrics)
        score = confidence_interval(metrics[name] * (100 if name == "accuracy" else 1))
        count = sum(metric.startswith("instance_") for metric in metrics)
        instances = (metrics[f"instance_{i + 1}"] for i in range(count))
        return Tested(name, score, tuple(confidence_interval(100 * each) for each in instances))

    return test


def result(
    values: flags.FlagValues,
    tested: Tested,
    *,
    batch_norm: str,
    split: str,
    episodes: int,
    seconds: float,
) -> dict:
    """The contents of result.json; accuracy and ci95 are in per cent.

    The sequence protocol adds itself and the accuracies at each instance of a class.
    """
    name, score, instances = tested
    # In a sequence, the support's statistics are those of inputs yet to come.
    transductive = batch_norm == "batch" or (batch_norm == "support" and bool(instances))
    found = {
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
        "transductive": transductive,
        "steps": values.steps,
        "seed": values.seed,
        "seconds": round(seconds, 1),
    }
    if instances:
        found["protocol"] = "sequence"
        found["instances"] = [round(each.mean, 4) for each in instances]
        found["instances_ci95"] = [round(each.ci95, 4) for each in instances]
    return found


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
    if "instances" in found:
        each = len(found["instances"])
        task = f"sequences of {found['ways']} classes x {each} instances"
    return (
        f"{found['split']} {name} {score} ({task}, {found['episodes']} episodes, "
        f"batch norm {found['batch_norm']})"
    )


def instance_table(curves: dict[str, Sequence[float]]) -> str:
    """Accuracies at the 1st, 2nd, ... instance of a class as lines of a table.

    Args:
      curves: by name, accuracies in per cent.
    """
    count = max(map(len, curves.values()))
    rows = {"instance": [str(i + 1) for i in range(count)]}
    rows |= {name: [f"{value:.1f}" for value in values] for name, values in curves.items()}
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}" + "".join(f"{cell:>6}" for cell in cells) for name, cells in rows.items()
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
      overrides: flags of the run that the test changes; None leaves them as they are.

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
        if value is not None:
            setattr(values, name, value)
    try:
        learner, criterion = learners.build_learner(values)
        splits = tasks.load(values, data_dir)
        source = tasks.tasks(splits, split, tasks.test_spec(values))
    except ValueError as error:
        raise UsageError(str(error)) from error
    params, state, seconds = _restore(folder / "checkpoints", checkpoint, learner, source, values)
    asked = {"split": split, "episodes": episodes}
    test = make_test(learner, criterion, source, protocol=values.protocol, seed=seed, **asked)
    return result(
        values,
        test(params, state),
        batch_norm=learners.build_network(values).batch_norm,
        seconds=seconds,
        **asked,
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
