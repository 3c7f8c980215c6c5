"""A body with a linear head that adapts by an inner loop: what MAML's relatives share."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from meta_jax.core import (
    Array,
    Batch,
    Episode,
    MetaLearner,
    Metrics,
    Network,
    Objective,
    PyTree,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.normalisation import (
    embed_queries,
    embed_support,
    is_normalisation,
    keeps_support_moments,
    queries_need_support,
)
from meta_jax.objectives import check_batch, check_targets, without_padding
from meta_jax.optimization_based.adjoints import Adjoint
from meta_jax.optimization_based.inner_loop import (
    Mask,
    Problem,
    partition,
    run_inner_loop,
    with_proximal_term,
)
from meta_jax.optimization_based.update_rules import UpdateRule, from_optax
from meta_jax.registry import Default

Reduction = Literal["mean", "sum", "class_sum"]
# (embeddings [n, D], y [n, ways] with rows of zeros for padding) -> {'kernel', 'bias'}
MakeHead = Callable[[Array, Array], PyTree]


class GradientAdapted(NamedTuple):
    """A learner after its inner loop.

    Attributes:
      params: Adapted parameters, {'network', 'head'}.
      state: State of the network.
      support: The support set, where queries are normalised beside it; else None.
    """

    params: PyTree
    state: PyTree
    support: Batch | None = None


# ---- Which leaves are adapted.


def all_but_normalisation(path: tuple, leaf: Array) -> bool:
    """The mask of the MAML authors' code: normalisation is meta-learned, but not adapted."""
    del leaf
    return not is_normalisation(path)


def head_only(path: tuple, leaf: Array) -> bool:
    """The mask of ANIL: the body is meta-learned, but not adapted."""
    del leaf
    return path[0].key == "head"


def body_only(path: tuple, leaf: Array) -> bool:
    """The mask of BOIL, the complement of ANIL's: the head is meta-learned, but not adapted."""
    return not head_only(path, leaf)


# ---- Settings.


def default_by_task(*, normalised: float, plain: float, regression: float) -> Default:
    """A default that follows the objective and the network's normalisation.

    Args:
      normalised: Value for classification by a network with normalisation.
      plain: Value for classification by a network without.
      regression: Value for regression.

    Returns:
      The function (network, objective) -> value that a registration takes.
    """

    def default(network: Network | None, objective: Objective) -> float:
        if objective.kind == "regression":
            return regression
        return plain if network is None or network.normalisation == "none" else normalised

    return default


def resolved(value: float | None) -> float:
    """A setting whose default None a registration has replaced by what `defaults` says."""
    if value is None:
        raise TypeError("a setting without a value: call the registered factory")
    return value


def check_steps(steps: int, eval_steps: int) -> None:
    """Refuses a number of inner steps below zero.

    Raises:
      UsageError: one of them is negative.
    """
    if min(steps, eval_steps) < 0:
        raise UsageError(f"inner steps {steps} and {eval_steps} must not be negative")


def rule_from(
    optimizer: optax.GradientTransformation | None, learning_rate: float | None, adjoint: Adjoint
) -> UpdateRule:
    """The update rule of an inner optimizer, or of plain SGD.

    Args:
      optimizer: Optax transformation; None for SGD.
      learning_rate: Learning rate of SGD.
      adjoint: How the outer gradient comes back, which the optimizer must allow.

    Raises:
      UsageError: the outer gradient could not come back through the optimizer.
    """
    if optimizer is None:
        return from_optax(optax.sgd(resolved(learning_rate)))
    if not (adjoint.is_first_order or adjoint.is_implicit):
        _check_differentiable(optimizer, adjoint)
    return from_optax(optimizer)


def _check_differentiable(optimizer: optax.GradientTransformation, adjoint: Adjoint) -> None:
    """Refuses what has no derivative where a coordinate's gradient is zero, as behind dead ReLUs.

    The derivative of a square root at zero is infinite: Adam's updates make every outer gradient
    NaN.
    """
    rule = from_optax(optimizer)
    params = {"network": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}

    def update(gradient: PyTree, params: PyTree) -> Array:
        updates, _ = rule.update(
            {},
            gradient,
            rule.init({}, params),
            params,
            loss=jnp.ones(()),
            value_fn=lambda params: (ravel_pytree(params)[0] ** 2).sum(),
        )
        return ravel_pytree(updates)[0].sum()

    culprit = f"the adjoint {adjoint.name} differentiates the inner optimizer, which"
    gradient = jax.tree.map(lambda p: jnp.array([0.0, 1.0]), params)
    slopes = jax.jit(jax.grad(update, (0, 1)))
    try:
        jax.eval_shape(slopes, gradient, params)
    except Exception as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            return  # it wants parameters of another structure, and cannot be looked at here
        raise UsageError(
            f"{culprit} has a line search and no derivative: use adjoint first_order"
        ) from error
    with jax.ensure_compile_time_eval():
        finite = bool(jnp.isfinite(ravel_pytree(slopes(gradient, params))[0]).all())
    if not finite:
        raise UsageError(
            f"{culprit} has no derivative where a gradient is zero (a square root): give it an "
            "eps_root above zero, as optax.adam(rate, eps_root=1e-8), or use adjoint first_order"
        )


