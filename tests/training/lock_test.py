"""One process at a time in a workdir. Another open file is to a lock what another process is."""

import contextlib
import fcntl
import os

import pytest

from meta_jax.lookup import UsageError
from meta_jax.training.lock import lock_workdir
from tests.binaries import command


@contextlib.contextmanager
def somebody_else(folder):
    """Has the lock, as another process would."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def test_a_folder_is_one_process_s_until_it_ends(tmp_path):
    folder = tmp_path / "run"
    with somebody_else(tmp_path):
        with pytest.raises(UsageError, match="another process is training"), lock_workdir(tmp_path):
            pass
        with lock_workdir(folder), lock_workdir(f"{folder}/."):  # a folder of its own, twice
            with pytest.raises(BlockingIOError), somebody_else(folder):
                pass
            assert not any(folder.iterdir())
    with lock_workdir(tmp_path), pytest.raises(BlockingIOError), somebody_else(tmp_path):
        pass
    with somebody_else(folder):  # free again
        pass


def test_a_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock_workdir(tmp_path):
        raise KeyError
    with somebody_else(tmp_path):
        pass


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), lock_workdir(tmp_path):
        pass


def test_a_file_is_no_workdir(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UsageError, match="is a file and no workdir"), lock_workdir(path):
        pass


@pytest.mark.parametrize("module", ["train", "learn_optimizer"])
def test_a_second_run_is_refused_and_writes_nothing(module, tmp_path):
    with somebody_else(tmp_path):
        done = command(module, "--steps=1", "--log_every=1", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "another process is training in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
