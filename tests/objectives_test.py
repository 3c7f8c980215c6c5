"""Objectives by closed-form values, padding and the mistakes they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch
from meta_jax.lookup import UsageError
from meta_jax.objectives import (
    as_objective,
    check_batch,
    check_kind,
    cross_entropy,
    cross_entropy_loss,
    masked_mean,
    row_mask,
    squared_error,
    squared_error_loss,
    without_padding,
)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    loss, metrics = cross_entropy_loss(logits, jnp.array([[0.0, 1.0], [1.0, 0.0]]))
    np.testing.assert_allclose(loss, (np.log(4 / 3) + np.log(2)) / 2, rtol=1e-6)
    assert metrics["accuracy"] == 0.5  # a tie is wrong


def test_squared_error_by_hand():
    outputs, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 4.0]])
    loss, metrics = squared_error_loss(outputs, y)
    assert loss == metrics["mse"] == (4 + 9) / 4


@pytest.mark.parametrize("objective", [cross_entropy, squared_error])
def test_padding_counts_in_no_objective(objective):
    outputs = jax.random.normal(jax.random.key(0), (3, 2))
    y = jnp.eye(2)[jnp.array([0, 1, 1])]
    rubbish = jnp.array([[jnp.inf, -7.0]])
    padded = objective.loss(
        jnp.concatenate([outputs, rubbish]),
        jnp.concatenate([y, jnp.ones((1, 2))]),
        jnp.array([True, True, True, False]),
    )
    plain = objective.loss(outputs, y, None)
    assert jax.tree.structure(padded) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    nothing = objective.loss(outputs, y, jnp.zeros(3, bool))
    assert all(leaf == 0 for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("objective", [cross_entropy, squared_error])
@pytest.mark.parametrize(
    ("outputs", "y"),
    [((10, 2), (10, 1)), ((10, 1), (10,)), ((10,), (10,)), ((10, 2), (9, 2))],
)
def test_shapes_that_would_broadcast_are_refused(objective, outputs, y):
    with pytest.raises(ValueError, match=r"y"):
        objective.loss(jnp.ones(outputs), jnp.ones(y), None)


@pytest.mark.parametrize("objective", [cross_entropy, squared_error])
def test_integer_labels_are_refused_with_the_remedy(objective):
    with pytest.raises(ValueError, match=r"one-hot.*int32\[3\].*jax\.nn\.one_hot"):
        objective.loss(jnp.ones((3, 5)), jnp.array([0, 1, 2]), None)


def test_objectives_by_name():
    assert as_objective("cross_entropy") is cross_entropy
    assert as_objective(squared_error) is squared_error
    own = as_objective("meta_jax.objectives:squared_error")
    assert own.loss is squared_error.loss
    assert own.name == "meta_jax.objectives:squared_error"
    with pytest.raises(UsageError, match=r"unknown objective 'hinge'.*cross_entropy"):
        as_objective("hinge")
    with pytest.raises(UsageError, match="is a float"):
        as_objective("math:pi")


def test_a_learner_of_classes_refuses_regression():
    with pytest.raises(UsageError, match=r"siamese is for classification.*regression"):
        check_kind(squared_error, "classification", "siamese")
    check_kind(cross_entropy, "classification", "siamese")


def test_rows_and_means():
    batch = Batch({"a": jnp.zeros((3, 2))}, jnp.zeros((3, 1)))
    assert row_mask(batch).tolist() == [True] * 3
    mask = jnp.array([True, False, True])
    assert row_mask(batch._replace(mask=mask)) is mask
    assert masked_mean(jnp.array([1.0, 5.0, 3.0]), mask) == 2
    assert without_padding(jnp.ones((3, 1)), mask).ravel().tolist() == [1, 0, 1]


def test_batches_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"support needs the same number of rows.*x 3, y 2"):
        check_batch(Batch(jnp.zeros((3, 2)), jnp.zeros((2, 1))), "support")
    with pytest.raises(ValueError, match=r"query needs.*at least one.*x 0"):
        check_batch(Batch(jnp.zeros((0, 2)), jnp.zeros((0, 1))), "query")
    check_batch(Batch({"a": jnp.zeros((3, 2))}, jnp.zeros((3, 1))), "support")
