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
    cosine_similarity,
    prototype_head,
    prototypes,
    squared_distance,
)
from meta_jax.metric_based.learner import metric_learner
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour
from meta_jax.metric_based.prototypical import prototypical

# What embeds an input.
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.linen import from_linen
from meta_jax.networks.mlp import mlp

# Optimization-based methods and their primitives.
from meta_jax.optimization_based.adjoints import (
    ADJOINTS,
    CHECKPOINTED,
    FIRST_ORDER,
    UNROLLED,
    Adjoint,
)
from meta_jax.optimization_based.inner_loop import merge, partition, unroll
from meta_jax.optimization_based.maml import (
    all_but_batch_norm,
    first_order_maml,
    gradient_learner,
    maml,
)
from meta_jax.optimization_based.update_rules import UpdateRule, from_optax

# The outer loop.
from meta_jax.training.checkpoints import CheckpointError, restore, restore_latest, save
from meta_jax.training.evaluation import Score, confidence_interval, make_evaluate
from meta_jax.training.loop import Outcome, Schedule, TrainingDivergedError, fit
from meta_jax.training.outer_step import (
    TrainState,
    init_train_state,
    make_outer_step,
    make_run,
    task_gradients,
    task_mesh,
)

__all__ = [
    "ADJOINTS",
    "CHECKPOINTED",
    "FIRST_ORDER",
    "UNROLLED",
    "Adjoint",
    "Aux",
    "Batch",
    "CheckpointError",
    "DataError",
    "Episode",
    "EpisodeSpec",
    "Head",
    "ImageDataset",
    "MetaLearner",
    "Network",
    "Outcome",
    "Schedule",
    "Score",
    "Splits",
    "TrainState",
    "TrainingDivergedError",
    "UpdateRule",
    "all_but_batch_norm",
    "check_spec",
    "confidence_interval",
    "conv4",
    "convolve",
    "cosine_similarity",
    "cross_entropy",
    "episode_loss",
    "first_order_maml",
    "fit",
    "from_linen",
    "from_optax",
    "gradient_learner",
    "init_train_state",
    "load_glyphs",
    "load_image_folder",
    "load_omniglot",
    "load_splits",
    "load_tfds_images",
    "make_evaluate",
    "make_outer_step",
    "make_run",
    "maml",
    "max_pool",
    "merge",
    "metric_learner",
    "mlp",
    "nearest_neighbour",
    "partition",
    "prototype_head",
    "prototypes",
    "prototypical",
    "quarter_turns",
    "restore",
    "restore_latest",
    "sample_episode",
    "sample_sinusoid",
    "save",
    "squared_distance",
    "squared_error",
    "stack_classes",
    "strided_conv4",
    "task_gradients",
    "task_mesh",
    "unroll",
]
