"""Attention and the layers of a transformer, for networks that read sequences or sets."""

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.shapes import with_rank


def attend(query: Array, keys: Array, values: Array, seen: Array | None = None) -> Array:
    """Dot-product attention (Vaswani et al. 2017): softmax(q k / sqrt(d)) v of every head.

    In single and half precision it is `jax.nn.dot_product_attention`, whose softmax is in single
    precision; double precision is kept throughout.

    Args:
      query: [n, heads, d].
      keys: [m, heads, d].
      values: [m, heads, d].
      seen: Which keys a query sees, bool [n, m], or [1, m] for all queries alike; None for all.

    Returns:
      [n, heads, d]; zeros for a query that sees no key.

    Examples:
      >>> values = jnp.array([[[1.0]], [[3.0]], [[9.0]]])
      >>> attend(jnp.zeros((1, 1, 1)), values, values, jnp.array([[True, True, False]])).tolist()
      [[[2.0]]]
    """
    if query.dtype == jnp.float64:
        read = _attend_in_double_precision(query, keys, values, seen)
    else:
        mask = None if seen is None else seen[None]
        read = jax.nn.dot_product_attention(query, keys, values, mask=mask)
    if seen is None:
        return read
    return jnp.where(seen.any(-1)[:, None, None], read, jnp.zeros((), read.dtype))


def _attend_in_double_precision(
    query: Array, keys: Array, values: Array, seen: Array | None
) -> Array:
    scores = jnp.einsum("nhd,mhd->hnm", query, keys) / jnp.sqrt(query.shape[-1])
    if seen is not None:
        # Finite, so that the softmax of no key at all is.
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("hnm,mhd->nhd", jax.nn.softmax(scores, axis=-1), values)


def split_heads(heads: int, z: Array) -> Array:
    """Rows [n, width] as [n, heads, width / heads]."""
    return z.reshape(z.shape[0], heads, z.shape[1] // heads)


def check_heads(component: str, width: int, heads: int) -> None:
    """Refuses a width that the heads do not divide, and numbers below one.

    Raises:
      UsageError: the numbers do not fit.
    """
    check_at_least_one(component, width=width, heads=heads)
    if width % heads:
        raise UsageError(
            f"the width of {component} must be a multiple of its heads: width={width}, "
            f"heads={heads}"
        )


# ---- A layer of a transformer: attention and an MLP, normalised before each.


def init_layer_norm(width: int) -> PyTree:
    """Scale and offset of a layer normalisation."""
    return {"scale": jnp.ones(width), "offset": jnp.zeros(width)}


def layer_norm(params: PyTree, x: Array) -> Array:
    """Layer normalisation over the last axis (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    scale, offset = (with_rank(params[name], x) for name in ("scale", "offset"))
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale + offset


def init_transformer_layer(key: Array, width: int, hidden: int) -> PyTree:
    """Parameters of a layer.

    Args:
      key: A random key.
      width: Width of its inputs and outputs.
      hidden: Units of its MLP.
    """
    sizes = {
        "query_key_value": (width, 3 * width),
        "attention_output": (width, width),
        "hidden": (width, hidden),
        "output": (hidden, width),
    }
    keys = jax.random.split(key, len(sizes))
    linears = {n: init_linear(k, *size) for k, (n, size) in zip(keys, sizes.items(), strict=True)}
    names = ("attention_normalisation", "mlp_normalisation")
    return linears | {name: init_layer_norm(width) for name in names}


def project(layer: PyTree, z: Array, heads: int, parts: slice = slice(3)) -> list[Array]:
    """Queries, keys and values of rows, or some of them.

    Args:
      layer: Parameters, from `init_transformer_layer`.
      z: Rows [n, width].
      heads: Number of heads.
      parts: Which of the three are computed, such as slice(1, 3) for keys and values.

    Returns:
      A list of arrays [n, heads, width / heads].
    """
    width = z.shape[-1]

    def chosen(leaf: Array) -> Array:  # columns are by head, and within it by part
        by_head = leaf.reshape(*leaf.shape[:-1], heads, 3, width // heads)
        return by_head[..., parts, :].reshape(*leaf.shape[:-1], -1)

    some = jax.tree.map(chosen, layer["query_key_value"])
    projected = linear(some, layer_norm(layer["attention_normalisation"], z))
    by_head = split_heads(heads, projected)
    return jnp.split(by_head, by_head.shape[-1] * heads // width, axis=-1)


def after_attention(layer: PyTree, z: Array, read: Array) -> Array:
    """Rows [n, width] after a layer, with what its heads read, [n, heads, width / heads]."""
    z = z + linear(layer["attention_output"], read.reshape(z.shape))
    hidden = jax.nn.gelu(linear(layer["hidden"], layer_norm(layer["mlp_normalisation"], z)))
    return z + linear(layer["output"], hidden)
