"""Attention by closed forms, in every precision, and with keys that nobody may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.networks.attention import (
    attend,
    check_heads,
    init_transformer_layer,
    project,
)


def inputs(dtype, rows=(3, 5)):
    normal = np.random.default_rng(0).normal
    return [normal(size=(n, 2, 4)).astype(jnp.dtype(dtype)) for n in (rows[0], rows[1], rows[1])]


def by_hand(query, keys, values, seen):
    query, keys, values = (np.asarray(a, np.float64) for a in (query, keys, values))
    found = np.zeros(query.shape)
    for i, row in enumerate(query):
        for head, q in enumerate(row):
            weights = np.exp(keys[seen[i], head] @ q / 2)
            found[i, head] = weights @ values[seen[i], head] / weights.sum()
    return found


@pytest.mark.parametrize(
    ("dtype", "atol"), [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 0.02)]
)
def test_it_is_the_weighted_mean_of_the_values_that_are_seen(dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        query, keys, values = inputs(dtype)
        seen = np.random.default_rng(1).random((3, 5)) < 0.6
        seen[:, 0] = True
        found = jax.jit(attend)(query, keys, values, seen)
        assert found.dtype == dtype
        expected = by_hand(query, keys, values, seen)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol)
        everything = jax.jit(attend)(query, keys, values)
        expected = by_hand(query, keys, values, np.ones((3, 5), bool))
        np.testing.assert_allclose(np.asarray(everything, np.float64), expected, atol=atol)


@pytest.mark.parametrize("x64", [False, True])
def test_who_sees_nothing_reads_zeros_and_has_a_gradient(x64):
    with jax.enable_x64(x64):
        query, keys, values = inputs("float64" if x64 else "float32")
        seen = np.zeros((1, 5), bool)

        @jax.jit
        def read_and_gradient(*arguments):
            gradient = jax.grad(lambda *a: attend(*a, seen).sum(), (0, 1, 2))(*arguments)
            return attend(*arguments, seen), gradient

        read, gradient = read_and_gradient(query, keys, values)
        assert not np.asarray(read).any()
        assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_a_part_of_a_projection_is_that_part_of_the_whole():
    @jax.jit
    def projections(key):
        layer, z = init_transformer_layer(key, 6, 8), jax.random.normal(key, (3, 6))
        return [project(layer, z, 2, parts) for parts in (slice(0, 3), slice(0, 1), slice(1, 3))]

    whole, first, others = projections(jax.random.key(0))
    assert [part.shape for part in whole] == [(3, 2, 3)] * 3
    for found, expected in zip([*first, *others], whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError, match="width=6, heads=4"):
        check_heads("x", 6, 4)
