"""Kills small runs before every file operation of a save and at random moments, and goes on.

    python -m tests.kills

prints the table of `docs/faults.md`. A kill is held where the same command goes on from the newest
checkpoint that was there, and comes to the same end as a run that nobody killed: bitwise the
parameters, states and metrics, the same result, and no file more or less.
"""

import argparse
import collections
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.binaries import IMPORTED, environment

_CURVES = "--tasks=sinusoid --network.widths=4 --eval_episodes=4 --val_episodes=2"
_GLYPHS = "--tasks=glyphs --tasks.image_size=16 --network.features=2 --ways=3 --queries=2"
_OFTEN = "--steps=12 --log_every=2 --eval_every=4 --checkpoint_every=4"
# By the learner, what is killed: a binary and its flags.
RUNS = {
    "prototypical": f"train {_GLYPHS} {_OFTEN} --eval_episodes=4 --val_episodes=2",
    "maml": f"train --learner=maml {_CURVES} {_OFTEN}",
    "reptile": f"train --learner=reptile {_CURVES} {_OFTEN}",
    "learn_optimizer": "learn_optimizer --rule=mlp --rule.widths=4,4 --estimator.horizon=4 "
    f"--estimator.truncation=2 --task_batch=4 --val_tasks=8 --test_tasks=4 {_OFTEN}",
}
# The save whose operations are killed: of this step, until that of the next.
_SAVED, _NEXT = "step_00000008.saving", "step_00000012.saving"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
      status: Exit status; minus the number of the signal that killed it.
      said: What it printed.
      operations: Files that it changed, in order.
      digest: SHA-256 of what the checkpoints hold, by leaf; empty where it did not come to its end.
      seconds: Time from start to end.
    """

    status: int
    said: str
    operations: list[str]
    digest: dict[str, str]
    seconds: float


def run(
    command: str,
    workdir: Path,
    *,
    killed_at: tuple[int, int] | None = None,
    killed_after: tuple[int, float] | None = None,
) -> Ended:
    """Runs a command in a fork of this process.

    Args:
      command: A binary and its flags.
      workdir: Its workdir.
      killed_at: A signal, and the file operation, from 1, before which it sends it to itself.
      killed_after: A signal, and the seconds after which it is sent.
    """
    with tempfile.TemporaryDirectory() as folder:
        started, notes = time.monotonic(), Path(folder)
        child = os.fork()
        if child == 0:
            _be(command, workdir, killed_at, notes)
        if killed_after is not None:
            number, seconds = killed_after
            time.sleep(seconds)
            os.kill(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        digest = notes / "digest"
        return Ended(
            status,
            (notes / "said").read_text() if (notes / "said").exists() else "",
            (notes / "operations").read_text().splitlines(),
            json.loads(digest.read_text()) if digest.exists() else {},
            time.monotonic() - started,
        )


def _be(command: str, workdir: Path, killed_at: tuple[int, int] | None, notes: Path) -> None:
    """Becomes a binary, notes what it does, and ends the process."""
    said = os.open(notes / "said", os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(said, standard)
    os.environ.update(environment())
    sys.addaudithook(_Shim(workdir, killed_at, notes / "operations").see)
    binary, *arguments = command.split()
    sys.argv = [f"experiments.{binary}", *arguments, f"--workdir={workdir}"]
    status = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = int(end.code or 0)
    if status == 0:
        (notes / "digest").write_text(json.dumps(_digest(workdir / "checkpoints")))
    sys.stdout.flush()
    os._exit(status)


class _Shim:
    """Counts the file operations of a process in a folder, and kills it before one of them."""

    def __init__(self, workdir: Path, killed_at: tuple[int, int] | None, log: Path) -> None:
        self._workdir, self._count = str(workdir), 0
        self._signal, self._killed_at = killed_at or (0, 0)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Sees an event of the interpreter, before it happens."""
        if not (event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)):
            return
        path = arguments[0]
        # What a tree is removed by names files within an open folder.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not (inside or str(path).startswith(self._workdir)):
            return
        self._count += 1
        if self._count == self._killed_at:
            os.kill(os.getpid(), self._signal)
        os.write(self._log, f"{event} {path}\n".encode())


def _digest(folder: Path) -> dict[str, str]:
    import jax
    import numpy as np

    from meta_jax.training import checkpoints

    found = {}
    for name in sorted(path.name for path in folder.iterdir()):
        for leaf, value in checkpoints.read(folder / name).leaves.items():
            data = jax.random.key_data(value) if leaf == "key" else value
            found[f"{name}/{leaf}"] = hashlib.sha256(np.asarray(data).tobytes()).hexdigest()
    return found


