"""Flags that define a run, and the one way in which user errors end a binary."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from meta_jax.data.dataset import DataError
from meta_jax.training.checkpoints import CheckpointError
from meta_jax.training.loop import TrainingDivergedError
from meta_jax.training.writers import write_text


class UsageError(ValueError):
    """A user's mistake; the message names the culprit and the remedy in one line."""


def define_run_flags(values: flags.FlagValues) -> None:
    """Defines the flags that make a run what it is; they are kept in the workdir's flags.txt."""

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    def integer(name: str, default: int | None, text: str, lower_bound: int | None = None) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound, flag_values=values)

    def number(name: str, default: float, text: str) -> None:
        flags.DEFINE_float(name, default, text, flag_values=values)

    string("learner", "prototypical", "Method: prototypical, maml or fomaml.")
    string("dataset", "glyphs", "glyphs, omniglot, tfds:NAME, folder:PATH or sinusoid.")
    string("split_rule", "vinyals", "Class split of omniglot: vinyals or lake.")
    string("train_split", "train", "Split to train on: train, or trainval where there is one.")
    integer("image_size", 28, "Side of the images in pixels.", 1)
    integer("ways", 5, "Classes of a test episode.", 1)
    integer("shots", 1, "Support examples of each class in a test episode.", 1)
    integer("queries", 15, "Query examples of each class in a test episode.", 1)
    integer("train_ways", None, "Classes of a training episode; default: ways.", 1)
    integer("train_shots", None, "Support examples in training; default: shots.", 1)
    integer("train_queries", None, "Query examples in training; default: queries.", 1)
    string("rotations", "none", "Quarter turns: none, classes, per_class or per_episode.")
    string("network", None, "conv4, strided_conv4 or mlp; default: the method's own.")
    integer("features", 64, "Channels of each block of the network.", 1)
    string("batch_norm", None, "batch, running or support; default: the method's own.")
    string("distance", "squared_euclidean", "Of prototypical: squared_euclidean or cosine.")
    number("inner_learning_rate", 2.0, "Of the inner loop, for a loss averaged over examples.")
    integer("inner_steps", 1, "Inner steps in training.", 0)
    integer("eval_inner_steps", 3, "Inner steps in validation and tests.", 0)
    string("adjoint", None, "unrolled, first_order or checkpointed; default: the method's own.")
    integer("task_batch", 1, "Tasks in an outer step.", 1)
    integer("task_chunk", None, "Tasks vmapped at a time; default: 1 on a CPU, else all.", 1)
    integer("steps", 1000, "Outer steps.", 1)
    number("learning_rate", 1e-3, "Of the outer Adam.")
    integer("halve_every", 0, "Outer steps after which the learning rate halves; 0: never.", 0)
    integer("log_every", 50, "Outer steps in one compiled call and between lines of metrics.", 1)
    integer("eval_every", 500, "Outer steps between validations; 0: none.", 0)
    integer("checkpoint_every", 500, "Outer steps between checkpoints.", 1)
    integer("val_episodes", 200, "Episodes of a validation.", 1)
    integer("seed", 0, "Of initial parameters, training tasks and random class splits.")


def run_flag_values(path: Path) -> flags.FlagValues:
    """Reads a flagfile, or the flags.txt of a workdir.

    Raises:
      UsageError: it cannot be read, or a line of it is not a flag of a run.
    """
    values = flags.FlagValues()
    define_run_flags(values)
    try:
        values(["", f"--flagfile={path}"])
    except flags.Error as error:
        raise UsageError(f"{path} does not fit this version: {error}") from error
    return values


def run_flag_lines(values: flags.FlagValues) -> str:
    """The run's flags as the contents of a flags.txt; unset ones are left out."""
    names = flags.FlagValues()
    define_run_flags(names)
    return "".join(
        f"--{name}={values[name].value}\n"
        for name in sorted(names)
        if values[name].value is not None
    )


def claim_workdir(workdir: Path, values: flags.FlagValues) -> None:
    """Writes flags.txt into a new workdir, or checks that an old one was made with the same flags.

    Raises:
      UsageError: the workdir holds something else, or was trained with other flags.
    """
    path = workdir / "flags.txt"
    wanted = run_flag_lines(values)
    if path.exists():
        found = path.read_text(encoding="utf-8")
        if found != wanted:
            difference = sorted(set(found.splitlines()) ^ set(wanted.splitlines()))
            names = sorted({line[2:].split("=")[0] for line in difference})
            raise UsageError(
                f"{workdir} was trained with other flags ({', '.join(names)}): "
                "name another workdir, or give the flags of its flags.txt"
            )
        return
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UsageError(f"{workdir} is not empty and no workdir of ours: name another one")
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, wanted)


def run_main(main: Callable[[list[str]], int | None], *, positional: bool = False) -> None:
    """Parses the flags and runs a binary; a user's mistake is one line and exit status 2.

    Args:
      main: gets the arguments that are not flags.
      positional: whether there may be any.
    """
    # A second start of the same program need not compile again.
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/meta_jax/compiled"))

    def parse(arguments: list[str]) -> list[str]:
        try:
            left = flags.FLAGS(arguments)
            if len(left) > 1 and not positional:
                raise UsageError(f"unknown argument '{left[1]}': flags start with two dashes")
        except (flags.Error, UsageError, OSError) as error:
            _end(error, 2)
        if flags.FLAGS.help or flags.FLAGS.helpfull:
            app.usage(shorthelp=not flags.FLAGS.helpfull, writeto_stdout=True)
            sys.exit(0)
        return left

    def guarded(arguments: list[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)
        try:
            return main(arguments[1:])
        except (UsageError, DataError, CheckpointError) as error:
            _end(error, 2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _end(f"{error}: free some space and run the same command again", 2)
        except TrainingDivergedError as error:
            _end(error, 1)

    app.run(guarded, flags_parser=parse)


def _end(error: Exception | str, status: int) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
