"""Prototypical MAML (Triantafillou et al. 2020, arXiv:1903.03096)."""

import jax
import jax.numpy as jnp
import optax

from meta_jax.core import MetaLearner, Network, PyTree, cross_entropy
from meta_jax.optimization_based.adjoints import UNROLLED, Adjoint
from meta_jax.optimization_based.inner_loop import Mask
from meta_jax.optimization_based.learner import all_but_batch_norm, gradient_learner
from meta_jax.optimization_based.update_rules import from_optax


def prototype_linear_head(z: jax.Array, y: jax.Array) -> PyTree:
    """The linear head whose logits are -||z - c_k||^2 up to a constant of each query's own.

    W = 2 c_k and b = -||c_k||^2 with c_k the mean embedding of class k (Triantafillou et al. 2020,
    section 4). Embeddings z [n, D] and one-hot labels y [n, ways] give a kernel [D, ways] and a
    bias [ways].
    """
    prototypes = y.T @ z / jnp.maximum(y.sum(0), 1)[:, None]
    return {"kernel": 2 * prototypes.T, "bias": -(prototypes**2).sum(1)}


def protomaml(
    network: Network,
    *,
    inner_lr: float = 0.1,
    steps: int = 1,
    eval_steps: int = 3,
    adjoint: Adjoint = UNROLLED,
    mask: Mask | None = all_but_batch_norm,
    reduction: str = "mean",
) -> MetaLearner:
    """MAML whose head starts from the prototypes: W = 2 c_k, b = -||c_k||^2 (section 4).

    The outer gradient reaches the body through the prototypes too. Without inner steps it is a
    Prototypical Network. It classifies; ways and shots may differ between training and tests.

    Args:
      network: the body.
      inner_lr: of the inner SGD, for the inner loss that `reduction` makes.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: how the outer gradient comes back.
      mask: which leaves of {'network', 'head'} are adapted; by default all but batch norm's.
      reduction: of the inner loss: 'mean', 'sum' or 'class_sum'.

    Returns:
      The learner; it has no head of its own.

    Raises:
      ValueError: for a number of steps below zero or an unknown reduction.
    """
    return gradient_learner(
        network,
        from_optax(optax.sgd(inner_lr)),
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint,
        mask=mask,
        criterion=cross_entropy,
        reduction=reduction,
        head=prototype_linear_head,
    )