def _left(workdir: Path) -> dict[str, Any]:
    """What a run leaves, but for times: files, metrics and the result."""
    result = json.loads((workdir / "result.json").read_text())
    result.pop("seconds", None)
    shallow = [*workdir.iterdir(), *(workdir / "checkpoints").iterdir()]
    return {
        "files": sorted(str(path.relative_to(workdir)) for path in shallow),
        "metrics": (workdir / "metrics.jsonl").read_text(),
        "result": result,
    }


def _newest(workdir: Path) -> int | None:
    """The step of the newest checkpoint that is complete; None where there is none."""
    names = [path.name for path in workdir.glob("checkpoints/step_*")]
    steps = [re.fullmatch(r"step_(\d+)(\.saved)?", name) for name in names]
    return max((int(match[1]) for match in steps if match), default=None)


class Tried(NamedTuple):
    """What a kill gave.

    Attributes:
      problem: What is not as without the kill; None for nothing.
      seconds: Time from the signal to the end, where this process sent it.
    """

    problem: str | None
    seconds: float


def try_kill(command: str, whole: Ended, expected: dict[str, Any], **killed: Any) -> Tried:
    """Kills a run, and lets it go on."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        first = run(command, workdir, **killed)
        seconds = first.seconds - killed["killed_after"][1] if "killed_after" in killed else 0.0
        return Tried(_problem(command, workdir, first, whole, expected), seconds)


def _problem(
    command: str, workdir: Path, first: Ended, whole: Ended, expected: dict[str, Any]
) -> str | None:
    step = _newest(workdir)
    if first.status == 130 and f"stopped at step {step or 0} of" not in first.said:
        return f"no line says how to go on: {first.said}"
    again = run(command, workdir)
    if again.status:
        return f"status {again.status}: {again.said}"
    if step is not None and f"resuming at step {step} of" not in again.said:
        return f"the checkpoint of step {step} is not used: {again.said}"
    if again.digest != whole.digest:
        return "other parameters, or other checkpoints"
    left = _left(workdir)
    return next((f"other {n}: {left[n]}" for n in expected if left[n] != expected[n]), None)


def of_a_save(operations: list[str]) -> range:
    """The numbers of the operations of one save and of what follows until the next one."""
    first, after = (
        next(i for i, line in enumerate(operations) if name in line) for name in (_SAVED, _NEXT)
    )
    return range(first + 1, after + 1)


def kills(whole: Ended, count: int, generator: random.Random) -> Iterator[tuple[str, dict]]:
    """What is tried on a run: a name of the kind, and the arguments of `run`."""
    for operation in of_a_save(whole.operations):
        yield "SIGKILL before a file operation", {"killed_at": (signal.SIGKILL, operation)}
    for number in (signal.SIGTERM, signal.SIGINT):
        for operation in generator.sample(range(1, len(whole.operations) + 1), 5):
            yield f"{number.name} before a file operation", {"killed_at": (number, operation)}
    for number, times in ((signal.SIGKILL, count), (signal.SIGTERM, 5), (signal.SIGINT, 5)):
        for _ in range(times):
            moment = (number, generator.uniform(0, whole.seconds))
            yield f"{number.name} at a random moment", {"killed_after": moment}


def main() -> int:
    """Prints the table, and what did not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--random", type=int, default=25, help="random SIGKILLs of each run")
    parser.add_argument("--runs", nargs="*", default=[*RUNS], choices=[*RUNS])
    chosen = parser.parse_args()
    for name in IMPORTED:
        importlib.import_module(name)
    generator = random.Random(0)
    tried = collections.defaultdict(list)
    for name in chosen.runs:
        with tempfile.TemporaryDirectory() as folder:
            run(RUNS[name], Path(folder) / "first")  # compiles
            whole = run(RUNS[name], Path(folder) / "run")
            assert whole.status == 0, whole.said
            expected = _left(Path(folder) / "run")
        for kind, killed in kills(whole, chosen.random, generator):
            found = try_kill(RUNS[name], whole, expected, **killed)
            tried[name, kind].append(found)
            if found.problem is not None:
                print(f"{name}: {killed}: {found.problem}", file=sys.stderr, flush=True)
    print("| Run | What | Tried | Held | Ended within |\n| --- | --- | ---: | ---: | ---: |")
    for (name, kind), found in tried.items():
        longest = max(each.seconds for each in found)
        print(f"| {name} | {kind} | {_counts(found)} | {f'{longest:.1f} s' if longest else ''} |")
    every = [each for found in tried.values() for each in found]
    print(f"| all | | {_counts(every)} | |")
    return int(any(each.problem is not None for each in every))


def _counts(found: Sequence[Tried]) -> str:
    return f"{len(found)} | {sum(each.problem is None for each in found)}"


if __name__ == "__main__":
    sys.exit(main())
