"""The training loop: runs, logs, validates, saves, and resumes exactly where it stopped."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np

from meta_jax.core import Config, Metrics, Objective, PyTree
from meta_jax.lookup import UsageError, local_path
from meta_jax.training import checkpoints
from meta_jax.training.checkpoints import CheckpointError
from meta_jax.training.lock import lock_workdir
from meta_jax.training.optimizers import averaged_params
from meta_jax.training.outer_step import TrainLoop, TrainState
from meta_jax.training.writers import (
    MetricsWriter,
    OnMetrics,
    Progress,
    as_history,
    read_metrics,
)

# train state -> metrics; the parameters are the averaged ones, where the optimizer averages them
Validate = Callable[[TrainState], Mapping[str, float]]


class TrainingDivergedError(RuntimeError):
    """A loss, a gradient or all of validation is not finite."""


class LoopConfig(NamedTuple):
    """When things happen, in outer steps. All are multiples of `log_every` but `steps`.

    Attributes:
      steps: Number of outer steps in all, those of earlier sessions among them.
      log_every: Steps in one compiled call, and between lines of metrics.
      eval_every: Steps between validations; 0 for none.
      checkpoint_every: Steps between checkpoints.
    """

    steps: int
    log_every: int = 50
    eval_every: int = 500
    checkpoint_every: int = 500

    def check(self) -> None:
        """Raises UsageError where the numbers do not fit each other."""
        if min(self.steps, self.log_every, self.checkpoint_every) < 1 or self.eval_every < 0:
            raise UsageError(
                "steps, log_every and checkpoint_every must be at least 1, eval_every at least 0"
            )
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) % self.log_every:
                raise UsageError(
                    f"{name}={getattr(self, name)} must be a multiple of log_every={self.log_every}"
                )

    def steps_from(self, step: int) -> int:
        """Steps of the next compiled call: up to a multiple of `log_every`, or to the end."""
        return min(self.log_every - step % self.log_every, self.steps - step)

    def validates_at(self, step: int) -> bool:
        """Whether there is a validation after this step."""
        return bool(self.eval_every) and (step % self.eval_every == 0 or step == self.steps)

    def saves_at(self, step: int) -> bool:
        """Whether there is a checkpoint after this step."""
        return step % self.checkpoint_every == 0 or step == self.steps


class FitResult(NamedTuple):
    """What a run leaves behind.

    Attributes:
      train_state: State of the training after the last step.
      seconds: Duration of the training, over all its sessions.
      finished: Whether all steps are done: False where SIGTERM or Ctrl-C stopped it, and the same
        call goes on.
      history: 'train' or 'val' -> 'step' or the name of a metric -> values.
    """

    train_state: TrainState
    seconds: float
    finished: bool
    history: dict[str, dict[str, np.ndarray]]


class _Run(NamedTuple):
    """What stays the same during a run."""

    config: LoopConfig
    workdir: Path
    validate: Validate | None
    objective: Objective | None
    learner_config: Config | None
    keep_state: bool
    say: Callable[[str], None]
    on_metrics: OnMetrics | None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.workdir / "checkpoints"


def fit(
    train_state: TrainState,
    train_loop: TrainLoop,
    data: PyTree,
    *,
    config: LoopConfig,
    workdir: Path | str,
    tasks_per_step: int,
    validate: Validate | None = None,
    objective: Objective | None = None,
    learner_config: Config | None = None,
    keep_state: bool = True,
    say: Callable[[str], None] = print,
    on_metrics: OnMetrics | None = None,
) -> FitResult:
    """Trains from the newest intact checkpoint of a workdir, or from `train_state`.

    A run that was stopped at any moment and started again ends with bitwise the same parameters,
    optimizer state and metrics as one that was not. The workdir gets `metrics.jsonl`,
    `tensorboard/` and `checkpoints/` with the latest two steps and, where there is validation,
    `best`; `config.json`, which `meta_jax.load` needs, is written by `write_config`. SIGTERM and
    Ctrl-C, or interrupting the cell of a notebook, end the run after the compiled call under way,
    with a checkpoint and the last state as the result.

    Args:
      train_state: The state before the first step; the caller may go on using it.
      train_loop: Many steps in one call, from `make_train_loop`.
      data: What the tasks are drawn from.
      config: When things happen.
      workdir: Folder in which everything is written.
      tasks_per_step: The task batch, for the progress bar.
      validate: Gives metrics of the present state, such as `make_validate` builds it.
      objective: Says which metric of `validate` selects the best checkpoint, and which way; needed
        where `validate` is given.
      learner_config: Settings of the learner, `learner.config`, which go into the checkpoints.
      keep_state: Whether the best checkpoint holds the learner's state beside its parameters.
      say: Takes lines meant for the user.
      on_metrics: Function that is called with (step, 'train' or 'val', metrics) whenever some were
        measured, to draw or to log them; metrics are floats by name. What it raises ends the run,
        which the same call resumes from its last checkpoint.

    Returns:
      The last state, the time it took, whether the run came to its end, and all its metrics.

    Raises:
      UsageError: the numbers of `config` do not fit, `validate` does not give the objective's
        metric, or another process is training in the workdir.
      TrainingDivergedError: a loss or a gradient is not finite, and the last good checkpoint stays;
        or no validation was finite.
      CheckpointError: nothing intact to resume from, checkpoints of another learner, or the disk is
        full.
    """
    config.check()
    if validate is not None and objective is None:
        raise UsageError(
            "validate is given without an objective: say which metric selects the best"
        )
    workdir = local_path(workdir)
    run = _Run(config, workdir, validate, objective, learner_config, keep_state, say, on_metrics)
    with lock_workdir(workdir):
        return _fit(run, train_state, train_loop, data, tasks_per_step)


def _fit(
    run: _Run, train_state: TrainState, train_loop: TrainLoop, data: PyTree, tasks_per_step: int
) -> FitResult:
    """As `fit`, in a workdir that no other process has."""
    config, objective, validate, workdir = run.config, run.objective, run.validate, run.workdir
    train_state, seconds = _start(run, train_state)
    step, started = int(train_state.step), time.monotonic()
    shown = ("loss",) if objective is None else ("loss", objective.metric)
    with (
        _stop_signals() as stopped,
        MetricsWriter(workdir, step, run.on_metrics) as writer,
        Progress(config.steps, step, tasks_per_step, shown) as progress,
    ):
        best = _best_so_far(run, step, read_metrics(workdir))
        while step < config.steps and not stopped:
            train_state, metrics = _advance(run, train_state, train_loop, data, writer)
            progress.update(int(train_state.step) - step, metrics)
            step = int(train_state.step)
            metadata = {"step": step, "seconds": seconds + time.monotonic() - started}
            if validate is not None and config.validates_at(step):
                best = _select(run, train_state, best, metadata, writer)
            if config.saves_at(step) or stopped:
                checkpoints.save_step(
                    run.folder, step, train_state, metadata, config=run.learner_config
                )
    finished = step == config.steps
    if not finished:
        run.say(
            f"stopped at step {step} of {config.steps} and saved in {workdir}: the same command "
            "goes on from there"
        )
    elif validate is not None and config.eval_every and best is None:
        raise TrainingDivergedError(
            f"no validation gave a finite {objective.metric if objective else 'metric'}, so there "
            "is no best checkpoint: lower the learning rates and start in a new workdir"
        )
    history = as_history(read_metrics(workdir))
    return FitResult(train_state, seconds + time.monotonic() - started, finished, history)


def _start(run: _Run, train_state: TrainState) -> tuple[TrainState, float]:
    """The state to start from, which is ours to donate, and the seconds of earlier sessions."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    restored = checkpoints.restore_latest(run.folder, train_state, config=run.learner_config)
    seconds = 0.0
    if restored is not None:
        train_state, metadata, warnings = restored
        seconds = metadata["seconds"]
        for line in warnings:
            run.say(line)
        run.say(f"resuming at step {metadata['step']} of {run.config.steps}")
    # A copy, for the loop donates it. Fresh and restored states are placed alike, so that one
    # compilation serves both.
    return jax.device_put(train_state, shardings, may_alias=False), seconds


