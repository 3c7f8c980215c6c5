"""The outer loop of every learner: steps, evaluation, checkpoints, optimizers and pictures."""

from meta_jax.training import checkpoints, optimizers, pictures
from meta_jax.training.evaluation import (
    MeanCI,
    confidence_interval,
    make_evaluate,
    make_validate,
)
from meta_jax.training.learned_rules import LearnedRule, load_rule
from meta_jax.training.loop import FitResult, LoopConfig, TrainingDivergedError, fit
from meta_jax.training.optimizers import average_params, averaged_params
from meta_jax.training.outer_step import (
    TrainState,
    init_train_state,
    make_outer_step,
    place,
    task_gradients,
    task_mesh,
    training_data,
)
from meta_jax.training.record import make_config, write_config
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.trained import (
    Trained,
    load,
    load_pretrained,
    pretrained_names,
    save_trained,
)
from meta_jax.training.writers import MetricsWriter, read_metrics

__all__ = [
    "FitResult",
    "LearnedRule",
    "LoopConfig",
    "MeanCI",
    "MetricsWriter",
    "TrainState",
    "Trained",
    "TrainingDivergedError",
    "average_params",
    "averaged_params",
    "checkpoints",
    "confidence_interval",
    "fit",
    "init_train_state",
    "load",
    "load_pretrained",
    "load_rule",
    "make_config",
    "make_evaluate",
    "make_outer_step",
    "make_train_loop",
    "make_validate",
    "optimizers",
    "pictures",
    "place",
    "pretrained_names",
    "read_metrics",
    "save_trained",
    "task_gradients",
    "task_mesh",
    "training_data",
    "write_config",
]
