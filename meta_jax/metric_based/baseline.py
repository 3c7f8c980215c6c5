"""Baselines that learn no episodes: a classifier of all training classes, a new head for a test.

Baseline and Baseline++ of Chen, Liu, Kira, Wang and Huang, "A Closer Look at Few-shot
Classification", ICLR 2019; SimpleShot of Wang, Chao, Weinberger and van der Maaten, 2019,
arXiv:1911.04623. Training draws ordinary batches, labelled among all classes of the split: give
`all_classes(tasks)` to the outer loop in Python; `experiments.train` does.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, MetaLearner, Metrics, Network, Objective, PyTree
from meta_jax.metric_based.heads import Examples, Head, keep_examples
from meta_jax.metric_based.learner import metric_learner
from meta_jax.metric_based.primitives import (
    check_vectors,
    choose,
    cosine_similarity,
    prototypes,
    squared_distance,
    unit_rows,
)
from meta_jax.objectives import (
    check_kind,
    check_targets,
    cross_entropy,
    without_padding,
)
from meta_jax.ranges import NotNegative, NotNegativeInt, Positive, PositiveInt
from meta_jax.shapes import with_rank

# (parameters of a classifier, embeddings [n, D]) -> logits [n, classes]
Logits = Callable[[PyTree, Array], Array]
_MEMORY = 0.99  # of the running mean of embeddings
_FEW_CLASSES = 200
Transform = Literal["none", "l2", "centred_l2"]


def linear_logits(params: PyTree, z: Array) -> Array:
    """z W + b.

    Args:
      params: {'kernel' [D, classes], 'bias' [classes]}.
      z: Embeddings [n, D].
    """
    return z @ params["kernel"] + params["bias"][None]


def cosine_logits(params: PyTree, z: Array) -> Array:
    """s cos(z, w_k), s = 2 up to 200 classes and 10 beyond, as the authors of Baseline++ have it.

    Args:
      params: {'kernel' [D, classes]}, w_k its columns.
      z: Embeddings [n, D].
    """
    kernel = params["kernel"]
    scale = 2 if kernel.shape[1] <= _FEW_CLASSES else 10
    return scale * cosine_similarity(z, kernel.T)


def descend(
    logits: Logits,
    params: PyTree,
    examples: Examples,
    *,
    objective: Objective = cross_entropy,
    steps: int,
    learning_rate: float,
    weight_decay: float,
) -> PyTree:
    """Trains a classifier on a support set by gradient descent on all of it.

    Args:
      logits: The classifier.
      params: Its parameters at the start.
      examples: Embeddings [n, D] and one-hot labels [n, classes].
      objective: Gives the loss.
      steps: Number of steps.
      learning_rate: Length of a step.
      weight_decay: Lambda of a penalty lambda ||w||^2 / 2 on all parameters.

    Returns:
      The trained parameters.
    """

    def loss(params: PyTree) -> Array:
        return objective.loss(logits(params, examples.z), examples.y, examples.mask)[0]

    def step(_: Any, params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda p, g: p - learning_rate * (g + weight_decay * p), params, jax.grad(loss)(params)
        )

    return jax.lax.fori_loop(0, steps, step, params)


def _classifier_head(
    logits: Logits,
    with_bias: bool,
    train_classes: int,
    objective: Objective,
    fit: Callable[[Examples, Array], PyTree],
    predict: Callable[[PyTree, Array, Array], Array],
) -> Head:
    """A head that trains a classifier of all classes, and fits another thing in tests.

    Args:
      logits: The classifier.
      with_bias: Whether it has a bias.
      train_classes: Its number of classes.
      objective: Its loss.
      fit: (examples, mean embedding of the training [D]) -> what a test keeps of a support set.
      predict: (what it kept, mean embedding, z [m, D]) -> logits [m, ways].
    """

    def init(key: Array, z: Array, y: Array, mask: Array | None) -> tuple[PyTree, PyTree]:
        del y, mask
        check_vectors("z", z)
        shape = (z.shape[1], train_classes)
        params = {"kernel": jax.nn.initializers.glorot_uniform()(key, shape, z.dtype)}
        if with_bias:
            params["bias"] = jnp.zeros(train_classes, z.dtype)
        return params, {"mean": jnp.zeros(z.shape[1], z.dtype)}

    def fit_with_mean(
        params: PyTree, state: PyTree, z: Array, y: Array, mask: Array | None, *, train: bool
    ) -> tuple[Any, PyTree]:
        examples = keep_examples(params, z, y, mask)
        if not train:
            return fit(examples, state["mean"]), state
        count = z.shape[0] if mask is None else jnp.maximum(mask.sum(), 1).astype(z.dtype)
        mean = jax.lax.stop_gradient(without_padding(z, mask).sum(0) / count)
        return examples, {"mean": _MEMORY * state["mean"] + (1 - _MEMORY) * mean}

    def predict_with_mean(
        params: PyTree,
        state: PyTree,
        fitted: Any,
        z: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[Array, PyTree]:
        del params, mask
        kept = fit(fitted, state["mean"]) if train else fitted
        return predict(kept, state["mean"], z), state

    def loss(
        params: PyTree, fitted: Examples, z: Array, y: Array, mask: Array | None
    ) -> tuple[Array, Metrics]:
        check_targets(y, "query.y")
        if y.shape[1] != train_classes:
            raise ValueError(
                f"the classifier has train_classes={train_classes}, and labels are of {y.shape[1]} "
                "classes: give train_classes their number, and tasks from all_classes(tasks)"
            )
        both = None
        if mask is not None or fitted.mask is not None:
            both = jnp.concatenate([_real(fitted.y, fitted.mask), _real(y, mask)])
        z, y = jnp.concatenate([fitted.z, z]), jnp.concatenate([fitted.y, y])
        return objective.loss(logits(params, z), y, both)

    return Head(init, fit_with_mean, predict_with_mean, loss)


def _real(y: Array, mask: Array | None) -> Array:
    return jnp.ones(y.shape[0], bool) if mask is None else mask


def _descending_head(
    logits: Logits,
    with_bias: bool,
    start: Callable[[Examples], PyTree],
    train_classes: int,
    objective: Objective,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
) -> Head:
    """A head that trains a classifier of all classes, and another one by descent in tests.

    Args:
      logits: Both classifiers.
      with_bias: Whether that of all classes has a bias.
      start: (examples) -> parameters of a test's classifier at the start.
      train_classes: Number of classes.
      objective: Loss of both.
      steps, learning_rate, weight_decay: Those of a test's descent.
    """

    def fit(examples: Examples, mean: Array) -> PyTree:
        del mean
        return descend(
            logits,
            start(examples),
            examples,
            objective=objective,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )

    def predict(fitted: PyTree, mean: Array, z: Array) -> Array:
        del mean
        return logits(fitted, z)

    return _classifier_head(logits, with_bias, train_classes, objective, fit, predict)


def _zeros(examples: Examples) -> PyTree:
    """A linear classifier of zeros for the classes of a support set."""
    shape = (examples.z.shape[1], examples.y.shape[1])
    return {
        "kernel": jnp.zeros(shape, examples.z.dtype),
        "bias": jnp.zeros(shape[1], examples.z.dtype),
    }


def _class_means(examples: Examples) -> PyTree:
    """A cosine classifier whose vectors are the class means of a support set."""
    means = unit_rows(prototypes(unit_rows(examples.z), examples.y, examples.mask))
    return {"kernel": means.T}


@registry.learner("baseline", network="conv4", normalisation="running")
def baseline(
    network: Network,
    *,
    train_classes: PositiveInt,
    objective: Objective = cross_entropy,
    head_steps: NotNegativeInt = 100,
    head_lr: Positive = 0.01,
    head_decay: NotNegative = 1e-3,
    joint_encoding: bool = True,
) -> MetaLearner:
    """Builds the Baseline: a linear classifier of all training classes, a new one for each test.

    With its flag and 300 outer steps it gives 85.7 % on glyphs (untrained 23.3 %).

    A test trains a linear head on the embeddings of its support set, by gradient descent from zero;
    the network stays. The authors take mini-batches of 4 and momentum, and start at random; here a
    test takes the whole support set at once and is not random.

    Args:
      network: Embedding network.
      train_classes: Number of classes that the labels of training are of.
      objective: Objective of the tasks; it classifies.
      head_steps: Steps of the head's descent in a test.
      head_lr: Learning rate of it.
      head_decay: Weight decay of it.
      joint_encoding: Whether a batch of training is embedded at once.

    Returns:
      The learner. Ways, shots and queries of a test are free.

    Raises:
      UsageError: the objective does not classify, or a setting is negative.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.mlp import mlp
      >>> learner = baseline(mlp((8,)), train_classes=100)
      >>> support = Batch(jnp.array([[0., 1.], [1., 0.]]), jnp.eye(2))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> logits, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> params["head"]["kernel"].shape, logits.argmax(1).tolist()
      ((8, 100), [0, 1])
    """
    check_kind(objective, "classification", "baseline")
    head = _descending_head(
        linear_logits,
        True,
        _zeros,
        train_classes,
        objective,
        steps=head_steps,
        learning_rate=head_lr,
        weight_decay=head_decay,
    )
    return metric_learner(network, head, objective, joint_encoding=joint_encoding)


@registry.learner("baseline_plus_plus", network="conv4", normalisation="running")
def baseline_plus_plus(
    network: Network,
    *,
    train_classes: PositiveInt,
    objective: Objective = cross_entropy,
    head_steps: NotNegativeInt = 100,
    head_lr: Positive = 0.01,
    head_decay: NotNegative = 1e-3,
    joint_encoding: bool = True,
) -> MetaLearner:
    """Builds Baseline++: as the Baseline, with classifiers by scaled cosines, `cosine_logits`.

    With its flag and 300 outer steps it gives 81.1 % on glyphs (untrained 42.2 %).
    A test starts from the class means of its support set, where the authors start at random.

    Args:
      network: Embedding network.
      train_classes: Number of classes that the labels of training are of.
      objective: Objective of the tasks; it classifies.
      head_steps: Steps of the head's descent in a test; 0 for the class means.
      head_lr: Learning rate of it, on weights that begin with norm 1.
      head_decay: Weight decay of it.
      joint_encoding: Whether a batch of training is embedded at once.

    Returns:
      The learner. Ways, shots and queries of a test are free.

    Raises:
      UsageError: the objective does not classify, or a setting is negative.
    """
    check_kind(objective, "classification", "baseline_plus_plus")
    head = _descending_head(
        cosine_logits,
        False,
        _class_means,
        train_classes,
        objective,
        steps=head_steps,
        learning_rate=head_lr,
        weight_decay=head_decay,
    )
    return metric_learner(network, head, objective, joint_encoding=joint_encoding)


def _as_it_is(z: Array, mean: Array) -> Array:
    del mean
    return z


def _unit(z: Array, mean: Array) -> Array:
    del mean
    return unit_rows(z)


def _centred_unit(z: Array, mean: Array) -> Array:
    return unit_rows(z - with_rank(mean, z))


_TRANSFORMS: dict[str, Callable[[Array, Array], Array]] = {
    "none": _as_it_is,
    "l2": _unit,
    "centred_l2": _centred_unit,
}


@registry.learner("simple_shot", network="conv4", normalisation="running")
def simple_shot(
    network: Network,
    *,
    train_classes: PositiveInt,
    objective: Objective = cross_entropy,
    transform: Transform = "centred_l2",
    joint_encoding: bool = True,
) -> MetaLearner:
    """Builds SimpleShot: the Baseline's training, and the nearest class mean in a test.

    With its flag and 300 outer steps it gives 85.3 % on glyphs (untrained 43.2 %).
    The logits of a test are -||g(f(x)) - c_k||^2, c_k the mean of the support's g(f(x)), with
    g(z) = (z - m) / ||z - m|| and m the mean embedding of the training images, a running mean of
    its last few hundred batches.

    Args:
      network: Embedding network f.
      train_classes: Number of classes that the labels of training are of.
      objective: Objective of the tasks; it classifies.
      transform: Function g of embeddings: centred_l2 (CL2N in the paper), l2 without m (L2N), or
        none (UN).
      joint_encoding: Whether a batch of training is embedded at once.

    Returns:
      The learner. Ways, shots and queries of a test are free.

    Raises:
      UsageError: the objective does not classify, or an unknown transform.
    """
    check_kind(objective, "classification", "simple_shot")
    transformed = choose(_TRANSFORMS, "transform", transform)

    def fit(examples: Examples, mean: Array) -> Array:
        return prototypes(transformed(examples.z, mean), examples.y, examples.mask)

    def predict(fitted: Array, mean: Array, z: Array) -> Array:
        return -squared_distance(transformed(z, mean), fitted)

    head = _classifier_head(linear_logits, True, train_classes, objective, fit, predict)
    return metric_learner(network, head, objective, joint_encoding=joint_encoding)
