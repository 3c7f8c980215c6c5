import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.networks.sequences import recurrent
from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.policies import log_probability
from meta_jax.reinforcement.ppo import (
    PolicyGradient,
    collect,
    learning_rewards,
    normalised,
    surrogate_loss,
)
from meta_jax.reinforcement.trial_policy import TrialPolicy, init_policy, read_trial

pytestmark = pytest.mark.usefixtures("x64")

POLICY = TrialPolicy(recurrent(4))
ENVIRONMENT = bandit(arms=3, pulls=4)
ACTIONS = ENVIRONMENT.actions
PLAIN = PolicyGradient(entropy_weight=0.0, value_weight=0.0, gae_lambda=1.0, discount=1.0)
KEY = jax.random.key(0)


@functools.cache
def params():
    leaves, treedef = jax.tree.flatten(jax.jit(init)(KEY))
    noise = np.random.default_rng(0)
    return treedef.unflatten([leaf + 0.3 * noise.standard_normal(leaf.shape) for leaf in leaves])


def init(key):
    return init_policy(POLICY, key, ENVIRONMENT)


@functools.cache
def experience(settings=PLAIN, seed=0):
    task = jnp.array([0.2, 0.9, 0.5])
    run = jax.jit(functools.partial(collect, settings, POLICY))
    return run(params(), Problem(ENVIRONMENT, task), jax.random.key(seed))


def test_where_the_parameters_are_those_that_acted_it_is_the_policy_gradient():
    found = experience()

    def loss(p):
        return surrogate_loss(PLAIN, POLICY, ACTIONS, p, found)[0]

    def expected(p):
        outputs, _ = read_trial(POLICY, p, ACTIONS, found.trajectory)
        log_p = jax.vmap(functools.partial(log_probability, actions=ACTIONS))(
            outputs, found.trajectory.action
        )
        return -(log_p * found.advantage).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params())
    np.testing.assert_allclose(value, -found.advantage.mean(), atol=1e-12)  # every ratio is 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        gradient,
        jax.jit(jax.grad(expected))(params()),
    )


def test_a_ratio_beyond_the_clip_gives_no_gradient():
    found = experience()
    towards = jnp.where(found.advantage > 0, -1.0, 1.0)  # all that is worth it was done already
    choice = found.trajectory.extras
    moved = choice._replace(log_probability=choice.log_probability + towards)
    found = found._replace(trajectory=found.trajectory._replace(extras=moved))
    gradient = jax.jit(jax.grad(lambda p: surrogate_loss(PLAIN, POLICY, ACTIONS, p, found)[0]))
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient(params())))


def test_the_expected_gradient_is_exact():
    """One pull: the gradient by a logit is p_a (r_a - the mean reward)."""
    environment = bandit(arms=3, pulls=1)
    task = jnp.array([0.2, 0.9, 0.5])
    settings = PLAIN._replace(reward="expected")

    def one(key):
        found = collect(settings, POLICY, params(), Problem(environment, task), key)

        def loss(p):
            return surrogate_loss(settings, POLICY, ACTIONS, p, found)[0]

        return -jax.grad(loss)(params())["policy"]["bias"], found.trajectory

    gradients, trajectory = jax.jit(jax.vmap(one))(jax.random.split(KEY, 4000))
    outputs, _ = read_trial(POLICY, params(), ACTIONS, jax.tree.map(lambda t: t[0], trajectory))
    p = np.asarray(jax.nn.softmax(outputs[0]))
    exact = p * (np.asarray(task) - p @ np.asarray(task))
    error = np.asarray(gradients).std(0) / np.sqrt(4000)
    assert (abs(gradients.mean(0) - exact) < 4 * error).all()
    assert abs(exact).max() > 10 * error.max()


def test_what_is_learned_from():
    found = experience().trajectory
    task = np.array([0.2, 0.9, 0.5])
    np.testing.assert_array_equal(learning_rewards(found, "sampled"), found.reward)
    np.testing.assert_allclose(learning_rewards(found, "expected"), task[found.action])
    np.testing.assert_allclose(learning_rewards(found, "regret"), task[found.action] - 0.9)
    with pytest.raises(UsageError, match="does not know the regret of an action"):
        learning_rewards(found._replace(regret=None), "regret")


def test_advantages_are_normalised_over_what_is_real():
    found = experience()
    mask = jnp.array([True, True, True, False])
    found = found._replace(trajectory=found.trajectory._replace(mask=mask))
    advantage = np.asarray(normalised(found).advantage)
    np.testing.assert_allclose(advantage[:3].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(advantage[:3].std(), 1, atol=1e-6)
    assert advantage[3] == 0
