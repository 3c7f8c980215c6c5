"""Almost No Inner Loop (Raghu, Raghu, Bengio and Vinyals 2020, arXiv:1909.09157)."""

import optax

from meta_jax import registry
from meta_jax.core import MetaLearner, Network, Objective
from meta_jax.objectives import cross_entropy
from meta_jax.optimization_based.adjoints import Adjoint
from meta_jax.optimization_based.learner import Reduction, default_by_task, head_only
from meta_jax.optimization_based.maml import maml
from meta_jax.ranges import NotNegativeInt, Positive


@registry.learner(
    "anil",
    network="strided_conv4",
    normalisation="batch",
    defaults={"inner_lr": default_by_task(normalised=2.0, plain=0.1, regression=0.01)},
)
def anil(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    inner_lr: Positive | None = None,
    inner_optimizer: optax.GradientTransformation | None = None,
    steps: NotNegativeInt = 5,
    eval_steps: NotNegativeInt | None = None,
    adjoint: Adjoint | str = "unrolled",
    reduction: Reduction = "mean",
) -> MetaLearner:
    """Builds an ANIL learner: MAML whose inner loop adapts the head alone (section 4).

    The body is the same after adaptation, is run once for the whole inner loop, and still gets its
    outer gradient. It equals MAML with an inner learning rate of zero for the body. The paper takes
    MAML's settings for each data set, so an inner step costs little here.

    With its flag alone, 1000 outer steps give 71.7 % on glyphs (untrained 31.4 %) and a squared
    error of 1.34 on sinusoids (untrained 4.24).

    Args:
      network: Body; a linear head with one output for each column of y follows it.
      objective: Loss of the inner and the outer loop; the tasks choose it.
      inner_lr: Learning rate of the inner loop. By default 2.0 for classification by a network with
        normalisation, 0.1 for one without, 0.01 for regression.
      inner_optimizer: Optax transformation in the place of SGD with `inner_lr`. An adaptive one
        needs its eps_root above zero, or the adjoint first_order.
      steps: Inner steps in training.
      eval_steps: Inner steps in tests; None for as many as in training.
      adjoint: How the outer gradient comes back through the inner loop: unrolled for second order,
        checkpointed, mixed_mode, truncated:K or first_order.
      reduction: Reduction of the inner loss over the support set: mean, sum, or class_sum, the mean
        times the number of classes.

    Returns:
      The learner.

    Raises:
      UsageError: settings that `maml` refuses.
    """
    return maml(
        network,
        objective=objective,
        inner_lr=inner_lr,
        inner_optimizer=inner_optimizer,
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint,
        mask=head_only,
        reduction=reduction,
    )
