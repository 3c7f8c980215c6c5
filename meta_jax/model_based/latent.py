"""The latent variable of Neural Processes (Garnelo et al. 2018, "Neural Processes").

One vector describes what all answers of a task have in common. It is drawn in training from what
support set and queries tell of it together, which is kept near what the support set alone tells.
"""

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.sets import masked_row_mean
from meta_jax.networks.sets.set_network import feedforward, init_feedforward, pairs
from meta_jax.objectives import Gaussian


def init_latent(
    key: Array, inputs: int, codes: int, features: int, *, size: int, width: int
) -> PyTree:
    """Parameters of the latent variable.

    Args:
      key: A random key.
      inputs: Size of an embedded input.
      codes: Size of a label's code.
      features: Size of the features that the latent vector joins.
      size: Size of the latent vector.
      width: Units of every layer.
    """
    encoder_key, moments_key, decoder_key = jax.random.split(key, 3)
    return {
        "encoder": init_feedforward(encoder_key, [inputs + codes, width, width]),
        "moments": init_feedforward(moments_key, [width, width, 2 * size]),
        "decoder": init_feedforward(decoder_key, [features + size, width, width]),
    }


def latent_distribution(
    params: PyTree, z: Array, labels: Array, mask: Array | None = None
) -> Gaussian:
    """What a set tells of the latent vector: s = mean_i h(x_i, y_i), N(mean(s), scale(s)).

    Args:
      params: Parameters, from `init_latent`.
      z: Embedded inputs [n, inputs].
      labels: Codes of their labels, [n, codes].
      mask: bool [n], False for padding.

    Returns:
      Mean and scale, [size] each; the scale is 0.1 + 0.9 sigmoid, as in the authors' code.
    """
    encoded = feedforward(params["encoder"], pairs(z, labels, mask))
    summary = masked_row_mean(encoded, mask)
    mean, scale = jnp.split(feedforward(params["moments"], summary[None])[0], 2)
    return Gaussian(mean, 0.1 + 0.9 * jax.nn.sigmoid(scale))


def join_latent(params: PyTree, features: Array, latent: Array) -> Array:
    """Features [m, width] of queries from features [m, features] and the latent vector [size]."""
    latent = jnp.broadcast_to(latent, (features.shape[0], latent.size)).astype(features.dtype)
    return feedforward(params["decoder"], jnp.concatenate([jax.nn.relu(features), latent], 1))


def kl_divergence(first: Gaussian, second: Gaussian) -> Array:
    """The Kullback-Leibler divergence KL(first || second) of diagonal Gaussians, in nats.

    Args:
      first: Mean and scale, [...] each.
      second: Mean and scale of the same shape.

    Returns:
      A scalar, the sum over all dimensions.

    Examples:
      >>> standard = Gaussian(jnp.zeros(2), jnp.ones(2))
      >>> float(kl_divergence(standard._replace(mean=jnp.array([1.0, 0.0])), standard))
      0.5
    """
    away = (first.mean - second.mean) / second.scale
    ratio = first.scale / second.scale
    return ((ratio**2 + away**2 - 1) / 2 - jnp.log(ratio)).sum()
