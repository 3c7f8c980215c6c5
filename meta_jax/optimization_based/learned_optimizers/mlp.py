"""Small per-parameter MLPs as optimizers (Metz et al. 2022, arXiv:2203.11860)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Network, PyTree
from meta_jax.networks.mlp import mlp
from meta_jax.networks.output_layer import with_output_layer
from meta_jax.optimization_based.update_rules import UpdateRule

_MOMENTA = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
_TIMES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
# Decays of AdafacMLPLOpt before they are learned.
_DECAYS = {"momentum": (0.9, 0.99, 0.999), "square": (0.999,), "factored": (0.9, 0.99, 0.999)}


class MLPState(NamedTuple):
    """Of `mlp_rule`."""

    step: jax.Array  # int32 scalar
    momenta: PyTree  # for each leaf of the parameters, [..., 6]


class Moments(NamedTuple):
    """Running averages for one leaf of the parameters, of shape [..., d1, d0] or smaller."""

    momentum: jax.Array  # of gradients [..., 3]
    square: jax.Array  # of squared gradients [..., 1]
    row: jax.Array  # of squared gradients averaged over the longest axis; without one, of them all
    column: jax.Array  # averaged over the second longest axis; without one, `row` again


class AdafactorMLPState(NamedTuple):
    """Of `adafactor_mlp_rule`."""

    step: jax.Array  # int32 scalar
    moments: PyTree  # `Moments` for each leaf of the parameters


def time_features(step: jax.Array) -> jax.Array:
    """tanh(t / s - 1) for eleven timescales s from 1 to 100,000, [11]."""
    return jnp.tanh(step / jnp.array(_TIMES) - 1)


def normalised(features: jax.Array) -> jax.Array:
    """Each feature [..., features] divided by its root mean square over the leaf, 1e-5 added."""
    axes = tuple(range(features.ndim - 1))
    return features * jax.lax.rsqrt(1e-5 + (features**2).mean(axes, keepdims=True))


def _network(units: tuple[int, ...]) -> Network:
    """From the features of one parameter to d and m."""
    return with_output_layer(mlp(units), 2)


def _updates(network: Network, weights: PyTree, features: jax.Array, step: jax.Array) -> jax.Array:
    """-1e-3 d exp(1e-3 m) of a network's two outputs d and m, for features [..., features]."""
    time = time_features(step).astype(features.dtype)
    time = jnp.broadcast_to(time, (*features.shape[:-1], time.size))
    x = jnp.concatenate([features, time], -1)
    y, _ = network.apply(weights, {}, x.reshape(-1, x.shape[-1]), key=None, train=True)
    updates = -1e-3 * y[:, 0] * jnp.exp(1e-3 * y[:, 1])
    return updates.reshape(features.shape[:-1]).astype(features.dtype)


def mlp_rule(units: tuple[int, ...] = (32, 32)) -> UpdateRule:
    """An MLP that sees one parameter's gradient, value, six momenta and the time.

    Eight features, each over its root mean square in the leaf, and eleven of time give d and m; the
    update is -1e-3 d exp(1e-3 m) (MLPLOpt of the paper's code).

    Args:
      units: of the hidden layers; (32, 32) have 1,762 meta-parameters.

    Examples:
      >>> meta = mlp_rule().init_meta(jax.random.key(0), jnp.zeros(3))
      >>> sum(leaf.size for leaf in jax.tree.leaves(meta))
      1762
    """
    network, decays = _network(units), jnp.array(_MOMENTA)

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        del params
        return network.init(key, jnp.zeros((1, 2 + len(_MOMENTA) + len(_TIMES))))[0]

    def init(meta: PyTree, params: PyTree) -> MLPState:
        del meta
        momenta = jax.tree.map(lambda p: jnp.zeros((*p.shape, len(_MOMENTA)), p.dtype), params)
        return MLPState(jnp.zeros((), jnp.int32), momenta)

    def update(
        meta: PyTree, gradient: PyTree, state: MLPState, params: PyTree, *, loss: jax.Array | None
    ) -> tuple[PyTree, MLPState]:
        del loss
        momenta = jax.tree.map(
            lambda m, g: _average(decays, m, g[..., None]), state.momenta, gradient
        )

        def of_leaf(g: jax.Array, p: jax.Array, m: jax.Array) -> jax.Array:
            seen = jnp.concatenate([jnp.stack([g, p], -1), m], -1)
            return _updates(network, meta, normalised(seen), state.step)

        updates = jax.tree.map(of_leaf, gradient, params, momenta)
        return updates, MLPState(state.step + 1, momenta)

    return UpdateRule(init_meta, init, update)


