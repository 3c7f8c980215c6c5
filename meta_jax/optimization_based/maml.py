"""Model-Agnostic Meta-Learning (Finn, Abbeel and Levine 2017, arXiv:1703.03400)."""

from typing import NamedTuple

import jax
import optax

from meta_jax.core import (
    Batch,
    Criterion,
    Episode,
    MetaLearner,
    Network,
    PyTree,
    cross_entropy,
    episode_loss,
)
from meta_jax.networks.layers import init_linear, linear
from meta_jax.optimization_based.adjoints import FIRST_ORDER, UNROLLED, Adjoint
from meta_jax.optimization_based.inner_loop import Mask, unroll
from meta_jax.optimization_based.update_rules import UpdateRule, from_optax


class GradientAdapted(NamedTuple):
    """A learner after its inner loop."""

    params: PyTree  # the adapted parameters {'network', 'head'}
    state: PyTree  # the network's state


def all_but_batch_norm(path: tuple, leaf: jax.Array) -> bool:
    """The mask of the MAML authors' code: batch norm is meta-learned, but not adapted."""
    del leaf
    return not any(getattr(key, "key", None) == "batch_norm" for key in path)


def gradient_learner(
    network: Network,
    rule: UpdateRule,
    *,
    steps: int,
    eval_steps: int,
    adjoint: Adjoint,
    mask: Mask | None,
    criterion: Criterion,
) -> MetaLearner:
    """A network with a linear head that adapts by an inner loop on the support set.

    MAML and its relatives are compositions of this one.

    Args:
      network: the body, without an output layer; as many outputs as `y` has columns follow it.
      rule: the inner optimizer.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: how the outer gradient comes back through the inner loop.
      mask: which of {'network', 'head'}'s leaves are adapted; None for all.
      criterion: inner and outer loss, (outputs [n, ways], y [n, ways]) -> (loss, metrics).

    Returns:
      The learner; its parameters are {'learner': {'network', 'head'}, 'rule'}.
    """

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        network_key, head_key, rule_key = jax.random.split(key, 3)
        x, y = episode.support
        params, state = network.init(network_key, x)
        z, _ = network.apply_to_support(params, state, x, key=head_key, train=False)
        learner = {
            "network": params,
            "head": init_linear(head_key, z.shape[-1], y.shape[-1]),
        }
        return {"learner": learner, "rule": rule.init_meta(rule_key, learner)}, state

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> GradientAdapted:
        def problem(learner: PyTree, state: PyTree) -> tuple[jax.Array, PyTree]:
            z, state = network.apply_to_support(
                learner["network"], state, support.x, key=key, train=train
            )
            return criterion(linear(learner["head"], z), support.y)[0], state

        learner, state, _ = unroll(
            problem,
            rule,
            params["rule"],
            params["learner"],
            state,
            steps=steps if train else eval_steps,
            adjoint=adjoint,
            mask=mask,
        )
        if network.batch_norm == "support":
            # The loop's last statistics are those before its last update.
            _, state = network.apply_to_support(
                learner["network"], state, support.x, key=key, train=train
            )
        return GradientAdapted(learner, state)

    def predict(
        params: PyTree, adapted: GradientAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params
        learner, state = adapted
        z, state = network.apply_to_queries(learner["network"], state, x, key=key, train=train)
        return linear(learner["head"], z), state

    return MetaLearner(init, adapt, predict, episode_loss(adapt, predict, criterion))


def maml(
    network: Network,
    *,
    inner_lr: float = 2.0,
    steps: int = 1,
    eval_steps: int = 3,
    adjoint: Adjoint = UNROLLED,
    mask: Mask | None = all_but_batch_norm,
    criterion: Criterion = cross_entropy,
) -> MetaLearner:
    """theta' = theta - alpha grad L_S(theta), repeated; the meta-loss is L_B(theta') (eq. 1).

    Args:
      network: the body; a linear head with one output for each column of `y` follows it.
      inner_lr: alpha, for a loss that is the MEAN over the support set. The authors' code sums
        over the classes, so its 0.4 for 5 ways is 2.0 here.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: `UNROLLED` for second order, `FIRST_ORDER`, or `CHECKPOINTED` to save memory.
      mask: which leaves are adapted; by default all but batch norm's, as the authors do.
      criterion: `cross_entropy`, or `squared_error` for regression.

    Returns:
      The learner.

    Raises:
      ValueError: for a number of steps below zero.
    """
    if min(steps, eval_steps) < 0:
        raise ValueError(f"inner steps {steps} and {eval_steps} must not be negative")
    return gradient_learner(
        network,
        from_optax(optax.sgd(inner_lr)),
        steps=steps,
        eval_steps=eval_steps,
        adjoint=adjoint,
        mask=mask,
        criterion=criterion,
    )


def first_order_maml(network: Network, **settings: object) -> MetaLearner:
    """`maml` whose inner gradients are constants (section 5.2); the same settings but `adjoint`."""
    return maml(network, adjoint=FIRST_ORDER, **settings)