def _advance(
    run: _Run, train_state: TrainState, train_loop: TrainLoop, data: PyTree, writer: MetricsWriter
) -> tuple[TrainState, Metrics]:
    """Makes one compiled call, and writes what it measured."""
    step, started = int(train_state.step), time.monotonic()
    train_state, metrics, finite = train_loop(train_state, data, run.config.steps_from(step))
    reached = int(train_state.step)
    if not finite:
        last = checkpoints.latest_path(run.folder, reached)
        saved = "nothing was saved yet" if last is None else f"the last good checkpoint is {last}"
        raise TrainingDivergedError(
            f"the loss or its gradient is not finite at step {reached}; lower the learning rate "
            f"and go on, or start in a new workdir ({saved})"
        )
    writer.write(reached, "train", metrics)
    seconds = time.monotonic() - started
    writer.write_timing(reached, {"steps_per_second": (reached - step) / seconds})
    return train_state, metrics


def _select(
    run: _Run,
    train_state: TrainState,
    best: float | None,
    metadata: dict[str, Any],
    writer: MetricsWriter,
) -> float | None:
    """Validates, and saves what is better than the best before; gives the best from now on."""
    assert run.validate is not None and run.objective is not None
    params = averaged_params(train_state)
    scores = run.validate(train_state._replace(params=params))
    score = _score(scores, run.objective)
    writer.write(metadata["step"], "val", scores)
    if not math.isfinite(score):
        step = metadata["step"]
        run.say(f"validation at step {step} gave {run.objective.metric} = {score}: not selected")
    if not is_better(score, best, run.objective):
        return best
    learned = {"params": params}
    if run.keep_state:  # a state of scope 'task' is of tasks that were trained on: not learned
        learned["state"] = train_state.state
    found = {name: float(value) for name, value in scores.items()}
    checkpoints.save(run.folder, "best", learned, {**metadata, **found}, config=run.learner_config)
    return score


