"""Networks that read a sequence, at once or step by step with the same answers."""

from meta_jax.networks.sequences.linear_transformer import linear_transformer
from meta_jax.networks.sequences.recurrent import recurrent
from meta_jax.networks.sequences.running_sums import running_sums
from meta_jax.networks.sequences.sequence_network import SequenceNetwork
from meta_jax.networks.sequences.snail import snail
from meta_jax.networks.sequences.transformer import causal_transformer

__all__ = [
    "SequenceNetwork",
    "causal_transformer",
    "linear_transformer",
    "recurrent",
    "running_sums",
    "snail",
]
