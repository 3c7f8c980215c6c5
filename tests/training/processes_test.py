"""Several processes of one run, over loopback."""

import jax
import numpy as np

from meta_jax.lookup import UsageError
from meta_jax.training import processes
from tests import several_processes


def test_a_run_of_two_processes_is_stopped_killed_and_ended_by_one(tmp_path, x64):
    """SIGTERM reaches the second process alone, and both save; SIGKILL ends both later."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert several_processes.train(whole, "prototypical").finished
    several_processes.start(2, killed, "prototypical", killed_at=12)
    said = []
    assert several_processes.train(killed, "prototypical", say=said.append).finished
    assert said == ["resuming at step 12 of 20"]
    expected, found = map(several_processes.parameters, (whole, killed))
    np.testing.assert_allclose(found, expected, rtol=0, atol=several_processes.TOLERANCE)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, killed)]
    assert len(lines[0]) == len(lines[1])  # nobody wrote a line twice
    names = [sorted(path.name for path in (f / "checkpoints").iterdir()) for f in (whole, killed)]
    assert names[0] == names[1] == ["best", "step_00000016", "step_00000020"]


def test_one_process_writes_and_has_everything():
    key = jax.random.key(3)
    assert processes.is_writer()
    assert processes.from_writer(lambda: key) is key
    assert processes.largest(False, 0.5) == (0.0, 0.5)
    assert processes.local({"key": key})["key"] is key
    np.testing.assert_array_equal(processes.gathered(jax.numpy.arange(3)), [0, 1, 2])


def test_what_is_sent_to_other_processes_comes_back_as_it_was():
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 2)
    sent = processes.pack({"keys": keys, "step": 3, "none": None, "best": 0.1, "w": keys.shape})
    found = processes.unpack(sent)
    assert found.pop("keys").dtype == keys.dtype
    assert found == {"step": 3, "none": None, "best": 0.1, "w": (2,)}


def test_an_error_reaches_other_processes_whatever_it_holds():
    class TwoPartsError(Exception):
        """`pickle` builds it again from one argument."""

        def __init__(self, what, remedy):
            super().__init__(f"{what}: {remedy}")

    known, unknown = UsageError("the disk is full"), TwoPartsError("full", "delete something")
    assert processes.sendable(None) is None
    assert processes.sendable(known) is known
    found = processes.sendable(unknown)
    assert (type(found), str(found)) == (RuntimeError, "TwoPartsError: full: delete something")
