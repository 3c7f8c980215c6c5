"""Reptile (Nichol, Achiam and Schulman 2018, arXiv:1803.02999)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from meta_jax import registry
from meta_jax.core import (
    Adapt,
    Array,
    Batch,
    Episode,
    Loss,
    LossAux,
    MetaLearner,
    Network,
    Objective,
    Predict,
    PyTree,
    check_episode,
    supervised_evaluate,
)
from meta_jax.objectives import check_batch, cross_entropy, tree_rows
from meta_jax.optimization_based.adjoints import FIRST_ORDER
from meta_jax.optimization_based.inner_loop import run_inner_loop
from meta_jax.optimization_based.learner import (
    GradientAdapted,
    answer,
    check_steps,
    init_learner,
    refreshed,
    support_beside_queries,
    support_problem,
)
from meta_jax.optimization_based.update_rules import from_optax
from meta_jax.ranges import NotNegativeInt, Positive, PositiveInt


def minibatches(key: Array, rows: int, batch_size: int, steps: int) -> Array:
    """Rows [steps, batch_size] of mini-batches that cycle through a set, reshuffled each time.

    Args:
      key: A random key.
      rows: Size of the set.
      batch_size: Rows of a mini-batch; one may reach into the next shuffle, as the authors' do.
      steps: Number of mini-batches.
    """
    rounds = -(-steps * batch_size // rows)
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, rounds))
    return orders.reshape(-1)[: steps * batch_size].reshape(steps, batch_size)


def masked_minibatches(key: Array, mask: Array, batch_size: int, steps: int) -> Array:
    """As `minibatches`, of the rows of a set that are not padding.

    Args:
      key: A random key.
      mask: Which rows are real, bool [n].
      batch_size: Rows of a mini-batch.
      steps: Number of mini-batches.

    Returns:
      Rows [steps, batch_size].
    """
    count = jnp.maximum(mask.sum(), 1)
    drawn = jnp.arange(steps * batch_size)

    def row(turn: Array, place: Array) -> Array:
        order = jax.random.uniform(jax.random.fold_in(key, turn), mask.shape)
        return jnp.argsort(jnp.where(mask, order, jnp.inf))[place]  # padding comes last

    return jax.vmap(row)(drawn // count, drawn % count).reshape(steps, batch_size)


def draw_minibatches(
    support: Batch, key: Array, batch_size: int | None, steps: int
) -> Callable[[Array], Batch]:
    """Builds the function from an inner step to the examples that it sees.

    Args:
      support: The support set.
      key: A random key.
      batch_size: Examples of a mini-batch; None for the whole support set.
      steps: Number of inner steps.
    """
    if batch_size is None:
        return lambda step: support
    steps = max(steps, 1)  # a step of a loop without steps is traced too
    if support.mask is None:
        rows = minibatches(key, tree_rows(support.x), batch_size, steps)
    else:
        rows = masked_minibatches(key, support.mask, batch_size, steps)
    return lambda step: jax.tree.map(lambda leaf: leaf[rows[step]], support)


def adam_without_momentum(learning_rate: float) -> optax.GradientTransformation:
    """The authors' inner optimizer, Adam with beta_1 = 0.

    `optax.adam(learning_rate, b1=0)` would carry a first moment that it never uses.

    Args:
      learning_rate: Learning rate.
    """
    return optax.rmsprop(learning_rate, 0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)


def interpolation_loss(adapt: Adapt, predict: Predict, objective: Objective) -> Loss:
    """Builds Reptile's loss 1/2 ||phi - stop_gradient(U(phi))||^2, of gradient phi - U(phi).

    Args:
      adapt: Reptile's adapt, whose parameters are U(phi).
      predict: Reptile's predict.
      objective: What the metrics on the queries are of.
    """

    def loss(params: PyTree, state: PyTree, task: Episode, key: Array, /) -> tuple[Array, LossAux]:
        adapt_key, predict_key = jax.random.split(key)
        support, (x, y, mask) = task
        check_episode(task)
        start = jax.lax.stop_gradient(params)
        adapted = adapt(start, state, support, adapt_key, train=True)
        outputs, state = predict(start, adapted, x, predict_key, train=True, mask=mask)
        way = jax.tree.map(lambda p, end: p - end, params, adapted.params)
        metrics = objective.loss(outputs, y, mask)[1]
        return optax.tree_utils.tree_norm(way, squared=True) / 2, LossAux(state, metrics)

    return loss


@registry.learner(
    "reptile",
    network="flat_strided_conv4",
    normalisation="batch",
    optimizer="sgd",
    run={"train_shots": 10, "train_queries": 5},
)
def reptile(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    inner_lr: Positive = 1e-3,
    inner_optimizer: optax.GradientTransformation | None = None,
    steps: NotNegativeInt = 5,
    eval_steps: NotNegativeInt = 50,
    batch_size: PositiveInt | None = 10,
    eval_batch_size: PositiveInt | None = 5,
    carry: bool = True,
) -> MetaLearner:
    """Builds a Reptile learner, which moves towards what training on a task makes of it.

    phi <- phi + epsilon mean_tasks(U(phi) - phi), U being some steps of training on the task. The
    loss is 1/2 ||phi - stop_gradient(U(phi))||^2, whose gradient is exactly phi - U(phi): with SGD
    of rate epsilon as the outer optimizer it is algorithm 1 with one task in the task batch, and
    its batched version with more. No gradient goes through the inner loop.

    Training needs more shots than tests: it learns from what mini-batches of a task have in common,
    and with one shot they are all alike; the binaries take 10. The paper on Omniglot with 5 ways:
    these defaults, 10 shots in training, 5 tasks, epsilon from 1 to 0 in 100,000 outer steps; with
    20 ways rate 5e-4, mini-batches of 20 and 10, steps 10 and 50. Its transductive rows are
    normalisation `batch`, the others `one_at_a_time`.

    With its flag alone, 1000 outer steps give 42.6 % on glyphs (untrained 30.3 %) and a squared
    error of 1.82 on sinusoids (untrained 4.17).

    Args:
      network: Body; a linear head with one output for each column of y follows it. All of both is
        adapted, normalisation included.
      objective: Loss of the inner loop; the tasks choose it.
      inner_lr: Learning rate of the authors' inner optimizer, Adam with beta_1 = 0.
      inner_optimizer: Optax transformation in its place.
      steps: Inner steps in training.
      eval_steps: Inner steps in tests.
      batch_size: Examples of an inner mini-batch in training; None for the whole support set.
      eval_batch_size: Examples of an inner mini-batch in tests; None for the whole support set.
      carry: Whether the inner optimizer's state goes on from task to task, and into tests, as in
        the authors' code; its real numbers are averaged over the task batch.

    Returns:
      The learner; parameters {'network', 'head'}, state {'network', 'rule'}.

    Raises:
      UsageError: a number of steps below zero or a mini-batch without an example.
    """
    check_steps(steps, eval_steps)
    rule = from_optax(inner_optimizer or adam_without_momentum(inner_lr))

    def init(key: Array, episode: Episode) -> tuple[PyTree, PyTree]:
        learner, state = init_learner(network, key, episode)
        return learner, {"network": state, "rule": rule.init({}, learner) if carry else {}}

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
    ) -> GradientAdapted:
        check_batch(support, "support")
        count, size = (steps, batch_size) if train else (eval_steps, eval_batch_size)
        rows_key, loop_key, end_key = jax.random.split(key, 3)
        batch = draw_minibatches(support, rows_key, size, count)
        end = run_inner_loop(
            support_problem(network, objective, batch, loop_key, train=train),
            rule,
            {},
            params,
            state["network"],
            steps=count,
            adjoint=FIRST_ORDER,
            rule_state=state["rule"] if carry else None,
        )
        # The moments are those of all support examples, not of the last mini-batch.
        body = end.params["network"]
        stats = refreshed(network, body, end.state, support, end_key, train=train)
        state = {"network": stats, "rule": end.rule_state if carry else {}}
        return GradientAdapted(end.params, state, support_beside_queries(network, support))

    def predict(
        params: PyTree,
        adapted: GradientAdapted,
        x: PyTree,
        key: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[Array, PyTree]:
        del params
        inner = adapted._replace(state=adapted.state["network"])
        outputs, stats = answer(network, inner, x, key, train=train, mask=mask)
        return outputs, {**adapted.state, "network": stats}

    loss = interpolation_loss(adapt, predict, objective)
    return MetaLearner(init, adapt, predict, loss, supervised_evaluate(adapt, predict, objective))
