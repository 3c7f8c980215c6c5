"""The training loop: runs, logs, validates, saves, and resumes exactly where it stopped."""

import contextlib
import functools
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

from meta_jax.core import Config, Objective, PyTree
from meta_jax.host import naming_dials
from meta_jax.lookup import UsageError, local_path
from meta_jax.training import checkpoints, processes
from meta_jax.training.checkpoints import CheckpointError
from meta_jax.training.lock import lock_workdir
from meta_jax.training.optimizers import averaged_params
from meta_jax.training.outer_step import TrainState
from meta_jax.training.train_loop import SoFar, TrainLoop
from meta_jax.training.writers import (
    MetricsWriter,
    OnMetrics,
    Progress,
    as_history,
    read_metrics,
)

# train state -> metrics; the parameters are the averaged ones, where the optimizer averages them
Validate = Callable[[TrainState], Mapping[str, float]]
_DIALS = (
    "lower --task_chunk, give --remat or a cheaper --learner.adjoint, or take smaller episodes; "
    "the run goes on from its last checkpoint"
)
_CALL_SECONDS = 2.0  # about what a compiled call takes, where a step takes less


class TrainingDivergedError(RuntimeError):
    """A loss, a gradient or all of validation is not finite."""


class LoopConfig(NamedTuple):
    """When things happen, in outer steps. All are multiples of `log_every` but `steps`.

    Attributes:
      steps: Number of outer steps in all, those of earlier sessions among them.
      log_every: Steps between lines of metrics, and at most in one compiled call.
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
        """Steps to the next line of metrics: up to a multiple of `log_every`, or to the end."""
        return min(self.log_every - step % self.log_every, self.steps - step)

    def logs_at(self, step: int) -> bool:
        """Whether there is a line of metrics after this step."""
        return step % self.log_every == 0 or step == self.steps

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
    with a checkpoint and the last state as the result; a call takes about two seconds, or one step
    where that takes longer.

    Of several processes all call this, and the first one writes and says what is said. A signal to
    any of them ends the run in all.

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
        metric, another process is training in the workdir, or (`OutOfMemoryError`) a step or a
        validation needs more memory than there is.
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
    workdir, say = local_path(workdir), say if processes.is_writer() else _say_nothing
    run = _Run(config, workdir, validate, objective, learner_config, keep_state, say, on_metrics)
    with _stop_signals() as stopped, lock_workdir(workdir):
        reached = _start(run, train_state)
        with _output(run, int(reached.train_state.step), tasks_per_step) as output:
            reached = _go_on(run, reached, train_loop, data, output, stopped)
        history = processes.from_writer(lambda: as_history(read_metrics(workdir)))
    step = int(reached.train_state.step)
    finished = step == config.steps
    if not finished:
        saved = f" and saved in {workdir}: the same command goes on from there"
        say(f"stopped at step {step} of {config.steps}{saved if step else ', nothing to save yet'}")
    elif validate is not None and config.eval_every and reached.best is None:
        raise TrainingDivergedError(
            f"no validation gave a finite {objective.metric if objective else 'metric'}, so there "
            "is no best checkpoint: lower the learning rates and start in a new workdir"
        )
    return FitResult(reached.train_state, reached.seconds, finished, history)


class _Reached(NamedTuple):
    """How far a run has come."""

    train_state: TrainState
    so_far: SoFar  # what the next line of metrics takes in
    best: float | None  # on validation
    seconds: float  # duration of the training, over all its sessions


def _start(run: _Run, train_state: TrainState) -> _Reached:
    """Where a run begins. The state is ours to donate."""
    restored, best = processes.from_writer(functools.partial(_read_workdir, run, train_state))
    state, so_far, seconds = train_state, SoFar(0, {}), 0.0
    if restored is not None:
        state, metadata, warnings = restored
        so_far, seconds = SoFar(*metadata.get("so_far", so_far)), metadata["seconds"]
        for line in warnings:
            run.say(line)
        run.say(f"resuming at step {metadata['step']} of {run.config.steps}")
    # A copy, for the loop donates it. Fresh and restored states are placed alike, so that one
    # compilation serves both.
    state = jax.tree.map(
        lambda leaf, like: processes.put(leaf, like.sharding, may_alias=False), state, train_state
    )
    return _Reached(state, so_far, best, seconds)


def _read_workdir(
    run: _Run, like: TrainState
) -> tuple[tuple[TrainState, dict[str, Any], list[str]] | None, float | None]:
    """The newest checkpoint, and the best validation so far; left-overs of a kill are removed."""
    checkpoints.tidy(run.folder)
    restored = checkpoints.restore_latest(run.folder, like, config=run.learner_config)
    step = int(like.step) if restored is None else int(restored[0].step)
    return restored, _best_so_far(run, step, read_metrics(run.workdir))


def _go_on(
    run: _Run,
    reached: _Reached,
    train_loop: TrainLoop,
    data: PyTree,
    output: "_Output",
    stopped: list[int],
) -> _Reached:
    """Trains to the end, or until any process was told to stop."""
    config, pace = run.config, _Pace()
    step, started = int(reached.train_state.step), time.monotonic() - reached.seconds
    (stop,) = processes.largest(bool(stopped))
    while step < config.steps and not stop:
        steps, called = pace.fitting(config.steps_from(step)), time.monotonic()
        reached = _advance(run, reached, train_loop, data, steps)
        seconds = time.monotonic() - called
        step += steps
        reached = reached._replace(seconds=time.monotonic() - started)
        output.advance(steps, seconds, reached.so_far.metrics)
        if config.logs_at(step):
            output.line(step, "train", reached.so_far.metrics)
            reached = reached._replace(so_far=SoFar(0, {}))
        if run.validate is not None and config.validates_at(step):
            reached = reached._replace(best=_select(run, reached, output))
        stop, slowest = processes.largest(bool(stopped), seconds)
        pace.measured(steps, slowest)
        if config.saves_at(step) or stop:
            metadata = _metadata(reached)
            checkpoints.save_step(
                run.folder,
                step,
                reached.train_state,
                metadata,
                every=config.checkpoint_every,
                config=run.learner_config,
            )
    return reached


def _metadata(reached: _Reached) -> dict[str, Any]:
    """What is saved beside a state; between two lines of metrics also their means so far."""
    metadata: dict[str, Any] = {"step": int(reached.train_state.step), "seconds": reached.seconds}
    count, means = reached.so_far
    if count:
        metadata["so_far"] = [count, {name: float(mean) for name, mean in means.items()}]
    return metadata


class _Pace:
    """How many steps a compiled call may take, so that a signal is answered within seconds."""

    def __init__(self) -> None:
        self._most, self._compiled = 1, False

    def fitting(self, wanted: int) -> int:
        """The steps of the next call, of those that are wanted."""
        return min(wanted, self._most)

    def measured(self, steps: int, seconds: float) -> None:
        """Learns from the call that has ended; the first one's time is that of compilation."""
        if self._compiled:
            self._most = max(1, int(_CALL_SECONDS * steps / max(seconds, 1e-6)))
        self._compiled = True


