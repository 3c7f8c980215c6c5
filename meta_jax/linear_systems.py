"""Systems of linear equations with positive definite matrices, solved by elimination.

Batches of LAPACK calls are not for programs on several CPU devices: each call waits for threads of
a pool that all devices share, and where all of them wait, none goes on (jaxlib 0.10 to 0.11).
"""

import functools

import chex
import jax
import jax.numpy as jnp

from meta_jax.backend import on_cpu
from meta_jax.core import Array


def eliminate(matrix: Array, right: Array, *, least: float = 1e-6) -> tuple[Array, Array]:
    """Cholesky factor of a matrix, and the right side divided by it.

    Args:
      matrix: Positive semidefinite matrix A [n, n]. Rows that depend on those before them are
        passed over: theirs are columns of zeros in the factor and rows of zeros in the solution.
      right: Right side B [n, m].
      least: Smallest pivot, by the largest diagonal entry, of a row that depends on no other.

    Returns:
      The lower triangular L with L L^T = A, and L^-1 B [n, m].

    Examples:
      >>> a = jnp.array([[4.0, 2.0], [2.0, 5.0]])
      >>> factor, solved = eliminate(a, jnp.array([[4.0], [6.0]]))
      >>> factor.tolist(), solved[:, 0].tolist()
      ([[2.0, 0.0], [1.0, 2.0]], [2.0, 2.0])
    """
    chex.assert_rank([matrix, right], 2)
    n = len(matrix)
    step = functools.partial(_eliminate_row, least * jnp.max(jnp.diagonal(matrix)))
    _, (columns, rows) = jax.lax.scan(step, (matrix, right), jnp.arange(n))
    return columns.T, rows


def _eliminate_row(
    least: Array, carry: tuple[Array, Array], j: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Takes row j out of what is left of the matrix and of the right side."""
    matrix, right = carry
    pivot = matrix[j, j]
    scale = jnp.where(pivot > least, jax.lax.rsqrt(jnp.where(pivot > least, pivot, 1)), 0)
    column = jnp.where(jnp.arange(len(matrix)) >= j, matrix[:, j] * scale, 0)
    row = right[j] * scale
    left = matrix - column[:, None] * column[None], right - column[:, None] * row[None]
    return left, (column, row)


def solve_positive_definite(matrix: Array, right: Array) -> Array:
    """Solves A X = B, differentiably.

    Args:
      matrix: Positive definite matrix A [n, n].
      right: Right side B [n, m].

    Returns:
      X [n, m].

    Examples:
      >>> a = jnp.array([[4.0, 2.0], [2.0, 5.0]])
      >>> solve_positive_definite(a, jnp.array([[8.0], [8.0]]))[:, 0].tolist()
      [1.5, 1.0]
    """
    if not on_cpu():
        return jax.scipy.linalg.solve(matrix, right, assume_a="pos")
    return jax.lax.custom_linear_solve(
        functools.partial(jnp.matmul, matrix),
        right,
        functools.partial(_solve_by_elimination, jax.lax.stop_gradient(matrix)),
        symmetric=True,
    )


def _solve_by_elimination(matrix: Array, product: object, right: Array) -> Array:
    del product  # with the matrix, which is known
    factor, solved = eliminate(matrix, right, least=0.0)
    steps = jnp.arange(len(matrix)), factor.T, solved
    start = jnp.zeros_like(solved)
    return jax.lax.scan(_substitute_back, start, steps, reverse=True)[0]


def _substitute_back(found: Array, step: tuple[Array, Array, Array]) -> tuple[Array, None]:
    """Row j of the solution, by those below it: found [n, m]."""
    j, column, row = step
    pivot = column[j]
    value = (row - column @ found) / jnp.where(pivot > 0, pivot, 1)
    return found.at[j].set(jnp.where(pivot > 0, value, 0)), None
