"""RL^2: a policy with a memory learns, over trials of many tasks, to learn within one."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_jax import registry
from meta_jax.core import Array, LossAux, MetaLearner, Metrics, Objective, PyTree, Sample, with_loss
from meta_jax.lookup import UsageError
from meta_jax.networks.sequences import (
    SequenceNetwork,
    causal_transformer,
    linear_transformer,
    recurrent,
    running_sums,
    snail,
)
from meta_jax.objectives import check_kind, trial_return
from meta_jax.ranges import NotNegative, Positive, PositiveInt, Share
from meta_jax.reinforcement.environment import Environment
from meta_jax.reinforcement.ppo import (
    PolicyGradient,
    Reward,
    collect,
    ppo_updates,
    surrogate_loss,
)
from meta_jax.reinforcement.rollout import Percept, Trajectory, episode_returns, run_trial
from meta_jax.reinforcement.trial_policy import (
    Choice,
    Inputs,
    TrialPolicy,
    act_once,
    actions_of,
    as_agent,
    check_problem,
    init_policy,
    start_memory,
)

Memory = Literal["gru", "lstm", "transformer", "linear_transformer", "snail", "sums"]
_MEMORIES: dict[Memory, Callable[[int, int], SequenceNetwork]] = {
    "gru": lambda size, layers: recurrent(size, "gru"),
    "lstm": lambda size, layers: recurrent(size, "lstm"),
    "transformer": lambda size, layers: causal_transformer(size, layers),
    "linear_transformer": lambda size, layers: linear_transformer(size, layers),
    "snail": lambda size, layers: snail(width=size, filters=size),
    "sums": lambda size, layers: running_sums(size),
}
_MOST_EPISODES = 10  # whose returns are metrics of their own


@registry.learner("rl2", network=None, tasks="bandit", run={"task_batch": 400})
def rl2(
    *,
    objective: Objective = trial_return,
    memory: Memory = "gru",
    hidden_size: PositiveInt = 64,
    layers: PositiveInt = 2,
    inputs: Inputs = "steps",
    algorithm: Literal["ppo", "a2c"] = "ppo",
    reward: Reward = "sampled",
    discount: Share = 0.99,
    gae_lambda: Share = 0.9,
    entropy_weight: NotNegative = 0.01,
    value_weight: NotNegative = 0.5,
    clip: Positive = 0.2,
    epochs: PositiveInt = 3,
    minibatches: PositiveInt = 20,
) -> MetaLearner:
    """Builds an RL^2 learner: a policy whose memory lasts over a whole trial.

    At each step it reads the observation, its last action and reward, and whether an episode
    begins (Duan et al. 2016); its memory starts anew with every trial and never within one. What
    it maximises is the discounted return of the trial.

    Args:
      objective: Objective of the tasks; they are of reinforcement learning.
      memory: Kind of the memory: a recurrent layer 'gru' or 'lstm', a causal 'transformer',
        'linear_transformer' for one with linear attention, 'snail' (Mishra et al. 2018) for
        temporal convolutions with attention, or 'sums', which forgets the order of the steps.
      hidden_size: Units of the recurrent layer, width of a transformer, channels that each
        convolution of SNAIL adds, or number of sums.
      layers: Number of layers of a transformer.
      inputs: What the memory reads of the step before: in 'steps' its action and reward; in
        'transitions' the pair of its observation and action, plain and times the reward, which
        suits environments of few states.
      algorithm: Policy gradient: 'ppo' makes `epochs` x `minibatches` updates in an outer step,
        'a2c' makes one.
      reward: Reward that is learned from: 'sampled', those that came; 'expected', their means;
        'regret', minus the exact regret of each action. An environment must know the last two; the
        policy sees the sampled ones, and tests count them.
      discount: Discount of the return of a trial.
      gae_lambda: Lambda of the generalised advantage estimates, 0 to 1.
      entropy_weight: Factor of the policy's entropy in the loss.
      value_weight: Factor of the critic's squared error in the loss.
      clip: Change of an action's probability ratio beyond which 'ppo' gives no more reward.
      epochs: Times that 'ppo' uses each trial.
      minibatches: Updates of an epoch of 'ppo', each on other trials; divides the task batch.

    Returns:
      The learner. Its tasks are `Problem`s. `adapt` gives the memory at the beginning of a trial;
      `predict`, from a memory and a `Percept`, an action with its `Choice`, and the new memory.

    Raises:
      UsageError: tasks of another kind, or numbers below one.

    Examples:
      >>> from meta_jax.reinforcement.bandits import bandit
      >>> from meta_jax.reinforcement.environment import Problem
      >>> environment = bandit(arms=3)
      >>> problem = Problem(environment, environment.sample_task(jax.random.key(0)))
      >>> learner = rl2(hidden_size=8)
      >>> params, state = learner.init(jax.random.key(1), problem)
      >>> metrics = learner.evaluate(params, state, problem, jax.random.key(2))
      >>> sorted(metrics)
      ['loss', 'regret', 'return']
    """
    check_kind(objective, "control", "rl2")
    policy = TrialPolicy(_MEMORIES[memory](hidden_size, layers), inputs)
    settings = PolicyGradient(reward, discount, gae_lambda, entropy_weight, value_weight, clip)
    update = functools.partial(_update, settings, policy, epochs, minibatches)
    return MetaLearner(
        functools.partial(_init, policy),
        functools.partial(_adapt, policy),
        functools.partial(_predict, policy),
        functools.partial(_loss, settings, policy),
        functools.partial(_evaluate, policy),
        update=update if algorithm == "ppo" else None,
        updates_per_step=epochs * minibatches if algorithm == "ppo" else 1,
    )


def _init(policy: TrialPolicy, key: Array, task: PyTree) -> tuple[PyTree, PyTree]:
    return init_policy(policy, key, check_problem(task, "rl2").environment), {}


def _adapt(
    policy: TrialPolicy,
    params: PyTree,
    state: PyTree,
    task: PyTree,
    key: Array,
    *,
    train: bool,
) -> PyTree:
    """The memory at the beginning of a trial of a task, of which only the environment is seen."""
    del state, key, train
    return start_memory(policy, params, check_problem(task, "rl2").environment)


def _predict(
    policy: TrialPolicy,
    params: PyTree,
    memory: PyTree,
    percept: Percept,
    key: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> tuple[tuple[Array, Choice], PyTree]:
    """An action and its choice, and the memory after it."""
    del train, mask
    actions = actions_of(percept, params["policy"]["bias"].shape[0])
    action, memory, choice = act_once(policy, params, actions, memory, percept, key)
    return (action, choice), memory


def _loss(
    settings: PolicyGradient,
    policy: TrialPolicy,
    params: PyTree,
    state: PyTree,
    task: PyTree,
    key: Array,
) -> tuple[Array, LossAux]:
    """The loss of advantage actor-critic on one trial that the policy acts now."""
    problem = check_problem(task, "rl2")
    experience = collect(settings, policy, jax.lax.stop_gradient(params), problem, key)
    loss, metrics = surrogate_loss(
        settings, policy, problem.environment.actions, params, experience
    )
    return loss, LossAux(state, {**metrics, "return": experience.trajectory.reward.sum()})


def _evaluate(
    policy: TrialPolicy, params: PyTree, state: PyTree, task: PyTree, key: Array
) -> Metrics:
    problem = check_problem(task, "rl2")
    agent = as_agent(policy, params, problem.environment)
    return trial_metrics(run_trial(key, problem, agent), problem.environment)


def trial_metrics(trajectory: Trajectory, environment: Environment) -> Metrics:
    """What a test measures on one trial.

    Args:
      trajectory: The trial.
      environment: Its environment.

    Returns:
      'return', the sum of the sampled rewards, and 'loss', its negative; 'regret', what the actions
      lost in expectation, where the environment knows it; 'episode_1', ..., the return of each
      episode, where episodes have several steps and there are at most ten.
    """
    total = trajectory.reward.sum()
    metrics = {"return": total}
    if trajectory.regret is not None:
        metrics["regret"] = trajectory.regret.sum()
    if environment.horizon > 1 and environment.episodes <= _MOST_EPISODES:
        returns = episode_returns(trajectory, environment)
        metrics |= {f"episode_{i + 1}": value for i, value in enumerate(returns)}
    return with_loss(-total, metrics)


@functools.partial(jax.vmap, out_axes=(0, 0, 0))
def _split_keys(key: Array) -> tuple[Array, Array, Array]:
    first, second, third = jax.random.split(key, 3)
    return first, second, third


def _update(
    settings: PolicyGradient,
    policy: TrialPolicy,
    epochs: int,
    minibatches: int,
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
    """One phase of PPO: trials of all tasks, then the updates on them."""
    if keys.shape[0] % minibatches:
        raise UsageError(
            f"{minibatches} minibatches must divide the task batch {keys.shape[0]}: change one"
        )
    if mesh is not None:
        keys = jax.lax.with_sharding_constraint(keys, NamedSharding(mesh, PartitionSpec("task")))
    task_keys, trial_keys, order_keys = _split_keys(keys)
    problems = jax.vmap(sample, (0, None))(task_keys, data)
    actions = check_problem(problems, "rl2").environment.actions
    experience = jax.vmap(functools.partial(collect, settings, policy, params))(
        problems, trial_keys
    )
    (params, opt_state), metrics = ppo_updates(
        settings,
        policy,
        optimizer,
        actions,
        (params, opt_state),
        experience,
        order_keys[0],
        epochs=epochs,
        minibatches=minibatches,
    )
    metrics["return"] = experience.trajectory.reward.sum(1).mean()
    return params, state, opt_state, metrics
