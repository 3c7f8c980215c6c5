import numpy as np
import pytest
from absl import logging

from meta_jax.data import cache
from meta_jax.data.cache import cache_folder, cache_key, finish_writing, load_cached, store_cached


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("META_JAX_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.array([3], np.int64),
        np.zeros((0, 5), np.float32),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
)
def test_arrays_come_back_as_they_were(folder, array):
    assert load_cached("a") is None
    store_cached("a", array)
    found = load_cached("a")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert found.size == 0 or found.ctypes.data % 64 == 0
    mapped = load_cached("a", mapped=True)
    assert isinstance(mapped, np.memmap) == (array.size > 0)
    assert mapped.dtype == array.dtype
    np.testing.assert_array_equal(mapped, array)
    assert [path.name for path in folder.iterdir()] == ["a.npy"]


def test_every_damage_counts_as_absent(folder):
    array = np.arange(200, dtype=np.uint8)
    store_cached("a", array)
    finish_writing("a")
    path = folder / "a.npy"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 64
        path.write_bytes(damaged)
        found = load_cached("a")
        # Parts of the header say nothing, such as the byte order of bytes.
        same = found is not None and found.dtype == array.dtype and np.array_equal(found, array)
        assert found is None or (same and place < len(whole) - 232), place
        assert (load_cached("a", mapped=True) is None) == (found is None)
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert load_cached("a") is None, length
    path.write_bytes(whole + b"x")
    assert load_cached("a") is None
    path.write_bytes(whole)
    assert load_cached("a") is not None


def test_without_a_place_to_write_all_works_with_one_warning(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setenv("META_JAX_CACHE", str(file / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    for mapped in (False, True):
        kept = store_cached("a", np.arange(3), mapped=mapped)
        np.testing.assert_array_equal(kept, np.arange(3))
        assert load_cached("a") is None
    assert len(warnings) == 1
    assert "META_JAX_CACHE" in warnings[0]


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("META_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("META_JAX_CACHE")
    assert cache_folder() == tmp_path / "caches" / "meta_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "meta_jax"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", no_home)
    assert cache_folder() is None
    store_cached("a", np.arange(3))
    assert load_cached("a") is None


def test_a_key_depends_on_every_part():
    keys = {cache_key("a", 1), cache_key("a", 2), cache_key("a1"), cache_key("a", "1")}
    assert len(keys) == 4
