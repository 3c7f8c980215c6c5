"""A body with a linear head that adapts by an inner loop: what MAML's relatives share."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from meta_jax.core import (
    Batch,
    Criterion,
    Episode,
    MetaLearner,
    Network,
    PyTree,
    episode_loss,
)
from meta_jax.networks.layers import init_linear, linear
from meta_jax.optimization_based.adjoints import Adjoint
from meta_jax.optimization_based.inner_loop import Mask, Problem, partition, proximal, unroll
from meta_jax.optimization_based.update_rules import UpdateRule

REDUCTIONS = ("mean", "sum", "class_sum")


class GradientAdapted(NamedTuple):
    """A learner after its inner loop."""

    params: PyTree  # the adapted parameters {'network', 'head'}
    state: PyTree  # the network's state


def all_but_batch_norm(path: tuple, leaf: jax.Array) -> bool:
    """The mask of the MAML authors' code: batch norm is meta-learned, but not adapted."""
    del leaf
    return not any(getattr(key, "key", None) == "batch_norm" for key in path)


def head_only(path: tuple, leaf: jax.Array) -> bool:
    """The mask of ANIL: the body is meta-learned, but not adapted."""
    del leaf
    return path[0].key == "head"


def body_only(path: tuple, leaf: jax.Array) -> bool:
    """The mask of BOIL, the complement of ANIL's: the head is meta-learned, but not adapted."""
    return not head_only(path, leaf)


def reduced(criterion: Criterion, reduction: str) -> Criterion:
    """A criterion that averages over examples, with its loss reduced otherwise.

    Args:
      criterion: (outputs [n, ways], y [n, ways]) -> (mean loss, metrics).
      reduction: 'mean' over examples; 'sum' over the examples that are not padding; or
        'class_sum', the mean times the columns of y, which for equal shots is the sum over classes
        of each class's mean: the scale of the MAML authors' inner loss and learning rates.

    Raises:
      ValueError: for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{reduction}': choose one of {', '.join(REDUCTIONS)}")
    if reduction == "mean":
        return criterion

    def scaled(outputs: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, metrics = criterion(outputs, y)
        return loss * (y.shape[-1] if reduction == "class_sum" else (y != 0).any(-1).sum()), metrics

    return scaled


def init_learner(
    network: Network, key: jax.Array, episode: Episode, *, head: bool = True
) -> tuple[PyTree, PyTree]:
    """Parameters {'network', 'head'} and the network's state; `head=False` leaves the head out."""
    network_key, head_key, _ = jax.random.split(key, 3)
    x, y = episode.support
    params, state = network.init(network_key, x)
    if not head:
        return {"network": params}, state
    z, _ = network.apply_to_support(params, state, x, key=head_key, train=False)
    return {"network": params, "head": init_linear(head_key, z.shape[-1], y.shape[-1])}, state


def support_problem(
    network: Network,
    criterion: Criterion,
    batch: Callable[[jax.Array], Batch],
    key: jax.Array,
    *,
    train: bool,
) -> Problem:
    """The inner problem: the loss of body and head on support examples.

    Args:
      network: the body.
      criterion: (outputs, y) -> (loss, metrics).
      batch: step -> the examples that it sees.
      key: of the network's random layers.
      train: whether this is meta-training.
    """

    def problem(learner: PyTree, state: PyTree, step: jax.Array) -> tuple[jax.Array, PyTree]:
        x, y = batch(step)
        z, state = network.apply_to_support(learner["network"], state, x, key=key, train=train)
        return criterion(linear(learner["head"], z), y)[0], state

    return problem


def check_steps(steps: int, eval_steps: int) -> None:
    """Raises ValueError for a number of inner steps below zero."""
    if min(steps, eval_steps) < 0:
        raise ValueError(f"inner steps {steps} and {eval_steps} must not be negative")


def gradient_learner(
    network: Network,
    rule: UpdateRule,
    *,
    steps: int,
    eval_steps: int,
    adjoint: Adjoint,
    mask: Mask | None,
    criterion: Criterion,
    reduction: str = "mean",
    proximity: float = 0.0,
    head: Callable[[jax.Array, jax.Array], PyTree] | None = None,
) -> MetaLearner:
    """A network with a linear head that adapts by an inner loop on the support set.

    MAML and its relatives are compositions of this one.

    Args:
      network: the body, without an output layer; as many outputs as `y` has columns follow it.
      rule: the inner optimizer.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      adjoint: how the outer gradient comes back through the inner loop.
      mask: which of {'network', 'head'}'s leaves are adapted; None for all. Where none of the
        body's is, the support set is embedded once for all steps.
      criterion: inner and outer loss, (outputs [n, ways], y [n, ways]) -> (loss, metrics).
      reduction: of the inner loss: 'mean', 'sum' or 'class_sum' (see `reduced`).
      proximity: lambda of a term (lambda / 2)||phi - theta||^2 in the inner loss.
      head: (embeddings [n, D], y [n, ways]) -> {'kernel', 'bias'}, the head that the loop starts
        from; None for a meta-learned one.

    Returns:
      The learner; its parameters are {'learner': {'network', 'head'}, 'rule'}.

    Raises:
      ValueError: for a number of steps below zero, an unknown reduction, or an implicit adjoint
        without a proximity, whose minimum would not depend on where the loop starts.
    """
    check_steps(steps, eval_steps)
    if adjoint.is_implicit and not proximity > 0:
        raise ValueError(
            "the implicit adjoint needs a proximity above zero (imaml has one): without it a "
            "minimum does not depend on the initial parameters"
        )
    inner_criterion = reduced(criterion, reduction)

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        learner, state = init_learner(network, key, episode, head=head is None)
        adapted = learner if mask is None else partition(learner, mask)[0]
        return {"learner": learner, "rule": rule.init_meta(jax.random.split(key, 3)[2], adapted)}, (
            state
        )

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> GradientAdapted:
        learner = params["learner"]

        def embed(body: PyTree, state: PyTree) -> tuple[jax.Array, PyTree]:
            return network.apply_to_support(body, state, support.x, key=key, train=train)

        if head is not None:
            learner = {**learner, "head": head(embed(learner["network"], state)[0], support.y)}
        body_adapts = mask is None or jax.tree.leaves(partition(learner, mask)[0]["network"])
        if body_adapts:
            problem = support_problem(
                network, inner_criterion, lambda step: support, key, train=train
            )
        else:
            z, state = embed(learner["network"], state)

            def problem(
                learner: PyTree, state: PyTree, step: jax.Array
            ) -> tuple[jax.Array, PyTree]:
                del step
                return inner_criterion(linear(learner["head"], z), support.y)[0], state

        end = unroll(
            proximal(problem, learner, proximity) if proximity else problem,
            rule,
            params["rule"],
            learner,
            state,
            steps=steps if train else eval_steps,
            adjoint=adjoint,
            mask=mask,
        )
        state = end.state
        if network.batch_norm == "support" and body_adapts:
            # The loop's last statistics are those before its last update.
            _, state = embed(end.params["network"], state)
        return GradientAdapted(end.params, state)

    def predict(
        params: PyTree, adapted: GradientAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params
        learner, state = adapted
        z, state = network.apply_to_queries(learner["network"], state, x, key=key, train=train)
        return linear(learner["head"], z), state

    return MetaLearner(init, adapt, predict, episode_loss(adapt, predict, criterion))
