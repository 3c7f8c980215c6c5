"""Who may write a workdir: one run at a time, for as long as it lives."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

from meta_jax.lookup import UsageError, local_path
from meta_jax.training import processes

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None

LOCK_FILE = ".lock"
# The workdirs that this thread writes: who holds the lock may ask for it again.
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextlib.contextmanager
def only_writer(workdir: Path | str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the lock of a workdir: whoever else asks for it meanwhile is refused.

    The lock is the operating system's (`flock`), so that a process that was killed holds it no
    longer. The folder has a file `.lock` while the lock is held; it is made if it is not there, and
    removed again if nothing else was written. Of the processes of one run the first holds it for
    all.

    Args:
      workdir: The folder.
      say: Takes the line that a file system without locks gets.

    Raises:
      UsageError: another run holds it, or the workdir is a file.
    """
    path = local_path(workdir).absolute() / LOCK_FILE
    if path in _HELD.get():
        yield
        return
    held: list[int] = []
    made = processes.from_writer(lambda: _make_and_acquire(path, say, held))
    token = _HELD.set(_HELD.get() | {path})
    try:
        yield
    finally:
        _HELD.reset(token)
        for descriptor in held:
            _release(path, descriptor)
        if made and processes.is_writer():
            with contextlib.suppress(OSError):  # it is in use
                path.parent.rmdir()


def is_unused(workdir: Path) -> bool:
    """Whether a folder is absent or holds nothing but what the start of a run leaves when killed.

    Args:
      workdir: The folder.
    """
    if not workdir.exists():
        return not workdir.is_symlink()
    unfinished = (LOCK_FILE, "config.json.new")
    return workdir.is_dir() and all(entry.name in unfinished for entry in workdir.iterdir())


def _make_and_acquire(path: Path, say: Callable[[str], None], held: list[int]) -> bool:
    """Puts the lock into `held`, and gives whether the folder was made for it."""
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not empty and no workdir of ours: name another one")
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    held.extend(_acquire(path, say))
    return made


def _acquire(path: Path, say: Callable[[str], None]) -> list[int]:
    """The descriptor of the locked file; none where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"{path.parent} is being written by another run{owner and f' ({owner})'}: wait for "
                "its end, stop it, or name another workdir"
            ) from error
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            say(
                f"note: {path.parent} cannot be locked ({error.strerror}): take care that no other "
                "run writes it"
            )
            return []
        # Whoever held it before may have removed the file since it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return [descriptor]
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(0, "this system has no flock")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)  # before the lock is given up, while the file is surely ours
    os.close(descriptor)
