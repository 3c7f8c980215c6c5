"""What this machine gives the process: cores and memory, within the limits of a container."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from meta_jax.lookup import UsageError

_EXHAUSTED = "RESOURCE_EXHAUSTED"  # in the message of JAX's error
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc")
_SMALL = 2**24  # bytes that are always there; to find out what is takes longer than an image


def usable_cores(*, groups: Path = _CONTROL_GROUPS, process: Path = _PROCESS) -> int:
    """The number of cores that the process may keep busy, at least 1.

    Those of its affinity, or fewer where a control group (version 1 or 2) has a quota of CPU time:
    half a core is rounded down.

    Args:
      groups: Where control groups are mounted.
      process: Where the kernel describes processes.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in _group_folders("cpu", groups, process):
        quota, period = _words(folder / "cpu.max", 2) or (
            *(_words(folder / "cpu.cfs_quota_us", 1) or ("max",)),
            *(_words(folder / "cpu.cfs_period_us", 1) or ("max",)),
        )
        if quota.isdigit() and period.isdigit():  # 'max' and -1 stand for none
            cores = min(cores, int(quota) // max(int(period), 1))
    return max(cores, 1)


def available_memory(*, groups: Path = _CONTROL_GROUPS, process: Path = _PROCESS) -> int | None:
    """The bytes that the process may still take of this machine's memory; None if unknown.

    Args:
      groups: Where control groups are mounted.
      process: Where the kernel describes processes.
    """
    found = []
    for line in _text(process / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for folder in _group_folders("memory", groups, process):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _words(folder / name, 1)
            if limit and limit[0].isdigit():
                found.append(int(limit[0]))
    return min(found, default=None)


def device_memory() -> int | None:
    """The bytes of a device's memory, or of the machine's where devices are its cores."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return available_memory()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(what: str, needed: int, remedy: str, *, available: int | None = None) -> None:
    """Refuses what needs more memory than there is, before it grinds.

    Args:
      what: What needs it, with its number, such as 'val_episodes=2000000000'.
      needed: Bytes that it needs at least.
      remedy: What to do.
      available: Bytes that there are; None for those of the machine.

    Raises:
      UsageError: it needs more than there are.

    Examples:
      >>> check_memory("image_size=100000", 10**15, "choose a smaller one")
      Traceback (most recent call last):
      meta_jax.lookup.UsageError: image_size=100000 needs at least 1000000.0 GB of memory, and ...
    """
    if available is None and needed > _SMALL:
        available = available_memory()
    if available is not None and needed > available:
        raise UsageError(
            f"{what} needs at least {_amount(needed)} of memory, and {_amount(available)} are "
            f"there: {remedy}"
        )


class OutOfMemoryError(UsageError):
    """The memory did not suffice; the message says what needed it, and which dial to turn."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX or of Python says that memory is exhausted."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _EXHAUSTED in str(error)
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def naming_dials(what: str, dials: str) -> Iterator[None]:
    """Says in one line which dial to turn where the memory does not suffice.

    Args:
      what: What needs the memory.
      dials: What to do, with the flags' names.

    Raises:
      OutOfMemoryError: the memory is exhausted inside.

    Examples:
      >>> with naming_dials("a step", "lower --task_chunk"):
      ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
      Traceback (most recent call last):
      meta_jax.host.OutOfMemoryError: a step needs more memory than there is: lower --task_chunk ...
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OutOfMemoryError(
            f"{what} needs more memory than there is: {dials} ({reason})"
        ) from error


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _group_folders(controller: str, groups: Path, process: Path) -> list[Path]:
    """The folders of the control groups that limit the process, innermost first.

    In a container its own group is mounted as the root, so the folder of its path may be missing.
    """
    folders = []
    for line in _text(process / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        root = groups / controller if controllers else groups
        inner = root / path.lstrip("/")
        folders += [inner, *(each for each in inner.parents if each.is_relative_to(root))]
    return [folder for folder in folders if folder.is_dir()]


def _words(path: Path, number: int) -> tuple[str, ...] | None:
    words = tuple(_text(path).split())
    return words if len(words) == number else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
