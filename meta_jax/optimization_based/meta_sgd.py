"""Meta-SGD (Li, Zhou, Chen and Li 2017, arXiv:1707.09835)."""

from meta_jax.core import Criterion, MetaLearner, Network, cross_entropy
from meta_jax.optimization_based.adjoints import UNROLLED, Adjoint
from meta_jax.optimization_based.inner_loop import Mask
from meta_jax.optimization_based.learner import gradient_learner
from meta_jax.optimization_based.update_rules import learned_sgd


def meta_sgd(
    network: Network,
    *,
    inner_lr: float = 0.1,
    steps: int = 1,
    eval_steps: int = 1,
    adjoint: Adjoint = UNROLLED,
    mask: Mask | None = None,
    criterion: Criterion = cross_entropy,
    reduction: str = "mean",
) -> MetaLearner:
    """theta' = theta - alpha o grad L_S(theta), with a meta-learned alpha of theta's size (eq. 2).

    Args:
      network: the body; a linear head with one output for each column of `y` follows it.
      inner_lr: the largest initial rate: alpha starts uniform between a twentieth of it and it.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: how the outer gradient comes back.
      mask: which leaves are adapted, all by default.
      criterion: `cross_entropy`, or `squared_error` for regression.
      reduction: of the inner loss: 'mean', 'sum' or 'class_sum'.

    Returns:
      The learner; its parameters' 'rule' is alpha.

    Raises:
      ValueError: for a number of steps below zero or an unknown reduction.
    """
    return gradient_learner(
        network,
        learned_sgd(inner_lr / 20, inner_lr),
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint,
        mask=mask,
        criterion=criterion,
        reduction=reduction,
    )
