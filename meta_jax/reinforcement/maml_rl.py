"""MAML for reinforcement learning: a policy that a few policy gradients adapt to a task."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_jax import registry
from meta_jax.core import (
    Array,
    LossAux,
    MetaLearner,
    Metrics,
    Network,
    Objective,
    PyTree,
    with_loss,
)
from meta_jax.inner_loop import (
    Adjoint,
    InnerLoopResult,
    UpdateRule,
    as_adjoint,
    from_optax,
    learned_sgd,
    run_inner_loop,
)
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.objectives import check_kind, trial_return
from meta_jax.reinforcement.advantages import generalised_advantages, standardised
from meta_jax.reinforcement.baselines import fit_baseline, linear_features, returns_to_go
from meta_jax.reinforcement.dice import dice_surrogate, lvc_surrogate
from meta_jax.reinforcement.environment import Actions, Discrete, Problem
from meta_jax.reinforcement.policies import log_probability, sample_action
from meta_jax.reinforcement.rollout import Agent, Percept, Trajectory, run_trial
from meta_jax.reinforcement.trial_policy import actions_of, check_problem

Part = Literal["all", "head", "body"]
Surrogate = Literal["dice", "lvc"]
_SURROGATES = {"dice": dice_surrogate, "lvc": lvc_surrogate}


class _Parts(NamedTuple):
    """What the functions of the learner share."""

    network: Network
    rule: UpdateRule
    adjoint: Adjoint
    adapted: Part
    steps: int
    eval_steps: int
    trajectories: int
    eval_trajectories: int
    discount: float
    gae_lambda: float
    surrogate: Surrogate
    initial_scale: float


@registry.learner("maml_rl", network="mlp", tasks="navigation", run={"task_batch": 20})
def maml_rl(
    network: Network,
    *,
    objective: Objective = trial_return,
    inner_lr: float = 0.1,
    later_lr: float | None = None,
    inner_rule: Literal["sgd", "learned_sgd"] = "sgd",
    adapted: Part = "all",
    steps: int = 1,
    eval_steps: int = 3,
    trajectories: int = 20,
    eval_trajectories: int = 20,
    adjoint: Adjoint | str = "unrolled",
    discount: float = 0.99,
    gae_lambda: float = 1.0,
    surrogate: Surrogate = "dice",
    initial_scale: float = 1.0,
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

    Returns:
      The learner. Its tasks are `Problem`s. `adapt` gives the policy after the inner loop;
      `predict`, from it and a `Percept`, an action with its log probability, and the same policy.
      The metrics are 'return', the mean return after all inner steps, and 'return_after_K' for each
      number of inner steps.

    Raises:
      UsageError: tasks of another kind, a network with normalisation, or numbers that do not fit.
    """
    check_kind(objective, "control", "maml_rl")
    check_at_least_one("maml_rl", trajectories=trajectories, eval_trajectories=eval_trajectories)
    if min(steps, eval_steps) < 0:
        raise UsageError(f"steps must be at least 0: steps={steps}, eval_steps={eval_steps}")
    if not initial_scale > 0:
        raise UsageError(f"initial_scale={initial_scale} must be above 0")
    if network.normalisation != "none":
        raise UsageError("maml_rl needs a network without normalisation, such as mlp")
    parts = _Parts(
        network,
        _rule(inner_rule, inner_lr, inner_lr if later_lr is None else later_lr),
        as_adjoint(adjoint),
        adapted,
        steps,
        eval_steps,
        trajectories,
        eval_trajectories,
        discount,
        gae_lambda,
        surrogate,
        initial_scale,
    )
    return MetaLearner(
        functools.partial(_init, parts),
        functools.partial(_adapt, parts),
        functools.partial(_predict, parts),
        functools.partial(_loss, parts),
        functools.partial(_evaluate, parts),
    )


def _rule(name: str, inner_lr: float, later_lr: float) -> UpdateRule:
    if name == "learned_sgd":
        return learned_sgd(inner_lr / 20, inner_lr)
    return from_optax(optax.sgd(lambda step: jnp.where(step == 0, inner_lr, later_lr)))


