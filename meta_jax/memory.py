"""Memories: what model-based methods are made of."""

from meta_jax.model_based.mann import (
    lstm_cell,
    mann_cell,
)
from meta_jax.model_based.memory import (
    Memory,
    access_memory,
    content_address,
    decay_usage,
    empty_memory,
    least_used,
    read_memory,
    write_memory,
    write_weights,
)
from meta_jax.model_based.meta_networks import (
    FastWeightMemory,
    preprocess_gradient,
)
from meta_jax.model_based.sequence import (
    Cell,
    SequenceAdapted,
    as_sequence,
    instance_accuracy,
    instance_numbers,
    nca_loss,
    sequence_learner,
    sequence_metrics,
)

__all__ = [
    "Cell",
    "FastWeightMemory",
    "Memory",
    "SequenceAdapted",
    "access_memory",
    "as_sequence",
    "content_address",
    "decay_usage",
    "empty_memory",
    "instance_accuracy",
    "instance_numbers",
    "least_used",
    "lstm_cell",
    "mann_cell",
    "nca_loss",
    "preprocess_gradient",
    "read_memory",
    "sequence_learner",
    "sequence_metrics",
    "write_memory",
    "write_weights",
]
