"""The coordinatewise LSTM optimizer (Andrychowicz et al. 2016, arXiv:1606.04474)."""

import functools

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_jax import registry
from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm
from meta_jax.optimization_based.update_rules import UpdateRule, ValueFn, log_and_sign
from meta_jax.ranges import Positive, PositiveInts


@registry.component("rule", "lstm")
def coordinatewise_lstm(
    hidden_sizes: PositiveInts = (20, 20),
    *,
    preprocessing: Positive | None = 5.0,
    output_scale: Positive = 0.01,
) -> UpdateRule:
    """Builds the coordinatewise LSTM optimizer.

    theta_{t+1} = theta_t + output_scale * g_t, [g_t, h_{t+1}] = m(grad_t, h_t; phi) (equation 3).
    m is a stack of LSTMs with a linear output. Its weights phi are shared by all coordinates, each
    of which has a state of its own, so the rule is equivariant to their permutation.

    Args:
      hidden_sizes: Hidden size of each LSTM, from the gradient on; 20,20 have 5,141
        meta-parameters.
      preprocessing: Power p of `log_and_sign`, as which gradients enter; None for plain gradients,
        as the paper's quadratics have them (5,061 meta-parameters).
      output_scale: Factor of the output; 1 for the paper's quadratics.

    Returns:
      The rule; its state is one pair of outputs and cells [coordinates, hidden size] for each LSTM.

    Raises:
      UsageError: there is no LSTM, or one without units, or p is not positive.

    Examples:
      >>> meta = coordinatewise_lstm().init_meta(jax.random.key(0), jnp.zeros(3))
      >>> sum(leaf.size for leaf in jax.tree.leaves(meta))
      5141
    """
    if not hidden_sizes:
        raise UsageError("an LSTM rule without an LSTM: give hidden_sizes, for example (20,)")
    names = [f"lstm{i + 1}" for i in range(len(hidden_sizes))]
    sizes = [1 if preprocessing is None else 2, *hidden_sizes]

    def init_meta(key: Array, params: PyTree) -> PyTree:
        del params
        *keys, output = jax.random.split(key, len(names) + 1)
        stack = {
            name: init_lstm(k, *sizes[i : i + 2])
            for i, (name, k) in enumerate(zip(names, keys, strict=True))
        }
        return {**stack, "output": init_linear(output, sizes[-1], 1)}

    def init(meta: PyTree, params: PyTree) -> PyTree:
        # Whatever the precision of what is trained, the rule works in its own.
        dtype, size = meta["output"]["bias"].dtype, sum(p.size for p in jax.tree.leaves(params))
        zeros = [jnp.zeros((size, width), dtype) for width in hidden_sizes]
        return {name: (zero, zero) for name, zero in zip(names, zeros, strict=True)}

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, PyTree]:
        del params, loss, value_fn
        flat, unravel = ravel_pytree(gradient)
        step, state = _step(meta, flat.astype(meta["output"]["bias"].dtype), state, preprocessing)
        return unravel((output_scale * step).astype(flat.dtype)), state

    return UpdateRule(init_meta, init, update)


# Kept for the backward pass, its values would be some hundred times the parameters.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def _step(
    meta: PyTree, gradient: Array, state: PyTree, preprocessing: float | None
) -> tuple[Array, PyTree]:
    """The output [coordinates] of the stack of LSTMs for a gradient [coordinates]."""
    seen = gradient[:, None] if preprocessing is None else log_and_sign(gradient, preprocessing)
    new = {}
    for i in range(len(state)):
        name = f"lstm{i + 1}"
        new[name] = lstm(meta[name], seen, *state[name])
        seen = new[name][0]
    return linear(meta["output"], seen)[:, 0], new
