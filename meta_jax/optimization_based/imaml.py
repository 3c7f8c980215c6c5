"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019, arXiv:1909.04630)."""

import optax

from meta_jax.core import Criterion, MetaLearner, Network, cross_entropy
from meta_jax.optimization_based.adjoints import Adjoint, implicit
from meta_jax.optimization_based.inner_loop import Mask
from meta_jax.optimization_based.learner import all_but_batch_norm, gradient_learner
from meta_jax.optimization_based.update_rules import from_optax


def imaml(
    network: Network,
    *,
    inner_lr: float = 0.25,
    proximity: float = 2.0,
    cg_steps: int = 5,
    damping: float = 0.0,
    steps: int = 16,
    eval_steps: int = 16,
    adjoint: Adjoint | None = None,
    mask: Mask | None = all_but_batch_norm,
    criterion: Criterion = cross_entropy,
    reduction: str = "mean",
) -> MetaLearner:
    """phi* = argmin L_S(phi) + (lambda / 2)||phi - theta||^2; meta-gradient by implicit functions.

    The meta-gradient is (I + H / lambda)^-1 grad L_B(phi*), with H the Hessian of L_S at phi* and
    the inverse by conjugate gradients (equation 6): memory does not grow with the inner steps.

    Args:
      network: the body; a linear head with one output for each column of `y` follows it.
      inner_lr: of the inner gradient descent, below 2 / (lambda + the largest curvature).
      proximity: lambda.
      cg_steps: steps of conjugate gradients.
      damping: added to H + lambda I in the backward pass.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: another one than `implicit(cg_steps=cg_steps, damping=damping)`, to compare with.
      mask: which leaves are adapted; by default all but batch norm's. The others get their
        implicit gradient too.
      criterion: `cross_entropy`, or `squared_error` for regression.
      reduction: of the inner loss: 'mean', 'sum' or 'class_sum'.

    Returns:
      The learner.

    Raises:
      ValueError: for a number of steps below zero, an unknown reduction, a proximity that is not
        above zero, less than one step of conjugate gradients or a damping below zero.
    """
    return gradient_learner(
        network,
        from_optax(optax.sgd(inner_lr)),
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint or implicit(cg_steps=cg_steps, damping=damping),
        mask=mask,
        criterion=criterion,
        reduction=reduction,
        proximity=proximity,
    )
