"""Wrong command lines of `experiments.train` and damaged workdirs: one list for tests and figures.

    python -m tests.bad_inputs

prints the table of `docs/faults.md`, with those of the other binaries, which stand in
`tests/bad_inputs_of_other_binaries.py`. An input is held where it is refused in one line, with exit
status 2 and nothing written; a damaged workdir also where the run goes on as if nothing were.
"""

import collections
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from absl import flags

from experiments import command_line, run_flags, train
from meta_jax import host, registry

HELD = "held"
MEMORY = 16 * 10**9  # bytes that are taken to be there
_SMALL = "--tasks.image_size=16 --ways=3 --queries=2"
_CURVES = "--tasks=sinusoid --learner=fomaml --network.widths=4"
_OMNIGLOT = "--tasks=omniglot --data_dir"
LARGE = "99999999999999999999"

# By what is wrong. What a line does not say is a small run on glyphs.
COMMANDS: dict[str, list[str]] = {
    "sizes of a run": [
        *(
            f"--{name}={value}"
            for name in (
                *("ways", "shots", "queries", "train_ways", "train_shots", "train_queries"),
                *("task_batch", "task_chunk", "steps", "log_every", "checkpoint_every", "seeds"),
                *("val_episodes", "eval_episodes", "eval_chunk", "val_chunk", "query_chunk"),
            )
            for value in ("0", "-1", "1.5", "many", LARGE)
        ),
        *(f"--{name}={value}" for name in ("seed", "eval_every") for value in ("-1", "x", LARGE)),
        "--ways=2000",
        "--shots=500",
        "--queries=500",
        "--log_every=3",
        "--task_batch=4 --task_chunk=3",
        "--task_batch=2 --task_chunk=4",
        "--seed=2147483647 --seeds=2",
        "--learner=maml --train_ways=7",
    ],
    "more memory than there is": [
        "--val_episodes=2147483647",
        "--eval_episodes=2147483647",
        "--task_batch=2147483647",
        "--tasks.image_size=100000",
        "--network=mlp --network.widths=1000000000",
        "--network=conv4 --network.features=1000000",
        "--network=conv4 --network.features=1000000000",
        f"{_CURVES} --shots=2147483647",
        f"{_CURVES} --train_queries=2147483647",
        "--tasks.device_memory=0.01",
        "--tasks.placement=host --tasks.device_memory=0.001",
    ],
    "settings of no use": [
        "--train_split=test",
        "--train_split=foo",
        f"{_CURVES} --train_split=foo",
        f"{_CURVES} --ways=7",
        f"{_CURVES} --train_ways=7",
        f"{_CURVES} --tasks.rotations=classes",
        f"{_CURVES} --tasks.image_size=16",
        "--tasks.split_rule=lake",
        "--network=mlp --network.normalisation=batch",
        "--network=mlp --network.features=4",
        "--learner.inner_lr=0.1",
        "--optimizer.halve_every=5",
        "--optimizer.nesterov=true",
        "--learner=meta_networks --network=conv4",
        "--learner=meta_networks --remat",
        "--learner=maml --query_chunk=2",
        "--rule=lstm",
        "--learner=meta_networks --precision=bfloat16",
    ],
    "components that do not fit": [
        *(
            f"--tasks=sinusoid --network={name}"
            for name in ("conv4", "koch", "resnet12", "strided_conv4")
        ),
        *(f"--learner={name} --tasks=sinusoid" for name in ("mann", "siamese", "protomaml", "rl2")),
        *(f"--learner={name}" for name in ("maml_rl", "rl2")),
        "--learner=maml --tasks=bandit",
        "--learner=relation --network=mlp",
        "--network=relation_encoder",
        "--learner=mann --network=relation_encoder",
        "--network=koch",
        "--network=conv4 --tasks.image_size=8",
        "--learner=mann --learner.num_slots=3",
        "--learner=in_context --learner.heads=5",
        "--learner=maml --learner.adjoint=implicit",
        "--learner=maml --learner.adjoint=truncated:x",
        "--learner=maml --learner.adjoint=truncated:-1",
    ],
    "names, texts and choices": [
        *(
            f"--{kind}={name}"
            for kind in run_flags.SELECTIONS
            for name in ("foo", "no.such:thing", "os:path", "math:pi", ":", "")
        ),
        *(
            f"--{setting}=foo"
            for setting in (
                *("learner.distance", "network.normalisation", "network.features"),
                *("optimizer.schedule", "tasks.rotations", "tasks.augment", "tasks.polarity"),
                "tasks.placement",
                *("tasks.within_group", "tasks.examples", "learner.joint_encoding"),
            )
        ),
        *("--nonsense=1", "--learning_rate=0.1", "--learner.foo=1", "--ways=", "--ways", "ways=5"),
        *(
            "--noways",
            "--network=mlp --network.widths=4,x",
            "--network=mlp --network.widths=,",
            "--init_from=",
            "--precision=float16",
            "--=3",
        ),
        *("--tasks=folder", "--tasks=folder:", "--tasks=features:", "--tasks=glyphs:x"),
    ],
}


