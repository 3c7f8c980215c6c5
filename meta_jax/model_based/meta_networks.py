"""Meta Networks (Munkhdalai and Yu 2017, arXiv:1703.00837): a memory of fast weights.

The loss gradients of the support examples are the meta information; meta-networks turn them,
coordinate by coordinate, into fast weights. Gradients are constants to the training: there are no
second derivatives.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_jax import registry
from meta_jax.core import (
    Array,
    Batch,
    Episode,
    MetaLearner,
    Objective,
    PyTree,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.lookup import UsageError
from meta_jax.model_based.memory import content_address
from meta_jax.model_based.sequence import check_ways
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
from meta_jax.networks.normalisation import blank_padding
from meta_jax.objectives import (
    check_batch,
    check_kind,
    check_targets,
    cross_entropy,
    cross_entropy_loss,
)
from meta_jax.ranges import Positive, PositiveInt

_UNITS = 20  # of the meta-networks
_K = 7  # of the preprocessing: gradients below e^-7 are small


class FastWeightMemory(NamedTuple):
    """A support set absorbed.

    Attributes:
      keys: Representations r'_i of the support inputs, [n, hidden].
      values: Fast weights W*_i of the base learner, leaves [n, ...].
      mask: Mask of the support inputs, bool [n], False for padding.
      embedding: Fast weights Q* of the embedding.
      state: State of the learner, which is empty.
    """

    keys: Array
    values: PyTree
    mask: Array | None
    embedding: PyTree
    state: PyTree


def preprocess_gradient(gradient: Array) -> Array:
    """Splits gradients into magnitude and sign, both of order one.

    [max(ln |g| / 7, -1), clip(e^7 g, -1, 1)].

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


@registry.learner("meta_networks", network=None)
def meta_networks(
    *,
    objective: Objective = cross_entropy,
    features: PositiveInt = 64,
    hidden: PositiveInt = 64,
    blocks: PositiveInt = 5,
    fast_scale: Positive = 0.01,
    key_strength: Positive = 10.0,
) -> MetaLearner:
    """Builds a Meta Network, which answers with fast weights from a memory.

    1. Q* = d(G, {grad_Q loss_emb(u(Q, x'_i), y'_i)}), an LSTM over the support examples.
    2. W*_i = m(Z, grad_W loss(b(W, x'_i), y'_i)), stored under r'_i = u(Q, Q*, x'_i).
    3. For a query: r = u(Q, Q*, x), a = softmax cos(R, r), W* = sum_i a_i W*_i, b(W, W*, x).

    Both losses are cross-entropies. d and m work on single coordinates, shared among them; there is
    one pair for those of convolutions and one for the others.

    With its flag alone, 1000 outer steps give 86.6 % on glyphs (untrained 20.0 %).

    Args:
      objective: Objective of the tasks; it classifies.
      features: Channels of the convolutions of both networks u and b (see `networks.augmented`).
      hidden: Units of the layer behind them, the size of r.
      blocks: Number of convolutions, each before a pooling: 5 take 28 pixels to 1.
      fast_scale: Factor of the outputs of d and m. A coordinate's share in a layer is small, and
        one step of Adam moves all of them together: at 1 the activations explode.
      key_strength: Factor of the cosines of attention; with 1, the paper's, no weight exceeds
        another by more than e^2 and training is slower.

    Returns:
      The learner; its parameters are {'embedding': Q, 'base': W, 'embedding_meta': G,
      'base_meta': Z}. The number of ways is fixed. The classifier of Q, which serves loss_emb
      alone, stays as it was drawn. The order of the support matters (to d).

    Raises:
      UsageError: the objective does not classify, or there is no convolution.

    Examples:
      >>> learner = meta_networks(features=2, hidden=4)
      >>> x = jnp.linspace(0, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)
      >>> support = Batch(x, jnp.eye(2))
      >>> params, state = jax.eval_shape(learner.init, jax.random.key(0), Episode(support, support))
      >>> adapt = functools.partial(learner.adapt, train=False)
      >>> jax.eval_shape(adapt, params, state, support, jax.random.key(1)).keys.shape
      (2, 4)
    """
    check_kind(objective, "classification", "meta_networks")
    adapt = functools.partial(_adapt, fast_scale)
    predict = functools.partial(_predict, key_strength)
    return MetaLearner(
        functools.partial(_init, features, hidden, blocks),
        adapt,
        predict,
        supervised_loss(adapt, predict, objective),
        supervised_evaluate(adapt, predict, objective),
    )


def _init(
    features: int, hidden: int, blocks: int, key: Array, episode: Episode
) -> tuple[PyTree, PyTree]:
    support = episode.support
    check_support(support)
    *slow_keys, d_key, m_key = jax.random.split(key, 4)
    ways = support.y.shape[1]
    embedding, base = (
        init_augmented(slow_key, support.x, features, hidden, ways, blocks=blocks)
        for slow_key in slow_keys
    )
    params = {"embedding": embedding, "base": base}
    for name, init_meta, meta_key in (
        ("embedding_meta", _init_d, d_key),
        ("base_meta", _init_m, m_key),
    ):
        conv_key, dense_key = jax.random.split(meta_key)
        params[name] = {"conv": init_meta(conv_key), "dense": init_meta(dense_key)}
    return params, {}


