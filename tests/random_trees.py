"""Random arrays for tests, drawn with NumPy: JAX would compile one program for each shape."""

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import PyTree


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def moved(tree: PyTree, by: float = 0.3, seed: int = 42) -> PyTree:
    """Parameters away from their initial ones and zeros, so that each of them matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(np.asarray(p) + by * rng.normal(size=p.shape)), tree)


def dtypes(tree: PyTree) -> PyTree:
    """The dtype of every leaf."""
    return jax.tree.map(lambda leaf: leaf.dtype, tree)
