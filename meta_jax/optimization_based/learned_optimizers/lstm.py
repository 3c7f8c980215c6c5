"""The coordinatewise LSTM optimizer (Andrychowicz et al. 2016, arXiv:1606.04474)."""

import functools

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_jax.core import PyTree
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm
from meta_jax.optimization_based.update_rules import UpdateRule, log_and_sign


def coordinatewise_lstm(
    units: tuple[int, ...] = (20, 20), *, preprocessing: float | None = 5.0, scale: float = 0.01
) -> UpdateRule:
    """theta_{t+1} = theta_t + scale * g_t, [g_t, h_{t+1}] = m(grad_t, h_t; phi) (equation 3).

    m is a stack of LSTMs with a linear output. Its weights phi are shared by all coordinates, each
    of which has a state of its own, so the rule is equivariant to their permutation.

    Args:
      units: of the LSTMs, from the gradient on; (20, 20) have 5,141 meta-parameters.
      preprocessing: p of `log_and_sign`, as which gradients enter; None for plain gradients, as
        the paper's quadratics have them (5,061 meta-parameters).
      scale: what the output is multiplied by; the paper's quadratics have 1.

    Returns:
      The rule; its state is one pair of outputs and cells [coordinates, units] for each LSTM.

    Raises:
      ValueError: where no LSTM is given.

    Examples:
      >>> meta = coordinatewise_lstm().init_meta(jax.random.key(0), jnp.zeros(3))
      >>> sum(leaf.size for leaf in jax.tree.leaves(meta))
      5141
    """
    if not units:
        raise ValueError("coordinatewise_lstm needs at least one LSTM: give its units, e.g. (20,)")
    names = [f"lstm{i + 1}" for i in range(len(units))]
    sizes = [1 if preprocessing is None else 2, *units]

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        del params
        *keys, output = jax.random.split(key, len(units) + 1)
        stack = {
            name: init_lstm(k, *size)
            for name, k, size in zip(names, keys, zip(sizes, units, strict=False), strict=True)
        }
        return {**stack, "output": init_linear(output, units[-1], 1)}

    def init(meta: PyTree, params: PyTree) -> PyTree:
        # Whatever the precision of what is trained, the rule works in its own.
        dtype, size = meta["output"]["bias"].dtype, sum(p.size for p in jax.tree.leaves(params))
        zeros = [jnp.zeros((size, width), dtype) for width in units]
        return {name: (zero, zero) for name, zero in zip(names, zeros, strict=True)}

    # Kept for the backward pass, its values would be some hundred times the parameters.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(meta: PyTree, gradient: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        seen = gradient[:, None] if preprocessing is None else log_and_sign(gradient, preprocessing)
        new = {}
        for name in names:
            new[name] = lstm(meta[name], seen, *state[name])
            seen = new[name][0]
        return scale * linear(meta["output"], seen)[:, 0], new

    def update(
        meta: PyTree, gradient: PyTree, state: PyTree, params: PyTree, *, loss: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        del params, loss
        flat, unravel = ravel_pytree(gradient)
        step_taken, state = step(meta, flat.astype(meta["output"]["bias"].dtype), state)
        return unravel(step_taken.astype(flat.dtype)), state

    return UpdateRule(init_meta, init, update)