def _adapt(
    fast_scale: float, params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
) -> FastWeightMemory:
    del key, train
    check_support(support)
    check_ways(params["base"]["dense"]["classifier"].shape[1], support.y)
    mask = support.mask
    support = support._replace(x=blank_padding(support.x, mask))
    slow = params["embedding"]
    embedding = _fast_weights(
        functools.partial(_d, mask=mask),
        params["embedding_meta"],
        _gradients(slow, support),
        slow,
        fast_scale,
    )
    values = _fast_weights(
        _m, params["base_meta"], _gradients(params["base"], support), params["base"], fast_scale
    )
    return FastWeightMemory(represent(slow, embedding, support.x), values, mask, embedding, state)


def _predict(
    key_strength: float,
    params: PyTree,
    adapted: FastWeightMemory,
    x: Array,
    key: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del key, train
    x = blank_padding(x, mask)
    r = represent(params["embedding"], adapted.embedding, x)
    weights = content_address(r, adapted.keys, key_strength=key_strength, mask=adapted.mask)

    def answer(x: Array, weights: Array) -> Array:
        fast = jax.tree.map(lambda each: jnp.tensordot(weights, each, 1), adapted.values)
        return classify(params["base"], fast, x[None])[0]

    return jax.vmap(answer)(x, weights), adapted.state


def check_support(support: Batch) -> None:
    """Refuses a support set that is not of images with one-hot labels.

    Raises:
      UsageError: the inputs are no images.
      ValueError: the labels are not one-hot, or the numbers of rows differ.
    """
    check_batch(support, "support")
    check_targets(support.y)
    if getattr(support.x, "ndim", None) != 4:
        raise UsageError(
            "meta_networks has convolutions of its own: give it images [n, height, width, channels]"
        )


def _fast_weights(
    meta_network: Callable[[PyTree, Array], Array],
    meta: PyTree,
    gradients: PyTree,
    slow: PyTree,
    fast_scale: float,
) -> PyTree:
    """Fast weights by group of coordinates.

    Args:
      meta_network: (params, inputs [n, 2, coordinates]) -> [coordinates] or [n, coordinates].
      meta: Its parameters by group.
      gradients: Gradients of each example, leaves [n, ...], by group.
      slow: The slow weights, for their structure.
      fast_scale: Factor of the outputs.
    """
    made = {}
    for group, tree in gradients.items():
        unravel = ravel_pytree(slow[group])[1]
        each = jax.vmap(lambda leaf: ravel_pytree(leaf)[0])(tree)
        inputs = jnp.moveaxis(preprocess_gradient(each), -1, 1)
        flat = fast_scale * meta_network(meta[group], inputs)
        made[group] = jax.vmap(unravel)(flat) if flat.ndim == 2 else unravel(flat)
    return made


def _gradients(slow: PyTree, support: Batch) -> PyTree:
    """The slow network's gradient at each support example, leaves [n, ...], as constants."""

    def loss(slow: PyTree, x: Array, y: Array) -> Array:
        return cross_entropy_loss(classify(slow, None, x[None]), y[None])[0]

    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(slow, support.x, support.y)
    return jax.lax.stop_gradient(gradients)


def _init_d(key: Array) -> PyTree:
    lstm_key, output_key = jax.random.split(key)
    output = _zeros(init_linear(output_key, _UNITS, 1))
    return {"lstm": init_lstm(lstm_key, 2, _UNITS), "output": output}


def _d(params: PyTree, inputs: Array, mask: Array | None = None) -> Array:
    """An LSTM over the examples, for each coordinate: [n, 2, coordinates] -> [coordinates]."""

    def network(examples: Array) -> Array:
        def step(carry: tuple, example: tuple) -> tuple[tuple, None]:
            x, real = example
            new = lstm_across(params["lstm"], x, *carry)
            if real is not None:
                new = jax.tree.map(lambda a, b: jnp.where(real, a, b), new, carry)
            return new, None

        start = jnp.zeros((_UNITS, examples.shape[-1]), examples.dtype)
        (h, _), _ = jax.lax.scan(step, (start, start), (examples, mask))
        return linear_across(params["output"], h)[0]

    return _by_chunks(network, inputs)


def _init_m(key: Array) -> PyTree:
    sizes = ((2, _UNITS), (_UNITS, _UNITS), (_UNITS, 1))
    keys = jax.random.split(key, len(sizes))
    params = {f"layer{i + 1}": init_linear(keys[i], *size) for i, size in enumerate(sizes)}
    return {**params, "layer3": _zeros(params["layer3"])}


def _zeros(layer: PyTree) -> PyTree:
    """The last layer of a meta-network: training begins without fast weights."""
    return jax.tree.map(jnp.zeros_like, layer)


def _m(params: PyTree, inputs: Array) -> Array:
    """A small network, for each example and coordinate: [n, 2, coordinates] -> [n, coordinates]."""

    def network(examples: Array) -> Array:
        x = jax.nn.relu(linear_across(params["layer1"], examples))
        x = jax.nn.relu(linear_across(params["layer2"], x))
        return linear_across(params["layer3"], x)[:, 0]

    return _by_chunks(network, inputs)


def _by_chunks(network: Callable[[Array], Array], inputs: Array) -> Array:
    return join_coordinates(map_chunks(network, split_coordinates(inputs)), inputs.shape[-1])