def wrong_numbers() -> Iterator[str]:
    """For every setting that is a number, of every component, what is no number and its bounds."""
    for kind in run_flags.SELECTIONS:
        for name in registry.names(kind):
            component = registry.find(kind, name)
            for setting in registry.settings(component).values():
                if setting.type not in (int, float, tuple) or setting.name == "train_classes":
                    continue
                least = setting.range.least if setting.range else 0
                beyond = "1e39" if setting.type is float else LARGE
                for value in ("nan", "inf", beyond, f"{least - 1:.0f}"):
                    named = f"{name}:x" if kind == "tasks" and _has_argument(component) else name
                    yield f"--{kind}={named} --{kind}.{setting.name}={value}"


def _has_argument(component: registry.Component) -> bool:
    parameters = registry.parameters(component.factory).values()
    return any(one.kind is one.POSITIONAL_ONLY for one in parameters)


def outcome(arguments: list[str], *, whole: bool = False) -> str:
    """What a command line of `experiments.train` comes to, in this process.

    Args:
      arguments: The command line.
      whole: Whether it may train; else it is stopped where it would begin to.

    Returns:
      As `ended`.
    """
    fit = train.train if whole else mock.Mock(side_effect=_Accepted)
    stops = (mock.patch.object(train, "train", fit),)
    return ended(train, arguments, run_flags.SELECTIONS, run_flags.choose, stops)


def ended(
    binary: Any,
    arguments: list[str],
    selections: Sequence[str],
    choose: command_line.Choose | None,
    stops: Sequence[Any] = (),
) -> str:
    """What a command line comes to, in this process.

    Args:
      binary: Module of the binary.
      arguments: The command line.
      selections, choose: As `command_line.run_main` gets them.
      stops: Patches under which the binary runs, where it need not run whole.

    Returns:
      `HELD` where it is refused in one line; 'done' where it ends well, 'accepted' where it was
      stopped; otherwise what went wrong.
    """
    values, errors = flags.FlagValues(), io.StringIO()
    binary.define_flags(values)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for patch in (mock.patch.object(binary, "FLAGS", values), *stops):
            stack.enter_context(patch)
        try:
            command_line.parse_or_end(
                values, ["", *arguments], selections=selections, choose=choose
            )
            command_line.guarded(binary.main, [])
        except SystemExit as error:
            one_line = errors.getvalue().count("\n") == 1
            return HELD if error.code == 2 and one_line else f"status {error.code}"
        except _Accepted:
            return "accepted"
        except Exception as error:
            return f"traceback: {type(error).__name__}: {error}"
    return "done"


class _Accepted(Exception):
    """The run would have begun to train."""


def small(line: str) -> list[str]:
    """The arguments of a line of `COMMANDS`, in a small run where it names no tasks."""
    return [*([] if "--tasks=" in line else _SMALL.split()), *line.split()]


# ---- Damaged workdirs. A run is trained once, and each damage is done to a copy.

TRAINED = (
    f"{_CURVES} --shots=3 --train_shots=3 --queries=3 --task_batch=2 --learner.steps=1 --steps=4 "
    "--log_every=2 --eval_every=2 --checkpoint_every=2 --val_episodes=2 --eval_episodes=2"
)


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda workdir: (workdir / name).write_bytes(content)


