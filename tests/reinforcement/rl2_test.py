import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.reinforcement.environment import Discrete, Problem
from meta_jax.reinforcement.rl2 import rl2
from meta_jax.reinforcement.rollout import Agent, Percept, run_trial
from meta_jax.reinforcement.tabular_mdp import tabular_mdp
from meta_jax.reinforcement.trial_policy import percept_vector
from meta_jax.training.evaluation import make_evaluate
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.record import make_config
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.trained import Trained, load, save_trained
from tests.checkers import key_and_leak_checks

SIZE = EpisodeSize(1, 1, 1)
SOURCE = load_source("bandit", arms=2, pulls=5)
TASKS = SOURCE.tasks("train", SIZE, train=True)
LEARNER = rl2(hidden_size=16, minibatches=8)
OPTIMIZER = optax.adam(5e-3)


@functools.cache
def loop():
    return make_train_loop(make_outer_step(LEARNER, OPTIMIZER, TASKS.sample, task_batch=256))


def start():
    return init_train_state(LEARNER, OPTIMIZER, TASKS, 0)


def best_return(pulls):
    """The Bayes-optimal return of two arms, by dynamic programming over their counts."""

    @functools.cache
    def value(left, arms):
        return max(pull(left, arms[i], arms[1 - i]) for i in range(2)) if left else 0.0

    def pull(left, arm, other):
        won, lost = arm
        p = won / (won + lost)
        return p * (1 + value(left - 1, ((won + 1, lost), other))) + (1 - p) * value(
            left - 1, ((won, lost + 1), other)
        )

    return value(pulls, ((1, 1), (1, 1)))


def test_it_nears_the_best_that_there_is():
    found, metrics, finite = loop()(start(), TASKS.data, 40)
    assert finite
    assert {"loss", "return", "entropy", "value_error", "gradient_norm"} == metrics.keys()
    evaluate = make_evaluate(LEARNER, TASKS.sample, episodes=4096, chunk=4096)
    returns = np.asarray(evaluate(found.params, {}, TASKS.data, jax.random.key(5))["return"])
    best, error = best_return(5), returns.std() / np.sqrt(4096)
    assert 0.97 * best - 2 * error < returns.mean() < best + 4 * error
    assert returns.mean() > 2.5 + 10 * error  # what random pulls bring


def test_training_goes_on_as_if_it_had_not_stopped():
    once = loop()(start(), TASKS.data, 3)[0]
    twice = loop()(loop()(start(), TASKS.data, 1)[0], TASKS.data, 2)[0]
    jax.tree.map(np.testing.assert_array_equal, once._replace(key=0), twice._replace(key=0))
    assert loop().programs() == 1


def test_a2c_takes_one_step_by_the_gradient_of_the_mean_loss():
    learner = rl2(hidden_size=4, algorithm="a2c")
    assert (learner.update, learner.updates_per_step) == (None, 1)
    assert (LEARNER.updates_per_step, rl2().updates_per_step) == (24, 60)
    step = make_outer_step(learner, optax.sgd(1.0), TASKS.sample, task_batch=4, task_chunk=4)
    before = init_train_state(learner, optax.sgd(1.0), TASKS, 0)
    after, metrics = jax.jit(step)(before, ())
    assert 0 <= metrics["return"] <= 5
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), before.params, after.params)
    assert moved["policy"]["kernel"] > 0


def test_one_acts_with_it_step_by_step():
    params = start().params
    task = TASKS.sample(jax.random.key(3), ())
    memory = LEARNER.adapt(params, {}, task, jax.random.key(0), train=False)
    percept = Percept(jnp.zeros(0), jnp.zeros(0), jnp.int32(-1), jnp.zeros(()), jnp.bool_(True))
    (action, choice), after = LEARNER.predict(
        params, memory, percept, jax.random.key(1), train=False
    )
    assert action in (0, 1)
    np.testing.assert_allclose(jnp.exp(choice.log_probability), 0.5, atol=0.02)
    assert jax.tree.structure(after) == jax.tree.structure(memory)
    assert abs(after).max() > 0


