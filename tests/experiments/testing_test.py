"""What a test finds, inside one process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import testing
from experiments.testing import Asked
from meta_jax.core import Batch, Episode, MetaLearner, Objective, Tasks, supervised_evaluate
from meta_jax.data.source import TaskSource
from meta_jax.objectives import Gaussian, cross_entropy, gaussian_likelihood


def error_loss(outputs, y, mask):
    value = jnp.abs(outputs - y).mean()
    return value, {"mae": value}


def constant_learner(objective):
    """One that answers [1, 0, ...] whatever it is asked."""

    def adapt(params, state, support, key, *, train):
        return support.y.shape[1]

    def predict(params, ways, x, key, *, train, mask=None):
        return jnp.eye(ways)[0] * jnp.ones((x.shape[0], 1)), {}

    evaluate = supervised_evaluate(adapt, predict, objective)
    return MetaLearner(lambda key, task: ({}, {}), adapt, predict, None, evaluate)


def tasks(objective):
    batch = Batch(jnp.zeros((4, 2)), jnp.eye(4))
    return Tasks(lambda key, data: Episode(batch, batch), (), objective)


def test_shares_are_in_per_cent_and_other_metrics_are_not():
    found = testing.make_test(
        constant_learner(cross_entropy), tasks(cross_entropy), Asked(episodes=2)
    )({}, {})
    assert found.score == (25.0, 0.0)
    assert 1 < found.metrics["loss"].mean < 2
    assert found.text() == "25.00 % ± 0.00"
    mae = Objective(error_loss, "mae", maximise=False, kind="classification", name="own:mae")
    found = testing.make_test(constant_learner(mae), tasks(mae), Asked(episodes=2))({}, {})
    assert found.score.mean == pytest.approx(0.375)
    assert found.text() == "0.375 ± 0.000"


def test_baselines_are_tested_beside_it():
    source = TaskSource(None, ("test",), baselines=("nearest_neighbour",))
    x = jnp.arange(4.0)[:, None]
    labelled = Episode(Batch(x, jnp.eye(4)), Batch(x + 0.1, jnp.eye(4)))
    drawn = Tasks(lambda key, data: labelled, (), cross_entropy)
    found = testing.test_baselines(source, drawn, Asked(episodes=2))
    assert found["nearest_neighbour"].score == (100.0, 0.0)


def test_exact_answers_are_tested_on_the_same_episodes():
    def sample(key, data):
        batch = Batch(*(jax.random.normal(k, (3, 1)) for k in jax.random.split(key)))
        return Episode(batch, batch._replace(mask=jnp.array([True, False, True])))

    def nearly(key, data):
        episode = sample(key, data)
        return episode, Gaussian(episode.query.y + 0.5, jnp.full((3, 1), 0.1))

    source = TaskSource(None, ("test",))
    drawn = Tasks(sample, (), gaussian_likelihood, {"nearly": nearly})
    (tested,) = testing.test_baselines(source, drawn, Asked(episodes=4)).values()
    np.testing.assert_allclose(tested.metrics["mse"], (0.25, 0), atol=1e-6)
    np.testing.assert_allclose(
        tested.score.mean, scipy.stats.norm.logpdf(5) + np.log(10), rtol=1e-5
    )
    assert tested.metrics["coverage"].mean == 0
