"""Update rules: optax with meta-parameters. What an inner loop does with a gradient."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_jax.core import PyTree


class UpdateRule(NamedTuple):
    """An inner optimizer whose own parameters may be meta-learned."""

    init_meta: Callable[..., PyTree]  # (key, params) -> meta-parameters m
    init: Callable[..., PyTree]  # (m, params) -> state
    update: Callable[..., tuple[PyTree, PyTree]]  # (m, g, state, params, *, loss) -> (updates, s)


def from_optax(transformation: optax.GradientTransformation) -> UpdateRule:
    """Any optax transformation as an update rule without meta-parameters.

    Args:
      transformation: for example `optax.sgd(0.4)` or `optax.adam(1e-3)`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> rule = from_optax(optax.sgd(0.5))
      >>> state = rule.init({}, jnp.ones(2))
      >>> rule.update({}, jnp.array([1., 2.]), state, jnp.ones(2), loss=None)[0].tolist()
      [-0.5, -1.0]
    """
    transformation = optax.with_extra_args_support(transformation)

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        del key, params
        return {}

    def init(meta: PyTree, params: PyTree) -> PyTree:
        del meta
        return transformation.init(params)

    def update(
        meta: PyTree, gradient: PyTree, state: PyTree, params: PyTree, *, loss: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        del meta
        return transformation.update(gradient, state, params, value=loss)

    return UpdateRule(init_meta, init, update)


def learned_sgd(low: float, high: float) -> UpdateRule:
    """SGD with one meta-learned rate for each coordinate: u = -m o g (Li et al. 2017, eq. 2).

    Args:
      low, high: the rates start uniform between the two.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> rule = learned_sgd(0.5, 0.5)
      >>> rates = rule.init_meta(jax.random.key(0), jnp.ones(2))
      >>> rule.update(rates, jnp.array([1., 2.]), (), jnp.ones(2), loss=None)[0].tolist()
      [-0.5, -1.0]
    """

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(
            [
                jax.random.uniform(k, p.shape, p.dtype, low, high)
                for k, p in zip(keys, leaves, strict=True)
            ]
        )

    def update(
        meta: PyTree, gradient: PyTree, state: PyTree, params: PyTree, *, loss: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        del params, loss
        return jax.tree.map(lambda m, g: -m * g, meta, gradient), state

    return UpdateRule(init_meta, lambda meta, params: (), update)


def per_step_sgd(rate: float, steps: int) -> UpdateRule:
    """SGD with one meta-learned rate for each leaf and step (Antoniou et al. 2019, section 4).

    Args:
      rate: what all rates start from.
      steps: how many steps have rates of their own; later ones take the last.
    """

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        del key
        return jax.tree.map(lambda p: jnp.full(steps, rate, p.dtype), params)

    def init(meta: PyTree, params: PyTree) -> jax.Array:
        del meta, params
        return jnp.zeros((), jnp.int32)

    def update(
        meta: PyTree, gradient: PyTree, state: jax.Array, params: PyTree, *, loss: jax.Array | None
    ) -> tuple[PyTree, jax.Array]:
        del params, loss
        now = jnp.minimum(state, steps - 1)
        return jax.tree.map(lambda m, g: -m[now] * g, meta, gradient), state + 1

    return UpdateRule(init_meta, init, update)


def log_and_sign(x: jax.Array, p: float = 10.0) -> jax.Array:
    """(log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x): [...] -> [..., 2].

    Andrychowicz et al. (2016), appendix A; Ravi and Larochelle (2017), section 3.3.

    Args:
      x: gradients or losses.
      p: how many powers of e below 1 are told apart by their logarithm.

    Examples:
      >>> log_and_sign(jnp.array([1.0, -1.0, 0.0])).tolist()
      [[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]
    """
    size = jnp.abs(x)
    large = size >= math.exp(-p)
    # The logarithm's gradient at zero would be NaN even where it is not chosen.
    logarithm = jnp.log(jnp.where(large, size, 1.0)) / p
    return jnp.stack(
        [jnp.where(large, logarithm, -1.0), jnp.where(large, jnp.sign(x), math.exp(p) * x)], -1
    )