def _score(scores: Mapping[str, float], objective: Objective) -> float:
    if objective.metric not in scores:
        raise UsageError(
            f"validate gave no '{objective.metric}', which the objective selects by, but "
            f"{', '.join(scores) or 'nothing'}: give it, or an objective with one of these"
        )
    return float(scores[objective.metric])


def is_better(score: float, best: float | None, objective: Objective) -> bool:
    """Whether a score is finite and beats the best before; of equals the earlier is the best.

    Args:
      score: Value of the objective's metric.
      best: The best value before; None for none.
      objective: Says which way is better.
    """
    if not math.isfinite(score):
        return False
    return best is None or (score > best if objective.maximise else score < best)


def _best_so_far(run: _Run, step: int, lines: list[dict[str, Any]]) -> float | None:
    """The best validation up to a step, by the lines of metrics and the best checkpoint itself.

    The lines may have been deleted, and the checkpoint of a later step is that of steps to redo.
    """
    objective, best = run.objective, None
    if objective is None:
        return None
    scored = [line for line in lines if line["split"] == "val"]
    with contextlib.suppress(CheckpointError):  # there is none yet, or it is damaged
        scored.append(checkpoints.read_metadata(run.folder / "best"))
    for line in scored:
        if line.get("step", 0) <= step and objective.metric in line:
            score = line[objective.metric]
            best = score if is_better(score, best, objective) else best
    return best


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C puts an entry into, instead of ending the program.

    A second Ctrl-C ends it. Only the main thread can handle signals; in others nothing is changed.
    """
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and signal.SIGINT in stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
