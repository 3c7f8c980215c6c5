import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.lookup import UsageError
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.reinforcement.maml_rl import maml_rl
from meta_jax.reinforcement.policy_adaptation import sample_trajectories
from meta_jax.reinforcement.rollout import Percept
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.train_loop import make_train_loop
from tests.checkers import key_and_leak_checks

TASKS = load_source("navigation", horizon=8).tasks("train", EpisodeSize(1, 1, 1), train=True)
NETWORK = mlp((8,))
KEY = jax.random.key(0)


@functools.cache
def problem(seed=0):
    return TASKS.sample(jax.random.key(seed), ())


def learner(**settings):
    return maml_rl(NETWORK, trajectories=3, eval_trajectories=3, eval_steps=2, **settings)


@functools.cache
def initial(**settings):
    return jax.jit(learner(**settings).init)(KEY, problem())


def test_the_policy_after_no_step_is_the_policy():
    params, state = initial()
    adapted, _ = jax.jit(functools.partial(learner(steps=0).adapt, train=True))(
        params, state, problem(), KEY
    )
    jax.tree.map(np.testing.assert_array_equal, adapted, params["policy"])


def test_one_step_is_one_policy_gradient():
    """Against plain REINFORCE on the same trajectories, whose gradient DiCE has too."""
    params, state = initial()
    one = learner(inner_lr=0.5)
    adapted, _ = jax.jit(functools.partial(one.adapt, train=True))(params, state, problem(), KEY)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), adapted, params["policy"])

    @jax.jit
    def trajectories():
        key = jax.random.fold_in(KEY, 0)
        return sample_trajectories(NETWORK, state, params["policy"], problem(), key, 3)

    found = jax.tree.map(np.asarray, trajectories())
    # Returns that are left, less a ridge regression on the features, of deviation 1.
    weights = 0.99 ** np.maximum(np.arange(8)[None] - np.arange(8)[:, None], 0)
    to_go = (np.triu(weights) * found.reward[:, None, :]).sum(-1)
    x, t = found.percept.observation, np.broadcast_to(np.arange(8) / 100, (3, 8))[..., None]
    features = np.concatenate([x, x**2, t, t**2, t**3, np.ones_like(t)], -1).astype(np.float64)
    mask = found.mask
    real = np.where(mask[..., None], features, 0).reshape(-1, 8)
    gram = real.T @ real + 1e-5 * mask.sum() * np.eye(8)
    left = np.where(mask, to_go, 0).reshape(-1)
    advantage = to_go - features @ np.linalg.solve(gram, real.T @ left)
    advantage = (advantage - advantage[mask].mean()) / advantage[mask].std()

    def loss(policy):
        z = NETWORK.apply(policy["network"], state, x.reshape(-1, 2), key=None, train=False)[0]
        mean = (z @ policy["head"]["kernel"] + policy["head"]["bias"]).reshape(3, 8, 2)
        scale = jnp.exp(policy["log_scale"])
        log_p = jax.scipy.stats.norm.logpdf(found.action, mean, scale).sum(-1)
        return -(jnp.where(mask, log_p * advantage, 0)).sum() / mask.sum()

    gradient = jax.jit(jax.grad(loss))(params["policy"])
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(m, -0.5 * g, rtol=0.02, atol=2e-3), moved, gradient
    )
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 0.02


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_inner_loop_changes_a_part(part):
    params, state = initial()
    adapt = jax.jit(functools.partial(learner(adapted=part).adapt, train=False))
    adapted, _ = adapt(params, state, problem(), KEY)
    differs = {
        name: any(
            (a != b).any()
            for a, b in zip(
                jax.tree.leaves(adapted[name]),
                jax.tree.leaves(params["policy"][name]),
                strict=True,
            )
        )
        for name in adapted
    }
    assert differs == {
        "network": part == "body",
        "head": part == "head",
        "log_scale": part == "head",
    }


def test_training_and_tests_say_what_came_of_each_step():
    ours, optimizer = learner(inner_rule="learned_sgd"), optax.adam(1e-3)
    loop = make_train_loop(make_outer_step(ours, optimizer, TASKS.sample, task_batch=2))
    before = init_train_state(ours, optimizer, TASKS, 0)
    params = jax.tree.map(jnp.copy, before.params)
    after, metrics, finite = loop(before, (), 2)
    assert finite
    assert {"loss", "return", "return_before", "gradient_norm"} == metrics.keys()
    np.testing.assert_allclose(metrics["loss"], -metrics["return"], rtol=1e-5)
    # The learned rates, and the policy, got a gradient.
    moved = jax.tree.map(lambda a, b: abs(a - b).max() > 0, after.params, params)
    assert all(jax.tree.leaves(moved))
    found = ours.evaluate(params, {}, problem(), KEY)
    names = {f"return_after_{i}" for i in range(3)}
    assert found.keys() == {"loss", "return", *names}
    assert found["return"] == found["return_after_2"] == -found["loss"]
    assert found["return"] < 0


