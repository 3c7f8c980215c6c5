"""meta_jax: the meta-learning library of JAX.

Every method is a `MetaLearner`, a tuple of pure functions of one task; episodes, task batching, the
outer loop, evaluation and checkpoints are written once, for all of them. Here are the core types,
the learners, the networks and the outer loop; the rest is in namespaces:

- `data`: datasets, episodes and task sources.
- `networks`: layers, normalisation, convolutions and adapters.
- `heads`: what metric-based methods do with embeddings.
- `memory`: external memories, and learners that read sequences.
- `inner_loop`: the differentiable inner loop, its adjoints and update rules.
- `learned_optimizers`: optimizers whose update rule is learned.
- `objectives`: losses, metrics and what is better.
- `registry`: components by name.
- `reinforcement`: environments, trials and policies.
- `serving`: classifiers of somebody's own classes, and exports.
- `training`: outer steps, evaluation, checkpoints, optimizers and pictures.
"""

from meta_jax import (
    data,
    heads,
    inner_loop,
    memory,
    networks,
    objectives,
    registry,
    reinforcement,
    serving,
    training,
)
from meta_jax.core import (
    Batch,
    Episode,
    LossAux,
    MetaLearner,
    Network,
    Objective,
    Tasks,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.data import dataset_from_arrays
from meta_jax.lookup import UsageError
from meta_jax.metric_based.baseline import baseline, baseline_plus_plus, simple_shot
from meta_jax.metric_based.kernel import kernel_learner
from meta_jax.metric_based.matching import matching, matching_fce
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.r2d2 import r2d2
from meta_jax.metric_based.relation import relation
from meta_jax.metric_based.siamese import siamese
from meta_jax.model_based.in_context import in_context
from meta_jax.model_based.mann import lstm_learner, mann
from meta_jax.model_based.meta_networks import meta_networks
from meta_jax.networks import (
    conv4,
    from_functions,
    from_linen,
    from_nnx,
    mlp,
    resnet12,
    strided_conv4,
)
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based import learned_optimizers
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.lstm_meta_learner import lstm_meta_learner
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.protomaml import protomaml
from meta_jax.optimization_based.reptile import reptile
from meta_jax.serving import load_exported
from meta_jax.training import (
    TrainState,
    fit,
    init_train_state,
    load,
    load_pretrained,
    make_outer_step,
    make_train_loop,
)
from meta_jax.version import __version__ as __version__

__all__ = [
    "Batch",
    "Episode",
    "LossAux",
    "MetaLearner",
    "Network",
    "Objective",
    "Tasks",
    "TrainState",
    "UsageError",
    "anil",
    "baseline",
    "baseline_plus_plus",
    "boil",
    "conv4",
    "cross_entropy",
    "data",
    "dataset_from_arrays",
    "first_order_maml",
    "fit",
    "from_functions",
    "from_linen",
    "from_nnx",
    "heads",
    "imaml",
    "in_context",
    "init_train_state",
    "inner_loop",
    "kernel_learner",
    "learned_optimizers",
    "load",
    "load_exported",
    "load_pretrained",
    "lstm_learner",
    "lstm_meta_learner",
    "make_outer_step",
    "make_train_loop",
    "maml",
    "maml_plus_plus",
    "mann",
    "matching",
    "matching_fce",
    "memory",
    "meta_networks",
    "meta_sgd",
    "mlp",
    "nearest_neighbour",
    "networks",
    "objectives",
    "protomaml",
    "prototypical",
    "r2d2",
    "registry",
    "reinforcement",
    "relation",
    "reptile",
    "resnet12",
    "serving",
    "siamese",
    "simple_shot",
    "squared_error",
    "strided_conv4",
    "supervised_evaluate",
    "supervised_loss",
    "training",
]
