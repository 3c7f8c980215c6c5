"""How policies adapt: trajectories, surrogate losses and the inner loop of MAML."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, Network, PyTree
from meta_jax.inner_loop import Adjoint, InnerLoopResult, UpdateRule, run_inner_loop
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import init_linear, linear
from meta_jax.reinforcement.advantages import generalised_advantages, standardised
from meta_jax.reinforcement.baselines import fit_baseline, linear_features, returns_to_go
from meta_jax.reinforcement.dice import dice_surrogate, lvc_surrogate
from meta_jax.reinforcement.environment import Actions, Discrete, Problem
from meta_jax.reinforcement.policies import log_probability, sample_action
from meta_jax.reinforcement.rollout import Agent, Percept, Trajectory, run_trial

Part = Literal["all", "head", "body"]
Surrogate = Literal["dice", "lvc"]
_SURROGATES = {"dice": dice_surrogate, "lvc": lvc_surrogate}


class Adaptation(NamedTuple):
    """A policy without its parameters, and how it adapts.

    Attributes:
      network: Body of the policy; a linear head follows it.
      rule: Inner optimizer.
      adjoint: How the outer gradient comes back through the inner loop.
      adapted: What the inner loop changes.
      discount: Discount of the return.
      gae_lambda: Lambda of the generalised advantage estimates.
      surrogate: Inner loss.
      initial_scale: Standard deviation of the actions of a Gaussian policy before training.
    """

    network: Network
    rule: UpdateRule
    adjoint: Adjoint
    adapted: Part
    discount: float
    gae_lambda: float
    surrogate: Surrogate
    initial_scale: float


def init_policy(parts: Adaptation, key: Array, problem: Problem) -> tuple[PyTree, PyTree]:
    """Initial parameters {'policy', 'rule'}, and the state of the body.

    Raises:
      UsageError: the tasks have no observation.
    """
    environment = problem.environment
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


def policy_outputs(network: Network, state: PyTree, policy: PyTree, observations: Array) -> Array:
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
) -> tuple[Array, tuple, Array]:
    outputs = policy_outputs(network, state, policy, percept.observation[None])[0]
    action = sample_action(key, outputs, actions)
    return action, memory, log_probability(outputs, action, actions)


def sample_trajectories(
    network: Network, state: PyTree, policy: PyTree, problem: Problem, key: Array, count: int
) -> Trajectory:
    """Trajectories of a policy in one task, [count, steps]; nothing is differentiated through them.

    Their extras are the logarithms of the probabilities of the actions.

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


def advantages(parts: Adaptation, problem: Problem, found: Trajectory) -> Array:
    """Returns less a baseline that is linear in features of the observation, [count, steps]."""
    mask = found.mask
    to_go = functools.partial(returns_to_go, discount=parts.discount)
    step = jnp.arange(mask.shape[1]) % problem.environment.horizon
    features = linear_features(found.percept.observation, jnp.broadcast_to(step, mask.shape))
    baseline = fit_baseline(features, jax.vmap(to_go)(found.reward, mask), mask)
    estimate = functools.partial(
        generalised_advantages, discount=parts.discount, gae_lambda=parts.gae_lambda
    )
    return jax.vmap(estimate)(found.reward, baseline, mask)


def log_probabilities(
    parts: Adaptation, problem: Problem, state: PyTree, policy: PyTree, found: Trajectory
) -> Array:
    """Logarithms of the probabilities that a policy gives the actions, [count, steps]."""
    count, steps = found.mask.shape
    observations = found.percept.observation.reshape(count * steps, -1)
    outputs = policy_outputs(parts.network, state, policy, observations).reshape(count, steps, -1)
    of_action = functools.partial(log_probability, actions=problem.environment.actions)
    return jax.vmap(jax.vmap(of_action))(outputs, found.action)


def surrogate_loss(
    parts: Adaptation,
    problem: Problem,
    state: PyTree,
    policy: PyTree,
    found: Trajectory,
    advantage: Array,
) -> Array:
    """The surrogate of a policy, negative, a mean over steps.

    Args:
      parts: The policy.
      problem: The task.
      state: State of the body.
      policy: Parameters of the policy.
      found: Trajectories, of this policy or of one like it.
      advantage: Advantages of their actions, [count, steps].
    """
    log_p = log_probabilities(parts, problem, state, policy, found)
    gain = jax.vmap(_SURROGATES[parts.surrogate])(log_p, advantage, found.mask, found.extras)
    return -gain.sum() / found.mask.sum()


class _Seen(NamedTuple):
    """What the inner problem keeps: the state of the body, and the trajectories it used last."""

    state: PyTree
    found: Trajectory


Draw = Callable[[PyTree, Array], Trajectory]  # (policy, inner step) -> trajectories


def inner_loop(
    parts: Adaptation,
    params: PyTree,
    state: PyTree,
    problem: Problem,
    draw: Draw,
    steps: int,
) -> tuple[PyTree, InnerLoopResult]:
    """Adapts a policy to a task.

    Args:
      parts: The policy and how it adapts.
      params: Parameters {'policy', 'rule'}.
      state: State of the body.
      problem: The task.
      draw: Function (policy, inner step) -> trajectories: it samples them, or knows older ones.
      steps: Number of inner steps.

    Returns:
      The adapted policy, and the inner loop; what it observed are the trajectories of each step.
    """
    changed, kept = _split(parts.adapted, params["policy"])

    def loss(changed: PyTree, seen: _Seen, step: Array) -> tuple[Array, _Seen]:
        policy = changed | kept
        found = draw(policy, step)
        advantage = standardised(advantages(parts, problem, found), found.mask)
        value = surrogate_loss(parts, problem, seen.state, policy, found, advantage)
        return value, _Seen(seen.state, found)

    shapes = jax.eval_shape(draw, params["policy"], jnp.zeros((), jnp.int32))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ended = run_inner_loop(
        loss,
        parts.rule,
        params["rule"],
        changed,
        _Seen(state, nothing),
        steps=steps,
        adjoint=parts.adjoint,
        observe=lambda changed, seen, step: seen.found,
    )
    return ended.params | kept, ended
