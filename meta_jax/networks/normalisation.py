"""Normalisation as a layer, and the one table that says which moments it uses when.

Every reported accuracy names its mode:

- `batch`: moments of whatever is in the batch, in training and in tests (transductive on queries;
  the original MAML and Relation Networks).
- `running`: moments of the batch in training; averages over tasks and time in tests (the protocol
  of Prototypical Networks).
- `support`: moments of the support set, kept by `adapt` and used for the queries (inductive).
- `one_at_a_time`: as `batch` in training; in tests, each query with the support set (inductive;
  the non-transductive rows of Nichol et al. 2018).
- `layer`, `instance`: moments of each example alone, over all its features or over its places.
- `tasknorm`: moments of the support set blended with those of each example alone, TaskNorm-I of
  Bronskill et al. (2020).
- `none`: there is nothing to normalise.
"""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from meta_jax.core import Array, Batch, MomentsUse, Network, Normalisation, PyTree, check_mask
from meta_jax.lookup import UsageError
from meta_jax.objectives import row_mask
from meta_jax.shapes import with_rank

MODES: tuple[Normalisation, ...] = get_args(Normalisation)
BATCH_MODES = ("batch", "running", "support", "one_at_a_time")  # one structure of parameters
EPSILON = 1e-5
MOMENTUM = 0.9  # of the running averages, for each outer step


class _Uses(NamedTuple):
    """Which moments a mode uses, by what is looked at and whether this is training."""

    support_train: MomentsUse
    support_test: MomentsUse
    query_train: MomentsUse
    query_test: MomentsUse


_USES: dict[Normalisation, _Uses] = {
    "none": _Uses("stored", "stored", "stored", "stored"),
    "batch": _Uses("batch", "batch", "batch", "batch"),
    "running": _Uses("update", "stored", "update", "stored"),
    "support": _Uses("replace", "replace", "stored", "stored"),
    "one_at_a_time": _Uses("batch", "batch", "batch", "batch"),
    "layer": _Uses("stored", "stored", "stored", "stored"),
    "instance": _Uses("stored", "stored", "stored", "stored"),
    "tasknorm": _Uses("replace", "replace", "stored", "stored"),
}
# Modes in which support and queries may be one batch while training.
_JOINT = ("none", "batch", "running", "one_at_a_time", "layer", "instance")


def check_mode(mode: str, allowed: tuple[str, ...] = MODES) -> None:
    """Refuses a mode that does not exist, or that a network does not have.

    Raises:
      UsageError: the mode is not among those allowed.
    """
    if mode not in allowed:
        raise UsageError(f"unknown normalisation '{mode}': choose one of {', '.join(allowed)}")


def check_moments(moments: str) -> None:
    """Refuses a use of moments that does not exist.

    Raises:
      UsageError: it is not one of `meta_jax.core.MomentsUse`.
    """
    if moments not in get_args(MomentsUse):
        raise UsageError(
            f"unknown moments '{moments}': choose one of {', '.join(get_args(MomentsUse))}"
        )


def is_normalisation(path: tuple) -> bool:
    """Whether a parameter is a normalisation layer's, by its path in the tree.

    Networks keep a normalisation layer's parameters under the key 'normalisation'; the adapters of
    flax modules do so too.

    Args:
      path: Path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
    """
    return any(getattr(key, "key", None) == "normalisation" for key in path)


# ---- What is embedded, by which moments.


def is_transductive(mode: Normalisation) -> bool:
    """Whether a query's answer depends on the other queries in tests."""
    return mode == "batch"


def support_moments(mode: Normalisation, *, train: bool) -> MomentsUse:
    """The moments that normalise a support set."""
    return _USES[mode].support_train if train else _USES[mode].support_test


def query_moments(mode: Normalisation, *, train: bool) -> MomentsUse:
    """The moments that normalise queries."""
    return _USES[mode].query_train if train else _USES[mode].query_test


def keeps_support_moments(mode: Normalisation) -> bool:
    """Whether the state that `adapt` leaves holds the support set's moments."""
    return _USES[mode].support_test == "replace"


def queries_need_support(mode: Normalisation) -> bool:
    """Whether queries are embedded beside the support set in tests, so that it must be kept."""
    return mode == "one_at_a_time"


def embed_support(
    network: Network,
    params: PyTree,
    state: PyTree,
    support: Batch,
    *,
    key: Array | None,
    train: bool,
) -> tuple[Array, PyTree]:
    """Embeds a support set with the moments that the network's mode has for it.

    Args:
      network: The network.
      params, state: The network's.
      support: The examples; their targets are not looked at.
      key: A random key for dropout and the like.
      train: Whether this is meta-training.

    Returns:
      Embeddings [n, ...] and the network's new state.
    """
    moments = support_moments(network.normalisation, train=train)
    x = blank_padding(support.x, support.mask)
    return network.apply(params, state, x, key=key, train=train, moments=moments, mask=support.mask)


