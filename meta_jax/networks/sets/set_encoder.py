"""The set encoder of Conditional Neural Processes: the mean of encoded pairs."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import check_at_least_one
from meta_jax.networks.sets.set_network import SetNetwork, feedforward, init_feedforward, pairs
from meta_jax.objectives import masked_mean

Pairing = Literal["concatenated", "product"]


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
    width: int = 64,
    layers: int = 3,
    *,
    decoder_layers: int | None = None,
    pairing: Pairing = "concatenated",
) -> SetNetwork:
    """Builds a Conditional Neural Process (Garnelo et al. 2018): r = mean_i h(x_i, y_i), g(x, r).

    Every query sees the same vector r of the set, whatever its size and order.

    Args:
      width: Units of every layer.
      layers: Linear layers of the encoder h, with ReLUs between; 0 for the pairs themselves.
      decoder_layers: Layers of the decoder g, each with a ReLU; by default as many as the
        encoder's. With 0 the features are the query beside r.
      pairing: How a label enters: 'concatenated' to the input that is encoded; 'product' for the
        products of the encoded input with each of the label's numbers, so that with one-hot labels
        r holds the mean of each class, as in the paper's classification.

    Raises:
      UsageError: a width below one, or an unknown pairing.
    """
    check_at_least_one("set_encoder", width=width)
    if pairing not in get_args(Pairing):
        choices = ", ".join(get_args(Pairing))
        raise UsageError(f"unknown pairing '{pairing}': choose one of {choices}")
    decoder_layers = layers if decoder_layers is None else decoder_layers
    absorb = _absorb if pairing == "concatenated" else _absorb_products
    return SetNetwork(
        functools.partial(_init, width, layers, decoder_layers, pairing), absorb, _answer
    )


def _init(
    width: int,
    layers: int,
    decoder_layers: int,
    pairing: Pairing,
    key: Array,
    inputs: int,
    codes: int,
    rows: int,
) -> PyTree:
    del rows
    encoder_key, decoder_key = jax.random.split(key)
    product = pairing == "product"
    sizes = [inputs if product else inputs + codes, *[width] * layers]
    encoded = sizes[-1] * codes if product else sizes[-1]
    return {
        "encoder": init_feedforward(encoder_key, sizes),
        "decoder": init_feedforward(decoder_key, [inputs + encoded, *[width] * decoder_layers]),
    }


def _absorb(params: PyTree, z: Array, labels: Array, mask: Array | None) -> Array:
    return masked_row_mean(feedforward(params["encoder"], pairs(z, labels, mask)), mask)


def _absorb_products(params: PyTree, z: Array, labels: Array, mask: Array | None) -> Array:
    inputs, labels = jnp.split(pairs(z, labels, mask), [z.shape[1]], axis=1)
    # Each of a label's numbers by its own sum: with one-hot labels the mean of each class.
    weights = jnp.abs(labels).sum(0)[:, None]
    total = labels.T @ feedforward(params["encoder"], inputs)
    return (total / jnp.where(weights > 0, weights, 1)).reshape(-1)


def _answer(params: PyTree, memory: Array, z: Array) -> Array:
    return decode(params["decoder"], z, jnp.broadcast_to(memory, (z.shape[0], memory.size)))


def decode(layers: list[PyTree], z: Array, read: Array) -> Array:
    """Features of queries z [m, inputs] and what they read of the set, [m, width]."""
    features = feedforward(layers, jnp.concatenate([z, read.astype(z.dtype)], 1))
    return jax.nn.relu(features) if layers else features
