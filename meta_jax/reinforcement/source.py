"""Environments as sources of tasks."""

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec

from meta_jax import registry
from meta_jax.core import Array, PyTree, Sample
from meta_jax.data.source import EpisodeSize, TaskSource, source_from_sampler
from meta_jax.objectives import trial_return
from meta_jax.reinforcement.environment import Environment, Problem, check_environment

P = ParamSpec("P")


def source_from_environment(
    environment: Environment, *, baselines: tuple[str, ...] = ()
) -> TaskSource:
    """Builds a source of the tasks of an environment; all splits are drawn alike.

    Args:
      environment: The environment.
      baselines: Names of learners shown beside a result.

    Raises:
      UsageError: functions of the environment that do not fit each other.

    Examples:
      >>> import jax
      >>> from meta_jax.reinforcement.bandits import bandit
      >>> source = source_from_environment(bandit(arms=3))
      >>> tasks = source.tasks("train", EpisodeSize(1, 1, 1), train=True)
      >>> tasks.sample(jax.random.key(0), tasks.data).task.shape
      (3,)
    """
    check_environment(environment)
    return source_from_sampler(
        functools.partial(_sampler, environment), trial_return, baselines=baselines
    )


def _sampler(environment: Environment, size: EpisodeSize) -> Sample:
    del size  # a trial has its own
    return functools.partial(_sample, environment)


def _sample(environment: Environment, key: Array, data: PyTree, /) -> Problem:
    del data
    return Problem(environment, environment.sample_task(key))


def environment_tasks(
    name: str, *, run: Mapping[str, int] | None = None
) -> Callable[[Callable[P, Environment]], Callable[P, Environment]]:
    """Registers a factory of environments as a source of tasks, with its settings.

    Args:
      name: Name that `--tasks` takes.
      run: Usual settings of a training run by their flags.
    """

    def decorate(factory: Callable[P, Environment]) -> Callable[P, Environment]:
        checked = registry.with_ranges(factory, name)

        @functools.wraps(factory)
        def source(*args: P.args, **kwargs: P.kwargs) -> TaskSource:
            return source_from_environment(checked(*args, **kwargs))

        registry.tasks(name, run=run)(source)
        return checked

    return decorate
