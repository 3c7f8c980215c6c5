"""The training loop: runs, logs, validates, saves, and resumes exactly where it stopped."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax

from meta_jax.core import PyTree
from meta_jax.training import checkpoints
from meta_jax.training.outer_step import TrainState
from meta_jax.training.writers import MetricsWriter, Progress, read_metrics

# How validation metrics are compared: True where more is better.
_BETTER = {"accuracy": True, "mse": False, "last_loss": False}


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite."""


class Schedule(NamedTuple):
    """When things happen, in outer steps. All are multiples of `log_every` but `steps`."""

    steps: int  # in all
    log_every: int  # steps in one compiled call, and between lines of metrics
    eval_every: int  # between validations; 0 for none
    checkpoint_every: int

    def check(self) -> None:
        """Raises ValueError where the numbers do not fit each other."""
        if min(self.steps, self.log_every, self.checkpoint_every) < 1 or self.eval_every < 0:
            raise ValueError(
                "steps, log_every and checkpoint_every must be at least 1, eval_every at least 0"
            )
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of log_every={self.log_every}"
                )


class Outcome(NamedTuple):
    """What a run leaves behind."""

    train_state: TrainState
    seconds: float  # of training, over all its sessions
    finished: bool  # False where SIGTERM stopped it; the same command goes on


def fit(
    train_state: TrainState,
    run: Callable[[TrainState, PyTree, int], tuple[TrainState, dict, jax.Array]],
    data: PyTree,
    *,
    schedule: Schedule,
    workdir: Path,
    tasks_per_step: int,
    validate: Callable[[TrainState], dict[str, float]] | None = None,
    keep_state: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Trains from the newest intact checkpoint of a workdir, or from `train_state`.

    A run that was stopped at any moment and started again ends with bitwise the same parameters,
    optimizer state and metrics as one that was not. The workdir gets `metrics.jsonl`,
    `tensorboard/` and `checkpoints/` with the latest two steps and, where there is validation,
    `best`.

    Args:
      train_state: the state before the first step; it is donated.
      run: from `make_run`.
      data: the sampler's second argument.
      schedule: when things happen.
      workdir: where everything is written.
      tasks_per_step: the task batch, for the progress bar.
      validate: gives metrics of the present state, of which `accuracy` (or else `mse`, or else
        `last_loss`) selects the best checkpoint.
      keep_state: whether the best checkpoint holds the learner's state beside its parameters.
      say: takes lines meant for the user.

    Returns:
      The last state, the time it took, and whether the run came to its end.

    Raises:
      ValueError: the schedule's numbers do not fit.
      TrainingDivergedError: the loss is not finite; the last good checkpoint stays.
      CheckpointError: nothing intact to resume from, or the disk is full.
    """
    schedule.check()
    folder = workdir / "checkpoints"
    seconds = 0.0
    shardings = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    restored = checkpoints.restore_latest(folder, train_state)
    if restored is not None:
        train_state, metadata, warnings = restored
        seconds = metadata["seconds"]
        for line in warnings:
            say(line)
        say(f"resuming at step {metadata['step']} of {schedule.steps}")
    # Fresh and restored states are placed alike, so that one compilation serves both.
    train_state = jax.device_put(train_state, shardings)
    step = int(train_state.step)

    stopped = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        stopped.append(number)

    # Python lets the main thread alone handle signals.
    handles = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if handles else None
    started = time.monotonic()
    try:
        with (
            MetricsWriter(workdir, step) as writer,
            Progress(schedule.steps, step, tasks_per_step) as progress,
        ):
            best = _best(read_metrics(workdir))
            while step < schedule.steps and not stopped:
                call_started = time.monotonic()
                until = min(step + schedule.log_every, schedule.steps)
                train_state, metrics, finite = run(train_state, data, until)
                reached = int(train_state.step)
                if not finite:
                    raise TrainingDivergedError(
                        f"the loss is not finite at step {reached}; lower the learning rate and "
                        f"start in a new workdir (the last good checkpoint is in {folder})"
                    )
                done, step = reached - step, reached
                writer.write(step, "train", metrics)
                writer.write_timing(
                    step, {"steps_per_second": done / (time.monotonic() - call_started)}
                )
                progress.update(done, metrics)
                last = step == schedule.steps
                due = schedule.eval_every and (step % schedule.eval_every == 0 or last)
                metadata: dict[str, Any] = {
                    "step": step,
                    "seconds": seconds + time.monotonic() - started,
                }
                if validate is not None and due:
                    scores = validate(train_state)
                    writer.write(step, "val", scores)
                    if _is_better(scores, best):
                        best = scores
                        # A state of scope 'task' is of tasks that were trained on: not learned.
                        learned = {"params": train_state.params}
                        if keep_state:
                            learned["state"] = train_state.state
                        checkpoints.save(folder, "best", learned, {**metadata, **scores})
                if last or stopped or step % schedule.checkpoint_every == 0:
                    checkpoints.save_step(folder, step, train_state, metadata)
    finally:
        if handles:
            signal.signal(signal.SIGTERM, previous)
    finished = step == schedule.steps
    if not finished:
        say(f"stopped at step {step} of {schedule.steps}: the same command goes on from there")
    return Outcome(train_state, seconds + time.monotonic() - started, finished)


def _is_better(scores: dict[str, float], best: dict[str, float] | None) -> bool:
    name = next(name for name in _BETTER if name in scores)
    if best is None:
        return True
    return scores[name] > best[name] if _BETTER[name] else scores[name] < best[name]


def _best(lines: list[dict[str, Any]]) -> dict[str, float] | None:
    """The best validation so far, as it was selected line by line."""
    best = None
    for line in lines:
        if line["split"] == "val" and _is_better(line, best):
            best = line
    return best
