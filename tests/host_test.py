"""Cores and memory of a container, read from made-up control groups."""

import os

import jax.numpy as jnp
import pytest

from meta_jax import host
from meta_jax.lookup import UsageError

CORES = len(os.sched_getaffinity(0))


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"groups": root / "groups", "process": root / "proc"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, CORES),
        ({"proc/self/cgroup": "0::/a/b\n", "groups/a/b/cpu.max": "max 100000\n"}, CORES),
        ({"proc/self/cgroup": "0::/a/b\n", "groups/a/b/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "groups/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "groups/cpu.max": "99999999 100000\n"}, CORES),
        ({"proc/self/cgroup": "0::/\n", "groups/cpu.max": "damaged\n"}, CORES),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/a\n0::/\n",
                "groups/cpu/cpu.cfs_quota_us": "150000\n",
                "groups/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/a\n",
                "groups/cpu/docker/a/cpu.cfs_quota_us": "-1\n",
                "groups/cpu/docker/a/cpu.cfs_period_us": "100000\n",
            },
            CORES,
        ),
    ],
)
def test_a_quota_of_cpu_time_is_seen(tmp_path, files, cores):
    (tmp_path / "groups").mkdir()
    assert host.usable_cores(**write(tmp_path, files)) == cores


def test_the_quota_is_rounded_down_and_of_several_groups_the_least_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "groups/a/b/cpu.max": "799999 100000\n",
        "groups/a/cpu.max": "350000 100000\n",
    }
    assert host.usable_cores(**write(tmp_path, files)) == 3


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\n"}, 5120),
        (
            {
                "proc/meminfo": "MemAvailable: 5 kB\n",
                "proc/self/cgroup": "0::/a\n",
                "groups/a/memory.max": "2048\n",
            },
            2048,
        ),
        (
            {"proc/self/cgroup": "4:memory:/a\n", "groups/memory/memory.limit_in_bytes": "77\n"},
            77,
        ),
    ],
)
def test_the_memory_of_a_container_is_seen(tmp_path, files, memory):
    (tmp_path / "groups").mkdir()
    assert host.available_memory(**write(tmp_path, files)) == memory


def test_what_does_not_fit_is_refused_with_the_number():
    host.check_memory("seeds", 10, "less", available=10)
    with pytest.raises(UsageError, match=r"of 9 needs at least 11\.0 GB of memory, and 2\.0 GB"):
        host.check_memory("size of 9", 11 * 10**9, "choose a smaller one", available=2 * 10**9)


def test_memory_is_looked_up_for_what_is_large(monkeypatch):
    looked_up = []
    monkeypatch.setattr(host, "available_memory", lambda: looked_up.append(None) or 2**25)
    host.check_memory("image_size=28", 28**2, "choose a smaller one")  # as for every image
    assert not looked_up
    with pytest.raises(UsageError, match="image_size=9000 needs"):
        host.check_memory("image_size=9000", 9000**2, "choose a smaller one")


def test_exhausted_memory_of_a_device_names_the_dials():
    with (
        pytest.raises(host.OutOfMemoryError, match=r"the table needs more .* is: turn it down \("),
        host.naming_dials("the table", "turn it down"),
    ):
        jnp.zeros(10**14).block_until_ready()  # 400 TB are more than an address can name
