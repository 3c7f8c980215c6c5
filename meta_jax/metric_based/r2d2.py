"""The ridge-regression head of R2-D2 (Bertinetto et al. 2019, arXiv:1805.08136)."""

from meta_jax.core import MetaLearner, Network, cross_entropy, squared_error
from meta_jax.metric_based.heads import ridge_head
from meta_jax.metric_based.learner import metric_learner


def ridge(
    network: Network,
    *,
    penalty: float = 1.0,
    scale: float = 10.0,
    learned: bool = True,
    form: str = "auto",
    regression: bool = False,
    joint_encoding: bool = True,
) -> MetaLearner:
    """W = X'(XX' + lambda I)^-1 Y on the support embeddings X; outputs are scale * f(x) W (eq. 4).

    Classes are regressed on their one-hot labels, so that outputs lie about between 0 and 1: as
    logits they need the scale. See `ridge_head` for the column of ones and the normalisation by
    the number of examples.

    Args:
      network: the embedding network f.
      penalty: lambda, or the first one where it is learned (the paper begins with 50).
      scale: of the logits, or the first one where it is learned.
      learned: whether penalty and scale are trained with the network.
      form: 'primal', 'dual' (Woodbury), or 'auto' for the smaller linear system.
      regression: whether y are real targets, trained by their squared error.
      joint_encoding: embed support and queries as one batch in training.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      ValueError: for a penalty or scale that is not positive, or an unknown form.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.mlp import mlp
      >>> learner = ridge(mlp((8,)))
      >>> support = Batch(jnp.array([[0., 1.], [1., 0.]]), jnp.eye(2))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> logits, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> logits.argmax(1).tolist()
      [0, 1]
    """
    for name, value in (("penalty", penalty), ("scale", scale)):
        if value <= 0:
            raise ValueError(f"{name} {value} is impossible: use a positive one")
    if form not in ("auto", "primal", "dual"):
        raise ValueError(f"unknown form '{form}': choose one of auto, primal, dual")
    head = ridge_head(
        penalty=penalty, scale=scale, learned=learned, form=form, regression=regression
    )
    criterion = squared_error if regression else cross_entropy
    return metric_learner(network, head, criterion, joint_encoding=joint_encoding)
