"""Reptile (Nichol, Achiam and Schulman 2018, arXiv:1803.02999)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

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
from meta_jax.optimization_based.adjoints import FIRST_ORDER
from meta_jax.optimization_based.inner_loop import Unrolled, unroll
from meta_jax.optimization_based.learner import check_steps, init_learner, support_problem
from meta_jax.optimization_based.update_rules import from_optax


class ReptileAdapted(NamedTuple):
    """A learner after its inner loop."""

    params: PyTree  # the adapted parameters {'network', 'head'}
    state: PyTree
    support_x: jax.Array  # [n, ...], which a query is normalised with in the mode 'support'


def minibatches(key: jax.Array, examples: int, batch_size: int, steps: int) -> jax.Array:
    """Rows [steps, batch_size] of mini-batches that cycle through a set, reshuffled each time.

    Args:
      key: of the shuffles.
      examples: size of the set.
      batch_size: rows of a mini-batch; one may reach into the next shuffle, as the authors' do.
      steps: how many mini-batches.
    """
    rounds = -(-steps * batch_size // examples)
    orders = jax.vmap(lambda k: jax.random.permutation(k, examples))(jax.random.split(key, rounds))
    return orders.reshape(-1)[: steps * batch_size].reshape(steps, batch_size)


def reptile(
    network: Network,
    *,
    inner_lr: float = 1e-3,
    inner_optimizer: optax.GradientTransformation | None = None,
    steps: int = 5,
    eval_steps: int = 50,
    batch_size: int | None = 10,
    eval_batch_size: int | None = 5,
    carry: bool = True,
    criterion: Criterion = cross_entropy,
) -> MetaLearner:
    """phi <- phi + epsilon mean_tasks(U(phi) - phi), U being some steps of training on the task.

    The loss is 1/2 ||phi - stop_gradient(U(phi))||^2, whose gradient is exactly phi - U(phi): with
    SGD of rate epsilon as the outer optimizer it is algorithm 1 with one task in the task batch,
    and its batched version with more. No gradient goes through the inner loop. A task is learned
    from its support set alone; training gives it more shots than tests (10 or 15).

    In the batch-norm mode 'batch' the queries are normalised together (the paper's "transductive"
    rows). In the mode 'support' each query is normalised alone with the whole support set (its
    other rows).

    Args:
      network: the body; a linear head with one output for each column of `y` follows it. All of
        both is adapted, batch norm included.
      inner_lr: learning rate of the authors' inner optimizer, Adam with beta_1 = 0.
      inner_optimizer: any optax transformation, in its place.
      steps: inner steps in training.
      eval_steps: inner steps in tests.
      batch_size: examples of an inner mini-batch in training; None for the whole support set.
      eval_batch_size: the same in tests.
      carry: whether the inner optimizer's state goes on from task to task, and into tests, as in
        the authors' code; it is averaged over the task batch.
      criterion: `cross_entropy`, or `squared_error` for regression.

    Returns:
      The learner; parameters {'network', 'head'}, state {'network', 'rule'}.

    Raises:
      ValueError: for a number of steps below zero or a mini-batch without an example.
    """
    check_steps(steps, eval_steps)
    if any(size is not None and size < 1 for size in (batch_size, eval_batch_size)):
        raise ValueError(
            f"inner mini-batches of {batch_size} and {eval_batch_size} examples: give at least one"
        )
    # `optax.adam(inner_lr, b1=0)` would carry a first moment that it never uses.
    adam = optax.rmsprop(inner_lr, 0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
    rule = from_optax(inner_optimizer or adam)

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        learner, state = init_learner(network, key, episode)
        return learner, {"network": state, "rule": store(learner, rule.init({}, learner))}

    def store(learner: PyTree, rule_state: PyTree) -> PyTree:
        # In real numbers, counts too, for states are averaged over tasks.
        dtype = jax.tree.leaves(learner)[0].dtype
        return jax.tree.map(lambda s: s.astype(dtype), rule_state) if carry else {}

    def load(learner: PyTree, stored: PyTree) -> PyTree:
        fresh = rule.init({}, learner)

        def typed(like: jax.Array, s: jax.Array) -> jax.Array:
            is_real = jnp.issubdtype(like.dtype, jnp.inexact)
            return (s if is_real else s.round()).astype(like.dtype)

        return jax.tree.map(typed, fresh, stored) if carry else fresh

    def inner_loop(
        learner: PyTree, state: PyTree, support: Batch, key: jax.Array, train: bool
    ) -> Unrolled:
        count, size = (steps, batch_size) if train else (eval_steps, eval_batch_size)
        rows_key, network_key = jax.random.split(key)
        examples = support.x.shape[0]
        # Also a step of a loop without steps is traced.
        rows = size and minibatches(rows_key, examples, size, max(count, 1))

        def batch(step: jax.Array) -> Batch:
            return support if rows is None else jax.tree.map(lambda a: a[rows[step]], support)

        return unroll(
            support_problem(network, criterion, batch, network_key, train=train),
            rule,
            {},
            learner,
            state["network"],
            steps=count,
            adjoint=FIRST_ORDER,
            rule_state=load(learner, state["rule"]),
        )

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> ReptileAdapted:
        end = inner_loop(params, state, support, key, train)
        state = {"network": end.state, "rule": store(params, end.rule_state)}
        return ReptileAdapted(end.params, state, support.x)

    def predict(
        params: PyTree, adapted: ReptileAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params
        body, head, state = adapted.params["network"], adapted.params["head"], adapted.state

        def with_support(query: jax.Array) -> jax.Array:
            together = jnp.concatenate([adapted.support_x, query[None]])
            return network.apply(body, state["network"], together, key=key, train=True)[0][-1]

        if network.batch_norm == "support":
            z, stats = jax.vmap(with_support)(x), state["network"]
        else:
            z, stats = network.apply(body, state["network"], x, key=key, train=train)
        return linear(head, z), {**state, "network": stats}

    def loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        adapt_key, predict_key = jax.random.split(key)
        start = jax.lax.stop_gradient(params)
        adapted = adapt(start, state, episode.support, adapt_key, train=True)
        outputs, state = predict(start, adapted, episode.query.x, predict_key, train=True)
        squares = jax.tree.map(lambda p, end: ((p - end) ** 2).sum(), params, adapted.params)
        metrics = criterion(outputs, episode.query.y)[1]
        return sum(jax.tree.leaves(squares)) / 2, Aux(state, metrics)

    return MetaLearner(init, adapt, predict, loss)
