"""Sources that know their best answers: what they draw, and that the answers are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch
from meta_jax.data.gaussian_process import Hyperparameters, covariance, gp, gp_posterior
from meta_jax.data.linear_regression import linear_regression, posterior
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.data.varying_sizes import with_random_shots
from meta_jax.lookup import UsageError

SIZE = EpisodeSize(1, 12, 8)
HYPER = Hyperparameters(jnp.float32(0.8), jnp.float32(0.7), jnp.float32(0.4))
KERNELS = ("rbf", "matern52", "periodic")


def draw(tasks, number=200, sample=None):
    sample = sample or tasks.sample
    keys = jax.random.split(jax.random.key(0), number)
    return jax.jit(jax.vmap(lambda key: sample(key, tasks.data)))(keys)


def exact(tasks, number=200):
    (answered,) = tasks.exact_answers.values()
    return draw(tasks, number, answered)


def assert_same(a, b):
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, atol=1e-5), a, b)


class TestKernels:
    def test_they_are_those_of_the_books(self):
        a, b = jnp.array([[0.3]]), jnp.array([[0.1], [0.7]])
        d = np.array([0.2, 0.4])
        expected = {
            "rbf": np.exp(-(d**2) / (2 * 0.64)),
            "matern52": (1 + np.sqrt(5) * d / 0.8 + 5 * d**2 / (3 * 0.64))
            * np.exp(-np.sqrt(5) * d / 0.8),
            "periodic": np.exp(-2 * np.sin(np.pi * d / 0.4) ** 2 / 0.64),
        }
        for kernel, values in expected.items():
            found = covariance(kernel, HYPER, a, b)
            np.testing.assert_allclose(found, 0.49 * values[None], rtol=1e-5)


class TestGaussianProcess:
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_the_posterior_is_that_of_the_joint_gaussian(self, kernel):
        rng = np.random.default_rng(0)
        x, y = rng.uniform(-2, 2, (7, 1)), rng.normal(size=(5, 1))
        mask = np.array([True, False, True, True, True])
        support = Batch(*(np.where(mask[:, None], a, np.nan) for a in (x[:5], y)), mask)
        found = gp_posterior(kernel, HYPER, 0.1, jax.tree.map(jnp.asarray, support), x[5:])
        points = np.concatenate([x[:5][mask], x[5:]])
        joint = np.asarray(covariance(kernel, HYPER, points, points), np.float64)
        joint += 0.01 * np.eye(6)
        gain = joint[4:, :4] @ np.linalg.inv(joint[:4, :4])
        np.testing.assert_allclose(found.mean, gain @ y[mask], atol=1e-4)
        variance = np.diag(joint[4:, 4:] - gain @ joint[:4, 4:])
        np.testing.assert_allclose(found.scale[:, 0] ** 2, variance, atol=1e-4)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_the_exact_posterior_is_calibrated_and_of_the_tasks_that_are_drawn(self, kernel):
        tasks = gp(kernel=kernel).tasks("test", SIZE, train=False)
        episodes, answers = exact(tasks)
        assert_same(episodes, draw(tasks))
        inside = abs(episodes.query.y - answers.mean) < 1.96 * answers.scale
        assert 0.93 < inside.mean() < 0.97
        error, blind = ((abs(y - episodes.query.y)).mean() for y in (answers.mean, 0))
        assert error < 0.6 * blind

    def test_contexts_have_all_sizes_from_the_smallest_on(self):
        tasks = gp(least_shots=3).tasks("train", SIZE, train=True)
        support = draw(tasks).support
        assert set(np.asarray(support.mask.sum(1)).tolist()) == set(range(3, 13))
        assert (np.diff(support.mask.astype(int)) <= 0).all()
        assert (
            gp(least_shots=12)
            .tasks("train", SIZE, train=True)
            .sample(jax.random.key(0), ())
            .support.mask
            is None
        )

    def test_points_and_targets_are_as_described(self):
        tasks = gp(noise=0.5).tasks("train", EpisodeSize(1, 40, 1), train=True)
        support = draw(tasks, 2000).support
        assert support.x.min() >= -2
        assert support.x.max() < 2
        # The output scale's mean square is 0.37.
        np.testing.assert_allclose((support.y**2).mean(), 0.37 + 0.25, rtol=0.1)

    def test_the_squared_error_asks_for_means_alone(self):
        tasks = gp(objective="squared_error").tasks("test", SIZE, train=False)
        assert exact(tasks)[1].shape == (200, 8, 1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kernel": "cosine"}, "unknown kernel 'cosine': choose one of rbf"),
            ({"noise": 0.0}, "noise=0.0 must be greater than 0"),
            ({"least_length": 2.0}, "length scales from 2.0 to 1.0"),
            ({"least_shots": 0}, "least_shots=0 must be at least 1"),
        ],
    )
    def test_mistakes_are_refused(self, settings, message):
        with pytest.raises(UsageError, match=message):
            gp(**settings)


class TestLinearRegression:
    def test_least_squares_is_exact_from_as_many_points_as_dimensions(self):
        for shots in (3, 8):
            source = linear_regression(dimensions=4, least_shots=shots)
            tasks = source.tasks("test", EpisodeSize(1, shots, 8), train=False)
            episodes, answers = exact(tasks)
            assert_same(episodes, draw(tasks))
            error = ((answers - episodes.query.y) ** 2).mean()
            # A direction that is not known costs its share of w^2.
            expected = 1.0 if shots == 3 else 0.0
            np.testing.assert_allclose(error, expected, atol=0.15 if expected else 1e-4)

    def test_the_posterior_is_numpys(self):
        rng = np.random.default_rng(0)
        x, y, q = rng.normal(size=(5, 3)), rng.normal(size=(5, 1)), rng.normal(size=(2, 3))
        mask = np.array([True, True, False, True, True])
        support = Batch(
            jnp.asarray(np.where(mask[:, None], x, np.nan)), jnp.asarray(y), jnp.asarray(mask)
        )
        x, y = x[mask], y[mask]
        inverse = np.linalg.inv(x.T @ x + 0.25 * np.eye(3))
        found = posterior(0.5, support, q)
        np.testing.assert_allclose(found.mean, q @ inverse @ x.T @ y, rtol=1e-4)
        variance = 0.25 * np.diag(q @ inverse @ q.T) + 0.25
        np.testing.assert_allclose(found.scale[:, 0] ** 2, variance, rtol=1e-4)
        # Without noise the targets are those of some w.
        y = np.where(mask[:, None], np.nan_to_num(support.x) @ np.array([[1.0], [2.0], [-1.0]]), 0)
        found = posterior(0.0, support._replace(y=jnp.asarray(y)), q)
        np.testing.assert_allclose(found.mean, q @ np.linalg.lstsq(x, y[mask])[0], rtol=1e-4)

    def test_with_noise_ridge_regression_is_calibrated(self):
        source = linear_regression(dimensions=4, noise=0.5, objective="gaussian_likelihood")
        tasks = source.tasks("test", SIZE, train=False)
        assert list(tasks.exact_answers) == ["ridge_regression"]
        episodes, answers = exact(tasks)
        inside = abs(episodes.query.y - answers.mean) < 1.96 * answers.scale
        assert 0.93 < inside.mean() < 0.97

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dimensions": 0}, "dimensions=0 must be at least 1"),
            ({"noise": -1.0}, "noise=-1.0 must be at least 0"),
        ],
    )
    def test_mistakes_are_refused(self, settings, message):
        with pytest.raises(UsageError, match=message):
            linear_regression(**settings)


class TestSinusoid:
    def test_the_best_one_is_found_from_five_points(self):
        tasks = load_source("sinusoid", vary_frequency=True).tasks("test", SIZE, train=False)
        episodes, answers = exact(tasks)
        assert_same(episodes, draw(tasks))
        assert ((answers - episodes.query.y) ** 2).mean() < 1e-3

    def test_frequencies_differ_where_they_are_asked_to(self):
        keys = jax.random.split(jax.random.key(0), 300)
        found = jax.vmap(lambda key: sample_sinusoid(key, 40, 1, vary_frequency=True).support)(keys)
        plain = jax.vmap(lambda key: sample_sinusoid(key, 40, 1).support)(keys)
        np.testing.assert_array_equal(found.x, plain.x)
        waves = jax.vmap(best_at, (0, None))(found, jnp.linspace(0.6, 1.4, 81))
        best = np.linspace(0.6, 1.4, 81)[np.asarray(waves.argmin(1))]
        assert 0.78 < best.min() < 0.83
        assert 1.17 < best.max() < 1.22

    def test_a_likelihood_has_no_exact_answer_without_noise(self):
        source = load_source("sinusoid", vary_frequency=True, objective="gaussian_likelihood")
        assert not source.tasks("test", SIZE, train=False).exact_answers


def best_at(support, frequencies):
    """The squared error of the best sinusoid of each frequency."""

    def error(w):
        basis = jnp.concatenate([jnp.sin(w * support.x), jnp.cos(w * support.x)], 1)
        return ((basis @ jnp.linalg.lstsq(basis, support.y)[0] - support.y) ** 2).sum()

    return jax.vmap(error)(frequencies)


def test_random_shots_leave_the_rows_as_they_are():
    rows = jnp.arange(4.0)[:, None]
    found = with_random_shots(jax.random.key(0), Batch(rows, rows), 2)
    np.testing.assert_array_equal(found.x, rows)
    assert 2 <= int(found.mask.sum()) <= 4
