"""Learned optimizers: update rules whose meta-parameters are trained on families of problems."""

from meta_jax.optimization_based.learned_optimizers.estimators import (
    Estimator,
    Run,
    full_unroll,
    persistent_es,
    truncated_es,
    truncated_gradient,
    with_gradient,
)
from meta_jax.optimization_based.learned_optimizers.export import to_optax
from meta_jax.optimization_based.learned_optimizers.families import (
    ProblemFamily,
    convnet_family,
    draw_minibatch,
    mlp_family,
    network_family,
)
from meta_jax.optimization_based.learned_optimizers.hand_designed import (
    HAND_DESIGNED,
    with_learning_rate,
)
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import (
    last_loss_objective,
    learned_optimizer,
    make_training_curves,
    training_run,
)
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.learned_optimizers.mlp import adafactor_mlp_rule, mlp_rule
from meta_jax.optimization_based.learned_optimizers.quadratics import (
    quadratic_tasks,
    quadratics,
    sample_quadratic,
    sum_of_squares,
)
from meta_jax.optimization_based.learned_optimizers.tuning import (
    LEARNING_RATES,
    Tuned,
    tune_learning_rate,
)

__all__ = [
    "HAND_DESIGNED",
    "LEARNING_RATES",
    "Estimator",
    "ProblemFamily",
    "Run",
    "Tuned",
    "adafactor_mlp_rule",
    "convnet_family",
    "coordinatewise_lstm",
    "draw_minibatch",
    "full_unroll",
    "last_loss_objective",
    "learned_optimizer",
    "make_training_curves",
    "mlp_family",
    "mlp_rule",
    "network_family",
    "persistent_es",
    "quadratic_tasks",
    "quadratics",
    "sample_quadratic",
    "sum_of_squares",
    "to_optax",
    "training_run",
    "truncated_es",
    "truncated_gradient",
    "tune_learning_rate",
    "with_gradient",
    "with_learning_rate",
]
