"""A learned optimizer as a meta-learner: its rule is what is learned, a training run the task."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Batch, Episode, MetaLearner, PyTree
from meta_jax.optimization_based.adjoints import FIRST_ORDER, Adjoint
from meta_jax.optimization_based.inner_loop import unroll
from meta_jax.optimization_based.learned_optimizers.estimators import Estimator, Run
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily
from meta_jax.optimization_based.update_rules import UpdateRule


class Training(NamedTuple):
    """A network in the middle of its training."""

    params: PyTree
    state: PyTree  # the network's
    rule_state: PyTree
    batch: Batch  # the training set


class Trained(NamedTuple):
    """What `adapt` of a learned optimizer gives."""

    training: Training
    state: PyTree  # the learner's own, which `adapt` does not touch


def training_run(family: ProblemFamily, rule: UpdateRule, *, adjoint: Adjoint = FIRST_ORDER) -> Run:
    """The training of one network by a rule, as a `Run`: a task is an `Episode`.

    Args:
      family: what is trained.
      rule: the optimizer.
      adjoint: `FIRST_ORDER` takes gradients for constants, as Andrychowicz et al. (2016, section
        2.1) do; `UNROLLED` differentiates them too.

    Returns:
      The run. Losses are those after each step: at the minibatch of the next one.
    """
    network, criterion, minibatch = family

    def begin(meta: PyTree, task: Episode, key: jax.Array) -> Training:
        params, state = network.init(key, task.support.x)
        return Training(params, state, rule.init(meta, params), task.support)

    def go_on(
        meta: PyTree, training: Training, key: jax.Array, steps: int
    ) -> tuple[Training, jax.Array]:
        batch = training.batch

        def problem(params: PyTree, state: PyTree, step: jax.Array) -> tuple[jax.Array, PyTree]:
            x, y = batch
            draw_key, network_key = jax.random.split(jax.random.fold_in(key, step))
            if minibatch is not None:
                chosen = jax.random.randint(draw_key, (minibatch,), 0, y.shape[0])
                x, y = x[chosen], y[chosen]
            outputs, state = network.apply(params, state, x, key=network_key, train=True)
            return criterion(outputs, y)[0], state

        params, state, rule_state, losses, _ = unroll(
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

    return Run(begin, go_on)


def learned_optimizer(
    family: ProblemFamily,
    rule: UpdateRule,
    estimator: Estimator,
    *,
    test_steps: int = 100,
    adjoint: Adjoint = FIRST_ORDER,
) -> MetaLearner:
    """Trains a rule so that it trains the networks of a family fast.

    `loss` is the estimator's, whose gradient estimates that of the mean loss over a training run;
    `adapt` trains one network from fresh initial parameters on a support set, and `predict` asks
    it. What the estimator carries from one outer step to the next is each task's own, hence the
    state's scope.

    Args:
      family: what is trained; a sampler draws its tasks.
      rule: the optimizer that is learned.
      estimator: for example `truncated_gradient(100, 20)`.
      test_steps: steps of a training in `adapt`.
      adjoint: see `training_run`.

    Returns:
      The learner; its parameters are the rule's meta-parameters.
    """
    run = training_run(family, rule, adjoint=adjoint)

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        network_key, meta_key, run_key = jax.random.split(key, 3)
        params, _ = family.network.init(network_key, episode.support.x)
        meta = rule.init_meta(meta_key, params)
        return meta, estimator.init(run, meta, episode, run_key)

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> Trained:
        del train
        begin_key, run_key = jax.random.split(key)
        training = run.begin(params, Episode(support, support), begin_key)
        return Trained(run.go_on(params, training, run_key, test_steps)[0], state)

    def predict(
        params: PyTree, adapted: Trained, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params
        network = adapted.training
        y, _ = family.network.apply(network.params, network.state, x, key=key, train=train)
        return y, adapted.state

    loss = functools.partial(estimator.loss, run)
    return MetaLearner(init, adapt, predict, loss, state_scope="task")


def make_training_curves(
    family: ProblemFamily,
    rule: UpdateRule,
    sampler: Callable[[jax.Array, PyTree], Episode],
    *,
    steps: int,
    tasks: int,
    task_chunk: int = 32,
) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
    """How a rule trains: the losses of many training runs.

    Args:
      family: what is trained.
      rule: the optimizer.
      sampler: draws one task.
      steps: of a run.
      tasks: runs.
      task_chunk: runs at a time.

    Returns:
      A jitted function (meta, data, key) -> losses [tasks, steps], after each step. Equal keys give
      equal tasks, initial parameters and minibatches, whatever the rule.
    """
    run = training_run(family, rule)

    def curves(meta: PyTree, data: PyTree, key: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            task_key, begin_key, run_key = jax.random.split(key, 3)
            training = run.begin(meta, sampler(task_key, data), begin_key)
            return run.go_on(meta, training, run_key, steps)[1]

        keys = jax.random.split(key, tasks)
        return jax.lax.map(one, keys, batch_size=min(task_chunk, tasks))

    return jax.jit(curves)