def _without(name: str) -> Callable[[Path], object]:
    def remove(workdir: Path) -> None:
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _as_folder(name: str) -> Callable[[Path], object]:
    def replace(workdir: Path) -> None:
        _without(name)(workdir)
        (workdir / name).mkdir()

    return replace


def _as_file(name: str) -> Callable[[Path], object]:
    def replace(workdir: Path) -> None:
        _without(name)(workdir)
        (workdir / name).write_text("x")

    return replace


def _line(number: int, content: bytes) -> Callable[[Path], object]:
    """Puts a line into the metrics."""

    def insert(workdir: Path) -> None:
        path = workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([*lines[:number], content, *lines[number:]]) + b"\n")

    return insert


def record(place: str, value: object) -> Callable[[Path], object]:
    """Puts something else into a place of config.json."""

    def edit(workdir: Path) -> None:
        path = workdir / "config.json"
        config = within = json.loads(path.read_text())
        *parents, name = place.split(".")
        for parent in parents:
            within = within[parent]
        within[name] = value
        path.write_text(json.dumps(config))

    return edit


def _cut(pattern: str) -> Callable[[Path], object]:
    """Cuts files short."""

    def cut(workdir: Path) -> None:
        for path in workdir.glob(pattern):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:9])

    return cut


_LAST = "checkpoints/step_00000004"
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"metrics.jsonl: line {line}": _line(1, line) for line in (b"{", b"", b"[1]", b"null")},
    "metrics.jsonl: no step": _line(0, b'{"split": "train", "loss": 1.0}'),
    "metrics.jsonl: step a text": _line(0, b'{"step": "x", "split": "train"}'),
    "metrics.jsonl: loss a text": _line(0, b'{"step": 1, "split": "train", "loss": "x"}'),
    "metrics.jsonl: binary": _write("metrics.jsonl", bytes(range(256)) * 2),
    "metrics.jsonl: UTF-16": _write("metrics.jsonl", "{}".encode("utf-16")),
    "metrics.jsonl: empty": _write("metrics.jsonl", b""),
    "metrics.jsonl: cut": lambda workdir: os.truncate(workdir / "metrics.jsonl", 70),
    **{f"no {name}": _without(name) for name in ("metrics.jsonl", "config.json", "result.json")},
    **{f"no {name}": _without(name) for name in ("checkpoints", "checkpoints/best", _LAST)},
    **{
        f"{name} a folder": _as_folder(name)
        for name in (
            *("metrics.jsonl", "config.json", "result.json", "baselines.json"),
            *("learning_curve.png", "episode.png", f"{_LAST}/header.json"),
        )
    },
    **{
        f"{name} a file": _as_file(name)
        for name in ("checkpoints", "tensorboard", "checkpoints/best", _LAST)
    },
    **{
        f"config.json: {content!r}": _write("config.json", content)
        for content in (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00")
    },
    **{
        f"config.json: {place} {value}": record(place, value)
        for place in ("learner", "tasks", "optimizer", "run", "history", "example")
        for value in (7, [])
    },
    "config.json: empty run": record("run", {}),
    "config.json: steps a text": record("run.steps", "x"),
    "config.json: unknown optimizer": record("optimizer", {"name": "x"}),
    "config.json: tasks without a name": record("tasks", {"objective": "squared_error"}),
    **{
        f"cut {name}": _cut(f"checkpoints/{name}")
        for name in ("step_00000004/*", "step_00000004/tree/**/*", "best/*", "*/*", "*/tree/*")
    },
    **{
        f"header.json: {content!r}": _write(f"{_LAST}/header.json", content)
        for content in (b"null", b"{}", b"\xff\xfe\x00")
    },
    "a later step without files": lambda workdir: (workdir / "checkpoints/step_00000009").mkdir(),
    "a later step that is a file": _write("checkpoints/step_00000009", b"x"),
    "what a kill left behind": lambda workdir: (workdir / f"{_LAST}.saving").mkdir(),
    "baselines.json: binary": _write("baselines.json", b"\xff"),
    "result.json: binary": _write("result.json", b"\xff"),
}


