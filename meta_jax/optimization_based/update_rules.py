"""Update rules: optax with meta-parameters. What an inner loop does with a gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
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
