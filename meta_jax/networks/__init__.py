"""Networks that embed inputs, their layers, and the adapters of flax modules."""

from meta_jax.networks.conv4 import conv4, flat_strided_conv4, strided_conv4
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.flatten import flatten
from meta_jax.networks.frozen import frozen
from meta_jax.networks.functions import from_functions
from meta_jax.networks.koch import koch
from meta_jax.networks.layers import conv_block, init_conv_block, init_linear, linear
from meta_jax.networks.linen import from_linen
from meta_jax.networks.lstm import init_lstm, lstm
from meta_jax.networks.mlp import mlp
from meta_jax.networks.nnx import from_nnx
from meta_jax.networks.normalisation import (
    embed_apart,
    embed_queries,
    embed_support,
    embed_together,
    init_normalisation,
    is_normalisation,
    may_embed_together,
    normalise,
)
from meta_jax.networks.output_layer import with_output_layer
from meta_jax.networks.relation_network import (
    init_relation_module,
    relation_encoder,
    relation_module,
)
from meta_jax.networks.rematerialised import rematerialised
from meta_jax.networks.resnet12 import drop_block, resnet12
from meta_jax.precision import with_precision

__all__ = [
    "conv4",
    "conv_block",
    "convolve",
    "drop_block",
    "embed_apart",
    "embed_queries",
    "embed_support",
    "embed_together",
    "flat_strided_conv4",
    "flatten",
    "from_functions",
    "from_linen",
    "from_nnx",
    "frozen",
    "init_conv_block",
    "init_linear",
    "init_lstm",
    "init_normalisation",
    "init_relation_module",
    "is_normalisation",
    "koch",
    "linear",
    "lstm",
    "max_pool",
    "may_embed_together",
    "mlp",
    "normalise",
    "relation_encoder",
    "relation_module",
    "rematerialised",
    "resnet12",
    "strided_conv4",
    "with_output_layer",
    "with_precision",
]
