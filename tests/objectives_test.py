"""Objectives by closed-form values, padding and the mistakes they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from meta_jax.core import (
    RESERVED_METRICS,
    Batch,
    Episode,
    check_metrics,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.lookup import UsageError
from meta_jax.objectives import (
    Gaussian,
    as_objective,
    check_batch,
    check_kind,
    cross_entropy,
    cross_entropy_loss,
    gaussian,
    gaussian_likelihood_loss,
    masked_mean,
    row_mask,
    squared_error,
    squared_error_loss,
    without_padding,
)
from meta_jax.optimization_based.maml import maml
from tests.small_networks import IDENTITY

KEY = jax.random.key(0)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    loss, metrics = cross_entropy_loss(logits, jnp.array([[0.0, 1.0], [1.0, 0.0]]))
    np.testing.assert_allclose(loss, (np.log(4 / 3) + np.log(2)) / 2, rtol=1e-6)
    assert metrics["accuracy"] == 0.5  # a tie is wrong


def accuracy(logits, y):
    return float(cross_entropy_loss(jnp.asarray(logits), jnp.asarray(y))[1]["accuracy"])


def test_a_smoothed_label_counts_by_its_largest_entry():
    y = [[0.9, 0.1], [0.1, 0.9]]
    assert accuracy([[0.0, 5.0], [5.0, 0.0]], y) == 0
    assert accuracy([[5.0, 0.0], [5.0, 0.0]], y) == 0.5
    assert accuracy([[1.0, 1.0], [-7.0, -6.0]], y) == 0.5  # a tie is wrong
    assert accuracy([[-5.0, -5.0, -1.0]], [[0.0, 0.5, 0.5]]) == 1  # either of two


def test_a_row_without_a_label_counts_as_wrong():
    y = jax.nn.one_hot(jnp.array([0, 7]), 2)  # there is no class 7
    assert accuracy([[5.0, 0.0], [5.0, 0.0]], y) == 0.5
    assert accuracy(-jnp.ones((2, 2)), jnp.zeros((2, 2))) == 0


def test_the_accuracy_of_one_hot_labels_is_that_of_the_largest_logit():
    logits = np.random.default_rng(0).normal(size=(200, 4))
    labels = np.random.default_rng(1).integers(0, 4, 200)
    expected = (logits.argmax(1) == labels).mean()
    assert 0.1 < expected < 0.4
    np.testing.assert_allclose(accuracy(logits, np.eye(4)[labels]), expected, rtol=1e-6)


def test_cross_entropy_needs_two_ways():
    with pytest.raises(UsageError, match=r"of 1 way is right.*at least 2 ways.*squared_error"):
        cross_entropy_loss(jnp.ones((3, 1)), jnp.ones((3, 1)))
    assert squared_error_loss(jnp.ones((3, 1)), jnp.zeros((3, 1)))[0] == 1


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


@pytest.mark.parametrize(
    "mask", [jnp.ones((3, 1), bool), jnp.ones(1, bool), jnp.ones(3), jnp.ones(3, int)]
)
def test_masks_that_would_broadcast_or_weigh_are_refused(mask):
    values, y = jnp.ones(3), jnp.eye(3)
    for objective in (cross_entropy, squared_error):
        with pytest.raises(ValueError, match=r"mask must be bool \[3\]"):
            objective.loss(y, y, mask)
    for call in (masked_mean, without_padding):
        with pytest.raises(ValueError, match=r"mask must be bool \[3\]"):
            call(values if call is masked_mean else y, mask)
    with pytest.raises(ValueError, match="query"):
        check_batch(Batch(y, y, mask), "query")
    with pytest.raises(ValueError, match=r"values must be \[n\].*not \[3, 1\]"):
        masked_mean(values[:, None], mask)


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
    with pytest.raises(UsageError, match=r"not a function.*squared_error.*meta_jax\.Objective"):
        as_objective(lambda outputs, y, mask: 0.0)
    with pytest.raises(UsageError, match="not a NoneType"):
        maml(IDENTITY, objective=None)


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


def adapt(params, state, support, key, *, train):
    return state


def predict(params, adapted, x, key, *, train, mask=None):
    return x, adapted


def measure(objective, mask=None):
    batch = Batch(jnp.eye(3), jnp.eye(3))
    task = Episode(batch, batch._replace(mask=mask))
    return supervised_evaluate(adapt, predict, objective)({}, {}, task, KEY)


def test_queries_of_padding_alone_measure_nothing():
    assert measure(squared_error) == {"loss": 0, "mse": 0}
    assert measure(squared_error, jnp.arange(3) < 1) == {"loss": 0, "mse": 0}
    nothing = measure(squared_error, jnp.zeros(3, bool))
    assert set(nothing) == {"loss", "mse"}
    assert all(np.isnan(value) for value in nothing.values())


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "split", "step", "ways", "seed"])
def test_metrics_with_a_name_of_the_run_are_refused(name):
    with pytest.raises(UsageError, match=f"a metric is called '{name}'.*rename it"):
        check_metrics(["accuracy", name])
    own = squared_error._replace(loss=lambda *a: (jnp.ones(()), {name: jnp.zeros(())}))
    with pytest.raises(UsageError, match=f"'{name}'"):
        measure(own)
    assert name in RESERVED_METRICS
    check_metrics(["accuracy", "mse", "instance_1"])


@pytest.mark.parametrize("build", [supervised_loss, supervised_evaluate])
@pytest.mark.parametrize("mask", [jnp.ones((3, 1), bool), jnp.ones(2, bool), jnp.ones(3)])
def test_a_query_that_does_not_fit_is_refused_before_anything_is_computed(build, mask):
    own = squared_error._replace(loss=lambda *a: (jnp.ones(()), {}))  # which checks nothing
    batch = Batch(jnp.eye(3), jnp.eye(3))
    with pytest.raises(ValueError, match="query"):
        build(None, None, own)({}, {}, Episode(batch, batch._replace(mask=mask)), KEY)


class TestGaussianLikelihood:
    Y = jnp.array([[0.5, 1.0], [2.0, -1.0], [9.0, 9.0]])
    OUTPUTS = Gaussian(
        jnp.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), jnp.array([[1.0, 0.5], [2.0, 0.1], [1, 1]])
    )
    MASK = jnp.array([True, True, False])

    def test_it_is_scipys_density_and_the_share_within_two_scales(self):
        loss, metrics = gaussian_likelihood_loss(self.OUTPUTS, self.Y, self.MASK)
        mean, scale = (np.asarray(leaf)[:2] for leaf in self.OUTPUTS)
        expected = scipy.stats.norm.logpdf(np.asarray(self.Y)[:2], mean, scale).mean()
        np.testing.assert_allclose(metrics["log_likelihood"], expected, rtol=1e-6)
        np.testing.assert_allclose(loss, -expected, rtol=1e-6)
        np.testing.assert_allclose(metrics["mse"], (0.25 + 0 + 1 + 4) / 4)
        assert metrics["coverage"] == 0.75

    def test_a_calibrated_prediction_covers_95_per_cent(self):
        y = jax.random.normal(KEY, (100_000, 1))
        outputs = Gaussian(jnp.zeros_like(y), jnp.ones_like(y))
        loss, metrics = gaussian_likelihood_loss(outputs, y)
        assert abs(float(metrics["coverage"]) - 0.95) < 0.003
        assert abs(float(loss) - 0.5 * np.log(2 * np.pi * np.e)) < 0.01  # the entropy

    def test_a_bound_of_the_scale_bounds_the_likelihood(self):
        outputs = gaussian(jnp.array([[0.0, -50.0]]), 0.1)
        _, metrics = gaussian_likelihood_loss(outputs, jnp.zeros((1, 1)))
        np.testing.assert_allclose(metrics["log_likelihood"], 1.3836, atol=1e-3)

    def test_outputs_without_a_scale_are_refused(self):
        with pytest.raises(UsageError, match=r"a mean and a scale.*squared_error"):
            gaussian_likelihood_loss(jnp.zeros((3, 2)), self.Y)
        with pytest.raises(ValueError, match="differ in shape"):
            gaussian_likelihood_loss(self.OUTPUTS, self.Y[:, :1])

    def test_it_is_found_by_its_name_and_says_what_it_takes(self):
        objective = as_objective("gaussian_likelihood")
        assert (objective.metric, objective.maximise) == ("log_likelihood", True)
        assert objective.outputs == "gaussian"
        assert squared_error.outputs == "array"
