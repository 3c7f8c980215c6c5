"""Kernel classification and regression on learned embeddings."""

from meta_jax.core import MetaLearner, Network, cross_entropy, squared_error
from meta_jax.metric_based.heads import (
    cosine_similarity,
    kernel_head,
    manhattan_distance,
    squared_distance,
)
from meta_jax.metric_based.learner import metric_learner

KERNELS = {
    "gaussian": lambda a, b: -squared_distance(a, b),
    "laplacian": lambda a, b: -manhattan_distance(a, b),
    "cosine": cosine_similarity,
}


def kernel_learner(
    network: Network,
    *,
    kernel: str = "gaussian",
    bandwidth: float = 1.0,
    learn_bandwidth: bool = True,
    regression: bool = False,
    joint_encoding: bool = True,
) -> MetaLearner:
    """P(y | x, S) = sum_i k(f(x), f(x_i)) y_i / sum_i k(f(x), f(x_i)).

    This is the Nadaraya-Watson estimator on a learned embedding. At one shot and bandwidth 1 the
    Gaussian kernel is a Prototypical Network. A class with more support examples than another
    weighs more, which prototypes do not do.

    Args:
      network: the embedding network f.
      kernel: 'gaussian' for exp(-||a - b||^2 / bandwidth), 'laplacian' for
        exp(-||a - b||_1 / bandwidth), or 'cosine' for exp(cos(a, b) / bandwidth).
      bandwidth: the kernel's, or the first one where it is learned.
      learn_bandwidth: whether the bandwidth is trained with the network.
      regression: whether y are real targets, trained by their squared error.
      joint_encoding: embed support and queries as one batch in training.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      ValueError: for an unknown kernel, or a bandwidth that is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.mlp import mlp
      >>> learner = kernel_learner(mlp((8,)), kernel="laplacian", regression=True)
      >>> support = Batch(jnp.array([[0., 1.], [1., 0.]]), jnp.array([[0.5], [0.5]]))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> y, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> y.tolist()
      [[0.5], [0.5]]
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel '{kernel}': choose one of {', '.join(KERNELS)}")
    if bandwidth <= 0:
        raise ValueError(f"bandwidth {bandwidth} is impossible: use a positive one")
    head = kernel_head(
        KERNELS[kernel],
        bandwidth=bandwidth,
        learn_bandwidth=learn_bandwidth,
        regression=regression,
    )
    criterion = squared_error if regression else cross_entropy
    return metric_learner(network, head, criterion, joint_encoding=joint_encoding)
