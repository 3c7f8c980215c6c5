"""Tiny networks for tests of learners: a normalisation layer behind one linear map."""

import jax
import jax.numpy as jnp

from meta_jax.core import Network
from meta_jax.networks.normalisation import init_normalisation, normalise

# Embeddings are the inputs themselves.
IDENTITY = Network(
    lambda key, x: ({}, {}),
    lambda params, state, x, *, key, train, moments="stored", mask=None: (x, state),
)


def identity(mode):
    """As `IDENTITY`, with a mode for heads that have normalisation of their own."""
    return IDENTITY._replace(normalisation=mode)


def normalised(mode, features=3, flat=True):
    """Images [n, height, width, channels] -> vectors, or maps where `flat` is False."""

    def init(key, x):
        kernel = jax.nn.initializers.glorot_uniform()(key, (x.shape[-1], features), x.dtype)
        params, stats = init_normalisation(features, mode, x.dtype)
        return {"linear": kernel, "normalisation": params}, stats

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        del key, train
        x, state = normalise(
            params["normalisation"],
            state,
            x @ params["linear"],
            mode=mode,
            moments=moments,
            mask=mask,
        )
        x = jnp.tanh(x)
        return (x.reshape(x.shape[0], -1) if flat else x), state

    return Network(init, apply, mode)


def mixed_inputs():
    """A dictionary of token ids [n, length] and their mask -> the mean of embedded tokens."""

    def init(key, x):
        return {"table": jax.random.normal(key, (5, 4))}, {}

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        del key, train, moments, mask
        real = x["real"][..., None]
        rows = params["table"][x["ids"]] * real
        return rows.sum(1) / jnp.maximum(real.sum(1), 1), state

    return Network(init, apply)