def _average(decay: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    decay = decay.astype(old.dtype)
    return decay * old + (1 - decay) * new.astype(old.dtype)


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


def _factors(moments: Moments, axes: tuple[int, int] | None) -> jax.Array:
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


def adafactor_mlp_rule(units: tuple[int, ...] = (4, 4)) -> UpdateRule:
    """A tiny MLP on Adam's and Adafactor's statistics, whose decays are learned too.

    28 features (gradient, value, three momenta, a mean square, momenta over its root, its inverse
    root, gradients and momenta over Adafactor's estimate at three decays, and that estimate's rows
    and columns, plain and as inverse roots), each over its root mean square in the leaf, and
    eleven of time give d and m; the update is -1e-3 d exp(1e-3 m) (AdafacMLPLOpt of the paper's
    code; Shazeer and Stern 2018 for Adafactor).

    Args:
      units: of the hidden layers; (4, 4) have 197 meta-parameters, seven of them decays.

    Examples:
      >>> meta = adafactor_mlp_rule().init_meta(jax.random.key(0), jnp.zeros(3))
      >>> sum(leaf.size for leaf in jax.tree.leaves(meta))
      197
    """
    network = _network(units)

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        del params
        offsets = {name: jnp.zeros(len(decays)) for name, decays in _DECAYS.items()}
        weights, _ = network.init(key, jnp.zeros((1, 28 + len(_TIMES))))
        return {"mlp": weights, "decays": offsets}

    def decay(meta: PyTree, name: str) -> jax.Array:
        # 1 - decay changes by a factor of e^10 for one unit of the meta-parameter.
        offset = meta["decays"][name]
        return 1 - (1 - jnp.array(_DECAYS[name], offset.dtype)) * jnp.exp(10 * offset)

    def init(meta: PyTree, params: PyTree) -> AdafactorMLPState:
        del meta

        def of_leaf(p: jax.Array) -> Moments:
            def zeros(shape: tuple[int, ...], name: str) -> jax.Array:
                return jnp.zeros((*shape, len(_DECAYS[name])), p.dtype)

            axes = factored_axes(p.shape)
            row, column = (p.shape, p.shape) if axes is None else _without(p.shape, axes)
            return Moments(
                zeros(p.shape, "momentum"),
                zeros(p.shape, "square"),
                zeros(row, "factored"),
                zeros(column, "factored"),
            )

        return AdafactorMLPState(jnp.zeros((), jnp.int32), jax.tree.map(of_leaf, params))

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: AdafactorMLPState,
        params: PyTree,
        *,
        loss: jax.Array | None,
    ) -> tuple[PyTree, AdafactorMLPState]:
        del loss

        def new_moments(g: jax.Array, old: Moments) -> Moments:
            squares = g[..., None] ** 2
            axes = factored_axes(g.shape)
            row, column = (squares, squares)
            if axes is not None:
                second, first = axes
                row, column = squares.mean(first), squares.mean(second)
            factored = decay(meta, "factored")
            return Moments(
                _average(decay(meta, "momentum"), old.momentum, g[..., None]),
                _average(decay(meta, "square"), old.square, squares),
                _average(factored, old.row, row),
                _average(factored, old.column, column),
            )

        def of_leaf(g: jax.Array, p: jax.Array, new: Moments) -> jax.Array:
            axes = factored_axes(g.shape)
            factors = _factors(new, axes)
            row, column = new.row, new.column
            if axes is not None:
                second, first = axes
                row, column = jnp.expand_dims(row, first), jnp.expand_dims(column, second)
            inverse = jax.lax.rsqrt(new.square + 1e-6)
            features = [
                g[..., None],
                p[..., None],
                new.momentum,
                new.square,
                new.momentum * inverse,
                inverse,
                g[..., None] * factors,
                row,
                column,
                jax.lax.rsqrt(row + 1e-8),
                jax.lax.rsqrt(column + 1e-8),
                new.momentum * factors,
            ]
            wide = [jnp.broadcast_to(f, (*g.shape, f.shape[-1])) for f in features]
            seen = normalised(jnp.concatenate(wide, -1))
            return _updates(network, meta["mlp"], seen, state.step)

        moments = jax.tree.map(new_moments, gradient, state.moments)
        updates = jax.tree.map(of_leaf, gradient, params, moments)
        return updates, AdafactorMLPState(state.step + 1, moments)

    return UpdateRule(init_meta, init, update)


def _without(shape: tuple[int, ...], axes: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shape without its longest axis, and without its second longest."""
    second, first = axes
    return tuple(shape[:axis] + shape[axis + 1 :] for axis in (first, second))