def embed_queries(
    network: Network,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    support: Batch | None,
    key: Array | None,
    train: bool,
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    """Embeds queries with the moments that the network's mode has for them.

    Args:
      network: The network.
      params, state: The network's, the state as `embed_support` left it.
      x: Queries, leaves [m, ...].
      support: The support set where `queries_need_support`; else it is not looked at.
      key: A random key for dropout and the like.
      train: Whether this is meta-training.
      mask: bool [m], False for padding.

    Returns:
      Embeddings [m, ...] and the network's new state.
    """
    x = blank_padding(x, mask)
    if queries_need_support(network.normalisation) and not train:
        if support is None:
            raise ValueError("queries are normalised one at a time with the support set: give it")
        return _embed_one_at_a_time(network, params, state, x, support, key), state
    moments = query_moments(network.normalisation, train=train)
    return network.apply(params, state, x, key=key, train=train, moments=moments, mask=mask)


def _embed_one_at_a_time(
    network: Network, params: PyTree, state: PyTree, x: PyTree, support: Batch, key: Array | None
) -> Array:
    mask = None
    if support.mask is not None:
        mask = jnp.concatenate([support.mask, jnp.ones(1, bool)])
    support_x = blank_padding(support.x, support.mask)

    def embed(query: PyTree) -> Array:
        together = jax.tree.map(lambda s, q: jnp.concatenate([s, q[None]]), support_x, query)
        z, _ = network.apply(
            params, state, together, key=key, train=False, moments="batch", mask=mask
        )
        return z[-1]

    return jax.vmap(embed)(x)


def blank_padding(x: PyTree, mask: Array | None) -> PyTree:
    """Zeros where the rows are padding: the network's output there stays finite, whatever stood.

    Raises:
      ValueError: the mask is not bool [n].
    """
    if mask is None:
        return x

    def blank(leaf: Array) -> Array:
        check_mask(mask, leaf.shape[0])
        real = mask.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(real, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(blank, x)


def may_embed_together(mode: Normalisation) -> bool:
    """Whether support and queries may be embedded as one batch while training."""
    return mode in _JOINT


def embed_together(
    network: Network, params: PyTree, state: PyTree, support: Batch, query: Batch, *, key: Array
) -> tuple[Array, Array, PyTree]:
    """Embeds support set and queries as one batch, in training (Snell et al. 2017).

    Args:
      network: The network, of a mode that `may_embed_together`.
      params, state: The network's.
      support, query: The examples; their targets are not looked at.
      key: A random key for dropout and the like.

    Returns:
      Embeddings of the support [n, ...] and of the queries [m, ...], and the new state.
    """
    x = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), support.x, query.x)
    n = jax.tree.leaves(support.x)[0].shape[0]
    mask = None
    if support.mask is not None or query.mask is not None:
        mask = jnp.concatenate([row_mask(support), row_mask(query)])
        x = blank_padding(x, mask)
    moments = query_moments(network.normalisation, train=True)
    z, state = network.apply(params, state, x, key=key, train=True, moments=moments, mask=mask)
    return z[:n], z[n:], state


def embed_apart(
    network: Network, params: PyTree, state: PyTree, support: Batch, query: Batch, *, key: Array
) -> tuple[Array, Array, PyTree]:
    """As `embed_together`, but the support set first and the queries with the state it leaves."""
    support_key, query_key = jax.random.split(key)
    z_support, state = embed_support(network, params, state, support, key=support_key, train=True)
    z, state = embed_queries(
        network,
        params,
        state,
        query.x,
        support=support,
        key=query_key,
        train=True,
        mask=query.mask,
    )
    return z_support, z, state


# ---- The layer.


class Moments(NamedTuple):
    """Mean and biased variance."""

    mean: Array
    var: Array


def init_normalisation(
    features: int, mode: Normalisation, dtype: jnp.dtype | None = None
) -> tuple[PyTree, PyTree]:
    """Parameters and moments of a normalisation layer.

    Args:
      features: Size of the last axis.
      mode: One of `MODES`; those in `BATCH_MODES` share one structure.
      dtype: Type of the parameters; JAX's default if None.

    Returns:
      {'scale', 'offset'} (with 'slope' and 'intercept' for tasknorm), each [features] or a scalar,
      and {'mean', 'var'} [features] (with 'count' for tasknorm). Nothing for the mode none, and no
      moments for layer and instance.
    """
    check_mode(mode)
    if mode == "none":
        return {}, {}
    params = {"scale": jnp.ones(features, dtype), "offset": jnp.zeros(features, dtype)}
    if mode in ("layer", "instance"):
        return params, {}
    stats = {"mean": jnp.zeros(features, dtype), "var": jnp.ones(features, dtype)}
    if mode == "tasknorm":
        params |= {"slope": jnp.zeros((), dtype), "intercept": jnp.zeros((), dtype)}
        stats["count"] = jnp.ones((), dtype)
    return params, stats


