"""What is reported of a run under several seeds: mean, spread and an interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reports import measured_on, rounded
from experiments.testing import score_text
from meta_jax.core import Objective
from meta_jax.training.evaluation import MeanCI


def over_seeds(found: Mapping[int, Mapping[str, Any]], objective: Objective) -> dict[str, Any]:
    """Builds the result of several seeds from that of each: mean, spread and an interval.

    Args:
      found: Contents of result.json by seed, at least two.
      objective: What was asked.

    Returns:
      The keys of one result, in which the metric is its mean over seeds, `ci95` the half-width of
      Student's 95 % interval of that mean, and `metrics` likewise; besides, `std` (sample standard
      deviation over seeds) and `seeds`, the metric of each.
    """
    first = next(iter(found.values()))
    metric = objective.metric
    metrics = {
        name: [record["metrics"][name][0] for record in found.values()] for name in first["metrics"]
    }
    summary = {name: [*map(rounded, seed_interval(v))] for name, v in metrics.items()}
    values = {str(seed): record[metric] for seed, record in found.items()}
    return {
        **first,
        metric: summary[metric][0],
        "ci95": summary[metric][1],
        "seconds": round(sum(record["seconds"] for record in found.values()), 1),
        "metrics": summary,
        "std": rounded(float(np.std([*values.values()], ddof=1))),
        "seeds": values,
    }


def seed_interval(values: Sequence[float]) -> MeanCI:
    """Mean of one value for each seed, and the half-width of Student's 95 % interval of it.

    Args:
      values: [n], n at least 2.

    Examples:
      >>> mean, ci95 = seed_interval([1.0, 2.0, 3.0])
      >>> mean, round(ci95, 4)  # 4.3027 / sqrt(3), as s = 1
      (2.0, 2.4841)
    """
    from scipy import stats

    n, deviation = len(values), np.std(values, ddof=1)
    half = stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n)
    return MeanCI(float(np.mean(values)), float(half))


def seeds_line(record: Mapping[str, Any], objective: Objective) -> str:
    """The one human-readable line of a result over seeds."""
    score = MeanCI(record[objective.metric], record["ci95"])
    return (
        f"{record['split']} {objective.metric} {score_text(score, objective)} over "
        f"{len(record['seeds'])} seeds (standard deviation {record['std']:.2f}; "
        f"{measured_on(record, objective, each=' each')})"
    )
