"""Networks whose embeddings are computed again in the backward pass, instead of kept."""

import functools

import jax

from meta_jax.core import Array, MomentsUse, Network, PyTree


def rematerialised(network: Network) -> Network:
    """A network that keeps nothing of an embedding for its derivative but inputs and outputs.

    The derivative computes the embedding once more. It needs less memory where several embeddings
    are differentiated, as in the steps of an inner loop; a lone one needs as much, for it is
    computed again as a whole. Values and derivatives are the same.

    Args:
      network: Any network.

    Examples:
      >>> import jax.numpy as jnp
      >>> from meta_jax.networks.mlp import mlp
      >>> network = rematerialised(mlp((8,)))
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> network.apply(params, state, jnp.ones((2, 5)), key=None, train=True)[0].shape
      (2, 8)
    """
    return network._replace(apply=functools.partial(_apply_again, network))


def _apply_again(
    network: Network,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    /,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    def apply(
        params: PyTree, state: PyTree, x: PyTree, key: Array | None, mask: Array | None
    ) -> tuple[Array, PyTree]:
        return network.apply(params, state, x, key=key, train=train, moments=moments, mask=mask)

    return jax.checkpoint(apply)(params, state, x, key, mask)