def bad_paths(folder: Path) -> dict[str, str]:
    """Arguments that name what is no workdir, no data and no flagfile, by what it is."""
    (folder / "file").write_text("x")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "full").mkdir()
    (folder / "full" / "a").write_text("x")
    (folder / "images.zip").write_bytes(b"PK\x03\x04")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "utf16").write_bytes("--ways=5\n".encode("utf-16"))
    workdirs = ("file/w", "file", "broken", "loop", "loop/w", "full", "x" * 300, "a\0b")
    data = ("file", "full", "nowhere", "broken", "loop", "images.zip", "binary", "x" * 300, "a\0b")
    flagfiles = ("binary", "utf16", "full", "nowhere", "broken", "loop")
    return {
        **{f"workdir {name[:9]!r}": f"{_CURVES} --workdir={folder}/{name}" for name in workdirs},
        **{f"folder {name[:9]!r}": f"--tasks=folder:{folder}/{name}" for name in data},
        **{f"features {name[:9]!r}": f"--tasks=features:{folder}/{name}" for name in data},
        **{f"data_dir {name[:9]!r}": f"{_OMNIGLOT}={folder}/{name}" for name in data},
        **{f"init_from {name[:9]!r}": f"{_CURVES} --init_from={folder}/{name}" for name in data},
        **{f"flagfile {name!r}": f"--flagfile={folder}/{name}" for name in flagfiles},
    }


# ---- The table.


class Tried(NamedTuple):
    """What an input came to."""

    kind: str
    text: str
    found: str
    held: bool


def try_commands(lines: Iterable[tuple[str, str]]) -> Iterator[Tried]:
    """Tries command lines, (kind, line), none of which may begin to write."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        for kind, line in lines:
            given = [] if "--workdir=" in line else [f"--workdir={workdir}"]
            found = outcome([*small(line), *given])
            yield Tried(kind, line, found, found == HELD and not workdir.exists())
            shutil.rmtree(workdir, ignore_errors=True)


def try_damages(damages: Mapping[str, Callable[[Path], object]]) -> Iterator[Tried]:
    """Damages copies of a trained workdir, and starts the same command with two steps more."""
    with tempfile.TemporaryDirectory() as folder:
        trained, copy = Path(folder) / "trained", Path(folder) / "copy"
        first = outcome([*TRAINED.split(), f"--workdir={trained}"], whole=True)
        assert first == "done", first
        for name, damage in damages.items():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(trained, copy)
            damage(copy)
            found = outcome([*TRAINED.split(), "--steps=6", f"--workdir={copy}"], whole=True)
            yield Tried("damaged workdirs", name, found, found in (HELD, "done"))


def all_tried() -> Iterator[Tried]:
    """Tries everything."""
    yield from try_commands((kind, line) for kind, lines in COMMANDS.items() for line in lines)
    yield from try_commands(("numbers of settings", line) for line in wrong_numbers())
    with tempfile.TemporaryDirectory() as folder:
        named = bad_paths(Path(folder))
        yield from try_commands(("paths", line) for line in named.values())
    yield from try_damages(DAMAGES)
    from tests import bad_inputs_of_other_binaries  # which takes much from here

    with tempfile.TemporaryDirectory() as folder:
        yield from bad_inputs_of_other_binaries.all_tried(Path(folder))


def main() -> int:
    """Prints the table, and what did not hold."""
    with mock.patch.object(host, "available_memory", lambda: MEMORY):
        return _print_table(all_tried())


def _print_table(found: Iterable[Tried]) -> int:
    tried, held = collections.Counter(), collections.Counter()
    for one in found:
        tried[one.kind] += 1
        held[one.kind] += one.held
        if not one.held:
            print(f"{one.kind}: {one.text!r}: {one.found}", file=sys.stderr, flush=True)
    print("| Inputs | Tried | Held |\n| --- | ---: | ---: |")
    for kind, number in tried.items():
        print(f"| {kind} | {number} | {held[kind]} |")
    print(f"| all | {tried.total()} | {held.total()} |")
    return int(tried != held)


if __name__ == "__main__":
    sys.exit(main())
