"""Networks that read a set of pairs of inputs and labels, and answer queries about it."""

from meta_jax.networks.sets.cross_attention import cross_attention
from meta_jax.networks.sets.label_codes import equiangular_codes
from meta_jax.networks.sets.set_encoder import masked_row_mean, set_encoder
from meta_jax.networks.sets.set_network import SetNetwork
from meta_jax.networks.sets.target_masked import target_masked_transformer
from meta_jax.networks.sets.temporal_convolutions import read_in_order, temporal_convolutions

__all__ = [
    "SetNetwork",
    "cross_attention",
    "equiangular_codes",
    "masked_row_mean",
    "read_in_order",
    "set_encoder",
    "target_masked_transformer",
    "temporal_convolutions",
]