def _init(parts: _Parts, key: Array, task: PyTree) -> tuple[PyTree, PyTree]:
    environment = check_problem(task, "maml_rl").environment
    if not environment.observation.shape[0]:
        raise UsageError(
            "the policies of maml_rl see the observation alone, and these tasks have none: choose "
            "rl2, which remembers what it did, or other tasks"
        )
    network_key, head_key, rule_key = jax.random.split(key, 3)
    x = jnp.zeros((1, *environment.observation.shape), environment.observation.dtype)
    body, state = parts.network.init(network_key, x)
    z = jax.eval_shape(functools.partial(_embed, parts.network, state), body, x)
    actions = environment.actions
    outputs = actions.n if isinstance(actions, Discrete) else actions.size
    policy = {"network": body, "head": init_linear(head_key, z.shape[1], outputs)}
    if not isinstance(actions, Discrete):
        policy["log_scale"] = jnp.full(actions.size, math.log(parts.initial_scale), z.dtype)
    changed, _ = _split(parts.adapted, policy)
    return {"policy": policy, "rule": parts.rule.init_meta(rule_key, changed)}, state


def _embed(network: Network, state: PyTree, body: PyTree, x: Array) -> Array:
    return network.apply(body, state, x, key=None, train=False)[0]


def _split(adapted: Part, policy: PyTree) -> tuple[PyTree, PyTree]:
    """The parts of a policy that the inner loop changes, and the others."""
    chosen = {"all": set(policy), "head": {"head", "log_scale"}, "body": {"network"}}[adapted]
    changed = {name: part for name, part in policy.items() if name in chosen}
    return changed, {name: part for name, part in policy.items() if name not in chosen}


def _outputs(network: Network, state: PyTree, policy: PyTree, observations: Array) -> Array:
    """What describes the policy at observations [n, size]: [n, outputs]."""
    outputs = linear(policy["head"], _embed(network, state, policy["network"], observations))
    if "log_scale" in policy:
        scales = jnp.broadcast_to(policy["log_scale"], outputs.shape)
        return jnp.concatenate([outputs, scales], 1)
    return outputs


def _act(
    network: Network,
    state: PyTree,
    policy: PyTree,
    actions: Actions,
    memory: tuple,
    percept: Percept,
    key: Array,
) -> tuple[Array, tuple, tuple]:
    outputs = _outputs(network, state, policy, percept.observation[None])[0]
    return sample_action(key, outputs, actions), memory, ()


def sample_trajectories(
    network: Network, state: PyTree, policy: PyTree, problem: Problem, key: Array, count: int
) -> Trajectory:
    """Trajectories of a policy in one task, [count, steps]; nothing is differentiated through them.

    Args:
      network: Body of the policy.
      state: State of the body.
      policy: Parameters {'network', 'head'} and, for real actions, 'log_scale'.
      problem: The task.
      key: Random key.
      count: Number of trajectories.
    """
    act = functools.partial(
        _act, network, state, jax.lax.stop_gradient(policy), problem.environment.actions
    )
    run = functools.partial(run_trial, problem=problem, agent=Agent((), act))
    return jax.vmap(run)(jax.random.split(key, count))


def _advantages(parts: _Parts, problem: Problem, found: Trajectory) -> Array:
    """Returns less a baseline that is linear in features, of mean 0 and deviation 1."""
    mask = found.mask
    to_go = functools.partial(returns_to_go, discount=parts.discount)
    step = jnp.arange(mask.shape[1]) % problem.environment.horizon
    features = linear_features(found.percept.observation, jnp.broadcast_to(step, mask.shape))
    baseline = fit_baseline(features, jax.vmap(to_go)(found.reward, mask), mask)
    advantage = jax.vmap(
        functools.partial(
            generalised_advantages, discount=parts.discount, gae_lambda=parts.gae_lambda
        )
    )(found.reward, baseline, mask)
    return standardised(advantage, mask)


def _surrogate(
    parts: _Parts, problem: Problem, state: PyTree, policy: PyTree, found: Trajectory
) -> Array:
    """The loss of a policy on trajectories that it sampled itself: the surrogate, negative."""
    advantage = _advantages(parts, problem, found)
    count, steps = found.mask.shape
    observations = found.percept.observation.reshape(count * steps, -1)
    outputs = _outputs(parts.network, state, policy, observations).reshape(count, steps, -1)
    of_action = functools.partial(log_probability, actions=problem.environment.actions)
    log_p = jax.vmap(jax.vmap(of_action))(outputs, found.action)
    surrogate = _SURROGATES[parts.surrogate]
    return -jax.vmap(surrogate)(log_p, advantage, found.mask).sum() / found.mask.sum()


