"""Many outer steps in one compiled call."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Array, Metrics, PyTree
from meta_jax.data.streams import Buffer, EpisodeStream, key_bits
from meta_jax.training.outer_step import OuterStep, TrainState

# (train state, data, steps, so far) -> (train state, mean metrics, whether all was finite)
TrainLoop = Callable[..., tuple[TrainState, Metrics, Array]]


class SoFar(NamedTuple):
    """Metrics of the steps that a mean has taken in already.

    Attributes:
      steps: How many they are.
      metrics: Their means by name; none before the first step.
    """

    steps: int
    metrics: Mapping[str, Any]


class CompiledLoop:
    """A compiled call of many outer steps; see `make_train_loop`."""

    def __init__(self, outer_step: OuterStep) -> None:
        """Compiles nothing yet."""
        # Traced once for the shapes and the loop alike.
        self._step = jax.jit(functools.partial(_step_on, outer_step), inline=True)
        self._run = jax.jit(self._many_steps, donate_argnums=0)

    def __call__(
        self, train_state: TrainState, data: PyTree, steps: int, so_far: SoFar | None = None
    ) -> tuple[TrainState, Metrics, Array]:
        """Runs `steps` more steps."""
        if isinstance(data, EpisodeStream):
            return self._run_stream(train_state, data, steps, so_far or SoFar(0, {}))
        return self._run(*self.arguments(train_state, data, steps, so_far))

    def _run_stream(
        self, train_state: TrainState, stream: EpisodeStream, steps: int, so_far: SoFar
    ) -> tuple[TrainState, Metrics, Array]:
        """Runs the steps of one buffer after another."""
        step, bits = int(train_state.step), key_bits(train_state.key)
        end = step + steps
        while True:
            left, buffer = stream.at(bits, step)
            run = min(left, end - step)
            train_state, metrics, finite = self._run(
                *self.arguments(train_state, buffer, run, so_far)
            )
            step, so_far = step + run, SoFar(so_far.steps + run, metrics)
            if step == end or not finite:
                return train_state, metrics, finite

    def arguments(
        self, train_state: TrainState, data: PyTree, steps: Any, so_far: SoFar | None = None
    ) -> tuple[TrainState, PyTree, Any, SoFar]:
        """The arguments of the compiled program, among them the means that it starts from."""
        shapes = jax.eval_shape(self._step, train_state, data)[1]
        count, means = so_far or SoFar(0, {})
        started = {name: np.asarray(means.get(name, 0), s.dtype) for name, s in shapes.items()}
        return train_state, data, steps, SoFar(count, started)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """The program for arguments that `arguments` gave, lowered."""
        return self._run.lower(*arguments)

    def programs(self) -> int:
        """How many programs were compiled, one for each combination of shapes."""
        return self._run._cache_size()  # pyrefly: ignore[missing-attribute]

    def _many_steps(
        self, train_state: TrainState, data: PyTree, steps: Array, so_far: SoFar
    ) -> tuple[TrainState, Metrics, Array]:
        end = train_state.step + steps

        def body(carry: tuple) -> tuple:
            train_state, (count, mean), _ = carry
            train_state, metrics = self._step(train_state, data)
            # A mean step by step, which is the same however the steps are shared among calls.
            mean = jax.tree.map(lambda m, new: m + (new - m) / (count + 1), mean, metrics)
            return train_state, SoFar(count + 1, mean), is_finite(metrics)

        train_state, (_, mean), finite = jax.lax.while_loop(
            lambda carry: (carry[0].step < end) & carry[2],
            body,
            (train_state, so_far, jnp.bool_(True)),
        )
        return train_state, mean, finite


def _step_on(
    outer_step: OuterStep, train_state: TrainState, data: PyTree
) -> tuple[TrainState, Metrics]:
    """A step on data, or on a buffer of examples that were gathered for some steps."""
    if isinstance(data, Buffer):
        data = data.group(train_state.step)
    return outer_step(train_state, data)


def make_train_loop(outer_step: OuterStep) -> CompiledLoop:
    """Builds a compiled call of many outer steps, however many are asked for.

    Args:
      outer_step: One step, from `make_outer_step`.

    Returns:
      A function (train state, data, steps, so_far=None) -> (train state, mean metrics, finite),
      whose data may be a stream from `training_data`. It runs `steps` more steps and donates the
      train state it is given. The means take in the steps of `so_far`, their number and their
      means: several calls give bitwise the state and the means of one. Where a loss or a gradient
      is not finite, it stops behind that step and `finite` is False.
    """
    return CompiledLoop(outer_step)


def is_finite(metrics: Metrics) -> Array:
    """Whether the loss and, where it is among a step's metrics, the gradient's norm are finite."""
    finite = jnp.isfinite(metrics["loss"])
    if "gradient_norm" in metrics:
        finite &= jnp.isfinite(metrics["gradient_norm"])
    return finite
