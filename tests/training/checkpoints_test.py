import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.training import checkpoints
from meta_jax.training.checkpoints import CheckpointError, DamagedCheckpointError


class State(NamedTuple):
    step: jax.Array
    params: dict
    state: dict
    opt_state: tuple
    key: jax.Array


def make_state(seed=0):
    key = jax.random.key(seed)
    params = {"conv": {"w": jax.random.normal(key, (3, 3, 4)), "b": jnp.zeros(4)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return State(jnp.int32(seed), params, {}, optimizer.init(params), key)


def small(value):
    return {"w": jnp.full((3,), value, jnp.float32)}


def assert_bitwise_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def entries(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_train_state_round_trips_bitwise(tmp_path):
    state = make_state()
    path = checkpoints.save(tmp_path, "best", state, {"step": 7, "accuracy": 0.1})
    restored, metadata = checkpoints.restore(path, make_state(seed=1))
    assert_bitwise_equal(restored, state)
    assert metadata == {"step": 7, "accuracy": 0.1}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_odd_leaves_round_trip_into_abstract_arrays(tmp_path):
    tree = {
        "bfloat16": jnp.arange(5, dtype=jnp.bfloat16) / 3,
        "specials": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40], jnp.float32),
        "boolean": jnp.array(True),
        "byte": jnp.arange(256, dtype=jnp.uint8),
        "empty": jnp.zeros((0, 3), jnp.int32),
        "raw key": jax.random.key_data(jax.random.key(1)),
        "other generator": jax.random.split(jax.random.key(2, impl="rbg"), 3),
    }
    path = checkpoints.save(tmp_path, "odd", tree, {})
    restored, _ = checkpoints.restore(path, jax.eval_shape(lambda: tree))
    assert_bitwise_equal(restored, tree)


def test_transposed_numpy_array_keeps_its_values(tmp_path):
    tree = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    restored, _ = checkpoints.restore(checkpoints.save(tmp_path, "t", tree, {}), tree)
    np.testing.assert_array_equal(restored["w"], tree["w"])


def test_metadata_with_integer_keys_and_nan_is_readable(tmp_path):
    path = checkpoints.save(tmp_path, "m", small(0), {"by_ways": {5: 1, 20: 2, 10: float("inf")}})
    _, metadata = checkpoints.restore(path, small(0))
    assert metadata == {"by_ways": {"5": 1, "20": 2, "10": float("inf")}}


@pytest.mark.parametrize("leaf", [3, np.zeros(2, np.float64)], ids=["int", "float64"])
def test_leaf_that_jax_would_not_give_back_is_refused(tmp_path, leaf):
    with pytest.raises(TypeError, match="leaf w"):
        checkpoints.save(tmp_path, "x", {"w": leaf}, {})
    assert entries(tmp_path) == []


def test_small_weights_stay_small_and_name_no_machine_path(tmp_path):
    weights = {f"layer{i}": jax.random.normal(jax.random.key(i), (28_000,)) for i in range(4)}
    path = checkpoints.save(tmp_path, "weights", weights, {})
    assert sum(file.stat().st_size for file in files(path)) < 450_000
    assert len(files(path)) <= 16
    assert not [file for file in files(path) if str(tmp_path).encode() in file.read_bytes()]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_harm_to_any_file_is_found(tmp_path, harm):
    path = checkpoints.save(tmp_path, "best", small(1), {"step": 1})
    for index, name in enumerate(file.relative_to(path) for file in files(path)):
        harmed = tmp_path / str(index)
        shutil.copytree(path, harmed)
        if harm == "flip":
            flip_a_byte(harmed / name)
        elif harm == "truncate":
            data = (harmed / name).read_bytes()
            (harmed / name).write_bytes(data[: len(data) // 2])
        else:
            (harmed / name).unlink()
        with pytest.raises(DamagedCheckpointError, match=rf"checkpoint {harmed} is damaged: .*\w$"):
            checkpoints.restore(harmed, small(0))


def test_copied_checkpoint_is_readable_elsewhere(tmp_path):
    shutil.move(checkpoints.save(tmp_path / "a", "best", small(1), {}), tmp_path / "weights")
    assert_bitwise_equal(checkpoints.restore(tmp_path / "weights", small(0))[0], small(1))


@pytest.mark.parametrize(
    ("like", "culprit"),
    [
        ({"w": jnp.zeros(4)}, r"holds float32\[3\] at w, where float32\[4\] is expected"),
        ({"w": jnp.zeros(3, jnp.int32)}, r"float32\[3\] at w, where int32\[3\]"),
        ({"w": jnp.zeros(3), "b": jnp.zeros(1)}, r"holds nothing at b"),
        ({}, r"float32\[3\] at w, where nothing"),
    ],
    ids=["shape", "dtype", "more", "fewer"],
)
def test_other_structure_is_a_mismatch_and_not_damage(tmp_path, like, culprit):
    checkpoints.save_step(tmp_path, 1, small(1), {})
    with pytest.raises(CheckpointError, match=culprit) as caught:
        checkpoints.restore_latest(tmp_path, like)
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert "\n" not in str(caught.value)


def test_absent_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*best; train first"):
        checkpoints.restore(tmp_path / "best", small(0))
    assert checkpoints.restore_latest(tmp_path / "nowhere", small(0)) is None
    checkpoints.save(tmp_path, "best", small(0), {})
    assert checkpoints.restore_latest(tmp_path, small(0)) is None


def test_only_the_newest_steps_and_best_are_kept(tmp_path):
    checkpoints.save(tmp_path, "best", small(0), {})
    for step in (100, 200, 300):
        checkpoints.save_step(tmp_path, step, small(step), {"step": step})
    assert entries(tmp_path) == ["best", "step_00000200", "step_00000300"]
    tree, metadata, warnings = checkpoints.restore_latest(tmp_path, small(0))
    assert_bitwise_equal(tree, small(300))
    assert (metadata, warnings) == ({"step": 300}, [])


def test_a_step_between_checkpoints_goes_when_the_next_is_saved(tmp_path):
    kept = {4: [4], 8: [4, 8], 9: [8, 9], 10: [8, 10], 12: [8, 12]}
    for step, steps in kept.items():
        checkpoints.save_step(tmp_path, step, small(step), {"step": step}, every=4)
        assert entries(tmp_path) == [f"step_{each:08d}" for each in steps]


def test_steps_order_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoints.save_step(tmp_path, step, small(step), {"step": step})
    assert checkpoints.restore_latest(tmp_path, small(0))[1] == {"step": 100_000_000}


def test_damaged_newest_step_is_skipped_and_said(tmp_path):
    for step in (1, 2):
        checkpoints.save_step(tmp_path, step, small(step), {"step": step})
    flip_a_byte(tmp_path / "step_00000002" / "header.json")
    tree, metadata, warnings = checkpoints.restore_latest(tmp_path, small(0))
    assert_bitwise_equal(tree, small(1))
    assert metadata == {"step": 1}
    assert len(warnings) == 1
    assert "step_00000002 is damaged" in warnings[0]
    assert "\n" not in warnings[0]

    # The resumed run must not take the damaged one for the newest, and prune what is intact.
    checkpoints.save_step(tmp_path, 1, small(5), {"step": 1}, keep=1)
    assert checkpoints.restore_latest(tmp_path, small(0))[1] == {"step": 1}
    checkpoints.save_step(tmp_path, 2, small(6), {"step": 2}, keep=1)
    assert_bitwise_equal(checkpoints.restore_latest(tmp_path, small(0))[0], small(6))
    assert entries(tmp_path) == ["step_00000002"]


def test_all_steps_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        checkpoints.save_step(tmp_path, step, small(step), {})
        flip_a_byte(tmp_path / f"step_{step:08d}" / "header.json")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        checkpoints.restore_latest(tmp_path, small(0))


@pytest.mark.parametrize("name", ["best", "step_00000005"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new(tmp_path, monkeypatch, name):
    """Whatever folder state the save passes through can be read, and saved over."""
    directory, states = tmp_path / "checkpoints", []

    def snapshot_before(function):
        def wrapped(*args, **kwargs):
            states.append(tmp_path / f"state{len(states)}")
            shutil.copytree(directory, states[-1])
            return function(*args, **kwargs)

        return wrapped

    checkpoints.save(directory, name, small(1), {"n": 1})
    with monkeypatch.context() as patch:
        for module, function in (
            (checkpoints, "_write_arrays"),
            (checkpoints, "_digest_files"),
            (checkpoints.os, "rename"),
            (checkpoints.shutil, "rmtree"),
        ):
            patch.setattr(module, function, snapshot_before(getattr(module, function)))
        checkpoints.save(directory, name, small(2), {"n": 2})

    seen = set()
    for state in states:
        before = entries(state)
        tree, metadata = checkpoints.restore(state / name, small(0))
        assert_bitwise_equal(tree, small(metadata["n"]))
        seen.add(metadata["n"])
        if name.startswith("step"):
            assert checkpoints.restore_latest(state, small(0))[1:] == (metadata, [])
        assert entries(state) == before, "reading must not write"
        checkpoints.save(state, name, small(3), {"n": 3})
        assert_bitwise_equal(checkpoints.restore(state / name, small(0))[0], small(3))
        assert entries(state) == [name]
    assert seen == {1, 2}


def test_leftovers_of_another_step_are_removed(tmp_path):
    checkpoints.save_step(tmp_path, 1, small(1), {})
    (tmp_path / "step_00000002.saving" / "tree").mkdir(parents=True)
    assert checkpoints.restore_latest(tmp_path, small(0))[2] == []
    checkpoints.save_step(tmp_path, 3, small(3), {})
    assert entries(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_kill_while_an_old_step_is_removed_leaves_no_damaged_one(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoints.save_step(tmp_path, step, small(step), {"step": step})
    rmtree = shutil.rmtree

    def killed(path, *arguments, **settings):
        if Path(path).exists() and "step_00000001" in str(path):
            raise KeyboardInterrupt
        rmtree(path, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save_step(tmp_path, 3, small(3), {"step": 3})
    assert "step_00000001" not in entries(tmp_path)
    checkpoints.tidy(tmp_path)
    assert entries(tmp_path) == ["step_00000002", "step_00000003"]
    checkpoints.tidy(tmp_path / "nowhere")


_SAVE_FOREVER = """
import itertools, sys
import jax.numpy as jnp
from meta_jax.training import checkpoints
for step in itertools.count():
    checkpoints.save_step(sys.argv[1], step, {"w": jnp.full(3, step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


def test_sigkill_loses_no_finished_save(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", _SAVE_FOREVER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with child:
        for _ in range(5):
            finished = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        finished = max([finished, *map(int, child.stdout.read().split())])
    tree, metadata, warnings = checkpoints.restore_latest(tmp_path, small(0))
    assert metadata["step"] >= finished
    assert_bitwise_equal(tree, small(metadata["step"]))
    assert warnings == []


@pytest.fixture
def small_disk(tmp_path):
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("this user may not mount a small tmpfs")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_full_disk_is_one_line_and_harms_nothing(small_disk, capfd):
    checkpoints.save_step(small_disk, 1, small(1), {"step": 1})
    noise = {"w": jax.random.normal(jax.random.key(0), (600_000,))}
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*: no space left; free"):
        checkpoints.save_step(small_disk, 2, noise, {"step": 2})
    assert entries(small_disk) == ["step_00000001"]
    assert checkpoints.restore_latest(small_disk, small(0))[1] == {"step": 1}
    assert capfd.readouterr().err == ""
    checkpoints.save_step(small_disk, 2, small(2), {"step": 2})


def test_disk_that_fills_while_the_arrays_are_written(small_disk, monkeypatch):
    checkpoints.save_step(small_disk, 1, small(1), {"step": 1})
    monkeypatch.setattr(checkpoints, "_check_space", lambda folder, size: None)
    noise = {"w": jax.random.normal(jax.random.key(0), (600_000,))}
    with pytest.raises(CheckpointError, match="no space left; free") as caught:
        checkpoints.save_step(small_disk, 2, noise, {"step": 2})
    assert "\n" not in str(caught.value)
    assert entries(small_disk) == ["step_00000001"]
    assert checkpoints.restore_latest(small_disk, small(0))[1] == {"step": 1}


def test_quota_error_while_writing_the_header(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(checkpoints.errno.EDQUOT, "quota")

    checkpoints.save(tmp_path, "best", small(1), {})
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CheckpointError, match="disk quota exceeded; free"):
        checkpoints.save(tmp_path, "best", small(2), {})
    assert entries(tmp_path) == ["best"]
    assert_bitwise_equal(checkpoints.restore(tmp_path / "best", small(0))[0], small(1))


def test_sharded_arrays_come_back_whole_on_the_default_device(tmp_path):
    """Saved from four devices, read on one."""
    saver = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from meta_jax.training import checkpoints
mesh = Mesh(np.array(jax.devices()), ("task",))
for name, spec in (("split", PartitionSpec("task")), ("copied", PartitionSpec())):
    tree = {"w": jax.device_put(jnp.arange(8.0), NamedSharding(mesh, spec))}
    assert len(tree["w"].sharding.device_set) == 4
    checkpoints.save(sys.argv[1], name, tree, {})
"""
    environment = {
        **checkpoints.os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", saver, tmp_path], env=environment, check=True)
    expected = {"w": jnp.arange(8.0)}
    for name in ("split", "copied"):
        restored, _ = checkpoints.restore(tmp_path / name, expected)
        assert_bitwise_equal(restored, expected)
        assert restored["w"].sharding.device_set == {jax.devices()[0]}


def test_header_is_readable_json(tmp_path):
    path = checkpoints.save(tmp_path, "best", small(1), {"step": 4})
    header = json.loads((path / "header.json").read_text())
    assert header["metadata"] == {"step": 4}
    assert header["leaves"] == {"w": "float32[3]"}


# ---- Whose parameters they are.

CONV4 = {
    "name": "prototypical",
    "network": {"name": "conv4", "features": 4, "normalisation": "running"},
    "widths": (4, 4),
    "eval_steps": 3,
}


def with_network(**settings):
    return {**CONV4, "network": {**CONV4["network"], **settings}}


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (
            with_network(name="strided_conv4"),
            'network.name = "conv4", and here network.name = "str',
        ),
        (with_network(normalisation="support"), 'network.normalisation = "running", and here'),
        ({**CONV4, "eval_steps": 5}, "eval_steps = 3, and here eval_steps = 5"),
        ({**CONV4, "widths": (4, 5)}, r"widths = [4, 4], and here widths = [4, 5]"),
        ({**CONV4, "distance": "cosine"}, 'distance = "not set", and here distance = "cosine"'),
        ({**CONV4, "network": None}, "and here network = null"),
    ],
)
def test_parameters_of_another_learner_are_refused(tmp_path, config, culprit):
    """All leaves have the same names and shapes."""
    checkpoints.save_step(tmp_path, 1, small(1), {}, config=CONV4)
    for restore in (
        lambda: checkpoints.restore(tmp_path / "step_00000001", small(0), config=config),
        lambda: checkpoints.restore_latest(tmp_path, small(0), config=config),
    ):
        with pytest.raises(CheckpointError) as caught:
            restore()
        assert culprit in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, DamagedCheckpointError)


def test_the_same_settings_are_the_same_by_value(tmp_path):
    path = checkpoints.save(tmp_path, "best", small(1), {}, config=CONV4)
    for config in (CONV4, json.loads(json.dumps(CONV4)), {**CONV4, "eval_steps": 3.0}):
        assert_bitwise_equal(checkpoints.restore(path, small(0), config=config)[0], small(1))


def test_a_recorded_learner_and_none_given(tmp_path):
    path = checkpoints.save(tmp_path, "best", small(1), {}, config=CONV4)
    remedy = r"of prototypical, and no config is given .*: give config=learner.config, or use meta_"
    with pytest.raises(CheckpointError, match=remedy):
        checkpoints.restore(path, small(0))


def test_no_recorded_learner_and_one_given(tmp_path):
    path = checkpoints.save(tmp_path, "best", small(1), {})
    with pytest.raises(CheckpointError, match="does not say which learner it is of: train with"):
        checkpoints.restore(path, small(0), config=CONV4)


def test_all_contents_are_read_without_a_structure(tmp_path):
    state = make_state()
    tree = {"state": state, "none": jnp.zeros((0, 3), jnp.int32), "half": jnp.ones(2, jnp.bfloat16)}
    checkpoints.save_step(tmp_path, 1, tree, {"n": 1}, config=CONV4)
    contents = checkpoints.read(tmp_path / "step_00000001")
    assert contents.metadata == {"n": 1}
    assert contents.config == json.loads(json.dumps(CONV4))
    assert_bitwise_equal(contents.leaves["state/params/conv/w"], state.params["conv"]["w"])
    assert_bitwise_equal(contents.leaves["none"], tree["none"])
    assert_bitwise_equal(contents.leaves["half"], tree["half"])
    newest, warnings = checkpoints.read_latest(tmp_path)
    assert newest.leaves.keys() == contents.leaves.keys()
    assert (warnings, checkpoints.read_latest(tmp_path / "nowhere")) == ([], None)


def test_leaves_are_put_into_a_tree_of_their_shapes():
    leaves = {"a/b": jnp.ones(3, jnp.bfloat16), "c": jnp.zeros(())}
    tree = checkpoints.unflatten("here", leaves, {"a": {"b": jnp.zeros(3)}, "c": jnp.zeros(())})
    assert_bitwise_equal(tree, {"a": {"b": leaves["a/b"]}, "c": leaves["c"]})
    for like in ({"a": {"b": jnp.zeros(4)}, "c": jnp.zeros(())}, {"c": jnp.zeros(())}):
        with pytest.raises(
            CheckpointError, match=r"here holds \[3\] at a/b, where (nothing|\[4\])"
        ):
            checkpoints.unflatten("here", leaves, like)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(tmp_path, "best", small(1), {}, config={"name": "x", "network": jnp})
    assert entries(tmp_path) == []


@pytest.mark.parametrize("tree", [{"params": {}, "state": {}}, (), {"w": jnp.zeros((0, 3))}])
def test_a_tree_without_numbers_round_trips(tmp_path, tree):
    path = checkpoints.save(tmp_path, "best", tree, {"step": 1})
    restored, metadata = checkpoints.restore(path, tree)
    assert_bitwise_equal(restored, tree)
    assert metadata == checkpoints.read_metadata(path) == {"step": 1}
    assert set(checkpoints.read(path).leaves) == ({"w"} if "w" in tree else set())
    checkpoints.save(tmp_path, "best", small(2.0), {"step": 2})  # and takes its place
    assert_bitwise_equal(checkpoints.restore(path, small(0.0))[0], small(2.0))


def test_a_setting_of_nan_is_itself(tmp_path):
    config = {"name": "mine", "rate": float("nan")}
    path = checkpoints.save(tmp_path, "best", small(1.0), {}, config=config)
    checkpoints.restore(path, small(0.0), config={**config, "rate": float("nan")})
    with pytest.raises(CheckpointError, match=r"rate = NaN, and here rate = 1\.0"):
        checkpoints.restore(path, small(0.0), config={**config, "rate": 1.0})
    checkpoints.check_config(path, {"rate": 1}, {"rate": 1.0})


def test_the_newest_step_is_named(tmp_path):
    assert checkpoints.latest_path(tmp_path / "none", 5) is None
    for step in (3, 12):
        checkpoints.save_step(tmp_path, step, small(1.0), {})
    newest = {step: checkpoints.latest_path(tmp_path, step) for step in (2, 3, 11, 12, 13)}
    assert newest[2] is None
    assert newest[3] == newest[11] == tmp_path / "step_00000003"
    assert newest[12] == newest[13] == tmp_path / "step_00000012"
