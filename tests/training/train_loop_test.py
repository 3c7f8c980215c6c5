"""Many outer steps in one compiled call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import LossAux
from meta_jax.training.outer_step import (
    make_outer_step,
)
from meta_jax.training.train_loop import SoFar, make_train_loop
from tests.training.small_runs import (
    LEARNER,
    OPTIMIZER,
    dataset,
    fresh_state,
    no_task,
    of_loss,
    outer_step,
    sample,
    with_plain_key,
    without_data,
)

pytestmark = pytest.mark.usefixtures("x64")

TRAIN = make_train_loop(outer_step())


def assert_bitwise_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, with_plain_key(actual), with_plain_key(expected))


def test_where_a_run_is_split_makes_no_difference():
    data = dataset()
    ends = []
    for parts in ((7,), (2, 5), (1, 2, 4)):
        train_state = fresh_state()
        for steps in parts:
            before = int(train_state.step)
            train_state, metrics, finite = TRAIN(train_state, data, steps)
            assert finite
            assert train_state.step == before + steps  # more steps, not up to a step
            assert np.isfinite(metrics["loss"])
        ends.append(train_state)
    assert_bitwise_equal(ends[0], ends[1])
    assert_bitwise_equal(ends[0], ends[2])
    other = TRAIN(fresh_state(seed=1), data, 7)[0]
    assert (
        other.params["network"]["layer1"]["kernel"] != ends[0].params["network"]["layer1"]["kernel"]
    ).all()


def test_the_metrics_of_a_run_are_means_over_its_steps():
    data = dataset()
    train_state, first, _ = TRAIN(fresh_state(), data, 1)
    _, second, _ = TRAIN(train_state, data, 1)
    _, both, _ = TRAIN(fresh_state(), data, 2)
    for name, value in both.items():
        np.testing.assert_allclose(value, (first[name] + second[name]) / 2, rtol=1e-12)
    assert set(both) == {"loss", "accuracy", "gradient_norm"}


def test_no_more_steps_do_nothing():
    data = dataset()
    train_state, _, _ = TRAIN(fresh_state(), data, 2)
    expected = jax.tree.map(jnp.copy, train_state)
    for steps in (0, -1):
        train_state, _, finite = TRAIN(train_state, data, steps)
        assert_bitwise_equal(train_state, expected)
        assert finite


def test_several_calls_give_bitwise_the_means_of_one():
    whole = TRAIN(fresh_state(), dataset(), 5)
    half, metrics, _ = TRAIN(fresh_state(), dataset(), 2)
    both = TRAIN(half, dataset(), 3, SoFar(2, {name: float(m) for name, m in metrics.items()}))
    for ours, theirs in zip(*map(jax.tree.leaves, (both[1], whole[1])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_it_compiles_once_however_many_steps_are_asked_for():
    draws = []

    def counted(key, data):
        draws.append(None)
        return sample(key, data)

    step = make_outer_step(LEARNER, OPTIMIZER, counted, task_batch=2)
    train, train_state = make_train_loop(step), fresh_state()
    train_state, _, _ = train(train_state, dataset(), 1)
    traced = len(draws)
    for steps in (2, 3, 4):
        train_state, _, _ = train(train_state, dataset(), steps)
    assert len(draws) == traced > 0
    assert train.programs() == 1


def countdown(then):
    """The loss is p, with gradient 1, until p comes to nothing; `then` is added to it."""

    def loss(params, state, task, key):
        del task, key
        p = params["p"]
        return p + then(p), LossAux(state, {})

    return of_loss(loss)


@pytest.mark.parametrize(
    ("then", "culprit"),
    [
        (lambda p: jnp.where(p > 0.1, 0.0, jnp.nan), "loss"),
        # The root of zero, whose derivative is infinite: a finite loss with a gradient of NaN.
        (lambda p: jnp.sqrt(jnp.where(p > 0.1, 1.0, p - p)), "gradient_norm"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_with_its_step(then, culprit):
    learner, optimizer = countdown(then), optax.sgd(0.25)
    train = make_train_loop(make_outer_step(learner, optimizer, no_task, task_batch=1))
    # p is 1, 3/4, 1/2, 1/4, and then 0.
    train_state, metrics, finite = train(without_data(learner, optimizer), (), 4)
    assert finite
    np.testing.assert_allclose(train_state.params["p"], 0)
    train_state, metrics, finite = train(train_state, (), 100)
    assert not finite
    assert train_state.step == 5
    assert [name for name in ("loss", "gradient_norm") if np.isnan(metrics[name])] == [culprit]