@pytest.mark.parametrize("surrogate", ["dice", "lvc"])
def test_the_first_update_of_ppo_is_the_outer_gradient(surrogate):
    """The directions agree: in one task advantages differ by their scale alone."""
    params, state = initial()
    ours = learner(outer="ppo", epochs=1, surrogate=surrogate)
    keys, optimizer = jax.random.split(KEY, 1), optax.sgd(1.0)
    update = jax.jit(functools.partial(ours.update, optimizer, TASKS.sample))
    found, _, _, metrics = update(params, state, optimizer.init(params), (), keys)
    task_key, key = jax.random.split(keys[0])
    plain = learner(surrogate=surrogate)
    gradient = jax.jit(jax.grad(plain.loss, has_aux=True))
    expected, aux = gradient(params, state, TASKS.sample(task_key, ()), key)
    moved = np.concatenate(
        [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (params, found)), strict=True)]
    )
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(expected)])
    cosine = moved @ expected / (np.linalg.norm(moved) * np.linalg.norm(expected))
    assert cosine > 0.999
    np.testing.assert_allclose(metrics["return"], aux.metrics["return"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(moved), rtol=1e-4)


def test_ppo_makes_several_updates_of_a_step():
    ours = learner(outer="ppo", epochs=3)
    assert (ours.updates_per_step, learner().updates_per_step) == (3, 1)
    loop = make_train_loop(make_outer_step(ours, optax.adam(1e-3), TASKS.sample, task_batch=2))
    after, metrics, finite = loop(init_train_state(ours, optax.adam(1e-3), TASKS, 0), (), 1)
    assert finite
    assert after.opt_state[0].count == 3
    assert metrics.keys() == {"loss", "return", "return_before", "gradient_norm"}


def test_discrete_actions_have_logits():
    source = load_source("tabular_mdp", states=4, actions=3, episodes=1)
    task = source.tasks("train", EpisodeSize(1, 1, 1), train=True).sample(KEY, ())
    ours = learner()
    params, state = ours.init(KEY, task)
    assert "log_scale" not in params["policy"]
    adapted = ours.adapt(params, state, task, KEY, train=False)
    percept = Percept(jnp.eye(4)[0], jnp.zeros(4), jnp.int32(-1), jnp.zeros(()), jnp.bool_(True))
    (action, log_p), same = ours.predict(params, adapted, percept, KEY, train=False)
    assert action in range(3)
    assert 0 < np.exp(log_p) < 1
    jax.tree.map(np.testing.assert_array_equal, same, adapted)


def test_what_does_not_fit_is_refused():
    images = Episode(*[Batch(jnp.zeros((4, 3)), jnp.tile(jnp.eye(2), (2, 1)))] * 2)
    with pytest.raises(UsageError, match="maml_rl learns by acting, and a Episode"):
        learner().init(KEY, images)
    pulls = load_source("bandit").tasks("train", EpisodeSize(1, 1, 1), train=True)
    with pytest.raises(UsageError, match="see the observation alone, and these tasks have none"):
        learner().init(KEY, pulls.sample(KEY, ()))
    with pytest.raises(UsageError, match="maml_rl is for control"):
        learner(objective=cross_entropy)
    with pytest.raises(UsageError, match="maml_rl: trajectories=0 must be at least 1"):
        maml_rl(NETWORK, trajectories=0)
    with pytest.raises(UsageError, match="steps=-1 must be at least 0"):
        maml_rl(NETWORK, steps=-1)


def test_random_keys_are_used_once_and_nothing_leaks():
    ours = learner()

    def everything(key):
        init_key, loss_key, test_key = jax.random.split(key, 3)
        params, state = ours.init(init_key, problem())
        gradient = jax.grad(ours.loss, has_aux=True)(params, state, problem(), loss_key)
        return gradient, ours.evaluate(params, state, problem(), test_key)

    with key_and_leak_checks():
        jax.eval_shape(jax.jit(everything), KEY)
