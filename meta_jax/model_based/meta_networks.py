"""Meta Networks (Munkhdalai and Yu 2017, arXiv:1703.00837): a memory of fast weights.

The loss gradients of the support examples are the meta information; meta-networks turn them,
coordinate by coordinate, into fast weights. Gradients are constants to the training: there are no
second derivatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_jax.core import Batch, Episode, MetaLearner, PyTree, cross_entropy, episode_loss
from meta_jax.networks.augmented import classify, init_augmented, represent
from meta_jax.networks.coordinates import (
    join_coordinates,
    linear_across,
    lstm_across,
    map_chunks,
    split_coordinates,
)
from meta_jax.networks.layers import init_linear
from meta_jax.networks.lstm import init_lstm

_UNITS = 20  # of the meta-networks
_K = 7  # of the preprocessing: gradients below e^-7 are small


class FastWeightMemory(NamedTuple):
    """A support set absorbed."""

    keys: jax.Array  # r'_i [n, hidden], representations of the support inputs
    values: PyTree  # W*_i, the base learner's fast weights, leaves [n, ...]
    real: jax.Array  # bool [n], False for padding
    embedding: PyTree  # Q*, the embedding's fast weights
    state: PyTree


def preprocess_gradient(gradient: jax.Array) -> jax.Array:
    """[max(ln |g| / 7, -1), clip(e^7 g, -1, 1)]: magnitude and sign, both of order one.

    Args:
      gradient: [...].

    Returns:
      [..., 2] (Andrychowicz et al. 2016, appendix A, without its case distinction).

    Examples:
      >>> preprocess_gradient(jnp.array([0.0, 1.0])).round(6).tolist()
      [[-1.0, 0.0], [0.0, 1.0]]
    """
    magnitude = jnp.maximum(jnp.log(jnp.abs(gradient) + 1e-12) / _K, -1)
    return jnp.stack([magnitude, jnp.clip(gradient * jnp.exp(_K), -1, 1)], axis=-1)


def attend(
    queries: jax.Array, keys: jax.Array, real: jax.Array, *, strength: float = 1.0
) -> jax.Array:
    """softmax_i(strength cos(r, r'_i)) over the keys that are not padding.

    Args:
      queries: [m, D].
      keys: [n, D].
      real: bool [n].
      strength: 1 in the paper, so that no weight can exceed another by more than e^2.

    Returns:
      Weights [m, n], each row's summing to 1.
    """

    def normalised(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-8)

    cosines = normalised(queries) @ normalised(keys).T
    return jax.nn.softmax(jnp.where(real, strength * cosines, -jnp.inf))


def meta_networks(
    features: int = 64, *, hidden: int = 64, fast_scale: float = 0.01, strength: float = 1.0
) -> MetaLearner:
    """Fast weights for the embedding and, one memory of them for each support example, the base.

    1. Q* = d(G, {grad_Q loss_emb(u(Q, x'_i), y'_i)}), an LSTM over the support examples.
    2. W*_i = m(Z, grad_W loss(b(W, x'_i), y'_i)), stored under r'_i = u(Q, Q*, x'_i).
    3. For a query: r = u(Q, Q*, x), a = softmax cos(R, r), W* = sum_i a_i W*_i, b(W, W*, x).

    Both losses are cross-entropies. d and m work on single coordinates, shared among them; there is
    one pair for those of convolutions and one for the others.

    Args:
      features: channels of the convolutions of both networks u and b (see `networks.augmented`).
      hidden: units of the layer behind them, the width of r.
      fast_scale: what the outputs of d and m are multiplied by. A coordinate's share in a layer is
        small, and one step of Adam moves all of them together: at 1 the activations explode.
      strength: what the cosines of attention are multiplied by; 1 in the paper.

    Returns:
      The learner; its parameters are {'embedding': Q, 'base': W, 'embedding_meta': G,
      'base_meta': Z}. The number of ways is fixed. The classifier of Q, which serves loss_emb
      alone, stays as it was drawn. The order of the support matters (to d).

    Examples:
      >>> learner = meta_networks(2, hidden=4)
      >>> x = jnp.linspace(0, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)
      >>> support = Batch(x, jnp.eye(2))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> learner.predict(params, adapted, x, jax.random.key(2), train=False)[0].shape
      (2, 2)
    """

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        x, y = episode.support
        keys = jax.random.split(key, 4)

        def slow(key: jax.Array) -> PyTree:
            return init_augmented(key, x, features, hidden, y.shape[-1])

        params = {"embedding": slow(keys[0]), "base": slow(keys[1])}
        for name, init_meta, meta_key in (
            ("embedding_meta", _init_d, keys[2]),
            ("base_meta", _init_m, keys[3]),
        ):
            conv_key, dense_key = jax.random.split(meta_key)
            params[name] = {"conv": init_meta(conv_key), "dense": init_meta(dense_key)}
        return params, {}

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> FastWeightMemory:
        del key, train
        real = support.y.any(-1)

        def fast(meta: PyTree, gradients: PyTree, make: Callable) -> PyTree:
            """Fast weights by group of coordinates; `make` gets [n, 2, coordinates]."""
            made = {}
            for group, tree in gradients.items():
                unravel = ravel_pytree(params["base"][group])[1]
                each = jax.vmap(lambda leaf: ravel_pytree(leaf)[0])(tree)
                inputs = jnp.moveaxis(preprocess_gradient(each), -1, 1)
                flat = fast_scale * make(meta[group], inputs)
                made[group] = jax.vmap(unravel)(flat) if flat.ndim == 2 else unravel(flat)
            return made

        embedding = fast(
            params["embedding_meta"],
            _gradients(params["embedding"], support),
            lambda meta, inputs: _d(meta, inputs, real),
        )
        values = fast(params["base_meta"], _gradients(params["base"], support), _m)
        keys = represent(params["embedding"], embedding, support.x)
        return FastWeightMemory(keys, values, real, embedding, state)

    def predict(
        params: PyTree, adapted: FastWeightMemory, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del key, train
        r = represent(params["embedding"], adapted.embedding, x)
        weights = attend(r, adapted.keys, adapted.real, strength=strength)

        def answer(x: jax.Array, weights: jax.Array) -> jax.Array:
            fast = jax.tree.map(lambda each: jnp.tensordot(weights, each, 1), adapted.values)
            return classify(params["base"], fast, x[None])[0]

        return jax.vmap(answer)(x, weights), adapted.state

    return MetaLearner(init, adapt, predict, episode_loss(adapt, predict, cross_entropy))


def _gradients(slow: PyTree, support: Batch) -> PyTree:
    """The slow network's gradient at each support example, leaves [n, ...], as constants."""

    def loss(slow: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(classify(slow, None, x[None]), y[None])[0]

    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(slow, *support)
    return jax.lax.stop_gradient(gradients)


def _init_d(key: jax.Array) -> PyTree:
    lstm_key, output_key = jax.random.split(key)
    output = _zeros(init_linear(output_key, _UNITS, 1))
    return {"lstm": init_lstm(lstm_key, 2, _UNITS), "output": output}


def _d(params: PyTree, inputs: jax.Array, real: jax.Array) -> jax.Array:
    """An LSTM over the examples, for each coordinate: [n, 2, coordinates] -> [coordinates]."""

    def network(examples: jax.Array) -> jax.Array:
        def step(carry: tuple, example: tuple) -> tuple[tuple, None]:
            x, real = example
            new = lstm_across(params["lstm"], x, *carry)
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, carry), None

        start = jnp.zeros((_UNITS, examples.shape[-1]), examples.dtype)
        (h, _), _ = jax.lax.scan(step, (start, start), (examples, real))
        return linear_across(params["output"], h)[0]

    return _by_chunks(network, inputs)


def _init_m(key: jax.Array) -> PyTree:
    sizes = ((2, _UNITS), (_UNITS, _UNITS), (_UNITS, 1))
    keys = jax.random.split(key, len(sizes))
    params = {f"layer{i + 1}": init_linear(keys[i], *size) for i, size in enumerate(sizes)}
    return {**params, "layer3": _zeros(params["layer3"])}


def _zeros(layer: PyTree) -> PyTree:
    """The last layer of a meta-network: training begins without fast weights."""
    return jax.tree.map(jnp.zeros_like, layer)


def _m(params: PyTree, inputs: jax.Array) -> jax.Array:
    """A small network, for each example and coordinate: [n, 2, coordinates] -> [n, coordinates]."""

    def network(examples: jax.Array) -> jax.Array:
        x = jax.nn.relu(linear_across(params["layer1"], examples))
        x = jax.nn.relu(linear_across(params["layer2"], x))
        return linear_across(params["layer3"], x)[:, 0]

    return _by_chunks(network, inputs)


def _by_chunks(network: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> jax.Array:
    return join_coordinates(map_chunks(network, split_coordinates(inputs)), inputs.shape[-1])
