"""A linear layer at the end of any network."""

from functools import partial

import jax

from meta_jax.core import Array, MomentsUse, Network, PyTree
from meta_jax.networks.layers import check_at_least_one, init_linear, linear


def with_output_layer(network: Network, outputs: int) -> Network:
    """A network followed by a linear layer of its own: parameters {'network', 'head'}.

    Args:
      network: Network from [n, ...] to [n, features].
      outputs: Units of the linear layer.

    Raises:
      UsageError: outputs below one.
    """
    check_at_least_one("with_output_layer", outputs=outputs)
    init, apply = partial(_init, network, outputs), partial(_apply, network)
    return Network(init, apply, network.normalisation)


def _init(network: Network, outputs: int, key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
    network_key, head_key = jax.random.split(key)
    params, state = network.init(network_key, x)

    def embed(params: PyTree, state: PyTree, x: PyTree) -> Array:
        # Looked at for its shape alone; some networks draw at random in tests too.
        return network.apply(params, state, x, key=jax.random.key(0), train=False)[0]

    z = jax.eval_shape(embed, params, state, x)
    return {"network": params, "head": init_linear(head_key, z.shape[-1], outputs)}, state


def _apply(
    network: Network,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    z, state = network.apply(
        params["network"], state, x, key=key, train=train, moments=moments, mask=mask
    )
    return linear(params["head"], z), state
