"""MAML for reinforcement learning: a policy that a few policy gradients adapt to a task."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_jax import registry
from meta_jax.core import (
    Array,
    LossAux,
    MetaLearner,
    Metrics,
    Network,
    Objective,
    PyTree,
    Sample,
    with_loss,
)
from meta_jax.inner_loop import Adjoint, UpdateRule, as_adjoint, from_optax, learned_sgd
from meta_jax.lookup import UsageError
from meta_jax.objectives import check_kind, trial_return
from meta_jax.ranges import NotNegativeInt, Positive, PositiveInt, Share
from meta_jax.reinforcement.advantages import standardised
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.policies import log_probability, sample_action
from meta_jax.reinforcement.policy_adaptation import (
    Adaptation,
    Part,
    Surrogate,
    advantages,
    init_policy,
    inner_loop,
    log_probabilities,
    policy_outputs,
    sample_trajectories,
    surrogate_loss,
)
from meta_jax.reinforcement.ppo import gradient_step
from meta_jax.reinforcement.rollout import Percept, Trajectory
from meta_jax.reinforcement.trial_policy import actions_of, check_problem


class _Size(NamedTuple):
    """Number of inner steps, and of the trajectories of each."""

    steps: int
    trajectories: int


@registry.learner("maml_rl", network="mlp", tasks="navigation", run={"task_batch": 20})
def maml_rl(
    network: Network,
    *,
    objective: Objective = trial_return,
    inner_lr: Positive = 0.1,
    later_lr: Positive | None = None,
    inner_rule: Literal["sgd", "learned_sgd"] = "sgd",
    adapted: Part = "all",
    steps: NotNegativeInt = 1,
    eval_steps: NotNegativeInt = 3,
    trajectories: PositiveInt = 20,
    eval_trajectories: PositiveInt = 20,
    adjoint: Adjoint | str = "unrolled",
    discount: Share = 0.99,
    gae_lambda: Share = 1.0,
    surrogate: Surrogate = "dice",
    initial_scale: Positive = 1.0,
    outer: Literal["gradient", "ppo"] = "gradient",
    epochs: PositiveInt = 5,
    clip: Positive = 0.2,
) -> MetaLearner:
    """Builds a MAML learner of policies (Finn, Abbeel and Levine 2017, section 5.3).

    theta' = theta - alpha grad L(theta), L the negative return of trajectories that theta samples
    itself, anew at every inner step; the outer loss is that of trajectories of theta'. The inner
    loss is a DiCE surrogate, since the derivative of a plain one forgets that theta chooses what is
    sampled. Advantages are the returns less a linear baseline, fitted to each batch.

    The paper trains Gaussian policies with two layers of 100 units by TRPO, with 20 trajectories an
    inner step and rate 0.1.

    Args:
      network: Body of the policy; a linear head follows it. It sees the observation alone.
      objective: Objective of the tasks; they are of reinforcement learning.
      inner_lr: Learning rate of the inner loop; with learned_sgd the largest initial one.
      later_lr: Learning rate of the inner steps after the first; None for `inner_lr`.
      inner_rule: 'sgd', or 'learned_sgd' for a learned rate of each parameter (Meta-SGD).
      adapted: What the inner loop changes: 'all', the 'head' alone (ANIL), or the 'body' alone.
      steps: Inner steps in training.
      eval_steps: Inner steps in tests.
      trajectories: Trajectories that an inner step, and the outer loss, sample.
      eval_trajectories: The same in tests.
      adjoint: How the outer gradient comes back through the inner loop: unrolled for second order,
        checkpointed, truncated:K or first_order.
      discount: Discount of the return.
      gae_lambda: Lambda of the generalised advantage estimates; with 1, returns less the baseline.
      surrogate: Loss whose gradient is the policy gradient: 'dice', with unbiased second
        derivatives, or 'lvc', whose second derivatives are biased and vary less.
      initial_scale: Standard deviation of the actions of a Gaussian policy before training.
      outer: Outer update: 'gradient' makes one with the trajectories of a step, 'ppo' several, as
        proximal meta-policy search does (Rothfuss et al. 2019, algorithm 1, without its KL term).
      epochs: Updates that 'ppo' makes in an outer step.
      clip: Change of an action's probability ratio beyond which 'ppo' gives no more reward.

    Returns:
      The learner. Its tasks are `Problem`s. `adapt` gives the policy after the inner loop;
      `predict`, from it and a `Percept`, an action with its log probability, and the same policy.
      The metrics are 'return', the mean return after all inner steps, and 'return_after_K' for each
      number of inner steps.

    Raises:
      UsageError: tasks of another kind, a network with normalisation, or numbers that do not fit.
    """
    check_kind(objective, "control", "maml_rl")
    if network.normalisation != "none":
        raise UsageError("maml_rl needs a network without normalisation, such as mlp")
    parts = Adaptation(
        network,
        _rule(inner_rule, inner_lr, inner_lr if later_lr is None else later_lr),
        as_adjoint(adjoint),
        adapted,
        discount,
        gae_lambda,
        surrogate,
        initial_scale,
    )
    training, testing = _Size(steps, trajectories), _Size(eval_steps, eval_trajectories)
    is_ppo = outer == "ppo"
    return MetaLearner(
        functools.partial(_init, parts),
        functools.partial(_adapt, parts, training, testing),
        functools.partial(_predict, parts),
        functools.partial(_loss, parts, training),
        functools.partial(_evaluate, parts, testing),
        update=functools.partial(_update, parts, training, epochs, clip) if is_ppo else None,
        updates_per_step=epochs if is_ppo else 1,
    )


def _rule(name: str, inner_lr: float, later_lr: float) -> UpdateRule:
    if name == "learned_sgd":
        return learned_sgd(inner_lr / 20, inner_lr)
    return from_optax(optax.sgd(lambda step: jnp.where(step == 0, inner_lr, later_lr)))


def _init(parts: Adaptation, key: Array, task: PyTree) -> tuple[PyTree, PyTree]:
    return init_policy(parts, key, check_problem(task, "maml_rl"))


def _sample_at(
    parts: Adaptation,
    state: PyTree,
    problem: Problem,
    key: Array,
    count: int,
    policy: PyTree,
    step: Array,
) -> Trajectory:
    """Trajectories that a policy samples for an inner step."""
    key = jax.random.fold_in(key, step)
    return sample_trajectories(parts.network, state, policy, problem, key, count)


def _adapt(
    parts: Adaptation,
    training: _Size,
    testing: _Size,
    params: PyTree,
    state: PyTree,
    task: PyTree,
    key: Array,
    *,
    train: bool,
) -> PyTree:
    """The policy after the inner loop, which acts in the task itself."""
    problem, size = check_problem(task, "maml_rl"), training if train else testing
    draw = functools.partial(_sample_at, parts, state, problem, key, size.trajectories)
    policy, _ = inner_loop(parts, params, state, problem, draw, size.steps)
    return policy, state


def _predict(
    parts: Adaptation,
    params: PyTree,
    adapted: tuple[PyTree, PyTree],
    percept: Percept,
    key: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> tuple[tuple[Array, Array], tuple[PyTree, PyTree]]:
    """An action with its log probability, and the adapted policy as it was."""
    del params, train, mask
    policy, state = adapted
    outputs = policy_outputs(parts.network, state, policy, percept.observation[None])[0]
    actions = actions_of(percept, outputs.shape[0])
    action = sample_action(key, outputs, actions)
    return (action, log_probability(outputs, action, actions)), adapted


class _Sampled(NamedTuple):
    """A policy that adapted, and what was sampled on the way."""

    policy: PyTree
    inner: Trajectory  # [inner steps, count, steps]
    outer: Trajectory  # of the adapted policy, [count, steps]

    def returns(self) -> list[Array]:
        """Mean returns before each inner step, and after the last."""
        before = self.inner.reward.sum(-1).mean(-1)
        return [*before, self.outer.reward.sum(-1).mean()]


def _adapt_and_act(
    parts: Adaptation, size: _Size, params: PyTree, state: PyTree, problem: Problem, key: Array
) -> _Sampled:
    inner_key, outer_key = jax.random.split(key)
    draw = functools.partial(_sample_at, parts, state, problem, inner_key, size.trajectories)
    policy, ended = inner_loop(parts, params, state, problem, draw, size.steps)
    found = sample_trajectories(parts.network, state, policy, problem, outer_key, size.trajectories)
    return _Sampled(policy, ended.observed, found)


def _loss(
    parts: Adaptation, size: _Size, params: PyTree, state: PyTree, task: PyTree, key: Array
) -> tuple[Array, LossAux]:
    problem = check_problem(task, "maml_rl")
    sampled = _adapt_and_act(parts, size, params, state, problem, key)
    advantage = advantages(parts, problem, sampled.outer)
    surrogate = surrogate_loss(parts, problem, state, sampled.policy, sampled.outer, advantage)
    returns = sampled.returns()
    # The surrogate is 0 whatever the policy; what is minimised is the negative return.
    value = surrogate - jax.lax.stop_gradient(surrogate) - returns[-1]
    return value, LossAux(state, _metrics(size, returns))


def _metrics(size: _Size, returns: list[Array]) -> Metrics:
    return {"return": returns[-1], **({"return_before": returns[0]} if size.steps else {})}


def _evaluate(
    parts: Adaptation, size: _Size, params: PyTree, state: PyTree, task: PyTree, key: Array
) -> Metrics:
    problem = check_problem(task, "maml_rl")
    returns = _adapt_and_act(parts, size, params, state, problem, key).returns()
    by_step = {f"return_after_{i}": value for i, value in enumerate(returns)}
    return with_loss(-returns[-1], {"return": returns[-1], **by_step})


def _update(
    parts: Adaptation,
    size: _Size,
    epochs: int,
    clip: float,
    optimizer: optax.GradientTransformationExtraArgs,
    sample: Sample,
    params: PyTree,
    state: PyTree,
    opt_state: PyTree,
    data: PyTree,
    keys: Array,
    *,
    mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree, PyTree, Metrics]:
    """Adapts to all tasks once, then makes several updates on what was sampled."""
    if mesh is not None:
        keys = jax.lax.with_sharding_constraint(keys, NamedSharding(mesh, PartitionSpec("task")))
    task_keys, act_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    problems = jax.vmap(sample, (0, None))(task_keys, data)
    act = functools.partial(_adapt_and_act, parts, size, params, state)
    sampled = jax.vmap(act)(problems, act_keys)
    found = jax.vmap(functools.partial(advantages, parts))(problems, sampled.outer)
    # Over all tasks, so that each one's return counts alike.
    advantage = standardised(found, sampled.outer.mask)
    replay = functools.partial(_replayed_loss, parts, size, clip, state)

    def loss(params: PyTree) -> Array:
        return jax.vmap(replay, (None, 0, 0, 0))(params, problems, sampled, advantage).mean()

    def update(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], Metrics]:
        value, gradient = jax.value_and_grad(loss)(carry[0])
        carry, norm = gradient_step(optimizer, carry, value, gradient)
        return carry, {"loss": value, "gradient_norm": norm}

    (params, opt_state), metrics = jax.lax.scan(update, (params, opt_state), length=epochs)
    returns = jax.tree.map(jnp.mean, jax.vmap(_Sampled.returns)(sampled))
    metrics = jax.tree.map(jnp.mean, metrics) | _metrics(size, returns)
    return params, state, opt_state, metrics


def _replayed_loss(
    parts: Adaptation,
    size: _Size,
    clip: float,
    state: PyTree,
    params: PyTree,
    problem: Problem,
    sampled: _Sampled,
    advantage: Array,
) -> Array:
    """The clipped surrogate after an inner loop on trajectories that were sampled before."""
    draw = functools.partial(_stored, sampled.inner)
    policy, _ = inner_loop(parts, params, state, problem, draw, size.steps)
    log_p = log_probabilities(parts, problem, state, policy, sampled.outer)
    ratio = jnp.exp(log_p - sampled.outer.extras)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    mask = sampled.outer.mask
    return -jnp.where(mask, gain, 0).sum() / mask.sum()


def _stored(inner: Trajectory, policy: PyTree, step: Array) -> Trajectory:
    """The trajectories of an inner step, whoever sampled them."""
    del policy
    return jax.tree.map(lambda leaf: leaf[step], inner)