class _Seen(NamedTuple):
    """What the inner problem keeps: the state of the body, and the last return."""

    state: PyTree
    mean_return: Array


def _size(parts: _Parts, train: bool) -> tuple[int, int]:
    """Number of inner steps, and of the trajectories of each, in training or in tests."""
    if train:
        return parts.steps, parts.trajectories
    return parts.eval_steps, parts.eval_trajectories


def _inner_loop(
    parts: _Parts,
    params: PyTree,
    state: PyTree,
    problem: Problem,
    key: Array,
    *,
    train: bool,
) -> tuple[PyTree, InnerLoopResult]:
    """The adapted policy, and the inner loop; what it observed is the return before each step."""
    steps, trajectories = _size(parts, train)
    changed, kept = _split(parts.adapted, params["policy"])

    def loss(changed: PyTree, seen: _Seen, step: Array) -> tuple[Array, _Seen]:
        policy, now = changed | kept, jax.random.fold_in(key, step)
        found = sample_trajectories(parts.network, seen.state, policy, problem, now, trajectories)
        value = _surrogate(parts, problem, seen.state, policy, found)
        return value, _Seen(seen.state, found.reward.sum(1).mean())

    ended = run_inner_loop(
        loss,
        parts.rule,
        params["rule"],
        changed,
        _Seen(state, jnp.zeros(())),
        steps=steps,
        adjoint=parts.adjoint,
        observe=lambda changed, seen, step: seen.mean_return,
    )
    return ended.params | kept, ended


def _adapt(
    parts: _Parts, params: PyTree, state: PyTree, task: PyTree, key: Array, *, train: bool
) -> PyTree:
    """The policy after the inner loop, which acts in the task itself."""
    problem = check_problem(task, "maml_rl")
    policy, _ = _inner_loop(parts, params, state, problem, key, train=train)
    return policy, state


def _predict(
    parts: _Parts,
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
    outputs = _outputs(parts.network, state, policy, percept.observation[None])[0]
    actions = actions_of(percept, outputs.shape[0])
    action = sample_action(key, outputs, actions)
    return (action, log_probability(outputs, action, actions)), adapted


def _adapt_and_act(
    parts: _Parts, params: PyTree, state: PyTree, problem: Problem, key: Array, *, train: bool
) -> tuple[PyTree, InnerLoopResult, Trajectory]:
    """The adapted policy, its inner loop, and trajectories that it samples then."""
    inner_key, outer_key = jax.random.split(key)
    policy, ended = _inner_loop(parts, params, state, problem, inner_key, train=train)
    _, count = _size(parts, train)
    found = sample_trajectories(parts.network, state, policy, problem, outer_key, count)
    return policy, ended, found


def _loss(
    parts: _Parts, params: PyTree, state: PyTree, task: PyTree, key: Array
) -> tuple[Array, LossAux]:
    problem = check_problem(task, "maml_rl")
    policy, ended, found = _adapt_and_act(parts, params, state, problem, key, train=True)
    mean_return = found.reward.sum(1).mean()
    metrics = {"return": mean_return}
    if parts.steps:
        metrics["return_before"] = ended.observed[0]
    # The surrogate is 0 whatever the policy; what is minimised is the negative return.
    loss = _surrogate(parts, problem, state, policy, found) - mean_return
    return loss, LossAux(state, metrics)


def _evaluate(parts: _Parts, params: PyTree, state: PyTree, task: PyTree, key: Array) -> Metrics:
    problem = check_problem(task, "maml_rl")
    _, ended, found = _adapt_and_act(parts, params, state, problem, key, train=False)
    last = found.reward.sum(1).mean()
    returns = [*(ended.observed[i] for i in range(parts.eval_steps)), last]
    by_step = {f"return_after_{i}": value for i, value in enumerate(returns)}
    return with_loss(-last, {"return": last, **by_step})