def test_it_is_loaded_from_its_folder(tmp_path):
    params = start().params
    config = make_config(LEARNER, TASKS, source=SOURCE.config)
    save_trained(tmp_path, Trained(LEARNER, params, {}, TASKS.objective, None, config))
    found = load(tmp_path)
    assert found.learner.config == LEARNER.config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_what_does_not_fit_is_refused():
    images = Episode(*[Batch(jnp.zeros((4, 3)), jnp.tile(jnp.eye(2), (2, 1)))] * 2)
    with pytest.raises(UsageError, match="rl2 learns by acting, and a Episode has no environment"):
        LEARNER.init(jax.random.key(0), images)
    with pytest.raises(UsageError, match="rl2 is for control"):
        rl2(objective=cross_entropy)
    with pytest.raises(UsageError, match="answers queries, and tasks of reinforcement learning"):
        prototypical(mlp((4,)), objective=TASKS.objective)
    with pytest.raises(UsageError, match="8 minibatches must divide the task batch 12"):
        make_outer_step(LEARNER, OPTIMIZER, TASKS.sample, task_batch=12)(start(), ())
    with pytest.raises(UsageError, match="bandit: arms=0 must be at least 1"):
        load_source("bandit", arms=0)
    assert isinstance(TASKS.sample(jax.random.key(0), ()), Problem)


@pytest.mark.parametrize("memory", ["gru", "transformer", "snail"])
def test_random_keys_are_used_once_and_nothing_leaks(memory):
    learner = rl2(hidden_size=4, memory=memory, epochs=2, minibatches=2)
    step = make_outer_step(learner, OPTIMIZER, TASKS.sample, task_batch=4)

    def everything(seed):
        state = init_train_state(learner, OPTIMIZER, TASKS, 0)
        state, metrics = step(state, ())
        task_key, key = jax.random.split(jax.random.key(seed))
        task = TASKS.sample(task_key, ())
        return metrics, learner.evaluate(state.params, {}, task, key)

    with key_and_leak_checks():
        found, _ = jax.eval_shape(jax.jit(everything), 0)
    assert found["return"].shape == ()


def test_transitions_are_inputs_by_pair_of_observation_and_action():
    percept = Percept(jnp.eye(2)[0], jnp.eye(2)[1], jnp.int32(2), jnp.float32(-3), jnp.bool_(False))
    pairs = [0, 0, 0, 0, 0, 1]
    found = percept_vector("transitions", Discrete(3), percept)
    np.testing.assert_array_equal(found, [1, 0, *pairs, *(-3 * np.array(pairs)), -3, 0])
    # At the first step of a trial there is none; a bandit's observation has no numbers.
    first = Percept(jnp.zeros(0), jnp.zeros(0), jnp.int32(-1), jnp.zeros(()), jnp.bool_(True))
    np.testing.assert_array_equal(percept_vector("transitions", Discrete(2), first), [0] * 5 + [1])
    learner = rl2(hidden_size=4, inputs="transitions")
    params, _ = jax.eval_shape(learner.init, jax.random.key(0), TASKS.sample(jax.random.key(0), ()))
    assert params["memory"]["input"]["kernel"].shape == (6, 12)


def test_an_agent_gets_the_observation_of_the_step_before():
    environment = tabular_mdp(states=3, actions=2, episodes=2, horizon=3)
    problem = Problem(environment, environment.sample_task(jax.random.key(0)))
    agent = Agent((), lambda memory, percept, key: (jnp.int32(1), memory, ()))
    percept = run_trial(jax.random.key(1), problem, agent).percept
    np.testing.assert_array_equal(percept.last_observation[0], np.zeros(3))
    # The last step of an episode leads to a state that nobody sees.
    np.testing.assert_array_equal(percept.last_observation[1:], percept.observation[:-1])
