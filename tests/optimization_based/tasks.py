"""Small smooth tasks that the tests of this family share."""

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Batch, Episode, Network
from meta_jax.networks.normalisation import init_normalisation, normalise
from tests.random_trees import normal

KEY = jax.random.key(0)


def positive_definite(seed):
    m = np.random.default_rng(seed).normal(size=(4, 4))
    return m @ m.T / 4 + np.eye(4)


# Support 1/2 (p - c)'A(p - c), query 1/2 (p - d)'B(p - d); A and B do not commute.
A, B = positive_definite(0), positive_definite(1)
C, D, THETA = np.random.default_rng(2).normal(size=(3, 4))


def tanh_network(width=6):
    """Smooth, for identities between derivatives."""

    def init(key, x):
        w = jax.random.normal(key, (x.shape[1], width))
        return {"w": w, "b": jnp.zeros(width, w.dtype)}, {}

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return jnp.tanh(x @ params["w"] + params["b"]), state

    return Network(init, apply)


def identity_network():
    """No parameters: a head on it is a linear model, its squared error a quadratic."""

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return x, state

    return Network(lambda key, x: ({}, {}), apply)


def normalised_network(mode="batch", width=6, *, dropout=0.0):
    """A layer, its normalisation and tanh, and dropout of some share of the outputs."""

    def init(key, x):
        scale, state = init_normalisation(width, mode)
        return {"w": jax.random.normal(key, (x.shape[1], width)), "normalisation": scale}, state

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        y, state = normalise(
            params["normalisation"], state, x @ params["w"], mode=mode, moments=moments, mask=mask
        )
        y = jnp.tanh(y)
        if train and dropout:
            y = jnp.where(jax.random.bernoulli(key, 1 - dropout, y.shape), y / (1 - dropout), 0)
        return y, state

    return Network(init, apply, mode)


def two_blocks(mode="batch", width=3):
    """Two networks as the one above, one after the other: 'block1' and 'block2'."""
    blocks = {name: normalised_network(mode, width) for name in ("block1", "block2")}

    def init(key, x):
        params, state = {}, {}
        for name, block in blocks.items():
            params[name], state[name] = block.init(jax.random.fold_in(key, len(params)), x)
            x = jnp.zeros((x.shape[0], width), x.dtype)
        return params, state

    def apply(params, state, x, **settings):
        new = {}
        for name, block in blocks.items():
            x, new[name] = block.apply(params[name], state[name], x, **settings)
        return x, new

    return Network(init, apply, mode)


def padded(batch, rows=2, value=7.0):
    """A batch whose last rows are padding, with rubbish in them."""

    def pad(leaf):
        rubbish = np.full((rows, *leaf.shape[1:]), value, leaf.dtype)
        return jnp.asarray(np.concatenate([leaf, rubbish]))

    n = batch.y.shape[0]
    return Batch(jax.tree.map(pad, batch.x), pad(batch.y), jnp.asarray(np.arange(n + rows) < n))


def _episode(shape, seed, ways):
    y = jnp.asarray(np.tile(np.eye(ways), (2, 1)))
    return Episode(*(Batch(normal(2 * ways, *shape, seed=2 * seed + i), y) for i in range(2)))


def vectors(seed=0, ways=3):
    return _episode((4,), seed, ways)


def images(seed=0, ways=3):
    return _episode((8, 8, 1), seed, ways)


def loss_and_gradient(learner, *arguments):
    """The meta-loss (without its auxiliary part) and the meta-gradient."""
    function = jax.jit(jax.value_and_grad(lambda *a: learner.loss(*a)[0]))
    return function(*arguments)


def assert_trees_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    tolerance = {"rtol": 1e-10, "atol": 1e-12, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)
