"""Model-Agnostic Meta-Learning (Finn, Abbeel and Levine 2017, arXiv:1703.03400)."""

import optax

from meta_jax.core import Criterion, MetaLearner, Network, cross_entropy
from meta_jax.optimization_based.adjoints import FIRST_ORDER, UNROLLED, Adjoint
from meta_jax.optimization_based.inner_loop import Mask
from meta_jax.optimization_based.learner import all_but_batch_norm, gradient_learner
from meta_jax.optimization_based.update_rules import from_optax


def maml(
    network: Network,
    *,
    inner_lr: float = 2.0,
    inner_optimizer: optax.GradientTransformation | None = None,
    steps: int = 1,
    eval_steps: int = 3,
    adjoint: Adjoint = UNROLLED,
    mask: Mask | None = all_but_batch_norm,
    criterion: Criterion = cross_entropy,
    reduction: str = "mean",
) -> MetaLearner:
    """theta' = theta - alpha grad L_S(theta), repeated; the meta-loss is L_B(theta') (eq. 1).

    Args:
      network: the body; a linear head with one output for each column of `y` follows it.
      inner_lr: alpha, for the inner loss that `reduction` makes. The authors' code sums over the
        classes, so its 0.4 for 5 ways is 2.0 for the mean.
      inner_optimizer: any optax transformation, in the place of `optax.sgd(inner_lr)`.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: `UNROLLED` for second order, or another of `meta_jax.optimization_based.adjoints`.
      mask: which leaves are adapted; by default all but batch norm's, as the authors do.
      criterion: `cross_entropy`, or `squared_error` for regression.
      reduction: of the inner loss: 'mean', 'sum' or 'class_sum', the authors' (see `reduced`).

    Returns:
      The learner.

    Raises:
      ValueError: for a number of steps below zero, an unknown reduction or the implicit adjoint,
        which is `imaml`'s.
    """
    return gradient_learner(
        network,
        from_optax(inner_optimizer or optax.sgd(inner_lr)),
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint,
        mask=mask,
        criterion=criterion,
        reduction=reduction,
    )


def first_order_maml(network: Network, **settings: object) -> MetaLearner:
    """`maml` whose inner gradients are constants (section 5.2); the same settings but `adjoint`."""
    return maml(network, adjoint=FIRST_ORDER, **settings)
