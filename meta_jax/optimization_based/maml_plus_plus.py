"""MAML++: how to train your MAML (Antoniou, Edwards and Storkey 2019, arXiv:1810.09502)."""

import jax
import jax.numpy as jnp

from meta_jax.core import (
    Aux,
    Batch,
    Criterion,
    Episode,
    MetaLearner,
    Network,
    PyTree,
    cross_entropy,
)
from meta_jax.networks.layers import linear
from meta_jax.optimization_based.adjoints import UNROLLED, Adjoint, annealed
from meta_jax.optimization_based.inner_loop import Mask, Unrolled, partition, unroll
from meta_jax.optimization_based.learner import (
    GradientAdapted,
    all_but_batch_norm,
    check_steps,
    init_learner,
    reduced,
    support_problem,
)
from meta_jax.optimization_based.update_rules import per_step_sgd

_FLOOR = 0.03  # of a step's weight, in shares of 1 / steps


def multi_step_weights(steps: int, progress: jax.Array) -> jax.Array:
    """Weights [steps] of the query losses after each inner step; they sum to 1.

    They start equal; a step but the last falls to 0.03 / steps as `progress` (epochs done over
    epochs of annealing) goes from 0 to 1, and to 0 from there on, as in the authors' code.

    Examples:
      >>> multi_step_weights(4, 0.5).tolist()
      [0.125, 0.125, 0.125, 0.625]
    """
    is_last = jnp.arange(steps) == steps - 1
    early = jnp.maximum(1 - progress, _FLOOR) / steps
    late = jnp.minimum((1 + progress * (steps - 1)) / steps, 1 - (steps - 1) * _FLOOR / steps)
    return jnp.where(progress >= 1, is_last * 1.0, jnp.where(is_last, late, early))


def _is_batch_norm(path: tuple, leaf: jax.Array) -> bool:
    return not all_but_batch_norm(path, leaf)


