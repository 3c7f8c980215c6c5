"""Testing a learner: fixed seed, many episodes, a mean with its confidence interval."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_jax.core import Criterion, MetaLearner, PyTree
from meta_jax.model_based.sequence import as_sequence, sequence_criterion
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
    learner: MetaLearner,
    sampler: Sampler,
    criterion: Criterion,
    *,
    episodes: int,
    mesh: Mesh | None = None,
) -> Callable[[PyTree, PyTree, PyTree, jax.Array], dict[str, np.ndarray]]:
    """A compiled test of a learner on freshly drawn episodes, with parameters left as they are.

    Args:
      learner: the method.
      sampler: draws one test episode.
      criterion: gives the metrics of an episode's queries.
      episodes: how many.
      mesh: from `task_mesh`, to share the episodes among several devices.

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

    return _over_episodes(episode, episodes, mesh)


def make_evaluate_sequences(
    learner: MetaLearner, sampler: Sampler, *, episodes: int, mesh: Mesh | None = None
) -> Callable[[PyTree, PyTree, PyTree, jax.Array], dict[str, np.ndarray]]:
    """As `make_evaluate`, by the sequence protocol (Santoro et al. 2016, section 4).

    All examples of an episode come one after another in random order; each is answered before its
    label is shown.

    Args:
      learner: one whose `adapt` gives the `logits` of its answers on the way, as those of
        `sequence_learner` do.
      sampler: draws one episode, of equally many examples for each class.
      episodes: how many.
      mesh: from `task_mesh`, to share the episodes among several devices.

    Returns:
      A function (params, state, data, key) -> loss and accuracy of all answers, and instance_1,
      instance_2, ..., the accuracy at that instance of a class; each [episodes].
    """

    def episode(params: PyTree, state: PyTree, data: PyTree, key: jax.Array) -> dict:
        episode_key, order_key, adapt_key = jax.random.split(key, 3)
        sequence = as_sequence(order_key, sampler(episode_key, data))
        adapted = learner.adapt(params, state, sequence, adapt_key, train=False)
        loss, metrics = sequence_criterion(adapted.logits, sequence.y)
        return {"loss": loss, **metrics}

    return _over_episodes(episode, episodes, mesh)


def _over_episodes(
    episode: Callable[..., dict], episodes: int, mesh: Mesh | None
) -> Callable[[PyTree, PyTree, PyTree, jax.Array], dict[str, np.ndarray]]:
    chunk = 1 if jax.default_backend() == "cpu" else min(32, episodes)

    def share(params: PyTree, state: PyTree, data: PyTree, keys: jax.Array) -> dict:
        return jax.lax.map(
            lambda key: episode(params, state, data, key),
            keys,
            batch_size=None if chunk == 1 else chunk,
        )

    if mesh is not None:
        everywhere, each = PartitionSpec(), PartitionSpec("task")
        share = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(everywhere, everywhere, everywhere, each),
            out_specs=each,
            check_vma=False,
        )

    @jax.jit
    def evaluate(params: PyTree, state: PyTree, data: PyTree, key: jax.Array) -> dict:
        return share(params, state, data, jax.random.split(key, episodes))

    def placed(*arguments: PyTree) -> dict:
        if mesh is not None:
            arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))
        return jax.tree.map(np.asarray, evaluate(*arguments))

    return placed
