"""meta_jax: the meta-learning library of JAX.

Every method is a `MetaLearner`, a tuple of pure functions of one task; episodes, task batching, the
outer loop, evaluation and checkpoints are written once, for all of them.
"""

# The abstraction.
from meta_jax.core import (
    Aux,
    Batch,
    Episode,
    MetaLearner,
    Network,
    cross_entropy,
    episode_loss,
    squared_error,
)

# Where tasks come from.
from meta_jax.data.dataset import DataError, ImageDataset, Splits, stack_classes
from meta_jax.data.distortions import distort_affine, distorted_training
from meta_jax.data.episodes import EpisodeSpec, check_spec, quarter_turns, sample_episode
from meta_jax.data.glyphs import load_glyphs
from meta_jax.data.image_folder import load_image_folder
from meta_jax.data.omniglot import load_omniglot
from meta_jax.data.registry import load_splits
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.data.tfds_images import load_tfds_images

# Metric-based methods and their primitives.
from meta_jax.metric_based.heads import (
    Head,
    attention,
    cosine_similarity,
    kernel_head,
    kernel_logits,
    kernel_regression,
    linear_head,
    manhattan_distance,
    pairwise_distance,
    prototype_head,
    prototypes,
    ridge_head,
    ridge_solve,
    squared_distance,
    stateless_head,
)
from meta_jax.metric_based.kernel import kernel_learner
from meta_jax.metric_based.learner import metric_learner
from meta_jax.metric_based.matching import (
    embed_queries_in_context,
    embed_support_in_context,
    full_context_head,
    init_full_context,
    matching,
)
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.relation import class_maps, relation, relation_error, relation_head
from meta_jax.metric_based.ridge import ridge
from meta_jax.metric_based.siamese import pair_cross_entropy, pair_logits, pairwise_head, siamese

# Model-based methods and their primitives.
from meta_jax.model_based.mann import lstm_learner, mann
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
    attend,
    meta_networks,
    preprocess_gradient,
)
from meta_jax.model_based.sequence import (
    Cell,
    as_sequence,
    instance_accuracy,
    instance_numbers,
    neighbour_loss,
    sequence_learner,
)

# What embeds an input.
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.flatten import flatten
from meta_jax.networks.koch import koch
from meta_jax.networks.linen import from_linen
from meta_jax.networks.lstm import init_lstm, lstm
from meta_jax.networks.mlp import mlp
from meta_jax.networks.output_layer import with_output_layer
from meta_jax.networks.relation_network import relation_encoder

# Optimization-based methods and their primitives.
from meta_jax.optimization_based.adjoints import (
    ADJOINTS,
    CHECKPOINTED,
    FIRST_ORDER,
    MIXED_MODE,
    UNROLLED,
    Adjoint,
    annealed,
    implicit,
    truncated,
)
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.inner_loop import Unrolled, merge, partition, proximal, unroll

# Learned optimizers.
from meta_jax.optimization_based.learned_optimizers.estimators import (
    Estimator,
    Run,
    full_unroll,
    persistent_es,
    truncated_es,
    truncated_gradient,
    with_gradient,
)
from meta_jax.optimization_based.learned_optimizers.export import as_optax
from meta_jax.optimization_based.learned_optimizers.families import (
    ProblemFamily,
    classification,
    quadratics,
    sample_quadratic,
)
from meta_jax.optimization_based.learned_optimizers.hand_designed import HAND_DESIGNED, with_rate
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import (
    learned_optimizer,
    make_training_curves,
    training_run,
)
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.learned_optimizers.mlp import adafactor_mlp_rule, mlp_rule
from meta_jax.optimization_based.learned_optimizers.tuning import Tuned, tune_rate
from meta_jax.optimization_based.learner import (
    all_but_batch_norm,
    body_only,
    gradient_learner,
    head_only,
    reduced,
)
from meta_jax.optimization_based.lstm_meta_learner import (
    lstm_meta_learner,
    lstm_rule,
    per_task_statistics,
)
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus, multi_step_weights
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.protomaml import protomaml, prototype_linear_head
from meta_jax.optimization_based.reptile import minibatches, reptile
from meta_jax.optimization_based.update_rules import (
    UpdateRule,
    from_optax,
    learned_sgd,
    log_and_sign,
    per_step_sgd,
)

