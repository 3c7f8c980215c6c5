"""Memory-Augmented Neural Networks (Santoro et al. 2016, arXiv:1605.06065), and their baseline."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import MetaLearner, Network, PyTree
from meta_jax.model_based.memory import Memory, access_memory, empty_memory
from meta_jax.model_based.sequence import Cell, sequence_learner
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm_gates


class MannCarry(NamedTuple):
    """What a MANN carries from step to step; it starts anew with every task."""

    hidden: jax.Array  # [units] of the controller
    cell: jax.Array  # [units]
    memory: Memory
    what: jax.Array  # r_{t-1} [heads * width], what was read last


def mann(
    network: Network,
    *,
    units: int = 200,
    slots: int = 128,
    width: int = 40,
    heads: int = 4,
    decay: float = 0.95,
    strength: float = 1.0,
    values: bool = False,
    neighbour_weight: float = 0.0,
) -> MetaLearner:
    """An LSTM with an external memory that it writes to where it has not been for long.

    At step t the controller sees the embedded x_t, the label y_{t-1} and r_{t-1}, which it read
    last; from its state h_t come the keys k_t = tanh(W h_t) and the write gates; after one
    `access_memory` the answer is a linear function of [h_t, r_t].

    Args:
      network: embeds the inputs; `flatten()` for the paper's raw pixels.
      units: of the LSTM controller.
      slots: rows of the memory.
      width: of a row.
      heads: reads, and writes, at a step.
      decay: gamma of the usage; public implementations have 0.95 or 0.99.
      strength: what the cosines are multiplied by; 1 in the paper; larger ones read more sharply.
      values: whether what is written are values tanh(W h_t) of their own, as in public
        implementations, and not the keys, as in the paper.
      neighbour_weight: of the encoder's own loss; 0 in the paper; see `sequence_learner`.

    Returns:
      The learner; see `sequence_learner`.

    Raises:
      ValueError: for fewer slots than heads, or a decay outside [0, 1).

    Examples:
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.flatten import flatten
      >>> learner = mann(flatten(), units=8, slots=6, width=4, heads=2)
      >>> support = Batch(jnp.eye(3), jnp.eye(3))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> adapted.carry.memory.rows.shape, adapted.logits.shape
      ((6, 4), (3, 3))
    """
    if not 1 <= heads <= slots:
        raise ValueError(f"{heads} heads do not fit {slots} memory slots: use 1 to {slots} heads")
    if not 0 <= decay < 1:
        raise ValueError(f"usage decay {decay} is outside [0, 1): use for example 0.95")

    # The backward pass keeps one copy of the memory for each step and works out the rest again: on
    # a CPU this halves the time that the memory takes, most of which is traffic.
    remembered_access = jax.checkpoint(
        functools.partial(access_memory, decay=decay, strength=strength), prevent_cse=False
    )

    recurrent = heads * width + units

    def init(key: jax.Array, inputs: int, ways: int) -> PyTree:
        lstm_key, access_key = jax.random.split(key)
        return {
            "lstm": init_lstm(lstm_key, inputs + ways, units, recurrent=recurrent),
            "access": init_linear(access_key, units, heads * (width + 1 + values * width)),
        }

    def start(params: PyTree) -> MannCarry:
        dtype = params["lstm"]["kernel"].dtype
        zeros = jnp.zeros(units, dtype)
        memory = empty_memory(slots, width, heads, dtype)
        return MannCarry(zeros, zeros, memory, jnp.zeros(heads * width, dtype))

    def drive(params: PyTree, z: jax.Array, y: jax.Array) -> jax.Array:
        kernel = params["lstm"]["kernel"][:-recurrent]
        return jnp.concatenate([z, y], 1) @ kernel + params["lstm"]["bias"]

    def step(params: PyTree, carry: MannCarry, drive: jax.Array) -> tuple[MannCarry, jax.Array]:
        back = jnp.concatenate([carry.what, carry.hidden])
        hidden, cell = lstm_gates(drive + back @ params["lstm"]["kernel"][-recurrent:], carry.cell)
        interface = linear(params["access"], hidden).reshape(heads, -1)
        memory, what = remembered_access(
            carry.memory,
            jnp.tanh(interface[:, :width]),
            jax.nn.sigmoid(interface[:, width]),
            values=jnp.tanh(interface[:, width + 1 :]) if values else None,
        )
        what = what.reshape(-1)
        return MannCarry(hidden, cell, memory, what), jnp.concatenate([hidden, what])

    cell = Cell(init, start, drive, step, units + heads * width)
    return sequence_learner(network, cell, neighbour_weight=neighbour_weight)


def lstm_learner(
    network: Network, *, units: int = 200, neighbour_weight: float = 0.0
) -> MetaLearner:
    """The baseline of Santoro et al.: the same sequences, an LSTM and no external memory.

    Args:
      network: embeds the inputs.
      units: of the LSTM.
      neighbour_weight: of the encoder's own loss; see `sequence_learner`.

    Returns:
      The learner; see `sequence_learner`.
    """

    def init(key: jax.Array, inputs: int, ways: int) -> PyTree:
        return init_lstm(key, inputs + ways, units)

    def start(params: PyTree) -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros(units, params["kernel"].dtype)
        return zeros, zeros

    def drive(params: PyTree, z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.concatenate([z, y], 1) @ params["kernel"][:-units] + params["bias"]

    def step(
        params: PyTree, carry: tuple[jax.Array, jax.Array], drive: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, cell = carry
        carry = lstm_gates(drive + hidden @ params["kernel"][-units:], cell)
        return carry, carry[0]

    cell = Cell(init, start, drive, step, units)
    return sequence_learner(network, cell, neighbour_weight=neighbour_weight)
