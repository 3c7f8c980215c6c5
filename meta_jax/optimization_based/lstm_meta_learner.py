"""The LSTM Meta-Learner: optimization as a model (Ravi and Larochelle 2017, ICLR)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_jax.core import (
    Aux,
    Criterion,
    Episode,
    MetaLearner,
    Network,
    PyTree,
    cross_entropy,
)
from meta_jax.networks.coordinates import (
    join_coordinates,
    linear_across,
    map_chunks,
    split_coordinates,
)
from meta_jax.optimization_based.adjoints import FIRST_ORDER, Adjoint
from meta_jax.optimization_based.learner import gradient_learner
from meta_jax.optimization_based.update_rules import UpdateRule, log_and_sign


class MetaLSTMState(NamedTuple):
    """The state of the coordinates, whose weights are shared, as `split_coordinates` has them."""

    hidden: jax.Array  # [chunks, units, chunk] of the first LSTM
    cell: jax.Array  # [chunks, units, chunk]
    input_gate: jax.Array  # [chunks, chunk], before the sigmoid
    forget_gate: jax.Array  # [chunks, chunk], before the sigmoid


def lstm_rule(units: int = 20) -> UpdateRule:
    """theta_t = f_t o theta_{t-1} - i_t o grad_t: an LSTM's cell update, coordinate by coordinate.

    f_t = sigma(W_F [h_t, theta_{t-1}, f~_{t-1}] + b_F) and i_t alike (equations 2 to 4), where h_t
    is the output of a first LSTM that sees the preprocessed loss and gradient, and f~ is f before
    its sigmoid. The update takes the raw gradient. The learned initial cell is where the inner
    loop starts.

    Args:
      units: of the first LSTM; 20 have 2,000 parameters.
    """

    def init_meta(key: jax.Array, params: PyTree) -> PyTree:
        dtype = jax.tree.leaves(params)[0].dtype
        keys = jax.random.split(key, 6)

        def uniform(i: int, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
            return jax.random.uniform(keys[i], shape, dtype, low, high)

        return {
            "lstm": {
                "kernel": uniform(0, (4 + units, 4 * units), -0.01, 0.01),
                "bias": uniform(1, (4 * units,), -0.01, 0.01),
            },
            # The rates start small and nothing is forgotten.
            "input": {
                "kernel": uniform(2, (units + 2, 1), -0.01, 0.01),
                "bias": uniform(3, (1,), -5.0, -4.0),
            },
            "forget": {
                "kernel": uniform(4, (units + 2, 1), -0.01, 0.01),
                "bias": uniform(5, (1,), 4.0, 5.0),
            },
        }

    def init(meta: PyTree, params: PyTree) -> MetaLSTMState:
        del meta
        theta, _ = ravel_pytree(params)
        gate = split_coordinates(jnp.zeros_like(theta))
        zeros = split_coordinates(jnp.zeros((units, theta.size), theta.dtype))
        return MetaLSTMState(zeros, zeros, gate, gate)

    def gates(
        meta: PyTree, gradient: jax.Array, state: MetaLSTMState, theta: jax.Array, loss: jax.Array
    ) -> MetaLSTMState:
        """For one chunk of coordinates."""
        of_loss = jnp.broadcast_to(log_and_sign(loss)[:, None], (2, theta.size))
        of_gradient = jnp.moveaxis(log_and_sign(gradient), -1, 0)
        seen = jnp.concatenate([of_loss.astype(theta.dtype), of_gradient, state.hidden])
        forget, update, output, candidate = jnp.split(linear_across(meta["lstm"], seen), 4)
        cell = jax.nn.sigmoid(forget) * state.cell
        cell += jax.nn.sigmoid(update) * jnp.tanh(candidate)
        hidden = jax.nn.sigmoid(output) * jnp.tanh(cell)

        def gate(params: PyTree, before: jax.Array) -> jax.Array:
            return linear_across(params, jnp.concatenate([hidden, theta[None], before[None]]))[0]

        return MetaLSTMState(
            hidden,
            cell,
            gate(meta["input"], state.input_gate),
            gate(meta["forget"], state.forget_gate),
        )

    def update(
        meta: PyTree, gradient: PyTree, state: MetaLSTMState, params: PyTree, *, loss: jax.Array
    ) -> tuple[PyTree, MetaLSTMState]:
        flat, _ = ravel_pytree(gradient)
        theta, unravel = ravel_pytree(params)
        state = map_chunks(
            lambda *chunk: gates(meta, *chunk, loss),
            split_coordinates(flat),
            state,
            split_coordinates(theta),
        )
        forget, rate = (
            join_coordinates(gate, theta.size) for gate in (state.forget_gate, state.input_gate)
        )
        forgotten = -jax.nn.sigmoid(-forget)  # f - 1, without its rounding
        return unravel(forgotten * theta - jax.nn.sigmoid(rate) * flat), state

    return UpdateRule(init_meta, init, update)


def per_task_statistics(network: Network, momentum: float) -> Network:
    """A network of batch-norm mode 'support' that averages the statistics over a task's steps.

    Args:
      network: of mode 'support'.
      momentum: weight of a step's own statistics, as PyTorch has it; the rest is that of the
        statistics before, which begin with the state given.
    """

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        y, new = network.apply(params, state, x, key=key, train=train)
        if not train:
            return y, new
        return y, jax.tree.map(lambda old, n: (1 - momentum) * old + momentum * n, state, new)

    return network._replace(apply=apply)


def lstm_meta_learner(
    network: Network,
    *,
    steps: int = 12,
    eval_steps: int = 12,
    units: int = 20,
    momentum: float = 0.95,
    adjoint: Adjoint = FIRST_ORDER,
    criterion: Criterion = cross_entropy,
) -> MetaLearner:
    """An inner loop whose optimizer is an LSTM, and whose start is its learned initial cell.

    In the batch-norm mode 'support', the paper's, statistics begin anew in every task, are averaged
    over the steps on the support set, and normalise the queries.

    Args:
      network: the body; a linear head with one output for each column of `y` follows it. All of
        both is adapted.
      steps: inner steps in training, each on the whole support set.
      eval_steps: inner steps in tests.
      units: of the first LSTM.
      momentum: of the statistics, the weight of a step's own.
      adjoint: `FIRST_ORDER` is the paper's gradient independence: losses and gradients enter as
        constants. `UNROLLED` drops that assumption.
      criterion: `cross_entropy`, or `squared_error` for regression.

    Returns:
      The learner; its parameters are {'learner': the initial cell, 'rule': the LSTMs}.

    Raises:
      ValueError: for a number of steps below zero.
    """
    per_task = network.batch_norm == "support"
    learner = gradient_learner(
        per_task_statistics(network, momentum) if per_task else network,
        lstm_rule(units),
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint,
        mask=None,
        criterion=criterion,
    )
    if not per_task:
        return learner

    def loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        value, aux = learner.loss(params, state, episode, key)
        return value, aux._replace(state=state)  # the next task begins as this one did

    return learner._replace(loss=loss)
