import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour
from meta_jax.objectives import squared_error

KEY = jax.random.key(0)


def answer(support, x):
    learner = nearest_neighbour()
    adapted = learner.adapt({}, {}, support, KEY, train=False)
    logits, state = learner.predict({}, adapted, x, KEY, train=False)
    assert state == {}
    return logits


def test_logits_are_minus_the_distance_to_the_nearest_of_each_class():
    # Class 0 at 0 and 10, class 1 at 4; the row at 9 is padding.
    support = Batch(
        jnp.array([[[0.0]], [[4.0]], [[10.0]], [[9.0]]]),
        jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),
        jnp.array([True, True, True, False]),
    )
    logits = answer(support, jnp.array([[[1.0]], [[8.0]]]))
    np.testing.assert_array_equal(logits, [[-1.0, -9.0], [-4.0, -16.0]])


def test_inputs_may_be_trees_and_unsigned():
    x = {"a": jnp.array([[1], [250]], jnp.uint8), "b": jnp.zeros((2, 2))}
    logits = answer(Batch(x, jnp.eye(2)), jax.tree.map(lambda leaf: leaf[:1], x))
    np.testing.assert_array_equal(logits, [[0.0, -(249.0**2)]])


def test_a_class_without_examples_costs_a_finite_loss():
    support = Batch(jnp.array([[0.0], [1.0]]), jnp.eye(3)[:2])
    task = Episode(support, Batch(jnp.array([[0.2]]), jnp.eye(3)[:1]))
    metrics = nearest_neighbour().evaluate({}, {}, task, KEY)
    assert metrics["accuracy"] == 1
    assert np.isfinite(metrics["loss"])


def test_it_classifies_alone_and_asks_for_one_hot_labels():
    with pytest.raises(UsageError, match="nearest_neighbour is for classification"):
        nearest_neighbour(objective=squared_error)
    with pytest.raises(ValueError, match="one-hot"):
        answer(Batch(jnp.zeros((2, 1)), jnp.arange(2)), jnp.zeros((1, 1)))
