"""Tests of trees compared by shape."""

import jax
import jax.numpy as jnp

from meta_jax.shapes import shape_difference


def test_shapes_are_compared_by_path():
    one = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    other = {"a": jax.ShapeDtypeStruct((2, 4), jnp.float32)}
    assert shape_difference(one, one) == ""
    assert shape_difference(one, other) == "float32[2, 3] and float32[2, 4] at a"
    assert shape_difference(one, {}) == "float32[2, 3] and nothing at a"
