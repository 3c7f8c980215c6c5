"""A learned optimizer as a meta-learner: its rule is what is learned, a training run the task."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import (
    Array,
    Batch,
    Episode,
    LossAux,
    MetaLearner,
    Metrics,
    Network,
    Objective,
    PyTree,
    Tasks,
)
from meta_jax.host import naming_dials
from meta_jax.lookup import UsageError
from meta_jax.networks.normalisation import embed_queries, embed_support
from meta_jax.objectives import as_objective, cross_entropy
from meta_jax.optimization_based.adjoints import Adjoint, as_adjoint
from meta_jax.optimization_based.inner_loop import Problem, run_inner_loop
from meta_jax.optimization_based.learned_optimizers.estimators import Estimator, Run
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily, draw_minibatch
from meta_jax.optimization_based.update_rules import UpdateRule


class Training(NamedTuple):
    """A network in the middle of its training."""

    params: PyTree
    state: PyTree  # the network's state
    rule_state: PyTree
    batch: Batch  # the training set


class Trained(NamedTuple):
    """What `adapt` of a learned optimizer gives."""

    training: Training
    state: PyTree  # the learner's own, which `adapt` does not touch


def training_run(
    family: ProblemFamily,
    rule: UpdateRule,
    *,
    objective: Objective | str = cross_entropy,
    adjoint: Adjoint | str = "first_order",
) -> Run:
    """Builds the training of one network by a rule, as a `Run` whose tasks are episodes.

    Args:
      family: Family of the network.
      rule: Update rule that trains it.
      objective: Objective that the training minimises, that of the tasks.
      adjoint: Adjoint of the training: 'first_order' takes gradients for constants, as
        Andrychowicz et al. (2016, section 2.1) do; 'unrolled' differentiates them too.

    Returns:
      The run. Losses are those after each step: at the minibatch of the next one.

    Raises:
      UsageError: an unknown adjoint, or the implicit one.
    """
    objective, adjoint = as_objective(objective), as_adjoint(adjoint)
    if adjoint.is_implicit:
        raise UsageError("a learned rule reaches no minimum: the implicit adjoint is imaml's")

    def init(meta: PyTree, task: Episode, key: Array) -> Training:
        return init_training(family, rule, meta, task.support, key)

    def advance(meta: PyTree, training: Training, key: Array, steps: int) -> tuple[Training, Array]:
        batch = training.batch
        problem = training_problem(
            family.network(batch), objective, batch, key, minibatch=family.minibatch
        )
        params, state, rule_state, losses, _ = run_inner_loop(
            problem,
            rule,
            meta,
            training.params,
            training.state,
            steps=steps,
            adjoint=adjoint,
            rule_state=training.rule_state,
        )
        last, _ = problem(params, state, jnp.asarray(steps))
        losses = jnp.concatenate([losses[1:], last[None]])
        return Training(params, state, rule_state, batch), losses

    return Run(init, advance)


def init_training(
    family: ProblemFamily, rule: UpdateRule, meta: PyTree, batch: Batch, key: Array
) -> Training:
    """Begins the training of a network, which computes in the precision of its inputs.

    Args:
      family: Family of the network.
      rule: Update rule that trains it.
      meta: Meta-parameters of the rule.
      batch: Training set.
      key: Random key of the network's initial parameters.
    """
    params, state = family.network(batch).init(key, batch.x)
    params, state = _in_precision_of(batch.x, (params, state))
    return Training(params, state, rule.init(meta, params), batch)


def training_problem(
    network: Network, objective: Objective, batch: Batch, key: Array, *, minibatch: int | None
) -> Problem:
    """Builds the problem (params, state, step) -> (loss, new state) of training a network.

    Args:
      network: Network with its output layer.
      objective: Objective that is minimised.
      batch: Training set.
      key: Random key, from which each step derives its own.
      minibatch: Number of examples drawn for a step; None for all of them.
    """

    def problem(params: PyTree, state: PyTree, step: Array) -> tuple[Array, PyTree]:
        draw_key, network_key = jax.random.split(jax.random.fold_in(key, step))
        seen = batch if minibatch is None else draw_minibatch(draw_key, batch, minibatch)
        outputs, state = embed_support(network, params, state, seen, key=network_key, train=True)
        return objective.loss(outputs, seen.y, seen.mask)[0], state

    return problem


def learned_optimizer(
    family: ProblemFamily,
    rule: UpdateRule,
    estimator: Estimator,
    *,
    objective: Objective | str = cross_entropy,
    test_steps: int | None = None,
    adjoint: Adjoint | str = "first_order",
) -> MetaLearner:
    """Builds a learner that trains a rule to train the networks of a family fast.

    `loss` is the estimator's, whose gradient estimates that of the mean loss over a training run;
    `adapt` trains one network from fresh initial parameters on a support set (which is training, at
    meta-training and at test alike: its `train` switches nothing), and `predict` asks it. What the
    estimator carries from one outer step to the next is each task's own, hence the state's scope.

    Args:
      family: Family of the networks that are trained.
      rule: Update rule that is learned.
      estimator: Estimator of the outer gradient, for example `truncated_gradient(100, 20)`.
      objective: Objective of the tasks, which the training minimises.
      test_steps: Steps of a training in `adapt` and `evaluate`; the estimator's horizon if None.
      adjoint: Adjoint of the training: see `training_run`.

    Returns:
      The learner; its parameters are the rule's meta-parameters. `evaluate` gives `loss`, the mean
      over a training run, and `last_loss`, after its last step, which `last_loss_objective` selects
      by.

    Raises:
      UsageError: there is no test step, an unknown adjoint, or the implicit one.
    """
    objective = as_objective(objective)
    run = training_run(family, rule, objective=objective, adjoint=adjoint)
    steps = estimator.horizon if test_steps is None else test_steps
    if steps < 1:
        raise UsageError(f"test_steps {steps} must be at least 1")

    def init(key: Array, task: Episode) -> tuple[PyTree, PyTree]:
        network_key, meta_key, run_key = jax.random.split(key, 3)
        params, _ = family.network(task.support).init(network_key, task.support.x)
        meta = rule.init_meta(meta_key, params)
        return meta, estimator.init(run, meta, task, run_key)

    def adapt(params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool) -> Trained:
        del train
        return Trained(train_network(run, params, Episode(support, support), key, steps)[0], state)

    def predict(
        params: PyTree,
        adapted: Trained,
        x: PyTree,
        key: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        del params
        return ask_network(family, adapted.training, x, key, train=train, mask=mask), adapted.state

    def loss(params: PyTree, state: PyTree, task: Episode, key: Array) -> tuple[Array, LossAux]:
        return estimator.loss(run, params, state, task, key)

    def evaluate(params: PyTree, state: PyTree, task: Episode, key: Array) -> Metrics:
        del state
        _, losses = train_network(run, params, task, key, steps)
        return {"loss": losses.mean(), "last_loss": losses[-1]}

    return MetaLearner(init, adapt, predict, loss, evaluate, state_scope="task")


def train_network(
    run: Run, meta: PyTree, task: Episode, key: Array, steps: int
) -> tuple[PyTree, Array]:
    """Trains one network from fresh initial parameters.

    Args:
      run: Training, of `training_run`.
      meta: Meta-parameters of its rule.
      task: Task whose support set is the training set.
      key: Random key.
      steps: Number of steps.

    Returns:
      Where the training ended, and the losses [steps] after each step.
    """
    init_key, run_key = jax.random.split(key)
    return run.advance(meta, run.init(meta, task, init_key), run_key, steps)


def ask_network(
    family: ProblemFamily,
    training: Training,
    x: PyTree,
    key: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> Array:
    """Asks a network that was trained.

    Args:
      family: Family of the network.
      training: Where its training ended.
      x: Inputs, leaves [m, ...].
      key: Random key for dropout and the like.
      train: Whether these are on.
      mask: Bool [m], False for padding.

    Returns:
      Outputs [m, D].
    """
    params, state, _, batch = training
    y, _ = embed_queries(
        family.network(batch), params, state, x, support=batch, key=key, train=train, mask=mask
    )
    return y


def last_loss_objective(objective: Objective) -> Objective:
    """Builds the objective that selects a rule: the loss after a training's last step.

    Args:
      objective: Objective of the tasks, which the training minimises.
    """
    return objective._replace(metric="last_loss", maximise=False, unit="")


def make_training_curves(
    family: ProblemFamily,
    rule: UpdateRule,
    tasks: Tasks,
    *,
    steps: int,
    num_tasks: int,
    task_chunk: int = 32,
) -> Callable[[PyTree, Array], Array]:
    """Builds a function that gives the losses of many training runs by a rule.

    Args:
      family: Family of the networks that are trained.
      rule: Update rule that trains them.
      tasks: Tasks that are drawn, and their objective.
      steps: Number of steps of a run.
      num_tasks: Number of runs.
      task_chunk: Number of runs at a time.

    Returns:
      A compiled function (meta, key) -> losses [num_tasks, steps], after each step. Equal keys give
      equal tasks, initial parameters and minibatches, whatever the rule.

    Raises:
      UsageError: a number is less than 1.
    """
    if min(steps, num_tasks, task_chunk) < 1:
        raise UsageError(
            f"steps {steps}, num_tasks {num_tasks} and task_chunk {task_chunk} must be at least 1"
        )
    run = training_run(family, rule, objective=tasks.objective)

    @jax.jit
    def curves(meta: PyTree, data: PyTree, key: Array) -> Array:
        one = functools.partial(_one_curve, run, tasks, steps, meta, data)
        return jax.lax.map(
            one, jax.random.split(key, num_tasks), batch_size=min(task_chunk, num_tasks)
        )

    def measure(meta: PyTree, key: Array) -> Array:
        with naming_dials("training the problems", "lower --eval_chunk or --test_tasks"):
            # The data is an argument, so that it is not compiled in.
            return jax.block_until_ready(curves(meta, tasks.data, key))

    return measure


def _one_curve(run: Run, tasks: Tasks, steps: int, meta: PyTree, data: PyTree, key: Array) -> Array:
    task_key, init_key, run_key = jax.random.split(key, 3)
    training = run.init(meta, tasks.sample(task_key, data), init_key)
    return run.advance(meta, training, run_key, steps)[1]


def _in_precision_of(x: PyTree, tree: PyTree) -> PyTree:
    """A tree whose real leaves have the dtype of x's real leaves, where it has such."""
    real = [leaf.dtype for leaf in jax.tree.leaves(x) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not real:
        return tree
    dtype = jnp.result_type(*real)
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )
