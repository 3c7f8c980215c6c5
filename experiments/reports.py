"""What is reported of a test: keys for programs, a line for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import runs
from experiments.command_line import RunError
from experiments.testing import Asked, Tested
from meta_jax.core import Objective
from meta_jax.data.source import EpisodeSize
from meta_jax.networks.normalisation import is_transductive, support_moments
from meta_jax.precision import recorded_precision
from meta_jax.training import trained
from meta_jax.training.evaluation import MeanCI


class Result(NamedTuple):
    """What a test found, and the contents of its result.json."""

    tested: Tested
    record: dict[str, Any]
    beside: Mapping[str, Tested] = {}  # exact answers to the same episodes, by name
    notes: tuple[str, ...] = ()  # what a reader should know of it


def result(
    config: Mapping[str, Any],
    tested: Tested,
    asked: Asked,
    *,
    size: EpisodeSize | None = None,
    tasks: str | None = None,
    seconds: float,
    protocol: str | None = None,
) -> Result:
    """Builds the result of a test; accuracy and ci95 are in per cent.

    Args:
      config: Record of the run, the learner's as it was tested.
      tested: Result of the test.
      asked: Split, number of episodes and seed of the test.
      size: Size of the episodes, where it is not the run's.
      tasks: Name of the tasks, if not the run's.
      seconds: Duration of the training.
      protocol: Name of the test's protocol, where there is one.

    Raises:
      RunError: what was found is not finite.
    """
    run, metric = config["run"], tested.objective.metric
    ways, shots, queries = _reported_size(tested.objective, size or runs.test_size(run))
    _check_finite(tested, asked.split)
    mode = trained.normalisation_of(config["learner"])
    precision = recorded_precision(config["learner"].get("network"))
    # In a sequence, moments of the support set are those of inputs yet to come.
    peeks = bool(tested.instances) and support_moments(mode, train=False) != "stored"
    record = {
        "learner": config["learner"]["name"],
        "tasks": tasks or config["tasks"]["name"],
        "split": asked.split,
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "episodes": asked.episodes,
        metric: rounded(tested.score.mean),
        "ci95": rounded(tested.score.ci95),
        "normalisation": mode,
        "transductive": is_transductive(mode) or peeks,
        "steps": run["steps"],
        "seed": run["seed"],
        "seconds": round(seconds, 1),
        "metrics": {name: [*map(rounded, score)] for name, score in tested.metrics.items()},
        **({} if protocol is None else {"protocol": protocol}),
        **({} if precision == "float32" else {"with_precision": precision}),
    }
    return Result(tested, record)


def _reported_size(
    objective: Objective, size: tuple[int, int, int]
) -> tuple[int | None, int | None, int | None]:
    """Ways, shots and queries; None for trials, which have none of them."""
    return (None, None, None) if objective.kind == "control" else size


def _check_finite(tested: Tested, split: str) -> None:
    for name, (mean, ci95) in tested.metrics.items():
        reported = name == tested.objective.metric
        # The loss of a sure and wrong answer may be infinite; what is not a number is always wrong.
        if math.isnan(mean) or (reported and not math.isfinite(mean + ci95)):
            raise RunError(
                f"{split} {name} is {mean}, so there is no result: lower the learning rates, or "
                "clip gradients with --optimizer.clip_norm"
            )


def rounded(value: float) -> float:
    """A number with the digits that are reported."""
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")


def line(found: Result) -> str:
    """The one human-readable line of a result."""
    tested, record = found.tested, found.record
    on = measured_on(record, tested.objective, instances=len(tested.instances))
    return f"{record['split']} {tested.objective.metric} {tested.text()} ({on})"


def beside_text(beside: Mapping[str, Tested]) -> str:
    """What stands behind the line of a result: the scores of others on the same episodes."""
    return "".join(f"; {name.replace('_', ' ')} {t.text()}" for name, t in beside.items())


def measured_on(
    record: Mapping[str, Any], objective: Objective, *, instances: int = 0, each: str = ""
) -> str:
    """What a result was measured on: the size and the number of episodes, or of trials."""
    if objective.kind == "control":
        return f"{record['episodes']} trials{each}"
    size = f"{record['shots']}-shot"
    if objective.kind == "classification":
        size = f"{record['ways']}-way {size}"
    if instances:
        size = f"sequences of {record['ways']} classes x {instances} instances"
    on = f"{size}, {record['episodes']} episodes{each}, normalisation {record['normalisation']}"
    on += f", precision {record['with_precision']}" if "with_precision" in record else ""
    return f"{on}, protocol {record['protocol']}" if "protocol" in record else on


def instance_table(curves: Mapping[str, Sequence[MeanCI]]) -> str:
    """The metric at the 1st, 2nd, ... instance of a class as lines of a table.

    Args:
      curves: By name, the scores.
    """
    count = max(map(len, curves.values()))
    rows = {"instance": [str(i + 1) for i in range(count)]}
    rows |= {name: [f"{score.mean:.1f}" for score in scores] for name, scores in curves.items()}
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}" + "".join(f"{cell:>6}" for cell in cells) for name, cells in rows.items()
    )