# The outer loop.
from meta_jax.training.checkpoints import CheckpointError, restore, restore_latest, save
from meta_jax.training.evaluation import (
    Score,
    confidence_interval,
    make_evaluate,
    make_evaluate_sequences,
)
from meta_jax.training.loop import Outcome, Schedule, TrainingDivergedError, fit
from meta_jax.training.outer_step import (
    TrainState,
    init_train_state,
    make_outer_step,
    make_run,
    place,
    task_gradients,
    task_mesh,
)

__all__ = [
    "ADJOINTS",
    "CHECKPOINTED",
    "FIRST_ORDER",
    "HAND_DESIGNED",
    "MIXED_MODE",
    "UNROLLED",
    "Adjoint",
    "Aux",
    "Batch",
    "Cell",
    "CheckpointError",
    "DataError",
    "Episode",
    "EpisodeSpec",
    "Estimator",
    "FastWeightMemory",
    "Head",
    "ImageDataset",
    "Memory",
    "MetaLearner",
    "Network",
    "Outcome",
    "ProblemFamily",
    "Run",
    "Schedule",
    "Score",
    "Splits",
    "TrainState",
    "TrainingDivergedError",
    "Tuned",
    "Unrolled",
    "UpdateRule",
    "access_memory",
    "adafactor_mlp_rule",
    "all_but_batch_norm",
    "anil",
    "annealed",
    "as_optax",
    "as_sequence",
    "attend",
    "attention",
    "body_only",
    "boil",
    "check_spec",
    "class_maps",
    "classification",
    "confidence_interval",
    "content_address",
    "conv4",
    "convolve",
    "coordinatewise_lstm",
    "cosine_similarity",
    "cross_entropy",
    "decay_usage",
    "distort_affine",
    "distorted_training",
    "embed_queries_in_context",
    "embed_support_in_context",
    "empty_memory",
    "episode_loss",
    "first_order_maml",
    "fit",
    "flatten",
    "from_linen",
    "from_optax",
    "full_context_head",
    "full_unroll",
    "gradient_learner",
    "head_only",
    "imaml",
    "implicit",
    "init_full_context",
    "init_lstm",
    "init_train_state",
    "instance_accuracy",
    "instance_numbers",
    "kernel_head",
    "kernel_learner",
    "kernel_logits",
    "kernel_regression",
    "koch",
    "learned_optimizer",
    "learned_sgd",
    "least_used",
    "linear_head",
    "load_glyphs",
    "load_image_folder",
    "load_omniglot",
    "load_splits",
    "load_tfds_images",
    "log_and_sign",
    "lstm",
    "lstm_learner",
    "lstm_meta_learner",
    "lstm_rule",
    "make_evaluate",
    "make_evaluate_sequences",
    "make_outer_step",
    "make_run",
    "make_training_curves",
    "maml",
    "maml_plus_plus",
    "manhattan_distance",
    "mann",
    "matching",
    "max_pool",
    "merge",
    "meta_networks",
    "meta_sgd",
    "metric_learner",
    "minibatches",
    "mlp",
    "mlp_rule",
    "multi_step_weights",
    "nearest_neighbour",
    "neighbour_loss",
    "pair_cross_entropy",
    "pair_logits",
    "pairwise_distance",
    "pairwise_head",
    "partition",
    "per_step_sgd",
    "per_task_statistics",
    "persistent_es",
    "place",
    "preprocess_gradient",
    "protomaml",
    "prototype_head",
    "prototype_linear_head",
    "prototypes",
    "prototypical",
    "proximal",
    "quadratics",
    "quarter_turns",
    "read_memory",
    "reduced",
    "relation",
    "relation_encoder",
    "relation_error",
    "relation_head",
    "reptile",
    "restore",
    "restore_latest",
    "ridge",
    "ridge_head",
    "ridge_solve",
    "sample_episode",
    "sample_quadratic",
    "sample_sinusoid",
    "save",
    "sequence_learner",
    "siamese",
    "squared_distance",
    "squared_error",
    "stack_classes",
    "stateless_head",
    "strided_conv4",
    "task_gradients",
    "task_mesh",
    "training_run",
    "truncated",
    "truncated_es",
    "truncated_gradient",
    "tune_rate",
    "unroll",
    "with_gradient",
    "with_output_layer",
    "with_rate",
    "write_memory",
    "write_weights",
]
