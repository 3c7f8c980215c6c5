"""The set encoder of Conditional Neural Processes: the mean of encoded pairs."""

import functools

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.layers import check_at_least_one
from meta_jax.networks.sets.set_network import SetNetwork, feedforward, init_feedforward, pairs
from meta_jax.objectives import masked_mean


def masked_row_mean(rows: Array, mask: Array | None = None) -> Array:
    """Mean [features] of the rows [n, features] that are not padding; zeros without any.

    Args:
      rows: [n, features].
      mask: bool [n], False for padding.

    Examples:
      >>> masked_row_mean(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([True, True, False])).tolist()
      [2.0]
    """
    return jax.vmap(masked_mean, (1, None))(rows, mask)


def set_encoder(
    width: int = 64, layers: int = 3, *, decoder_layers: int | None = None
) -> SetNetwork:
    """Builds a Conditional Neural Process (Garnelo et al. 2018): r = mean_i h(x_i, y_i), g(x, r).

    Every query sees the same vector r of the set, whatever its size and order.

    Args:
      width: Units of every layer, and size of r.
      layers: Linear layers of the encoder h, with ReLUs between; 0 for the pairs themselves.
      decoder_layers: Layers of the decoder g, each with a ReLU; by default as many as the
        encoder's. With 0 the features are the query beside r.

    Raises:
      UsageError: a width below one.
    """
    check_at_least_one("set_encoder", width=width)
    decoder_layers = layers if decoder_layers is None else decoder_layers
    return SetNetwork(functools.partial(_init, width, layers, decoder_layers), _absorb, _answer)


def _init(
    width: int, layers: int, decoder_layers: int, key: Array, inputs: int, codes: int, rows: int
) -> PyTree:
    del rows
    encoder_key, decoder_key = jax.random.split(key)
    sizes = [inputs + codes, *[width] * layers]
    return {
        "encoder": init_feedforward(encoder_key, sizes),
        "decoder": init_feedforward(decoder_key, [inputs + sizes[-1], *[width] * decoder_layers]),
    }


def _absorb(params: PyTree, z: Array, labels: Array, mask: Array | None) -> Array:
    return masked_row_mean(feedforward(params["encoder"], pairs(z, labels, mask)), mask)


def _answer(params: PyTree, memory: Array, z: Array) -> Array:
    return decode(params["decoder"], z, jnp.broadcast_to(memory, (z.shape[0], memory.size)))


def decode(layers: list[PyTree], z: Array, read: Array) -> Array:
    """Features of queries z [m, inputs] and what they read of the set, [m, width]."""
    features = feedforward(layers, jnp.concatenate([z, read.astype(z.dtype)], 1))
    return jax.nn.relu(features) if layers else features
