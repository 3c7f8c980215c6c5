"""Wrong command lines of the binaries that use what was trained, and damaged weights.

What `tests.bad_inputs` is for `experiments.train`, this is for `evaluate`, `classify` and
`learn_optimizer`. Nothing is trained or tested: where a binary would begin to, an answer is ready.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from PIL import Image

from experiments import classify, evaluate, folder_tests, learn_optimizer, run_flags, runs, testing
from meta_jax.serving.classifier import Classifier
from meta_jax.training.evaluation import MeanCI
from meta_jax.training.trained import Trained, pretrained_folder, save_trained
from tests.bad_inputs import DAMAGES, HELD, LARGE, TRAINED, Tried, bad_paths, ended, record

RULE = Path(__file__).parents[1] / "results" / "weights" / "lstm_quadratics"
_NUMBERS = ("-1", "1.5", "many", LARGE)
_SCORE = MeanCI(1.0, 0.5)

# ---- What the lines name.


def curves(folder: Path) -> Path:
    """Weights of a learner of sinusoids that was not trained."""
    values = run_flags.run_values(TRAINED.replace("--eval_episodes=2", "").split())
    run = runs.build_run(values, runs.load_tasks(values))
    learner, tasks = run.learner, run.testing
    params, state = learner.init(jax.random.key(0), tasks.sample(jax.random.key(0), tasks.data))
    save_trained(
        folder,
        Trained(learner, params, state, tasks.objective, None, run.config, {"seconds": 1.0}),
    )
    return folder


def images(folder: Path) -> Path:
    """Support images of two classes, queries, and files that only seem to be images."""
    for name, shade in (("support/a", 0), ("support/b", 255), ("query", 9), ("one/a", 0)):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((30, 30), shade, np.uint8)).save(folder / name / "1.png")
    whole = (folder / "query" / "1.png").read_bytes()
    unreadable = {"empty": b"", "cut": whole[:40], "text": b"no image", "binary": b"\xff" * 99}
    for name, content in unreadable.items():
        shutil.copytree(folder / "support", folder / f"{name}_support")
        (folder / f"{name}_support" / "a" / "2.png").write_bytes(content)
        (folder / f"{name}.png").write_bytes(content)
    (folder / "no_images" / "a").mkdir(parents=True)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "folder.png").mkdir()
    return folder


def make_names(folder: Path) -> dict[str, str]:
    """By the names that lines use, paths below a folder, where they are made."""
    bad = bad_paths(folder).values()
    wrong = [line.rpartition("--init_from=")[2] for line in bad if "--init_from=" in line]
    return {
        "weights": str(curves(folder / "weights")),
        "glyphs": str(pretrained_folder("glyphs-prototypical")),
        "rule": str(RULE),
        "images": str(images(folder / "images")),
        "out": str(folder / "out"),
        **{name: str(folder / name) for name in ("file", "full", "loop", "broken")},
        **{f"wrong{i}": path for i, path in enumerate(wrong)},
    }


# ---- How the binaries end.


def evaluated(arguments: list[str]) -> str:
    """What a command line of `evaluate` comes to; a test finds the same whatever it tests."""

    def make_test(learner: Any, tasks: Any, asked: Any) -> Callable[..., Any]:
        metrics = {"loss": _SCORE, tasks.objective.metric: _SCORE}
        return lambda *what: testing.Tested(tasks.objective, metrics)

    stops = (
        mock.patch.object(folder_tests, "make_test", make_test),
        mock.patch.object(folder_tests, "test_exact_answers", lambda *what: {}),
    )
    return ended(evaluate, arguments, evaluate.SELECTIONS, evaluate.choose, stops)


def classified(arguments: list[str]) -> str:
    """What a command line of `classify` comes to; all classes are as probable."""

    def by_chunk(classifier: Classifier, program: Any, adapted: Any, x: np.ndarray) -> np.ndarray:
        # Of probabilities the first columns are looked at, of influence all.
        return np.full((len(x), len(classifier.classes)), 0.5)

    stops = (
        mock.patch.object(Classifier, "_by_chunk", by_chunk),
        mock.patch("meta_jax.serving.classifier._adapted", lambda *what: None),
    )
    return ended(classify, arguments, (), None, stops)


def compared(arguments: list[str]) -> str:
    """What a command line of `learn_optimizer` comes to; a comparison finds the same always."""
    found = {name: learn_optimizer.Compared([_SCORE], None) for name in ("lstm", "sgd")}
    stops = (
        mock.patch.object(learn_optimizer, "compare", lambda *what, **sizes: found),
        mock.patch.object(learn_optimizer, "fit", mock.Mock(side_effect=InterruptedError)),
    )
    selections, choose = learn_optimizer.SELECTIONS, learn_optimizer.choose
    return ended(learn_optimizer, arguments, selections, choose, stops)


BINARIES: dict[str, Callable[[list[str]], str]] = {
    "evaluate": evaluated,
    "classify": classified,
    "learn_optimizer": compared,
}

# ---- Wrong lines, by binary and by what is wrong. A name in braces is a path of `make_names`.


def _with(beginning: str, flags: Iterable[str]) -> list[str]:
    return [f"{beginning} --{flag}" for flag in flags]


def _numbers(names: Iterable[str], *more: str) -> list[str]:
    return [f"{name}={value}" for name in names for value in (*_NUMBERS, *more)]


_IMAGES = "--support={images}/support"
_CLASSIFY = f"{_IMAGES} --query={{images}}/query"
_NO_PATHS = [f"{{wrong{i}}}" for i in range(9)]
# Where nothing can be written.
_NO_OUTPUTS = ("{file}/x", "{loop}/x", "{broken}/x", "/proc/x", "/proc/sys/x", "/dev/full")
_NO_OUTPUTS += ("/dev/null", "x" * 300, "gs://a/b", "a\0b", "")

COMMANDS: dict[str, dict[str, list[str]]] = {
    "evaluate": {
        "flags": [
            *_with(
                "--weights={weights}",
                (
                    *_numbers(("eval_episodes", "eval_chunk", "query_chunk"), "0"),
                    *_numbers(("shots", "queries"), "0"),
                    *_numbers(("seed",)),
                    *("split=foo", "split=", "ways=7", "checkpoint=foo", "checkpoint=latest"),
                    *("precision=foo", "precision=float16", "learner.foo=1", "tasks="),
                    *("learner.inner_lr=nan", "learner.steps=-1", "network.widths=7"),
                    *("tasks.image_size=16", "nonsense=1", "eval_episodes=1"),
                    *(
                        "eval_episodes=2147483647",
                        "shots=2147483647 --queries=2147483647",
                        "tasks=no.such:thing",
                    ),
                    *("tasks=glyphs", "protocol=all_characters", "workdir={weights}"),
                    *("learner=maml", "network=conv4", "optimizer=adam", "runs={file}"),
                ),
            ),
            *_with(
                "--weights={glyphs}",
                (
                    *_numbers(("ways",), "0", "1", "2000"),
                    *("shots=500", "queries=500", "split=foo", "tasks=sinusoid", "tasks=bandit"),
                    *("network.features=7", "network.normalisation=foo", "learner.distance=foo"),
                    *("network.normalisation=layer", "tasks.polarity=foo"),
                    *("protocol=lake", "protocol=foo", "tasks=omniglot", "tasks=foo"),
                    *("protocol=lake --runs={file}", "tasks=folder:{file}", "tasks=folder"),
                    *("tasks=features:{file}", "tasks=folder:{full}"),
                ),
            ),
            *("", "--weights=", "--workdir=", "weights", "--weights", "--weights={rule}"),
            *("--weights=glyphs", "--workdir={weights} more"),
        ],
        "weights": _with("", [f"weights={path}" for path in (*_NO_PATHS, "gs://a/b")]),
        "outputs": _with("--weights={weights}", [f"output={o}" for o in (*_NO_OUTPUTS, "{full}")]),
    },
    "classify": {
        "flags": [
            *_with(
                _CLASSIFY,
                (
                    *("normalisation=foo", "normalisation=layer", "polarity=foo", "weights=foo"),
                    *("checkpoint=foo", "evaluate=maybe", "evaluate", "nonsense=1", "support="),
                    *("precision=bfloat16", "weights={weights}", "weights={rule}"),
                    *("weights={glyphs} --workdir={weights}",),
                ),
            ),
            *("", "--query={images}/query", _IMAGES, f"{_CLASSIFY} more", f"{_IMAGES} --query="),
        ],
        "weights": _with(_CLASSIFY, [f"weights={path}" for path in (*_NO_PATHS, "gs://a/b")]),
        "images": [
            *_with(
                "--query={images}/query",
                (
                    *(f"support={{images}}/{name}_support" for name in ("empty", "cut", "text")),
                    *("support={images}/binary_support", "support={images}/one"),
                    *("support={images}/no_images", "support={images}/query"),
                    *(f"support={path}" for path in (*_NO_PATHS, "gs://a/b")),
                ),
            ),
            *_with(
                _IMAGES,
                (
                    *(f"query={{images}}/{name}.png" for name in ("empty", "cut", "text")),
                    *(f"query={{images}}/{name}.png" for name in ("binary", "loop", "broken")),
                    *("query={images}/folder.png", "query={images}/*.gif", "query={images}/["),
                    *("query={images}/no_images", "query={images}/query,{images}/cut.png"),
                    *("query=/dev/null", "query=~nobody/x", "query=,"),
                    *(f"query={path}" for path in (*_NO_PATHS, "gs://a/b")),
                    *("query={images}/no_images --evaluate", "query={images}/one,x --evaluate"),
                ),
            ),
        ],
        "outputs": _with(_CLASSIFY, [f"output={path}" for path in (*_NO_OUTPUTS, "{file}")]),
    },
    "learn_optimizer": {
        "flags": [
            *_with("--weights={rule}", _numbers(("test_tasks", "test_steps", "ways"), "0")),
            *_with(
                "--workdir={out}",
                (
                    *_numbers(("task_batch", "task_chunk", "steps", "log_every"), "0"),
                    *_numbers(("checkpoint_every", "val_tasks", "shots"), "0"),
                    *_numbers(("seed", "test_seed", "eval_every")),
                    *("rule=foo", "family=foo", "estimator=foo", "optimizer=foo", "tasks=foo"),
                    *("rule=math:pi", "family=:", "estimator=no.such:thing", "tasks=bandit"),
                    *("rule.foo=1", "rule.hidden_size=0", "family.width=nan", "tasks=glyphs"),
                    *("estimator.horizon=0", "optimizer.learning_rate=-1", "log_every=3"),
                    *("adjoint=foo", "adjoint=truncated:-1", "adjoint=implicit", "learner=maml"),
                    *("precision=bfloat16", "weights={rule}", "nonsense=1", "output={file}/x"),
                    *("task_batch=4 --task_chunk=3", "val_tasks=2147483647"),
                    *("task_batch=2147483647", "workdir={file}/x", "workdir={full}"),
                ),
            ),
            *_with(
                "--weights={rule}",
                (
                    *("rule=mlp", "rule.hidden_size=3", "family=foo", "tasks=foo", "adjoint=foo"),
                    *("tasks.distribution=foo", "test_tasks=2147483647", "test_tasks=1"),
                ),
            ),
            *("", "--weights=", "--workdir=", "weights", "--weights={weights}"),
            *("--weights={glyphs}", "--weights={rule} more"),
        ],
        "weights": _with("", [f"weights={path}" for path in (*_NO_PATHS, "gs://a/b")]),
        "outputs": _with("--weights={rule}", [f"output={o}" for o in (*_NO_OUTPUTS, "{full}")]),
    },
}


def try_lines(binary: str, names: Mapping[str, str], every: int = 1) -> Iterator[Tried]:
    """Tries wrong lines of a binary, none of which may write anything.

    Args:
      binary: Name of the binary.
      names: Paths that the lines name, from `make_names`.
      every: Which of them: all if 1, each second if 2.
    """
    out = Path(names["out"])
    for kind, lines in COMMANDS[binary].items():
        for line in lines[::every]:
            given = [part.format(**names) for part in line.split()]
            if not any(part.startswith(("--output", "--workdir={out}")) for part in line.split()):
                given.append(f"--output={out}")
            found = BINARIES[binary](given)
            yield Tried(f"{binary}: {kind}", line, found, found == HELD and not out.exists())
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


# ---- Damaged weights.


def damages(places: Iterable[str]) -> dict[str, Callable[[Path], object]]:
    """Damages of weights by name: of the record, of the checkpoint, and other values in places."""
    parts = ("config.json", "checkpoints", "cut best")
    found = {n: d for n, d in DAMAGES.items() if any(p in n for p in parts) and "step" not in n}
    for place in places:
        for value in (7, "foo", None, [], {}):
            found[f"config.json: {place} {value!r}"] = record(place, value)
    return found


DAMAGED: dict[str, tuple[str, str, dict[str, Callable[[Path], object]]]] = {
    "evaluate": (
        "weights",
        "",
        damages(("learner.name", "learner.network", "tasks.name", "tasks.objective", "run.ways"))
        | {"config.json: a precision of no kind": record("learner.network.with_precision", "foo")},
    ),
    "classify": ("glyphs", _CLASSIFY, damages(("learner.name", "tasks.preprocessing"))),
    "learn_optimizer": (
        "rule",
        "",
        damages(("learner.rule", "learner.family", "learner.rule.name", "tasks.name", "run.ways")),
    ),
}


def try_damages(binary: str, names: Mapping[str, str], every: int = 1) -> Iterator[Tried]:
    """Damages copies of weights, and uses them.

    Args:
      binary, names, every: As in `try_lines`.
    """
    whole, beside, all_damages = DAMAGED[binary]
    copy, out = Path(names["out"]).with_name("copy"), Path(names["out"])
    for name in [*all_damages][::every]:
        shutil.copytree(names[whole], copy)
        try:
            all_damages[name](copy)
        except FileNotFoundError:  # weights do not have it
            shutil.rmtree(copy)
            continue
        line = f"--weights={copy} --output={out} {beside.format(**names)}"
        found = BINARIES[binary](line.split())
        held = found == HELD or (found == "done" and out.exists())
        yield Tried(f"{binary}: damaged weights", name, found, held)
        shutil.rmtree(copy)
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def all_tried(folder: Path) -> Iterator[Tried]:
    """Tries everything."""
    names = make_names(folder)
    for binary in BINARIES:
        yield from try_lines(binary, names)
        yield from try_damages(binary, names)
