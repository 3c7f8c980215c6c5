"""Tests of a learner on episodes, beside learners without training and exact answers."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from meta_jax import registry
from meta_jax.core import (
    Episode,
    MetaLearner,
    Objective,
    PyTree,
    Sample,
    Tasks,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.data.source import TaskSource
from meta_jax.lookup import UsageError
from meta_jax.networks.normalisation import is_transductive
from meta_jax.training.evaluation import (
    MeanCI,
    confidence_interval,
    in_query_chunks,
    make_evaluate,
)
from meta_jax.training.outer_step import task_mesh
from meta_jax.training.trained import normalisation_of

_SPLITS = ("train", "val", "test", "trainval")
_INSTANCE = "instance_"  # what begins the metrics of the sequence protocol


class Asked(NamedTuple):
    """What a test asks: which episodes, and how many."""

    split: str = "test"
    episodes: int = 1000
    seed: int = 0
    chunk: int | None = None  # episodes that a device evaluates at a time; the result is the same
    query_chunk: int | None = None  # queries answered at a time, likewise; all if None


class Tested(NamedTuple):
    """What a test found."""

    objective: Objective
    metrics: dict[str, MeanCI]  # over episodes; shares are in per cent

    @property
    def score(self) -> MeanCI:
        """The metric that a result reports."""
        return self.metrics[self.objective.metric]

    @property
    def instances(self) -> tuple[MeanCI, ...]:
        """By the sequence protocol, the metric at the 1st, 2nd, ... instance of a class."""
        names = [f"{_INSTANCE}{i + 1}" for i in range(len(self.metrics))]
        return tuple(self.metrics[name] for name in names if name in self.metrics)

    def text(self) -> str:
        """The score as people read it."""
        return score_text(self.score, self.objective)


def score_text(score: MeanCI, objective: Objective) -> str:
    """A score as people read it."""
    if objective.unit == "%":
        return f"{score.mean:.2f} % ± {score.ci95:.2f}"
    return f"{score.mean:.3f} ± {score.ci95:.3f}"


def make_test(
    learner: MetaLearner, tasks: Tasks, asked: Asked
) -> Callable[[PyTree, PyTree], Tested]:
    """Builds a test that is compiled once, on episodes drawn from a fixed seed.

    The same seed gives the same episodes to every learner and every time.

    Args:
      learner: The method.
      tasks: Tasks of the test.
      asked: Split, number and seed of the episodes.

    Returns:
      A function (params, state) -> what was found.
    """
    mesh = task_mesh(asked.episodes)
    evaluate = make_evaluate(
        learner, tasks.sample, episodes=asked.episodes, mesh=mesh, chunk=asked.chunk
    )
    key = jax.random.fold_in(jax.random.key(asked.seed), _split_number(asked.split))

    def test(params: PyTree, state: PyTree) -> Tested:
        return tested_from(tasks.objective, evaluate(params, state, tasks.data, key))

    return test


def answering_in_chunks(learner: MetaLearner, tasks: Tasks, chunk: int | None) -> MetaLearner:
    """The learner, whose tests answer some queries at a time; the same for None.

    Args:
      learner: The method.
      tasks: Tasks of the test.
      chunk: Queries that are answered at a time.

    Raises:
      UsageError: its answers depend on the other queries.
    """
    if chunk is None:
        return learner
    chunked = in_query_chunks(learner, tasks.objective, chunk)
    params, state = runs.initial_shapes(learner, tasks)
    arguments = (params, state, runs.example_task(tasks), jax.random.key(0))
    of_all, of_some = (jax.eval_shape(each.evaluate, *arguments) for each in (learner, chunked))
    if is_transductive(normalisation_of(learner.config)) or set(of_all) != set(of_some):
        name = (learner.config or {}).get("name", "this learner")
        raise UsageError(
            f"answers of {name} depend on the other queries of an episode: leave query_chunk out"
        )
    return chunked


def tested_from(objective: Objective, metrics: Mapping[str, np.ndarray]) -> Tested:
    """What a test found, from the metrics of each episode."""
    scores = {
        name: confidence_interval(_factor(name, objective) * values)
        for name, values in metrics.items()
    }
    return Tested(objective, scores)


def _split_number(split: str) -> int:
    if split in _SPLITS:
        return 1 + _SPLITS.index(split)
    return zlib.crc32(split.encode())


def _factor(metric: str, objective: Objective) -> int:
    """What a metric is multiplied by: shares are reported in per cent."""
    is_share = metric == objective.metric or metric.startswith(_INSTANCE)
    return 100 if objective.unit == "%" and is_share else 1


def test_baselines(source: TaskSource, tasks: Tasks, asked: Asked) -> dict[str, Tested]:
    """Tests what is shown beside a result: learners without training, and exact answers.

    Args:
      source: Source, which names the learners.
      tasks: Tasks of the test, which know their exact answers.
      asked: Split, number and seed of the episodes.
    """
    found = {}
    for name in source.baselines:
        factory = registry.find("learner", name).factory
        takes_objective = "objective" in registry.parameters(factory)
        learner = factory(**({"objective": tasks.objective} if takes_objective else {}))
        like = jax.eval_shape(learner.init, jax.random.key(0), runs.example_task(tasks))
        params, state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        found[name] = make_test(learner, tasks, asked)(params, state)
    return found | test_exact_answers(tasks, asked)


def test_exact_answers(tasks: Tasks, asked: Asked) -> dict[str, Tested]:
    """Tests the exact answers of tasks that know them, on the episodes of a learner's test."""
    repeats = _repeater(tasks.objective)
    return {
        name: make_test(repeats, tasks._replace(sample=_with_answers(answered)), asked)({}, {})
        for name, answered in tasks.exact_answers.items()
    }


def _with_answers(answered: Sample) -> Sample:
    """Draws episodes whose queries are their own answers; nothing is learned from the support."""

    def sample(key: jax.Array, data: PyTree, /) -> Episode:
        (_, query), outputs = answered(key, data)
        answers = query._replace(x=outputs)
        return Episode(answers, answers)

    return sample


def _repeater(objective: Objective) -> MetaLearner:
    """The learner that answers a query with the query."""

    def adapt(
        params: PyTree, state: PyTree, support: Any, key: jax.Array, *, train: bool
    ) -> PyTree:
        return state

    def predict(
        params: PyTree,
        adapted: PyTree,
        x: PyTree,
        key: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        return x, adapted

    return MetaLearner(
        lambda key, task: ({}, {}),
        adapt,
        predict,
        supervised_loss(adapt, predict, objective),
        supervised_evaluate(adapt, predict, objective),
    )
