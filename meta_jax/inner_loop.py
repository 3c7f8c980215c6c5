"""The inner loop: what optimization-based methods are made of."""

from meta_jax.optimization_based.adjoints import (
    ADJOINTS,
    CHECKPOINTED,
    FIRST_ORDER,
    MIXED_MODE,
    UNROLLED,
    Adjoint,
    annealed,
    as_adjoint,
    implicit,
    truncated,
)
from meta_jax.optimization_based.inner_loop import (
    InnerLoopResult,
    merge,
    partition,
    run_inner_loop,
    with_proximal_term,
)
from meta_jax.optimization_based.learner import (
    GradientAdapted,
    all_but_normalisation,
    body_only,
    gradient_learner,
    head_only,
    with_reduction,
)
from meta_jax.optimization_based.lstm_meta_learner import (
    lstm_rule,
    per_task_statistics,
)
from meta_jax.optimization_based.maml_plus_plus import (
    multi_step_weights,
)
from meta_jax.optimization_based.protomaml import (
    prototype_linear_head,
)
from meta_jax.optimization_based.update_rules import (
    UpdateRule,
    from_optax,
    learned_sgd,
    log_and_sign,
    per_step_sgd,
)

__all__ = [
    "ADJOINTS",
    "CHECKPOINTED",
    "FIRST_ORDER",
    "MIXED_MODE",
    "UNROLLED",
    "Adjoint",
    "GradientAdapted",
    "InnerLoopResult",
    "UpdateRule",
    "all_but_normalisation",
    "annealed",
    "as_adjoint",
    "body_only",
    "from_optax",
    "gradient_learner",
    "head_only",
    "implicit",
    "learned_sgd",
    "log_and_sign",
    "lstm_rule",
    "merge",
    "multi_step_weights",
    "partition",
    "per_step_sgd",
    "per_task_statistics",
    "prototype_linear_head",
    "run_inner_loop",
    "truncated",
    "with_proximal_term",
    "with_reduction",
]
