"""The flags of a run of several processes, and how they join."""

import os
import sys
from typing import Any

import jax
from absl import flags

from meta_jax.lookup import UsageError
from meta_jax.ranges import LARGEST_INT

_WHERE = ("coordinator_address", "num_processes", "process_id")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags with which the processes of one run find each other."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Whether several processes make one run: the same command is started in each, on one or "
        "more machines. SLURM, Open MPI and TPU pods say how they find each other; elsewhere the "
        "three flags do.",
        values,
    )
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of the first process, with --distributed.", values
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "How many processes there are, with --distributed.",
        1,
        LARGEST_INT,
        values,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Number of this process, from 0, with --distributed.",
        0,
        LARGEST_INT,
        values,
    )


def join(values: flags.FlagValues) -> None:
    """Joins the other processes of a run, where the flags say that there are some.

    Processes but the first print nothing; what goes wrong is said by each.

    Args:
      values: Parsed flags; those of other binaries do nothing.

    Raises:
      UsageError: the flags do not fit each other, or nothing says where the others are.
    """
    if "distributed" not in values:
        return
    where: dict[str, Any] = {name: values[name].value for name in _WHERE}
    if not values["distributed"].value:
        given = [name for name, value in where.items() if value is not None]
        if given:
            raise UsageError(f"--{given[0]} is of no use alone: add --distributed")
        return
    _check(where["coordinator_address"], where["num_processes"], where["process_id"])
    try:
        jax.distributed.initialize(*where.values())
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--distributed: {reason} Start it under SLURM, Open MPI or on a TPU pod, or give "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id"
        ) from error
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _check(address: str | None, processes: int | None, process: int | None) -> None:
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"--coordinator_address={address} must be HOST:PORT")
    if processes is not None and process is not None and process >= processes:
        raise UsageError(
            f"--process_id={process} must be below --num_processes={processes}: they count from 0"
        )
