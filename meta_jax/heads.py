"""Heads on embeddings: what metric-based methods are made of."""

from meta_jax.metric_based.heads import (
    Head,
    kernel_head,
    prototype_head,
    prototype_regression_head,
    ridge_head,
    stateless_head,
)
from meta_jax.metric_based.learner import (
    MetricAdapted,
    metric_learner,
)
from meta_jax.metric_based.matching import (
    embed_queries_in_context,
    embed_support_in_context,
    full_context_head,
    init_full_context,
)
from meta_jax.metric_based.primitives import (
    attention,
    cosine_similarity,
    kernel_logits,
    kernel_regression,
    manhattan_distance,
    pairwise_distance,
    prototypes,
    ridge_solve,
    squared_distance,
)
from meta_jax.metric_based.relation import (
    class_maps,
    relation_error,
    relation_head,
)
from meta_jax.metric_based.siamese import (
    pair_cross_entropy,
    pair_logits,
    pairwise_head,
)

__all__ = [
    "Head",
    "MetricAdapted",
    "attention",
    "class_maps",
    "cosine_similarity",
    "embed_queries_in_context",
    "embed_support_in_context",
    "full_context_head",
    "init_full_context",
    "kernel_head",
    "kernel_logits",
    "kernel_regression",
    "manhattan_distance",
    "metric_learner",
    "pair_cross_entropy",
    "pair_logits",
    "pairwise_distance",
    "pairwise_head",
    "prototype_head",
    "prototype_regression_head",
    "prototypes",
    "relation_error",
    "relation_head",
    "ridge_head",
    "ridge_solve",
    "squared_distance",
    "stateless_head",
]
