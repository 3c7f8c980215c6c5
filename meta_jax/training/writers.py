"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and a progress bar."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from meta_jax.lookup import UsageError, local_path

_FILE = "metrics.jsonl"
_PERIOD = 30.0  # seconds between lines of progress, where there is no bar


class OnMetrics(Protocol):
    """Takes metrics as soon as they are written."""

    def __call__(self, step: int, split: str, metrics: Mapping[str, float], /) -> object:
        """Takes the outer steps done, 'train' or 'val', and the metrics by name."""
        ...


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl`, and mirrors them into TensorBoard.

    A line is `{"step": 100, "accuracy": 0.5, "loss": 1.25, "split": "val"}`: step first, the rest
    by name. Lines hold nothing that differs between two equal runs (no times), and what lies
    beyond `resume_step` is dropped when the writer is made, so the file of an interrupted and
    resumed run is bitwise that of an uninterrupted one, provided that a step's metrics are written
    before its checkpoint is saved. TensorBoard's event files are written where tensorboardX is
    installed, under `workdir/tensorboard`.
    """

    def __init__(
        self, workdir: Path | str, resume_step: int = 0, on_metrics: OnMetrics | None = None
    ) -> None:
        """Opens the file and drops what a resumed run will write again.

        Args:
          workdir: The run's folder; made if it is not there.
          resume_step: Outer steps done at the checkpoint that the run starts from; lines of later
            steps, and a last line that a kill cut short, are removed. 0 is a run from the start,
            which keeps nothing.
          on_metrics: Function that is called with each line after it was written.

        Raises:
          UsageError: a line before the last is not one that this class writes, or the file is a
            folder.
        """
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / _FILE
        _check_file(path)
        kept = [line for line in _lines(path) if line["step"] <= resume_step] if resume_step else []
        write_text(path, "".join(_dump(line) for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(workdir / "tensorboard", resume_step)
        self._on_metrics = on_metrics

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Appends one line and flushes it.

        Args:
          step: Outer steps done.
          split: 'train', 'val' or 'test'.
          metrics: Real scalars by name; Python, numpy or JAX ones.

        Raises:
          ValueError: a metric is called 'step' or 'split'.
        """
        if clash := {"step", "split"} & metrics.keys():
            raise ValueError(f"a metric may not be called {min(clash)!r}; rename it")
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_dump({"step": int(step), "split": split, **values}))
        self._file.flush()
        self._mirror(step, {f"{split}/{name}": value for name, value in values.items()})
        if self._on_metrics is not None:
            self._on_metrics(int(step), split, values)

    def write_timing(self, step: int, timing: Mapping[str, float]) -> None:
        """Writes what differs from run to run (steps per second, ...) to TensorBoard alone."""
        self._mirror(step, {f"timing/{name}": value for name, value in timing.items()})

    def close(self) -> None:
        """Closes the files; nothing can be written afterwards."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        """Returns itself, to be closed on leaving the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files."""
        self.close()

    def _mirror(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board is not None:
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, step)


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
    """Reads `workdir/metrics.jsonl`.

    Returns:
      One dictionary per line, in the order written; an empty list if there is no file. A last
      line that a kill cut short is left out.

    Raises:
      UsageError: a line before the last is not one that `MetricsWriter` writes, or the file is a
        folder.
    """
    return _lines(Path(workdir) / _FILE)


def as_history(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Turns lines of metrics into arrays: split, such as 'train', -> name -> values.

    Args:
      lines: As `read_metrics` gives them.

    Returns:
      For each split its 'step' and its metrics, all of one length; NaN where a line lacks a metric.

    Examples:
      >>> history = as_history([{"step": 2, "split": "train", "loss": 0.5}])
      >>> history["train"]["step"].tolist(), history["train"]["loss"].tolist()
      ([2], [0.5])
    """
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        splits.setdefault(line["split"], []).append(line)
    return {
        split: {
            "step": np.array([line["step"] for line in chosen]),
            **{
                name: np.array([line.get(name, np.nan) for line in chosen])
                for name in sorted({name for line in chosen for name in line} - {"step", "split"})
            },
        }
        for split, chosen in splits.items()
    }


class Progress:
    """A progress bar: steps/s, tasks/s, chosen metrics and time left.

    On a terminal it is drawn on stderr; in a notebook it is a widget, if ipywidgets is installed.
    Elsewhere (a pipe, a log) stderr gets a line every half minute. The first steps include
    compilation, so speed and time left are told only from the steps after them.
    """

    def __init__(
        self,
        total_steps: int,
        initial: int,
        tasks_per_step: int,
        shown: Sequence[str] = ("loss",),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Draws the bar.

        Args:
          total_steps: Outer steps of the whole run.
          initial: Outer steps done before, by the run that this one resumes.
          tasks_per_step: Tasks in an outer step's batch.
          shown: Names of the metrics to show, where they are given.
          clock: Function that gives the time in seconds.
        """
        self._tasks_per_step = tasks_per_step
        self._shown = shown
        self._clock = clock
        self._total, self._done = total_steps, initial
        self._last = (clock(), initial)  # time and step of the last line
        self._compiled = False  # whether steps were done, so that those after them tell the speed
        bar = _bar_class()
        self._bar = bar and bar(
            total=total_steps, initial=initial, unit="step", dynamic_ncols=True, smoothing=0.1
        )

    def update(self, steps: int, metrics: Mapping[str, Any]) -> None:
        """Moves the bar on.

        Args:
          steps: Outer steps done since the last call.
          metrics: Scalars by name.
        """
        self._done += steps
        if self._bar is None:
            self._write_line(metrics)
            return
        shown = self._texts(metrics)
        # tqdm's own rate is steps/s; it is None until the first interval has passed.
        rate = self._bar.format_dict["rate"]
        if rate is not None:
            shown = {"tasks/s": f"{rate * self._tasks_per_step:.0f}", **shown}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)

    def _texts(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        return {name: f"{float(metrics[name]):.4g}" for name in self._shown if name in metrics}

    def _write_line(self, metrics: Mapping[str, Any]) -> None:
        """Writes a line, half a minute after the last."""
        now, (before, step) = self._clock(), self._last
        if self._done == step:
            return
        compiled, self._compiled = self._compiled, True
        if now - before < _PERIOD:
            if not compiled:
                self._last = (now, self._done)
            return
        self._last = (now, self._done)
        parts = [
            f"step {self._done} of {self._total}",
            *(f"{name} {text}" for name, text in self._texts(metrics).items()),
        ]
        if compiled:
            rate = (self._done - step) / (now - before)
            parts += [
                f"{rate * self._tasks_per_step:.3g} tasks/s",
                f"{duration((self._total - self._done) / rate)} left",
            ]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        """Returns itself, to be closed on leaving the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the bar's line."""
        self.close()


def _bar_class() -> Any | None:
    """The progress bar for where this runs; None where no bar can be drawn."""
    if _in_notebook():
        with contextlib.suppress(ImportError):
            import ipywidgets  # noqa: F401  # pyrefly: ignore[missing-import]
            from tqdm.notebook import tqdm as notebook_bar

            return notebook_bar
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm
    return None


def _in_notebook() -> bool:
    """Whether this is a cell of a notebook, which a kernel of IPython runs."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """A duration as people read it, in its two largest units.

    Examples:
      >>> duration(59.7), duration(754), duration(7500)
      ('60 s', '12 min 34 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _dump(line: Mapping[str, Any]) -> str:
    rest = {name: line[name] for name in sorted(line) if name != "step"}
    return json.dumps({"step": line["step"], **rest}) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    _check_file(path)
    if not path.exists():
        return []
    # Only a line that ends was written whole.
    *whole, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            _check_line(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: line {number} is damaged; remove that line") from error
        lines.append(line)
    return lines


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder, where lines of metrics belong: remove or rename it")


def _check_line(line: Any) -> None:
    """Raises ValueError, KeyError or TypeError where `MetricsWriter` did not write a line."""
    if not isinstance(line["split"], str) or not isinstance(line["step"], int):
        raise TypeError
    for name in line.keys() - {"step", "split"}:
        float(line[name])


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one piece: a kill leaves the older one or the new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def output_file(path: Path | str, name: str = "output") -> Path:
    """The file that a result will be written to, refused before anything is computed.

    Args:
      path: Path as somebody gave it.
      name: Name of the setting in messages.

    Raises:
      UsageError: it is a folder or a device, or nothing can be written beside it.
    """
    found = local_path(path)
    temporary = found.with_name(found.name + ".new")
    try:
        if found.is_dir():
            raise UsageError(f"--{name}={path} is a folder: name a file")
        if found.exists() and not found.is_file():
            raise UsageError(f"--{name}={path} is no plain file, which it would replace: name one")
        temporary.open("ab").close()
        if not temporary.stat().st_size:
            temporary.unlink()
    except OSError as error:
        raise UsageError(
            f"--{name}={path} cannot be written ({error.strerror}): name a file in a folder that "
            "is there"
        ) from error
    return found


def _summary_writer(folder: Path, resume_step: int) -> Any | None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    # TensorBoard hides the points of earlier event files from the purge step on.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)
