"""Cross-attention of queries to encoded pairs: the deterministic path of attentive processes."""

import functools
from typing import NamedTuple

import jax

from meta_jax.core import Array, PyTree
from meta_jax.networks.attention import (
    after_attention,
    attend,
    check_heads,
    init_transformer_layer,
    project,
    split_heads,
)
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.sets.set_encoder import decode
from meta_jax.networks.sets.set_network import SetNetwork, feedforward, init_feedforward, pairs
from meta_jax.objectives import without_padding


class KeysAndValues(NamedTuple):
    """A set as attention looks at it.

    Attributes:
      keys, values: [n, heads, width / heads].
      seen: Which of them are no padding, bool [1, n]; None for all.
    """

    keys: Array
    values: Array
    seen: Array | None


def cross_attention(
    width: int = 64, layers: int = 3, heads: int = 4, *, self_attention: int = 1
) -> SetNetwork:
    """Builds cross-attention, as in attentive neural processes (Kim et al. 2019).

    Queries k(x) look by dot products at keys k(x_i) and read values v(x_i, y_i), which have looked
    at each other before; a decoder g(x, read) gives the features.

    Args:
      width: Units of every layer.
      layers: Linear layers of k, v and g each.
      heads: Number of attention heads; divides the width.
      self_attention: Layers of self-attention among the pairs.

    Raises:
      UsageError: a number below one, or a width that the heads do not divide.
    """
    check_heads("cross_attention", width, heads)
    check_at_least_one("cross_attention", layers=layers)
    return SetNetwork(
        functools.partial(_init, width, layers, self_attention),
        functools.partial(_absorb, heads),
        functools.partial(_answer, heads),
    )


def _init(
    width: int, layers: int, self_attention: int, key: Array, inputs: int, codes: int, rows: int
) -> PyTree:
    del rows
    keys = jax.random.split(key, 7 + self_attention)
    hidden = [width] * layers
    return {
        "embedding": init_feedforward(keys[0], [inputs, *hidden]),
        "encoder": init_feedforward(keys[1], [inputs + codes, *hidden]),
        "self_attention": [init_transformer_layer(k, width, 2 * width) for k in keys[7:]],
        "query": init_linear(keys[2], width, width),
        # A bias of the keys would add the same to all scores of a query.
        "key": {"kernel": init_linear(keys[3], width, width)["kernel"]},
        "value": init_linear(keys[4], width, width),
        "output": init_linear(keys[5], width, width),
        "decoder": init_feedforward(keys[6], [inputs + width, *hidden]),
    }


def _absorb(
    heads: int, params: PyTree, z: Array, labels: Array, mask: Array | None
) -> KeysAndValues:
    seen = None if mask is None else mask[None]
    encoded = feedforward(params["encoder"], pairs(z, labels, mask))
    for layer in params["self_attention"]:
        query, keys, values = project(layer, encoded, heads)
        encoded = after_attention(layer, encoded, attend(query, keys, values, seen))
    keys = feedforward(params["embedding"], without_padding(z, mask)) @ params["key"]["kernel"]
    values = linear(params["value"], encoded)
    return KeysAndValues(split_heads(heads, keys), split_heads(heads, values), seen)


def _answer(heads: int, params: PyTree, memory: KeysAndValues, z: Array) -> Array:
    query = split_heads(heads, linear(params["query"], feedforward(params["embedding"], z)))
    read = attend(query, *memory).reshape(z.shape[0], -1)
    return decode(params["decoder"], z, linear(params["output"], read))
