"""A learned policy that reads the trial so far: inputs, outputs, and how it acts."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import linear
from meta_jax.networks.sequences import SequenceNetwork
from meta_jax.reinforcement.environment import Actions, Continuous, Discrete, Environment, Problem
from meta_jax.reinforcement.policies import log_probability, num_outputs, sample_action
from meta_jax.reinforcement.rollout import Agent, Percept, Trajectory

Inputs = Literal["steps", "transitions"]


class TrialPolicy(NamedTuple):
    """A policy without its parameters.

    Attributes:
      network: The memory.
      inputs: What it reads at each step, as `percept_vector` says.
    """

    network: SequenceNetwork
    inputs: Inputs = "steps"


class Choice(NamedTuple):
    """What a policy gives beside its actions.

    Attributes:
      log_probability: Logarithm of the probability of the action, when it was chosen.
      value: Value that the critic gives the step.
    """

    log_probability: Array
    value: Array


def check_problem(task: PyTree, learner: str) -> Problem:
    """The task, where it is one of reinforcement learning.

    Raises:
      UsageError: it is another one, such as an episode of images.
    """
    if not isinstance(task, Problem):
        raise UsageError(
            f"{learner} learns by acting, and a {type(task).__name__} has no environment: choose "
            "tasks of reinforcement learning, such as bandit"
        )
    return task


def actions_of(percept: Percept, outputs: int) -> Actions:
    """The actions there are, by a percept and the number of outputs that describe a policy."""
    is_discrete = jnp.issubdtype(percept.action.dtype, jnp.integer)
    return Discrete(outputs) if is_discrete else Continuous(outputs // 2)


def init_policy(policy: TrialPolicy, key: Array, environment: Environment) -> PyTree:
    """Initial parameters: {'memory', 'policy', 'value'}; all actions begin about equally likely."""
    memory_key, policy_key, value_key = jax.random.split(key, 3)
    actions, observation = environment.actions, environment.observation
    size = actions.n if isinstance(actions, Discrete) else actions.size
    inputs = _num_inputs(policy.inputs, observation.shape[0], size)
    steps = environment.episodes * environment.horizon
    memory = policy.network.init(memory_key, inputs, steps)
    x = jax.ShapeDtypeStruct((steps, inputs), observation.dtype)
    features = jax.eval_shape(policy.network.read, memory, x, jnp.ones(steps, bool)).shape[1]
    return {
        "memory": memory,
        "policy": init_head(policy_key, features, num_outputs(actions), 0.01),
        "value": init_head(value_key, features, 1, 1.0),
    }


def init_head(key: Array, inputs: int, outputs: int, scale: float) -> PyTree:
    """Initial parameters of an output layer: an orthogonal kernel of this scale, and no bias."""
    kernel = jax.nn.initializers.orthogonal(scale)(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs, kernel.dtype)}


def percept_vector(inputs: Inputs, actions: Actions, percept: Percept) -> Array:
    """Input of the memory at a step, [inputs].

    With 'steps' it is the observation, the last action (one-hot where actions are discrete, and
    zero before the first), the last reward, and whether an episode begins (Duan et al. 2016). With
    'transitions' it has the products of the last observation and the last action instead of the
    action, once as they are and once times the last reward: a number for each pair of state and
    action, where both are one-hot. An observation without numbers counts as 1.
    """
    action = percept.action
    if isinstance(actions, Discrete):
        action = jax.nn.one_hot(action, actions.n)
    rest = jnp.stack([percept.reward, percept.begins.astype(percept.reward.dtype)])
    if inputs == "transitions":
        seen = percept.last_observation if percept.observation.size else jnp.ones(1)
        pairs = jnp.outer(seen, action).ravel()
        action = jnp.concatenate([pairs, pairs * percept.reward])
    return jnp.concatenate([percept.observation, action, rest])


def _num_inputs(inputs: Inputs, observation: int, action: int) -> int:
    of_action = action if inputs == "steps" else 2 * max(observation, 1) * action
    return observation + of_action + 2


def as_agent(policy: TrialPolicy, params: PyTree, environment: Environment) -> Agent:
    """The policy with its parameters, as it acts; its extras are `Choice`s."""
    act = functools.partial(act_once, policy, params, environment.actions)
    return Agent(start_memory(policy, params, environment), act, policy.network.keep)


def start_memory(policy: TrialPolicy, params: PyTree, environment: Environment) -> PyTree:
    """The memory at the beginning of a trial."""
    return policy.network.start(params["memory"], environment.episodes * environment.horizon)


def act_once(
    policy: TrialPolicy,
    params: PyTree,
    actions: Actions,
    memory: PyTree,
    percept: Percept,
    key: Array,
) -> tuple[Array, PyTree, Choice]:
    """Reads a percept and draws an action: (action, memory, choice)."""
    memory, features = policy.network.step(
        params["memory"], memory, percept_vector(policy.inputs, actions, percept)
    )
    outputs, value = _outputs(params, features)
    action = sample_action(key, outputs, actions)
    return action, memory, Choice(log_probability(outputs, action, actions), value)


def _outputs(params: PyTree, features: Array) -> tuple[Array, Array]:
    return linear(params["policy"], features), linear(params["value"], features)[..., 0]


def read_trial(
    policy: TrialPolicy, params: PyTree, actions: Actions, trajectory: Trajectory
) -> tuple[Array, Array]:
    """What the policy gives at each step of a trial that was acted before.

    Args:
      policy: The policy.
      params: Parameters, which may have moved since.
      actions: Actions there are.
      trajectory: The trial, [steps].

    Returns:
      The numbers that describe its policy, [steps, outputs], and its values [steps].
    """
    xs = jax.vmap(functools.partial(percept_vector, policy.inputs, actions))(trajectory.percept)
    return _outputs(params, policy.network.read(params["memory"], xs, trajectory.mask))