def maml_plus_plus(
    network: Network,
    *,
    inner_lr: float = 0.5,
    steps: int = 5,
    eval_steps: int | None = None,
    multi_step_steps: int = 0,
    first_order_steps: int = 0,
    per_step_batch_norm: bool = True,
    adjoint: Adjoint = UNROLLED,
    mask: Mask | None = all_but_batch_norm,
    criterion: Criterion = cross_entropy,
    reduction: str = "mean",
) -> MetaLearner:
    """MAML with learned rates per leaf and step, batch norm per step and a multi-step loss.

    The meta-loss is sum_t w_t L_B(theta_t) over the query losses after every inner step, its
    weights annealed to the last step's (section 4). Outer steps are counted in the state.

    Args:
      network: the body; a linear head with one output for each column of `y` follows it.
      inner_lr: what all inner learning rates start from.
      steps: inner steps in training; each has its own rates and batch norm.
      eval_steps: inner steps in tests; by default `steps`, beyond them the last one's are used.
      multi_step_steps: outer steps over which the multi-step loss is annealed; 0 for none.
      first_order_steps: outer steps before second derivatives come in; 0 for second order always.
      per_step_batch_norm: whether each inner step has its own batch-norm parameters and statistics.
      adjoint: how the outer gradient comes back, once it is of second order.
      mask: which leaves are adapted; by default all but batch norm's.
      criterion: `cross_entropy`, or `squared_error` for regression.
      reduction: of the inner loss: 'mean', 'sum' or 'class_sum'.

    Returns:
      The learner; parameters {'learner', 'rule'}, state {'network', 'outer_step'}. The cosine
      learning rate of the paper is the outer optimizer's affair.

    Raises:
      ValueError: for a number of steps below zero (below one in training), an unknown reduction,
        or first-order steps before an adjoint that is not `UNROLLED`.
    """
    eval_steps = steps if eval_steps is None else eval_steps
    check_steps(steps, eval_steps)
    if steps < 1:
        raise ValueError("maml_plus_plus has rates for every inner step: give at least one step")
    if first_order_steps and adjoint is not UNROLLED:
        raise ValueError("first-order steps are annealed to the unrolled adjoint: choose that one")
    inner_criterion = reduced(criterion, reduction)
    rule = per_step_sgd(inner_lr, steps)

    def stack(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda p: jnp.broadcast_to(p, (steps, *p.shape)), tree)

    def at(tree: PyTree, step: jax.Array) -> PyTree:
        return jax.tree.map(lambda p: p[jnp.minimum(step, steps - 1)], tree)

    def at_step(learner: PyTree, state: PyTree, step: jax.Array) -> tuple[PyTree, PyTree]:
        if not per_step_batch_norm:
            return learner, state
        learner = jax.tree_util.tree_map_with_path(
            lambda path, p: at(p, step) if _is_batch_norm(path, p) else p, learner
        )
        return learner, at(state, step)

    def put(state: PyTree, new: PyTree, step: jax.Array) -> PyTree:
        if not per_step_batch_norm:
            return new
        step = jnp.minimum(step, steps - 1)
        return jax.tree.map(lambda s, n: s.at[step].set(n), state, new)

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        learner, state = init_learner(network, key, episode)
        if per_step_batch_norm:
            learner = jax.tree_util.tree_map_with_path(
                lambda path, p: stack(p) if _is_batch_norm(path, p) else p, learner
            )
            state = stack(state)
        adapted = learner if mask is None else partition(learner, mask)[0]
        params = {"learner": learner, "rule": rule.init_meta(key, adapted)}
        # A real number, for states are averaged over tasks.
        count = jnp.zeros((), jax.tree.leaves(learner)[0].dtype)
        return params, {"network": state, "outer_step": count}

    def inner_loop(
        params: PyTree,
        state: PyTree,
        support: Batch,
        key: jax.Array,
        train: bool,
        **settings: object,
    ) -> Unrolled:
        shared = support_problem(network, inner_criterion, lambda step: support, key, train=train)

        def problem(learner: PyTree, state: PyTree, step: jax.Array) -> tuple[jax.Array, PyTree]:
            loss, new = shared(*at_step(learner, state, step), step)
            return loss, put(state, new, step)

        return unroll(
            problem, rule, params["rule"], params["learner"], state, mask=mask, **settings
        )

    def settle(
        learner: PyTree, state: PyTree, support: Batch, key: jax.Array, step: jax.Array, train: bool
    ) -> GradientAdapted:
        """What answers queries after a step: where it uses the support's statistics, fresh ones."""
        learner, state = at_step(learner, state, step)
        if network.batch_norm == "support":
            _, state = network.apply_to_support(
                learner["network"], state, support.x, key=key, train=train
            )
        return GradientAdapted(learner, state)

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> GradientAdapted:
        count = steps if train else eval_steps
        end = inner_loop(
            params, state["network"], support, key, train, steps=count, adjoint=adjoint
        )
        last = jnp.asarray(max(0, count - 1))
        adapted = settle(end.params, end.state, support, key, last, train)
        stats = put(end.state, adapted.state, last)
        return adapted._replace(state={**state, "network": stats, "used": adapted.state})

    def predict(
        params: PyTree, adapted: GradientAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params
        learner, state = adapted
        state = dict(state)
        z, _ = network.apply_to_queries(
            learner["network"], state.pop("used"), x, key=key, train=train
        )
        return linear(learner["head"], z), state

    def loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        support, query = episode
        adapt_key, predict_key = jax.random.split(key)
        now = state["outer_step"]
        progress = now / multi_step_steps if multi_step_steps else jnp.ones_like(now)
        weights = multi_step_weights(steps, progress)

        def query_loss(learner: PyTree, stats: PyTree, step: jax.Array) -> tuple:
            learner, stats = settle(learner, stats, support, adapt_key, step, True)
            z, _ = network.apply_to_queries(
                learner["network"], stats, query.x, key=predict_key, train=True
            )
            return criterion(linear(learner["head"], z), query.y)

        def observe(learner: PyTree, stats: PyTree, step: jax.Array) -> tuple:
            # A step without weight is not worth its forward and backward pass.
            arguments = learner, stats, step
            none = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(query_loss, *arguments)
            )
            return jax.lax.cond(weights[step] > 0, query_loss, lambda *_: none, *arguments)

        end = inner_loop(
            params,
            state["network"],
            support,
            adapt_key,
            True,
            steps=steps,
            adjoint=annealed(now < first_order_steps) if first_order_steps else adjoint,
            observe=observe,
        )
        losses, metrics = end.observed
        last = {name: values[-1] for name, values in metrics.items()}
        return weights @ losses, Aux({"network": end.state, "outer_step": now + 1}, last)

    return MetaLearner(init, adapt, predict, loss)
