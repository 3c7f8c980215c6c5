"""The LSTM Meta-Learner: optimization as a model (Ravi and Larochelle 2017, ICLR)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_jax import registry
from meta_jax.core import (
    Array,
    Episode,
    LossAux,
    MetaLearner,
    MomentsUse,
    Network,
    Objective,
    PyTree,
)
from meta_jax.lookup import UsageError
from meta_jax.networks.coordinates import (
    join_coordinates,
    linear_across,
    map_chunks,
    split_coordinates,
)
from meta_jax.networks.normalisation import keeps_support_moments
from meta_jax.objectives import cross_entropy
from meta_jax.optimization_based.adjoints import Adjoint, as_adjoint
from meta_jax.optimization_based.learner import gradient_learner
from meta_jax.optimization_based.update_rules import UpdateRule, ValueFn, log_and_sign
from meta_jax.ranges import Decay, NotNegativeInt, PositiveInt


class MetaLSTMState(NamedTuple):
    """The state of the coordinates, whose weights are shared, as `split_coordinates` has them."""

    hidden: Array  # [chunks, hidden_size, chunk] of the first LSTM
    cell: Array  # [chunks, hidden_size, chunk]
    input_gate: Array  # [chunks, chunk], before the sigmoid
    forget_gate: Array  # [chunks, chunk], before the sigmoid


def lstm_rule(hidden_size: int = 20) -> UpdateRule:
    """Builds the update rule theta_t = f_t o theta_{t-1} - i_t o grad_t, an LSTM's cell update.

    f_t = sigma(W_F [h_t, theta_{t-1}, f~_{t-1}] + b_F) and i_t alike, for each coordinate
    (equations 2 to 4), where h_t is the output of a first LSTM that sees the preprocessed loss and
    gradient, and f~ is f before its sigmoid. The update takes the raw gradient. The learned initial
    cell is where the inner loop starts.

    Args:
      hidden_size: Hidden size of the first LSTM; 20 have 2,000 parameters.

    Returns:
      The rule, of meta-parameters {'lstm', 'input', 'forget'}.

    Raises:
      UsageError: a hidden size below one.
    """
    if hidden_size < 1:
        raise UsageError(f"the LSTM's hidden_size {hidden_size} must be at least 1")
    return UpdateRule(
        partial(_init_meta, hidden_size), partial(_init_coordinates, hidden_size), _update
    )


def _init_meta(hidden_size: int, key: Array, params: PyTree) -> PyTree:
    dtype = jax.tree.leaves(params)[0].dtype
    keys = jax.random.split(key, 6)

    def uniform(i: int, shape: tuple[int, ...], low: float, high: float) -> Array:
        return jax.random.uniform(keys[i], shape, dtype, low, high)

    return {
        "lstm": {
            "kernel": uniform(0, (4 + hidden_size, 4 * hidden_size), -0.01, 0.01),
            "bias": uniform(1, (4 * hidden_size,), -0.01, 0.01),
        },
        # The rates start small and nothing is forgotten.
        "input": {
            "kernel": uniform(2, (hidden_size + 2, 1), -0.01, 0.01),
            "bias": uniform(3, (1,), -5.0, -4.0),
        },
        "forget": {
            "kernel": uniform(4, (hidden_size + 2, 1), -0.01, 0.01),
            "bias": uniform(5, (1,), 4.0, 5.0),
        },
    }


def _init_coordinates(hidden_size: int, meta: PyTree, params: PyTree) -> MetaLSTMState:
    del meta
    theta, _ = ravel_pytree(params)
    gate = split_coordinates(jnp.zeros_like(theta))
    zeros = split_coordinates(jnp.zeros((hidden_size, theta.size), theta.dtype))
    return MetaLSTMState(zeros, zeros, gate, gate)


def _gates(
    meta: PyTree, gradient: Array, state: MetaLSTMState, theta: Array, loss: Array
) -> MetaLSTMState:
    """The new state of one chunk of coordinates, gradient and theta [chunk]."""
    of_loss = jnp.broadcast_to(log_and_sign(loss)[:, None], (2, theta.size))
    of_gradient = jnp.moveaxis(log_and_sign(gradient), -1, 0)
    seen = jnp.concatenate([of_loss.astype(theta.dtype), of_gradient, state.hidden])
    forget, update, output, candidate = jnp.split(linear_across(meta["lstm"], seen), 4)
    cell = jax.nn.sigmoid(forget) * state.cell
    cell += jax.nn.sigmoid(update) * jnp.tanh(candidate)
    hidden = jax.nn.sigmoid(output) * jnp.tanh(cell)

    def gate(params: PyTree, before: Array) -> Array:
        return linear_across(params, jnp.concatenate([hidden, theta[None], before[None]]))[0]

    return MetaLSTMState(
        hidden,
        cell,
        gate(meta["input"], state.input_gate),
        gate(meta["forget"], state.forget_gate),
    )


def _update(
    meta: PyTree,
    gradient: PyTree,
    state: MetaLSTMState,
    params: PyTree,
    /,
    *,
    loss: Array | None = None,
    value_fn: ValueFn | None = None,
) -> tuple[PyTree, MetaLSTMState]:
    del value_fn
    if loss is None:
        raise TypeError("the LSTM Meta-Learner's rule sees the loss: give it loss=")
    flat, _ = ravel_pytree(gradient)
    theta, unravel = ravel_pytree(params)
    state = map_chunks(
        lambda gradient, state, theta: _gates(meta, gradient, state, theta, loss),
        split_coordinates(flat),
        state,
        split_coordinates(theta),
    )
    forget, rate = (
        join_coordinates(gate, theta.size) for gate in (state.forget_gate, state.input_gate)
    )
    forgotten = -jax.nn.sigmoid(-forget)  # f - 1, without its rounding
    return unravel(forgotten * theta - jax.nn.sigmoid(rate) * flat), state


def per_task_statistics(network: Network, momentum: float) -> Network:
    """A network that averages the support's moments over the steps of a task.

    Args:
      network: A network whose normalisation keeps the support's moments.
      momentum: Weight of a step's own moments, as PyTorch has it; the rest is that of the moments
        before, which begin with the state given.
    """

    def averaged(path: tuple, old: Array, new: Array) -> Array:
        if getattr(path[-1], "key", None) == "count":  # of examples, which are as many each time
            return new
        return (1 - momentum) * old + momentum * new

    def apply(
        params: PyTree,
        state: PyTree,
        x: PyTree,
        /,
        *,
        key: Array | None,
        train: bool,
        moments: MomentsUse = "stored",
        mask: Array | None = None,
    ) -> tuple[Array, PyTree]:
        y, new = network.apply(params, state, x, key=key, train=train, moments=moments, mask=mask)
        if moments != "replace":
            return y, new
        return y, jax.tree_util.tree_map_with_path(averaged, state, new)

    return network._replace(apply=apply)


@registry.learner("lstm_meta_learner", network="strided_conv4", normalisation="support")
def lstm_meta_learner(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    steps: NotNegativeInt = 12,
    eval_steps: NotNegativeInt | None = None,
    hidden_size: PositiveInt = 20,
    momentum: Decay = 0.95,
    adjoint: Adjoint | str = "first_order",
) -> MetaLearner:
    """Builds an LSTM Meta-Learner, whose inner optimizer is an LSTM.

    Its learned initial cell is where the inner loop starts. Under normalisation `support`, the
    paper's, moments begin anew in every task, are averaged over the steps on the support set, and
    normalise the queries. The paper takes 12 steps for 1 shot and 5 for 5 shots, conv4 with 32
    features, Adam with rate 1e-3, gradients clipped at 0.25, one task in an outer step.

    With its flag alone, 1000 outer steps give 68.4 % on glyphs (untrained 28.8 %) and a squared
    error of 0.39 on sinusoids (untrained 4.11).

    Args:
      network: Body; a linear head with one output for each column of y follows it. All of both is
        adapted.
      objective: Loss of the inner and the outer loop; the tasks choose it.
      steps: Inner steps in training, each on the whole support set.
      eval_steps: Inner steps in tests; None for as many as in training.
      hidden_size: Hidden size of the first LSTM.
      momentum: Weight of a step's own moments in the average over the steps of a task.
      adjoint: How the outer gradient comes back: first_order is the paper's gradient independence,
        in which losses and gradients are constants; unrolled drops that assumption.

    Returns:
      The learner; its parameters are {'learner': the initial cell, 'rule': the LSTMs}.

    Raises:
      UsageError: a number of steps below zero, a hidden size below one or an unknown adjoint.
    """
    per_task = keeps_support_moments(network.normalisation)
    learner = gradient_learner(
        per_task_statistics(network, momentum) if per_task else network,
        lstm_rule(hidden_size),
        steps=steps,
        eval_steps=steps if eval_steps is None else eval_steps,
        adjoint=as_adjoint(adjoint),
        mask=None,
        objective=objective,
    )
    if not per_task:
        return learner

    def loss(params: PyTree, state: PyTree, task: Episode, key: Array, /) -> tuple[Array, LossAux]:
        value, aux = learner.loss(params, state, task, key)
        return value, aux._replace(state=state)  # the next task begins as this one did

    return learner._replace(loss=loss)
