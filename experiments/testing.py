"""What a test of a learner reports: the line for people and the keys for programs."""

import jax
from absl import flags

from experiments.tasks import Tasks
from meta_jax.core import Criterion, MetaLearner, PyTree
from meta_jax.training.evaluation import Score, confidence_interval, make_evaluate

_SPLITS = ("train", "val", "test", "trainval")


def metric_of(metrics: dict) -> str:
    """The metric that a result reports: 'accuracy', or 'mse' in regression."""
    return "accuracy" if "accuracy" in metrics else "mse"


def test(
    learner: MetaLearner,
    criterion: Criterion,
    params: PyTree,
    state: PyTree,
    tasks: Tasks,
    *,
    split: str,
    episodes: int,
    seed: int = 0,
) -> tuple[str, Score]:
    """Mean accuracy in per cent, or mean squared error, over episodes drawn from a fixed seed.

    The same seed gives the same episodes to every learner and every time.

    Returns:
      The metric's name and its score.
    """
    key = jax.random.fold_in(jax.random.key(seed), 1 + _SPLITS.index(split))
    metrics = make_evaluate(learner, tasks.sampler, criterion, episodes=episodes)(
        params, state, tasks.data, key
    )
    name = metric_of(metrics)
    return name, confidence_interval(metrics[name] * (100 if name == "accuracy" else 1))


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