def with_reduction(objective: Objective, reduction: Reduction) -> Objective:
    """An objective that averages over examples, with its loss reduced otherwise.

    Args:
      objective: The objective.
      reduction: How the loss is reduced: 'mean' over examples; 'sum' over the examples that are not
        padding; or 'class_sum', the mean times the columns of y, which for equal shots is the sum
        over classes of each class's mean: the scale of the MAML authors' inner loss and learning
        rates.

    Raises:
      UsageError: an unknown reduction.
    """
    if reduction not in get_args(Reduction):
        names = ", ".join(get_args(Reduction))
        raise UsageError(f"unknown reduction '{reduction}': choose one of {names}")
    if reduction == "mean":
        return objective

    def loss(outputs: PyTree, y: PyTree, mask: Array | None, /) -> tuple[Array, Metrics]:
        value, metrics = objective.loss(outputs, y, mask)
        if reduction == "class_sum":
            return value * y.shape[-1], metrics
        count = y.shape[0] if mask is None else mask.sum().astype(value.dtype)
        return value * count, metrics

    return objective._replace(loss=loss)


# ---- The learner.


def init_learner(
    network: Network, key: Array, episode: Episode, *, head: bool = True
) -> tuple[PyTree, PyTree]:
    """Parameters {'network', 'head'} and the network's state.

    Args:
      network: The body.
      key: A random key.
      episode: An example of a task, which sizes them.
      head: Whether there is a linear head with one output for each column of y.

    Raises:
      ValueError: the support's inputs and targets do not fit together, or the network's outputs are
        not vectors.
    """
    support = episode.support
    check_batch(support, "support")
    check_targets(support.y, "support.y")
    network_key, head_key = jax.random.split(key)
    params, state = network.init(network_key, support.x)
    if not head:
        return {"network": params}, state
    z, _ = jax.eval_shape(
        lambda: embed_support(network, params, state, support, key=jax.random.key(0), train=False)
    )
    if len(z.shape) != 2:
        raise UsageError(
            f"a linear head needs embeddings [n, D], not {list(z.shape)}: flatten or average them "
            "in the network"
        )
    return {"network": params, "head": init_linear(head_key, z.shape[1], support.y.shape[1])}, state


def support_problem(
    network: Network,
    objective: Objective,
    batch: Callable[[Array], Batch],
    key: Array,
    *,
    train: bool,
) -> Problem:
    """The inner problem: the loss of body and head on support examples.

    Args:
      network: The body.
      objective: The loss of outputs and y.
      batch: Function from a step to the examples that it sees.
      key: A random key, of which each step takes its own for the network's random layers.
      train: Whether this is meta-training; in tests nothing is random.
    """

    def problem(learner: PyTree, state: PyTree, step: Array) -> tuple[Array, PyTree]:
        now = batch(step)
        step_key = jax.random.fold_in(key, step)
        z, state = embed_support(network, learner["network"], state, now, key=step_key, train=train)
        return objective.loss(linear(learner["head"], z), now.y, now.mask)[0], state

    return problem


def head_problem(objective: Objective, z: Array, support: Batch) -> Problem:
    """The inner problem of a head on embeddings that stay as they are.

    Args:
      objective: The loss of outputs and y.
      z: Embeddings of the support set, [n, D].
      support: The support set.
    """

    def problem(learner: PyTree, state: PyTree, step: Array) -> tuple[Array, PyTree]:
        del step
        return objective.loss(linear(learner["head"], z), support.y, support.mask)[0], state

    return problem


def refreshed(
    network: Network, params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
) -> PyTree:
    """The state that answers queries, where it holds the support's moments: fresh ones.

    Those that an inner loop leaves are of the parameters before its last update.

    Args:
      network: The body.
      params: Parameters of the body after the last update.
      state: State of the body after the last step.
      support: The support set.
      key: A random key.
      train: Whether this is meta-training.
    """
    if not keeps_support_moments(network.normalisation):
        return state
    return embed_support(network, params, state, support, key=key, train=train)[1]


def support_beside_queries(network: Network, support: Batch) -> Batch | None:
    """The support set where the network's normalisation needs it beside each query, else None."""
    return support if queries_need_support(network.normalisation) else None


def answer(
    network: Network,
    adapted: GradientAdapted,
    x: PyTree,
    key: Array,
    *,
    train: bool,
    mask: Array | None,
) -> tuple[Array, PyTree]:
    """Outputs of an adapted learner, [m, ways], and the network's new state.

    Args:
      network: The body.
      adapted: The adapted learner.
      x: Queries, leaves [m, ...].
      key: A random key.
      train: Whether this is meta-training.
      mask: Which queries are real, bool [m]; None for all.
    """
    learner, state, support = adapted
    z, state = embed_queries(
        network, learner["network"], state, x, support=support, key=key, train=train, mask=mask
    )
    return linear(learner["head"], z), state


