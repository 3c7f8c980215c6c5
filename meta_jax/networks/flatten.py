"""Raw inputs as a network, for methods that need no embedding."""

import jax

from meta_jax.core import Network, PyTree


def flatten() -> Network:
    """Each input [...] as it is, a vector; no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> flatten().apply({}, {}, jnp.zeros((2, 20, 20, 1)), key=None, train=False)[0].shape
      (2, 400)
    """

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        del key, x
        return {}, {}

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params, key, train
        return x.reshape(x.shape[0], -1), state

    return Network(init, apply)
