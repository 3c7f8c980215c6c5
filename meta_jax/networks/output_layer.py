"""A linear layer at the end of any network."""

import jax

from meta_jax.core import Network, PyTree
from meta_jax.networks.layers import init_linear, linear


def with_output_layer(network: Network, outputs: int) -> Network:
    """A network followed by a linear layer of its own: parameters {'network', 'head'}.

    Args:
      network: from [n, ...] to [n, features].
      outputs: of the linear layer.
    """

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        network_key, head_key = jax.random.split(key)
        params, state = network.init(network_key, x)
        z, _ = network.apply(params, state, x, key=head_key, train=True)
        return {"network": params, "head": init_linear(head_key, z.shape[-1], outputs)}, state

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        z, state = network.apply(params["network"], state, x, key=key, train=train)
        return linear(params["head"], z), state

    return Network(init, apply, network.batch_norm)