class _Parts(NamedTuple):
    """What a gradient learner is made of; each as `gradient_learner` has it."""

    network: Network
    rule: UpdateRule
    steps: int
    eval_steps: int
    adjoint: Adjoint
    mask: Mask | None
    inner_objective: Objective
    proximity: float
    make_head: MakeHead | None


def _init(parts: _Parts, key: Array, episode: Episode) -> tuple[PyTree, PyTree]:
    learner_key, rule_key = jax.random.split(key)
    has_head = parts.make_head is None
    learner, state = init_learner(parts.network, learner_key, episode, head=has_head)
    adapted = learner if parts.mask is None else partition(learner, parts.mask)[0]
    return {"learner": learner, "rule": parts.rule.init_meta(rule_key, adapted)}, state


def _adapt(
    parts: _Parts, params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
) -> GradientAdapted:
    check_batch(support, "support")
    network, mask = parts.network, parts.mask
    head_key, loop_key, end_key = jax.random.split(key, 3)

    def embed(body: PyTree, state: PyTree, key: Array) -> tuple[Array, PyTree]:
        return embed_support(network, body, state, support, key=key, train=train)

    learner = params["learner"]
    if parts.make_head is not None:
        check_targets(support.y, "support.y")
        z, _ = embed(learner["network"], state, head_key)
        head = parts.make_head(z, without_padding(support.y, support.mask))
        learner = {**learner, "head": head}
    body_adapts = mask is None or jax.tree.leaves(partition(learner, mask)[0]["network"])
    if body_adapts:
        problem = support_problem(
            network, parts.inner_objective, lambda step: support, loop_key, train=train
        )
    else:
        z, state = embed(learner["network"], state, loop_key)
        problem = head_problem(parts.inner_objective, z, support)
    if parts.proximity:
        problem = with_proximal_term(problem, learner, parts.proximity)
    end = run_inner_loop(
        problem,
        parts.rule,
        params["rule"],
        learner,
        state,
        steps=parts.steps if train else parts.eval_steps,
        adjoint=parts.adjoint,
        mask=mask,
    )
    state = end.state
    if body_adapts:
        state = refreshed(network, end.params["network"], state, support, end_key, train=train)
    return GradientAdapted(end.params, state, support_beside_queries(network, support))


def _predict(
    network: Network,
    params: PyTree,
    adapted: GradientAdapted,
    x: PyTree,
    key: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del params
    return answer(network, adapted, x, key, train=train, mask=mask)


def gradient_learner(
    network: Network,
    rule: UpdateRule,
    *,
    steps: int,
    eval_steps: int,
    adjoint: Adjoint,
    mask: Mask | None,
    objective: Objective,
    reduction: Reduction = "mean",
    proximity: float = 0.0,
    make_head: MakeHead | None = None,
) -> MetaLearner:
    """Builds a network with a linear head that adapts by an inner loop on the support set.

    MAML and its relatives are compositions of this one.

    Args:
      network: The body, without an output layer; as many outputs as `y` has columns follow it.
      rule: Inner optimizer.
      steps: Inner steps in training.
      eval_steps: Inner steps in tests.
      adjoint: How the outer gradient comes back through the inner loop.
      mask: Which of {'network', 'head'}'s leaves are adapted; None for all. Where none of the
        body's is, the support set is embedded once, with one draw of dropout, for all steps.
      objective: Loss of the inner and the outer loop.
      reduction: Reduction of the inner loss: 'mean', 'sum' or 'class_sum' (see `with_reduction`).
      proximity: Weight lambda of a term (lambda / 2)||phi - theta||^2 in the inner loss.
      make_head: Function from the embeddings and labels of the support set to the head that the
        loop starts from; None for a meta-learned one.

    Returns:
      The learner; its parameters are {'learner': {'network', 'head'}, 'rule'}.

    Raises:
      UsageError: a number of steps below zero, an unknown reduction, or an implicit adjoint without
        a proximity, whose minimum would not depend on where the loop starts.
    """
    check_steps(steps, eval_steps)
    if adjoint.is_implicit and not proximity > 0:
        raise UsageError(
            "the implicit adjoint needs a proximity above zero (imaml has one): without it a "
            "minimum does not depend on the initial parameters"
        )
    inner_objective = with_reduction(objective, reduction)
    parts = _Parts(
        network,
        rule,
        steps,
        eval_steps,
        adjoint,
        mask,
        inner_objective,
        proximity,
        make_head,
    )
    adapt, predict = partial(_adapt, parts), partial(_predict, network)
    return MetaLearner(
        partial(_init, parts),
        adapt,
        predict,
        supervised_loss(adapt, predict, objective),
        supervised_evaluate(adapt, predict, objective),
    )
