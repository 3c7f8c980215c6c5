"""Raw inputs as a network, for methods that need no embedding."""

from meta_jax import registry
from meta_jax.core import Array, MomentsUse, Network, PyTree


@registry.network("flatten")
def flatten() -> Network:
    """Builds the network that makes each input a vector; it has no parameters.

    Returns:
      A stateless network from [n, ...] to [n, features].

    Examples:
      >>> import jax.numpy as jnp
      >>> flatten().apply({}, {}, jnp.zeros((2, 20, 20, 1)), key=None, train=False)[0].shape
      (2, 400)
    """
    return Network(_init, _apply)


def _init(key: Array, x: Array) -> tuple[PyTree, PyTree]:
    del key, x
    return {}, {}


def _apply(
    params: PyTree,
    state: PyTree,
    x: Array,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del params, key, train, moments, mask
    return x.reshape(x.shape[0], -1), state