def _advance(
    run: _Run, reached: _Reached, train_loop: TrainLoop, data: PyTree, steps: int
) -> _Reached:
    """Makes one compiled call."""
    count, _ = reached.so_far
    with naming_dials("a step of training", _DIALS):
        train_state, metrics, finite = train_loop(reached.train_state, data, steps, reached.so_far)
        diverged = not finite  # the device has done the steps when this is known
    if diverged:
        step = int(train_state.step)
        last = processes.from_writer(functools.partial(checkpoints.latest_path, run.folder, step))
        saved = "nothing was saved yet" if last is None else f"the last good checkpoint is {last}"
        raise TrainingDivergedError(
            f"the loss or its gradient is not finite at step {step}; lower the learning rate "
            f"and go on, or start in a new workdir ({saved})"
        )
    return reached._replace(train_state=train_state, so_far=SoFar(count + steps, metrics))


class _Output:
    """The lines of metrics and the progress that a run shows; only the writing process has them."""

    def __init__(self, writer: MetricsWriter | None, progress: Progress | None) -> None:
        self._writer, self._progress = writer, progress
        self._steps, self._seconds = 0, 0.0  # since the last line

    def advance(self, steps: int, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Shows how far training has come."""
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        if self._progress is not None:
            self._progress.update(steps, metrics)

    def line(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Writes a line of metrics, for a line of training with its speed."""
        if self._writer is None:
            return
        self._writer.write(step, split, metrics)
        if split == "train":
            self._writer.write_timing(step, {"steps_per_second": self._steps / self._seconds})
            self._steps, self._seconds = 0, 0.0


@contextlib.contextmanager
def _output(run: _Run, step: int, tasks_per_step: int) -> Iterator[_Output]:
    if not processes.is_writer():
        yield _Output(None, None)
        return
    shown = ("loss",) if run.objective is None else ("loss", run.objective.metric)
    with (
        MetricsWriter(run.workdir, step, run.on_metrics) as writer,
        Progress(run.config.steps, step, tasks_per_step, shown) as progress,
    ):
        yield _Output(writer, progress)


def _say_nothing(line: str) -> None:
    del line


def _select(run: _Run, reached: _Reached, output: _Output) -> float | None:
    """Validates, and saves what is better than the best before; gives the best from now on."""
    assert run.validate is not None and run.objective is not None
    train_state, best, metadata = reached.train_state, reached.best, _metadata(reached)
    params = averaged_params(train_state)
    scores = run.validate(train_state._replace(params=params))
    score = _score(scores, run.objective)
    output.line(metadata["step"], "val", scores)
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
