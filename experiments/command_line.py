"""Flags that define a run, and the one way in which user errors end a binary."""

import errno
import os
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

    def number(name: str, default: float | None, text: str) -> None:
        flags.DEFINE_float(name, default, text, flag_values=values)

    string("learner", "prototypical", "Method; an unknown name lists them all.")
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
    flags.DEFINE_boolean(
        "within_alphabet",
        False,
        "Classes of an episode from one alphabet; in tests one drawer's against another's.",
        flag_values=values,
    )
    string("protocol", "few_shot", "Of validation and tests: few_shot, or sequence (mann, lstm).")
    string("rotations", "none", "Quarter turns: none, classes, per_class or per_episode.")
    string(
        "network",
        None,
        "conv4, strided_conv4, flat_strided_conv4, relation_encoder, koch, mlp; default: its own.",
    )
    integer("features", 64, "Channels of each block of the network.", 1)
    string("batch_norm", None, "batch, running or support; default: the method's own.")
    string("distance", "squared_euclidean", "Of prototypical: squared_euclidean or cosine.")
    flags.DEFINE_boolean("distort", False, "Distort training images.", flag_values=values)
    number("temperature", 0.1, "Of matching and matching_fce: what cosines are divided by.")
    integer("full_context_steps", 3, "Of matching_fce: steps of the queries' LSTM.", 1)
    string("relation_criterion", "squared_error", "Of relation; or cross_entropy.")
    string("kernel", "gaussian", "Of kernel: gaussian, laplacian or cosine.")
    integer("units", 200, "Of mann and lstm: width of the LSTM.", 1)
    integer("memory_slots", 128, "Of mann: rows of the memory.", 1)
    integer("memory_width", 40, "Of mann: width of a row.", 1)
    integer("read_heads", 4, "Of mann: reads, and writes, at a step.", 1)
    number("usage_decay", 0.95, "Of mann: decay of the slots' usage.")
    flags.DEFINE_boolean(
        "memory_values",
        False,
        "Of mann: write values of their own, not the keys.",
        flag_values=values,
    )
    number(
        "key_strength",
        1.0,
        "Of mann and meta_networks: what the cosines are multiplied by; 1 in the papers.",
    )
    number("neighbour_weight", 0.0, "Of mann and lstm: of a loss of the encoder's own; 0: none.")
    number("inner_learning_rate", 2.0, "Of the inner loop, for a loss averaged over examples.")
    integer("inner_steps", 1, "Inner steps in training.", 0)
    integer("eval_inner_steps", 3, "Inner steps in validation and tests.", 0)
    string(
        "adjoint",
        None,
        "Of the inner loop, a dial of memory: unrolled, checkpointed, mixed_mode, truncated, "
        "first_order, implicit; default: the method's own.",
    )
    integer("truncation", None, "Last inner steps that --adjoint=truncated differentiates.", 0)
    string("inner_reduction", None, "Of the inner loss: mean, sum or class_sum; default: mean.")
    integer("inner_batch", None, "Examples of reptile's inner mini-batches in training.", 1)
    integer("eval_inner_batch", None, "The same in validation and tests.", 1)
    number("proximity", None, "Of imaml: lambda.")
    integer("cg_steps", None, "Of imaml: steps of conjugate gradients.", 1)
    number("cg_damping", None, "Of imaml: added to the Hessian's diagonal.")
    integer("multi_step_steps", None, "Of maml_plus_plus: outer steps of multi-step loss.", 0)
    integer("first_order_steps", None, "Of maml_plus_plus: outer steps in first order.", 0)
    integer("task_batch", 1, "Tasks in an outer step.", 1)
    integer("task_chunk", None, "Tasks vmapped at a time; default: 1 on a CPU, else all.", 1)
    integer("steps", 1000, "Outer steps.", 1)
    number("learning_rate", 1e-3, "Of the outer optimizer.")
    string("optimizer", None, "Outer optimizer: adam or sgd; default: the method's own.")
    number("clip_norm", None, "Largest norm of the outer gradient; default: any.")
    integer("halve_every", 0, "Outer steps after which the learning rate halves; 0: never.", 0)
    string("decay", None, "Of the learning rate, to zero at the last step: linear or cosine.")
    integer("log_every", 50, "Outer steps in one compiled call and between lines of metrics.", 1)
    integer("eval_every", 500, "Outer steps between validations; 0: none.", 0)
    integer("checkpoint_every", 500, "Outer steps between checkpoints.", 1)
    integer("val_episodes", 200, "Episodes of a validation.", 1)
    integer("seed", 0, "Of initial parameters, training tasks and random class splits.")


DefineFlags = Callable[[flags.FlagValues], None]


def run_flag_values(path: Path, define: DefineFlags = define_run_flags) -> flags.FlagValues:
    """Reads a flagfile, or the flags.txt of a workdir.

    Args:
      path: the file.
      define: defines the flags that it may have.

    Raises:
      UsageError: it cannot be read, or a line of it is not a flag of a run.
    """
    values = flags.FlagValues()
    define(values)
    try:
        values(["", f"--flagfile={path}"])
    except flags.Error as error:
        raise UsageError(f"{path} does not fit this version: {error}") from error
    return values


def run_flag_lines(values: flags.FlagValues, define: DefineFlags = define_run_flags) -> str:
    """The run's flags as the contents of a flags.txt; unset ones are left out."""
    names = flags.FlagValues()
    define(names)
    return "".join(
        f"--{name}={values[name].value}\n"
        for name in sorted(names)
        if values[name].value is not None
    )


def claim_workdir(
    workdir: Path, values: flags.FlagValues, define: DefineFlags = define_run_flags
) -> None:
    """Writes flags.txt into a new workdir, or checks that an old one was made with the same flags.

    Args:
      workdir: the folder.
      values: flags of the run.
      define: defines those that make the run what it is.

    Raises:
      UsageError: the workdir holds something else, or was trained with other flags.
    """
    path = workdir / "flags.txt"
    wanted = run_flag_lines(values, define)
    if path.exists():
        # Read, not compared as text: flags that are newer than the workdir have their defaults.
        found = run_flag_lines(run_flag_values(path, define), define)
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
    _use_all_cores()
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


# Together a tenth faster on a CPU, by measurement (python -m experiments.benchmark): vectors of all
# 512 bits that the CPU may have, and instructions in the order that needs least memory. The other
# order is for running several at a time, but tasks keep our devices busy, and what one instruction
# leaves in the cache the next one needs.
_CPU_FLAGS = {
    "xla_cpu_prefer_vector_width": "512",
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}


def _use_all_cores() -> None:
    """Makes every core a CPU device of its own, so that a step's tasks are shared among them.

    Small matrix products do not keep the threads of one device busy. What the user has in
    XLA_FLAGS stays as it is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    ours = [f"--{name}={value}" for name, value in _CPU_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
    if "host_platform_device_count" not in given:
        affinity = getattr(os, "sched_getaffinity", None)
        jax.config.update("jax_num_cpu_devices", len(affinity(0)) if affinity else os.cpu_count())


def _end(error: Exception | str, status: int) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
