"""Small per-parameter MLPs as optimizers (Metz et al. 2022, arXiv:2203.11860)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax import registry
from meta_jax.core import Array, Network, PyTree
from meta_jax.networks.mlp import mlp
from meta_jax.networks.output_layer import with_output_layer
from meta_jax.optimization_based.update_rules import UpdateRule, ValueFn
from meta_jax.ranges import PositiveInts
from meta_jax.shapes import with_rank

_MOMENTA = np.array((0.1, 0.5, 0.9, 0.99, 0.999, 0.9999))
_TIMES = np.array((1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000), np.int32)
# Decays of AdafacMLPLOpt before they are learned.
_DECAYS = {"momentum": (0.9, 0.99, 0.999), "square": (0.999,), "factored": (0.9, 0.99, 0.999)}
_ADAFACTOR_FEATURES = 28


class MLPState(NamedTuple):
    """State of `mlp_rule`."""

    step: Array  # int32 scalar
    momenta: PyTree  # for each leaf of the parameters, [..., 6]


class Moments(NamedTuple):
    """Running averages for one leaf of the parameters, of shape [..., d1, d0] or smaller."""

    momentum: Array  # of gradients [..., 3]
    square: Array  # of squared gradients [..., 1]
    row: Array  # of squared gradients averaged over the longest axis; without one, of them all
    column: Array  # averaged over the second longest axis; without one, `row` again


class AdafactorMLPState(NamedTuple):
    """State of `adafactor_mlp_rule`."""

    step: Array  # int32 scalar
    moments: PyTree  # `Moments` for each leaf of the parameters


def time_features(step: Array) -> Array:
    """tanh(t / s - 1) for eleven timescales s from 1 to 100,000, [11]."""
    return jnp.tanh(step / _TIMES - 1)


def over_root_mean_square(features: Array) -> Array:
    """Each feature [..., features] divided by its root mean square over the leaf, 1e-5 added."""
    axes = tuple(range(features.ndim - 1))
    return features * jax.lax.rsqrt(1e-5 + (features**2).mean(axes, keepdims=True))


@registry.component("rule", "mlp")
def mlp_rule(widths: PositiveInts = (32, 32)) -> UpdateRule:
    """Builds an optimizer that is an MLP on one parameter's gradient, value, momenta and the time.

    Eight features, each over its root mean square in the leaf, and eleven of time give d and m; the
    update is -1e-3 d exp(1e-3 m) (MLPLOpt of the paper's code).

    Args:
      widths: Number of units of each hidden layer; 32,32 have 1,762 meta-parameters.

    Returns:
      The rule, which looks at the parameters.

    Examples:
      >>> meta = mlp_rule().init_meta(jax.random.key(0), jnp.zeros(3))
      >>> sum(leaf.size for leaf in jax.tree.leaves(meta))
      1762
    """
    network = with_output_layer(mlp(widths), 2)

    def init_meta(key: Array, params: PyTree) -> PyTree:
        del params
        return network.init(key, jnp.zeros((1, 2 + _MOMENTA.size + _TIMES.size)))[0]

    def init(meta: PyTree, params: PyTree) -> MLPState:
        del meta
        momenta = jax.tree.map(lambda p: jnp.zeros((*p.shape, _MOMENTA.size), p.dtype), params)
        return MLPState(jnp.zeros((), jnp.int32), momenta)

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: MLPState,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, MLPState]:
        del loss, value_fn
        _check_params(params, "mlp_rule")
        momenta = jax.tree.map(
            lambda m, g: _average(_MOMENTA, m, g[..., None]), state.momenta, gradient
        )

        def of_leaf(g: Array, p: Array, m: Array) -> Array:
            seen = jnp.concatenate([jnp.stack([g, p], -1), m], -1)
            return _updates(network, meta, over_root_mean_square(seen), state.step)

        updates = jax.tree.map(of_leaf, gradient, params, momenta)
        return updates, MLPState(state.step + 1, momenta)

    return UpdateRule(init_meta, init, update)


@registry.component("rule", "adafactor_mlp")
def adafactor_mlp_rule(widths: PositiveInts = (4, 4)) -> UpdateRule:
    """Builds an optimizer that is a tiny MLP on Adam's and Adafactor's statistics.

    28 features (gradient, value, three momenta, a mean square, momenta over its root, its inverse
    root, gradients and momenta over Adafactor's estimate at three decays, and that estimate's rows
    and columns, plain and as inverse roots), each over its root mean square in the leaf, and
    eleven of time give d and m; the update is -1e-3 d exp(1e-3 m). The decays are learned too
    (AdafacMLPLOpt of the paper's code; Shazeer and Stern 2018 for Adafactor).

    Args:
      widths: Number of units of each hidden layer; 4,4 have 197 meta-parameters, seven of them
        decays.

    Returns:
      The rule, which looks at the parameters.

    Examples:
      >>> meta = adafactor_mlp_rule().init_meta(jax.random.key(0), jnp.zeros(3))
      >>> sum(leaf.size for leaf in jax.tree.leaves(meta))
      197
    """
    network = with_output_layer(mlp(widths), 2)

    def init_meta(key: Array, params: PyTree) -> PyTree:
        del params
        offsets = {name: jnp.zeros(len(decays)) for name, decays in _DECAYS.items()}
        weights, _ = network.init(key, jnp.zeros((1, _ADAFACTOR_FEATURES + _TIMES.size)))
        return {"mlp": weights, "decays": offsets}

    def init(meta: PyTree, params: PyTree) -> AdafactorMLPState:
        del meta
        return AdafactorMLPState(jnp.zeros((), jnp.int32), jax.tree.map(init_moments, params))

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: AdafactorMLPState,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, AdafactorMLPState]:
        del loss, value_fn
        _check_params(params, "adafactor_mlp_rule")
        decays = {name: learned_decays(meta["decays"][name], name) for name in _DECAYS}
        moments = jax.tree.map(functools.partial(update_moments, decays), gradient, state.moments)

        def of_leaf(g: Array, p: Array, new: Moments) -> Array:
            seen = over_root_mean_square(adafactor_features(g, p, new))
            return _updates(network, meta["mlp"], seen, state.step)

        updates = jax.tree.map(of_leaf, gradient, params, moments)
        return updates, AdafactorMLPState(state.step + 1, moments)

    return UpdateRule(init_meta, init, update)


# ---- Adafactor's statistics.


def learned_decays(offset: Array, name: str) -> Array:
    """Decays whose distance from 1 changes by a factor of e^10 for one unit of their offset.

    Args:
      offset: Meta-parameters, one for each decay.
      name: Name of the averages, 'momentum', 'square' or 'factored'.
    """
    return 1 - (1 - jnp.array(_DECAYS[name], offset.dtype)) * jnp.exp(10 * offset)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(second longest axis, longest axis); None where there are fewer than two axes.

    Examples:
      >>> factored_axes((3, 3, 8, 16)), factored_axes((5,))
      ((2, 3), None)
    """
    if len(shape) < 2:
        return None
    *_, second, first = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return second, first


def init_moments(p: Array) -> Moments:
    """Averages of zero for one leaf of the parameters."""
    axes = factored_axes(p.shape)
    row, column = (p.shape, p.shape) if axes is None else _without(p.shape, axes)

    def zeros(shape: tuple[int, ...], name: str) -> Array:
        return jnp.zeros((*shape, len(_DECAYS[name])), p.dtype)

    return Moments(
        zeros(p.shape, "momentum"),
        zeros(p.shape, "square"),
        zeros(row, "factored"),
        zeros(column, "factored"),
    )


def update_moments(decays: dict[str, Array], g: Array, old: Moments) -> Moments:
    """Takes one leaf's gradient into its averages.

    Args:
      decays: Decays of 'momentum', 'square' and 'factored'.
      g: Gradient of the leaf.
      old: Averages so far.
    """
    squares = g[..., None] ** 2
    axes = factored_axes(g.shape)
    row, column = squares, squares
    if axes is not None:
        second, first = axes
        row, column = squares.mean(first), squares.mean(second)
    return Moments(
        _average(decays["momentum"], old.momentum, g[..., None]),
        _average(decays["square"], old.square, squares),
        _average(decays["factored"], old.row, row),
        _average(decays["factored"], old.column, column),
    )


def adafactor_features(g: Array, p: Array, moments: Moments) -> Array:
    """The 28 features of each parameter of one leaf, [..., 28].

    Args:
      g: Gradient of the leaf.
      p: The leaf.
      moments: Averages, this gradient among them.
    """
    axes = factored_axes(g.shape)
    factors = _factors(moments, axes)
    row, column = moments.row, moments.column
    if axes is not None:
        second, first = axes
        row, column = jnp.expand_dims(row, first), jnp.expand_dims(column, second)
    inverse = jax.lax.rsqrt(moments.square + 1e-6)
    features = [
        g[..., None],
        p[..., None],
        moments.momentum,
        moments.square,
        moments.momentum * inverse,
        inverse,
        g[..., None] * factors,
        row,
        column,
        jax.lax.rsqrt(row + 1e-8),
        jax.lax.rsqrt(column + 1e-8),
        moments.momentum * factors,
    ]
    return jnp.concatenate([jnp.broadcast_to(f, (*g.shape, f.shape[-1])) for f in features], -1)


def _factors(moments: Moments, axes: tuple[int, int] | None) -> Array:
    """1 / sqrt of the estimated mean squared gradient, broadcast against [..., 3]."""
    if axes is None:
        return jax.lax.rsqrt(moments.row + 1e-9)
    second, first = axes
    # A row's factor is relative to the mean of all rows: their product estimates the square.
    left = second - (second > first)
    mean = moments.row.mean(left, keepdims=True)
    row = jax.lax.rsqrt(moments.row / (mean + 1e-9) + 1e-9)
    column = jax.lax.rsqrt(moments.column + 1e-9)
    return jnp.expand_dims(row, first) * jnp.expand_dims(column, second)


def _without(
    shape: tuple[int, ...], axes: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape without its longest axis, and without its second longest."""
    second, first = axes
    return shape[:first] + shape[first + 1 :], shape[:second] + shape[second + 1 :]


# ---- What both rules share.


def _check_params(params: PyTree, rule: str) -> None:
    if params is None:
        raise ValueError(
            f"{rule} looks at the parameters: give them, update(gradients, state, params)"
        )


def _average(decay: Array | np.ndarray, old: Array, new: Array) -> Array:
    decay = with_rank(jnp.asarray(decay, old.dtype), old)
    return decay * old + (1 - decay) * new.astype(old.dtype)


def _updates(network: Network, weights: PyTree, features: Array, step: Array) -> Array:
    """-1e-3 d exp(1e-3 m) of a network's two outputs d and m, for features [..., features]."""
    time = time_features(step).astype(features.dtype)
    time = jnp.broadcast_to(time, (*features.shape[:-1], time.size))
    x = jnp.concatenate([features, time], -1)
    y, _ = network.apply(weights, {}, x.reshape(-1, x.shape[-1]), key=None, train=True)
    updates = -1e-3 * y[:, 0] * jnp.exp(1e-3 * y[:, 1])
    return updates.reshape(features.shape[:-1]).astype(features.dtype)
