"""Testing a learner: fixed seed, many episodes, a mean with its confidence interval."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from meta_jax.core import Criterion, MetaLearner, PyTree
from meta_jax.training.outer_step import Sampler


class Score(NamedTuple):
    """A mean over episodes and the half-width of its 95 % confidence interval."""

    mean: float
    ci95: float


def confidence_interval(values: np.ndarray) -> Score:
    """Mean and 1.96 s / sqrt(n) of one value for each episode, [n], n at least 2.

    Examples:
      >>> mean, ci95 = confidence_interval(np.array([0.0, 1.0, 0.0, 1.0]))
      >>> mean, round(ci95, 4)
      (0.5, 0.5658)
    """
    return Score(float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values))))


def make_evaluate(
    learner: MetaLearner, sampler: Sampler, criterion: Criterion, *, episodes: int
) -> Callable[[PyTree, PyTree, PyTree, jax.Array], dict[str, np.ndarray]]:
    """A compiled test of a learner on freshly drawn episodes, with parameters left as they are.

    Args:
      learner: the method.
      sampler: draws one test episode.
      criterion: gives the metrics of an episode's queries.
      episodes: how many.

    Returns:
      A function (params, state, data, key) -> metrics, each [episodes]. The same key draws the
      same episodes.
    """

    def episode(params: PyTree, state: PyTree, data: PyTree, key: jax.Array) -> dict:
        episode_key, adapt_key, predict_key = jax.random.split(key, 3)
        support, query = sampler(episode_key, data)
        adapted = learner.adapt(params, state, support, adapt_key, train=False)
        outputs, _ = learner.predict(params, adapted, query.x, predict_key, train=False)
        loss, metrics = criterion(outputs, query.y)
        return {"loss": loss, **metrics}

    chunk = 1 if jax.default_backend() == "cpu" else min(32, episodes)

    @jax.jit
    def evaluate(params: PyTree, state: PyTree, data: PyTree, key: jax.Array) -> dict:
        keys = jax.random.split(key, episodes)
        return jax.lax.map(
            lambda key: episode(params, state, data, key),
            keys,
            batch_size=None if chunk == 1 else chunk,
        )

    return lambda *arguments: jax.tree.map(np.asarray, evaluate(*arguments))
