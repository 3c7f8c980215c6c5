"""What a test finds and what is reported of it, inside one process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import testing
from experiments.command_line import RunError
from experiments.testing import Asked
from meta_jax.core import (
    RESERVED_METRICS,
    Batch,
    Episode,
    MetaLearner,
    Objective,
    Tasks,
    supervised_evaluate,
)
from meta_jax.data.source import TaskSource
from meta_jax.objectives import Gaussian, cross_entropy, gaussian_likelihood, squared_error
from meta_jax.training.evaluation import MeanCI

CONFIG = {
    "learner": {"name": "prototypical", "network": {"name": "conv4", "normalisation": "batch"}},
    "tasks": {"name": "glyphs"},
    "run": {"ways": 5, "shots": 1, "queries": 15, "steps": 10, "seed": 3},
}


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


def scored(objective, **metrics):
    return testing.Tested(objective, {name: MeanCI(*score) for name, score in metrics.items()})


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


def test_the_result_says_what_was_asked_and_all_metrics():
    found = testing.result(
        CONFIG,
        scored(cross_entropy, accuracy=(91.23456, 0.5), loss=(0.25, 0.01)),
        Asked(),
        seconds=1.26,
    )
    assert found.record == {
        "learner": "prototypical",
        "tasks": "glyphs",
        "split": "test",
        "ways": 5,
        "shots": 1,
        "queries": 15,
        "episodes": 1000,
        "accuracy": 91.2346,
        "ci95": 0.5,
        "normalisation": "batch",
        "transductive": True,
        "steps": 10,
        "seed": 3,
        "seconds": 1.3,
        "metrics": {"accuracy": [91.2346, 0.5], "loss": [0.25, 0.01]},
    }
    # No metric of somebody's own may have one of these names.
    assert found.record.keys() - {"accuracy"} <= RESERVED_METRICS
    assert testing.line(found) == (
        "test accuracy 91.23 % ± 0.50 (5-way 1-shot, 1000 episodes, normalisation batch)"
    )


@pytest.mark.parametrize("score", [(float("nan"), 0.0), (float("inf"), float("nan"))])
def test_a_score_that_is_not_finite_is_no_result(score):
    with pytest.raises(RunError, match=r"test mse is (nan|inf), so there is no result"):
        testing.result(CONFIG, scored(squared_error, mse=score), Asked(), seconds=0)


def test_answers_that_are_not_numbers_are_no_result_though_their_accuracy_is_one():
    metrics = {"accuracy": (0.0, 0.0), "loss": (float("nan"), float("nan"))}
    with pytest.raises(RunError, match="test loss is nan"):
        testing.result(CONFIG, scored(cross_entropy, **metrics), Asked(), seconds=0)


@pytest.mark.parametrize(
    ("mode", "few_shot", "sequence"),
    [
        ("batch", True, True),
        ("support", False, True),  # the moments of inputs yet to come
        ("running", False, False),
        ("layer", False, False),
    ],
)
def test_a_sequence_is_transductive_where_moments_are_of_its_own_inputs(mode, few_shot, sequence):
    network = {"name": "conv4", "normalisation": mode}
    config = {**CONFIG, "learner": {"name": "mann", "network": network}}
    metrics = {"accuracy": (50.0, 1.0)}
    found = testing.result(config, scored(cross_entropy, **metrics), Asked(), seconds=0)
    assert found.record["transductive"] is few_shot
    metrics |= {"instance_1": (30.0, 1.0), "instance_2": (70.0, 1.0)}
    found = testing.result(config, scored(cross_entropy, **metrics), Asked(), seconds=0)
    assert found.record["transductive"] is sequence
    assert [score.mean for score in found.tested.instances] == [30.0, 70.0]
    assert "sequences of 5 classes x 2 instances" in testing.line(found)


def test_a_learner_without_a_network_has_no_normalisation():
    config = {**CONFIG, "learner": {"name": "meta_networks"}}
    found = testing.result(config, scored(cross_entropy, accuracy=(9.0, 1.0)), Asked(), seconds=0)
    assert (found.record["normalisation"], found.record["transductive"]) == ("none", False)


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


def test_a_table_has_the_score_at_every_instance():
    curves = {"trained": [MeanCI(20.0, 1.0), MeanCI(90.25, 1.0)], "new": [MeanCI(1.0, 0.0)]}
    assert testing.instance_table(curves).splitlines() == [
        "instance     1     2",
        "trained   20.0  90.2",
        "new        1.0",
    ]
