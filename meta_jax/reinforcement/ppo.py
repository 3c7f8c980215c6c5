"""Policy gradients over whole trials: advantage actor-critic and proximal policy optimization."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_jax.core import Array, Metrics, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.advantages import generalised_advantages, standardised
from meta_jax.reinforcement.environment import Actions, Problem
from meta_jax.reinforcement.policies import entropy, log_probability
from meta_jax.reinforcement.rollout import Trajectory, run_trial
from meta_jax.reinforcement.trial_policy import TrialPolicy, as_agent, read_trial

Reward = Literal["sampled", "expected", "regret"]


class PolicyGradient(NamedTuple):
    """Settings of a policy gradient.

    Attributes:
      reward: What is learned from: 'sampled', the rewards that came; 'expected', their means;
        'regret', the exact regret of each action, negative. An environment must know the last two.
      discount: Discount gamma of the return of a trial.
      gae_lambda: Lambda of the generalised advantage estimates.
      entropy_weight: Factor of the policy's entropy, which is maximised.
      value_weight: Factor of the critic's squared error.
      clip: Largest change of a probability's ratio that is rewarded; infinite without clipping.
    """

    reward: Reward = "sampled"
    discount: float = 0.99
    gae_lambda: float = 0.9
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    clip: float = 0.2


class Experience(NamedTuple):
    """A trial and what is learned from it, leaves [steps, ...].

    Attributes:
      trajectory: The trial.
      advantage: Advantage of each action.
      value_target: What the critic should have said.
    """

    trajectory: Trajectory
    advantage: Array
    value_target: Array


def learning_rewards(trajectory: Trajectory, reward: Reward) -> Array:
    """The rewards that are learned from, [steps].

    Raises:
      UsageError: the environment does not know the regret of an action.
    """
    if reward == "sampled":
        return trajectory.reward
    if reward == "expected":
        return trajectory.expected_reward
    if trajectory.regret is None:
        raise UsageError(
            "this environment does not know the regret of an action: learn from the reward "
            "'sampled' or 'expected'"
        )
    return -trajectory.regret


def collect(
    settings: PolicyGradient,
    policy: TrialPolicy,
    params: PyTree,
    problem: Problem,
    key: Array,
) -> Experience:
    """Acts for a trial of one task, and works out what is to be learned from it."""
    agent = as_agent(policy, params, problem.environment)
    trajectory = run_trial(key, problem, agent)
    values = trajectory.extras.value
    advantage = generalised_advantages(
        learning_rewards(trajectory, settings.reward),
        values,
        trajectory.mask,
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )
    return Experience(trajectory, advantage, advantage + values)


def surrogate_loss(
    settings: PolicyGradient,
    policy: TrialPolicy,
    actions: Actions,
    params: PyTree,
    experience: Experience,
) -> tuple[Array, Metrics]:
    """The clipped surrogate of one trial (Schulman et al. 2017, equation 9), to be minimised.

    With rho = pi(a) / pi_old(a) it is the mean over steps of -min(rho A, clip(rho) A), plus the
    critic's squared error, minus the entropy, each with its factor. Where the parameters are those
    that acted, its gradient is that of advantage actor-critic.

    Args:
      settings: Settings of the policy gradient.
      policy: The policy.
      actions: Actions there are.
      params: Parameters of the policy.
      experience: The trial, its advantages as they are to be used.
    """
    trajectory, advantage, target = experience
    outputs, values = read_trial(policy, params, actions, trajectory)
    log_p = jax.vmap(functools.partial(log_probability, actions=actions))(
        outputs, trajectory.action
    )
    ratio = jnp.exp(log_p - trajectory.extras.log_probability)
    clipped = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    steps = trajectory.mask.sum()

    def mean(x: Array) -> Array:
        return jnp.where(trajectory.mask, x, 0).sum() / steps

    gain = mean(jnp.minimum(ratio * advantage, clipped * advantage))
    uncertainty = mean(jax.vmap(functools.partial(entropy, actions=actions))(outputs))
    error = mean((values - target) ** 2)
    loss = settings.value_weight * error - gain - settings.entropy_weight * uncertainty
    return loss, {"entropy": uncertainty, "value_error": error}


def normalised(experience: Experience) -> Experience:
    """Advantages of mean 0 and deviation 1 over all steps of many trials, [trials, steps]."""
    return experience._replace(
        advantage=standardised(experience.advantage, experience.trajectory.mask)
    )


def gradient_step(
    optimizer: optax.GradientTransformationExtraArgs,
    carry: tuple[PyTree, PyTree],
    loss: Array,
    gradient: PyTree,
) -> tuple[tuple[PyTree, PyTree], Array]:
    """Parameters and the optimizer's state after a step, and the norm of the gradient."""
    params, opt_state = carry
    updates, opt_state = optimizer.update(gradient, opt_state, params, value=loss, grad=gradient)
    return (optax.apply_updates(params, updates), opt_state), optax.tree.norm(gradient)


def ppo_updates(
    settings: PolicyGradient,
    policy: TrialPolicy,
    optimizer: optax.GradientTransformationExtraArgs,
    actions: Actions,
    carry: tuple[PyTree, PyTree],
    experience: Experience,
    key: Array,
    *,
    epochs: int,
    minibatches: int,
) -> tuple[tuple[PyTree, PyTree], Metrics]:
    """Several epochs of updates on minibatches of whole trials.

    Args:
      settings: Settings of the policy gradient.
      policy: The policy.
      optimizer: The optimizer.
      actions: Actions there are.
      carry: Parameters and the optimizer's state.
      experience: What was collected, [trials, steps].
      key: Random key of the order of the trials.
      epochs: Number of times that each trial is used.
      minibatches: Updates of an epoch; divides the number of trials.

    Returns:
      Parameters and the optimizer's state, and metrics averaged over the updates, with 'loss' and
      'gradient_norm'.
    """
    trials = experience.advantage.shape[0]
    order = jax.vmap(lambda k: jax.random.permutation(k, trials))(jax.random.split(key, epochs))
    rows = order.reshape(epochs * minibatches, trials // minibatches)
    loss_of = functools.partial(surrogate_loss, settings, policy, actions)

    def batch_loss(params: PyTree, batch: Experience) -> tuple[Array, Metrics]:
        losses, metrics = jax.vmap(loss_of, (None, 0))(params, batch)
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    def update(carry: tuple[PyTree, PyTree], rows: Array) -> tuple[tuple[PyTree, PyTree], Metrics]:
        params, opt_state = carry
        batch = normalised(jax.tree.map(lambda leaf: leaf[rows], experience))
        (loss, metrics), gradient = jax.value_and_grad(batch_loss, has_aux=True)(params, batch)
        carry, norm = gradient_step(optimizer, (params, opt_state), loss, gradient)
        return carry, {"loss": loss, "gradient_norm": norm, **metrics}

    carry, metrics = jax.lax.scan(update, carry, rows)
    return carry, jax.tree.map(jnp.mean, metrics)