def normalise(
    params: PyTree,
    stats: PyTree,
    x: Array,
    *,
    mode: Normalisation,
    moments: MomentsUse,
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    """scale (x - mean) / sqrt(var + 1e-5) + offset, with the moments that are asked for.

    Inputs in half precision are normalised in float32, and are in half precision again at the end;
    the moments keep the type that they have.

    Args:
      params, stats: Parameters and moments, from `init_normalisation`.
      x: [n, ..., features].
      mode: The layer's; `layer` and `instance` ignore `moments`.
      moments: Which moments: see `meta_jax.core.MomentsUse`.
      mask: bool [n], False for rows of padding, which enter no moment.

    Returns:
      The normalised x and the new moments, which are the old ones where no row is real.

    Raises:
      UsageError: an unknown use of moments; instance or tasknorm on inputs without places,
        [n, features].
      ValueError: the mask is not bool [n].

    Examples:
      >>> params, stats = init_normalisation(1, "batch")
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, _ = normalise(params, stats, x, mode="batch", moments="batch")
      >>> y.round(3).ravel().tolist()
      [-1.0, 1.0]
    """
    check_moments(moments)
    if mask is not None:
        check_mask(mask, x.shape[0])
    if mode == "none":
        return x, stats
    if mode in ("instance", "tasknorm") and x.ndim < 3:
        raise UsageError(
            f"normalisation '{mode}' needs inputs with places [n, ..., features], not {x.shape}: "
            "use layer or batch"
        )
    wide = x.astype(wide_type(x.dtype))
    if mode in ("layer", "instance"):
        axes = tuple(range(1, x.ndim if mode == "layer" else x.ndim - 1))
        return _narrow(scaled(params, wide, moments_over(wide, axes)), x), stats
    batch = None if moments == "stored" else batch_moments(wide, mask)
    used, new = used_moments(stats, batch, moments)
    if mode == "tasknorm":
        if moments == "replace":
            n = jnp.asarray(x.shape[0]) if mask is None else mask.sum()
            new = {**new, "count": n.astype(stats["count"].dtype)}
        own = moments_over(wide, tuple(range(1, x.ndim - 1)))
        used = _blended(params, used, own, new["count"])
    if mask is not None and new is not stats:
        new = jax.tree.map(lambda n, old: jnp.where(mask.any(), n, old), new, stats)
    return _narrow(scaled(params, wide, used), x), new


def _narrow(y: Array, x: Array) -> Array:
    """y in the type of x, where that is half precision."""
    return y.astype(x.dtype) if x.dtype in (jnp.bfloat16, jnp.float16) else y


def wide_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type of sums, in which differences of squares stay positive: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def moments_over(x: Array, axes: tuple[int, ...]) -> Moments:
    """Mean and variance over some axes, which are kept with size 1."""
    mean = x.mean(axes, keepdims=True)
    return Moments(mean, ((x - mean) ** 2).mean(axes, keepdims=True))


def batch_moments(x: Array, mask: Array | None = None) -> Moments:
    """Moments [features] over all rows that are not padding, and all places.

    Args:
      x: [n, ..., features].
      mask: bool [n].

    Raises:
      ValueError: the mask is not bool [n].
    """
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        mean = x.mean(axes)
        return Moments(mean, ((x - with_rank(mean, x)) ** 2).mean(axes))
    check_mask(mask, x.shape[0])
    weight = mask.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    places = x[0, ..., 0].size
    count = jnp.maximum(weight.sum(), 1) * places
    # Not a product with zero: what stands in padding may be infinite.
    real = jnp.where(weight > 0, x, 0)
    mean = real.sum(axes) / count
    away = jnp.where(weight > 0, real - with_rank(mean, real), 0)
    return Moments(mean, (away**2).sum(axes) / count)


def used_moments(
    stats: PyTree, batch: Moments | None, moments: MomentsUse
) -> tuple[Moments, PyTree]:
    """What to normalise with, and the new state.

    Args:
      stats: The state {'mean', 'var', ...}.
      batch: Moments of the inputs at hand; None where `moments` is 'stored'.
      moments: Which moments: see `meta_jax.core.MomentsUse`.

    Raises:
      UsageError: an unknown use of moments.
    """
    check_moments(moments)
    if moments == "stored" or batch is None:
        return Moments(stats["mean"], stats["var"]), stats
    if moments == "batch":
        return batch, stats
    new = batch._asdict()
    if moments == "update":
        new = {name: MOMENTUM * stats[name] + (1 - MOMENTUM) * new[name] for name in new}
    return batch, {**stats, **{name: new[name].astype(stats[name].dtype) for name in new}}


def scaled(params: PyTree, x: Array, used: Moments) -> Array:
    """scale (x - mean) / sqrt(var + 1e-5) + offset."""
    factor = with_rank(params["scale"], used.var) * jax.lax.rsqrt(used.var + EPSILON)
    offset = with_rank(params["offset"], x)
    return (x - with_rank(used.mean, x)) * with_rank(factor, x) + offset


def _blended(params: PyTree, support: Moments, own: Moments, count: Array) -> Moments:
    """Moments of a mixture, a of the support's and 1 - a of each example's own (equations 6, 7)."""
    a = jax.nn.sigmoid(params["slope"] * count + params["intercept"])
    theirs = Moments(*(with_rank(moment, own.mean) for moment in support))
    mean = a * theirs.mean + (1 - a) * own.mean
    var = a * (theirs.var + (theirs.mean - mean) ** 2)
    var += (1 - a) * (own.var + (own.mean - mean) ** 2)
    return Moments(mean, var)
