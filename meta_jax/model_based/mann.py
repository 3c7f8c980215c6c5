"""Memory-Augmented Neural Networks (Santoro et al. 2016, arXiv:1605.06065), and their baseline."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, MetaLearner, Network, Objective, PyTree
from meta_jax.lookup import UsageError
from meta_jax.model_based.memory import Memory, access_memory, empty_memory
from meta_jax.model_based.sequence import Cell, EvaluationProtocol, sequence_learner
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm_gates
from meta_jax.objectives import check_kind, cross_entropy
from meta_jax.ranges import Decay, NotNegative, Positive, PositiveInt


class MannCarry(NamedTuple):
    """What a MANN carries from step to step; it starts anew with every task."""

    hidden: Array  # [hidden_size] of the controller
    cell: Array  # [hidden_size]
    memory: Memory
    read_vectors: Array  # r_{t-1} [num_heads * slot_size], what was read last


def mann_cell(
    *,
    hidden_size: int,
    num_slots: int,
    slot_size: int,
    num_heads: int,
    usage_decay: float,
    key_strength: float,
    write_values: bool,
) -> Cell:
    """Builds an LSTM with an external memory; the arguments are those of `mann`.

    Raises:
      UsageError: fewer slots than heads, or a usage decay outside [0, 1).
    """
    if not 1 <= num_heads <= num_slots:
        raise UsageError(
            f"{num_heads} heads do not fit {num_slots} memory slots: use 1 to {num_slots} heads"
        )
    # The backward pass keeps one copy of the memory for each step and works out the rest again: on
    # a CPU this halves the time that the memory takes, most of which is traffic.
    remembered_access = jax.checkpoint(
        functools.partial(access_memory, usage_decay=usage_decay, key_strength=key_strength),
        prevent_cse=False,
    )
    recurrent = num_heads * slot_size + hidden_size

    def init(key: Array, inputs: int, ways: int) -> PyTree:
        lstm_key, access_key = jax.random.split(key)
        interface = num_heads * (slot_size + 1 + write_values * slot_size)
        return {
            "lstm": init_lstm(lstm_key, inputs + ways, hidden_size, recurrent=recurrent),
            "access": init_linear(access_key, hidden_size, interface),
        }

    def start(params: PyTree) -> MannCarry:
        dtype = params["lstm"]["kernel"].dtype
        zeros = jnp.zeros(hidden_size, dtype)
        memory = empty_memory(num_slots, slot_size, num_heads, dtype)
        return MannCarry(zeros, zeros, memory, jnp.zeros(num_heads * slot_size, dtype))

    def input_projection(params: PyTree, z: Array, y: Array) -> Array:
        kernel = params["lstm"]["kernel"][:-recurrent]
        return jnp.concatenate([z, y], 1) @ kernel + params["lstm"]["bias"][None]

    def step(params: PyTree, carry: MannCarry, projected: Array) -> tuple[MannCarry, Array]:
        back = jnp.concatenate([carry.read_vectors, carry.hidden])
        gates = projected + back @ params["lstm"]["kernel"][-recurrent:]
        hidden, cell = lstm_gates(gates, carry.cell)
        interface = linear(params["access"], hidden).reshape(num_heads, -1)
        memory, read_vectors = remembered_access(
            carry.memory,
            jnp.tanh(interface[:, :slot_size]),
            jax.nn.sigmoid(interface[:, slot_size]),
            values=jnp.tanh(interface[:, slot_size + 1 :]) if write_values else None,
        )
        read_vectors = read_vectors.reshape(-1)
        output = jnp.concatenate([hidden, read_vectors])
        return MannCarry(hidden, cell, memory, read_vectors), output

    return Cell(init, start, input_projection, step, hidden_size + num_heads * slot_size)


@registry.learner("mann", network="strided_conv4", normalisation="running", run={"task_batch": 16})
def mann(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    hidden_size: PositiveInt = 100,
    num_slots: PositiveInt = 32,
    slot_size: PositiveInt = 40,
    num_heads: PositiveInt = 4,
    usage_decay: Decay = 0.95,
    key_strength: Positive = 10.0,
    write_values: bool = True,
    nca_weight: NotNegative = 1.0,
    protocol: EvaluationProtocol = "few_shot",
) -> MetaLearner:
    """Builds a Memory-Augmented Neural Network: an LSTM with an external memory.

    At step t the controller sees the embedded x_t, the label y_{t-1} and r_{t-1}, which it read
    last; from its state h_t come the keys k_t = tanh(W h_t) and the write gates; after one
    `access_memory`, which writes to where it has not been for long, the answer is a linear function
    of [h_t, r_t].

    The defaults are those of the shipped weights, which were trained for 20,000 outer steps of 16
    tasks; with one task a step it is at chance for more than a thousand steps. The paper has raw
    pixels (network flatten), an LSTM of 200 units, 128 slots, key_strength 1, write_values False
    and nca_weight 0, and trains for 100,000.

    With its flag alone, 1000 outer steps give 80.7 % on glyphs (untrained 20.0 %).

    Args:
      network: Embedding network.
      objective: Objective of the tasks; it classifies.
      hidden_size: Units of the LSTM controller.
      num_slots: Number of slots of the memory.
      slot_size: Size of a slot.
      num_heads: Number of heads, each of which reads and writes once at a step.
      usage_decay: Decay gamma of the slots' usage; public implementations have 0.95 or 0.99.
      key_strength: Factor of the cosines; with 1, the paper's, reads are blurred.
      write_values: Whether values tanh(W h_t) of their own are written, as in public
        implementations, and not the keys, as in the paper.
      nca_weight: Weight of the encoder's own loss, `nca_loss`; 0 in the paper.
      protocol: Protocol of tests: few_shot for the queries after the support set, sequence for
        every step of the shuffled episode, with the accuracy at the 1st, 2nd, ... instance of a
        class.

    Returns:
      The learner; see `sequence_learner`. The number of ways is fixed.

    Raises:
      UsageError: the objective does not classify, fewer slots than heads, or a usage decay outside
        [0, 1).

    Examples:
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.flatten import flatten
      >>> learner = mann(flatten(), hidden_size=8, num_slots=6, slot_size=4, num_heads=2)
      >>> support = Batch(jnp.eye(3), jnp.eye(3))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> adapted.carry.memory.rows.shape, adapted.logits.shape
      ((6, 4), (3, 3))
    """
    check_kind(objective, "classification", "mann")
    cell = mann_cell(
        hidden_size=hidden_size,
        num_slots=num_slots,
        slot_size=slot_size,
        num_heads=num_heads,
        usage_decay=usage_decay,
        key_strength=key_strength,
        write_values=write_values,
    )
    return sequence_learner(network, cell, objective, nca_weight=nca_weight, protocol=protocol)


def lstm_cell(hidden_size: int) -> Cell:
    """Builds an LSTM of that many units as a `Cell`."""

    def init(key: Array, inputs: int, ways: int) -> PyTree:
        return init_lstm(key, inputs + ways, hidden_size)

    def start(params: PyTree) -> tuple[Array, Array]:
        zeros = jnp.zeros(hidden_size, params["kernel"].dtype)
        return zeros, zeros

    def input_projection(params: PyTree, z: Array, y: Array) -> Array:
        return jnp.concatenate([z, y], 1) @ params["kernel"][:-hidden_size] + params["bias"][None]

    def step(
        params: PyTree, carry: tuple[Array, Array], projected: Array
    ) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = carry
        carry = lstm_gates(projected + hidden @ params["kernel"][-hidden_size:], cell)
        return carry, carry[0]

    return Cell(init, start, input_projection, step, hidden_size)


@registry.learner(
    "lstm",
    network="strided_conv4",
    normalisation="running",
    # It stays at chance for the first 1000 to 1300 steps.
    run={"task_batch": 16, "steps": 2000},
)
def lstm_learner(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    hidden_size: PositiveInt = 200,
    nca_weight: NotNegative = 1.0,
    protocol: EvaluationProtocol = "few_shot",
) -> MetaLearner:
    """Builds the baseline of Santoro et al.: the same sequences, an LSTM and no external memory.

    The paper has raw pixels (network flatten) and nca_weight 0.

    With its flag alone, 2000 outer steps give 42.8 % on glyphs (untrained 20.0 %).

    Args:
      network: Embedding network.
      objective: Objective of the tasks; it classifies.
      hidden_size: Units of the LSTM.
      nca_weight: Weight of the encoder's own loss, `nca_loss`; 0 in the paper.
      protocol: Protocol of tests: few_shot for the queries after the support set, sequence for
        every step of the shuffled episode, with the accuracy at the 1st, 2nd, ... instance of a
        class.

    Returns:
      The learner; see `sequence_learner`. The number of ways is fixed.

    Raises:
      UsageError: the objective does not classify.
    """
    check_kind(objective, "classification", "lstm")
    cell = lstm_cell(hidden_size)
    return sequence_learner(network, cell, objective, nca_weight=nca_weight, protocol=protocol)
