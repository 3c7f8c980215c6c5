"""Elimination against LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.backend import use_backend
from meta_jax.linear_systems import eliminate, solve_positive_definite

pytestmark = pytest.mark.usefixtures("x64")


def positive_definite(n, seed=0):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a @ a.T + 0.1 * np.eye(n)


def test_the_factor_is_that_of_cholesky():
    a, b = positive_definite(6), np.random.default_rng(1).normal(size=(6, 3))
    factor, solved = jax.jit(eliminate)(a, b)
    np.testing.assert_allclose(factor, np.linalg.cholesky(a), atol=1e-10)
    np.testing.assert_allclose(solved, np.linalg.solve(np.linalg.cholesky(a), b), atol=1e-10)


def test_rows_that_depend_on_others_are_passed_over():
    """Least squares of the smallest norm, from points of which the third repeats two."""
    x = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [1.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    y, query = x @ np.array([[1.0], [-1.0], [2.0]]), np.random.default_rng(2).normal(size=(5, 3))
    _, solved = jax.jit(eliminate)(x @ x.T, np.concatenate([y, x @ query.T], 1))
    np.testing.assert_allclose(
        solved[:, 1:].T @ solved[:, :1], query @ np.linalg.pinv(x) @ y, atol=1e-10
    )
    np.testing.assert_array_equal(solved[2:], 0)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_it_solves_and_is_differentiated(backend):
    a, b = positive_definite(5), np.random.default_rng(1).normal(size=(5, 2))

    def loss(a, b):
        return (jnp.sin(solve_positive_definite(a @ a.T, b)) ** 2).sum()

    def expected(a, b):
        return (jnp.sin(jnp.linalg.solve(a @ a.T, b)) ** 2).sum()

    with use_backend(backend):
        found = jax.jit(solve_positive_definite)(a, b)
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(a, b)
    np.testing.assert_allclose(found, np.linalg.solve(a, b), atol=1e-10)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(expected, (0, 1)))(a, b)
    np.testing.assert_allclose(value, wanted, rtol=1e-10)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


def test_no_batched_lapack_is_in_a_program_for_a_cpu():
    a = np.stack([positive_definite(4, seed) for seed in range(3)])
    solve = jax.jit(jax.vmap(solve_positive_definite))
    assert "lapack" not in solve.lower(a, a).as_text()
    np.testing.assert_allclose(solve(a, a), np.tile(np.eye(4), (3, 1, 1)), atol=1e-10)
