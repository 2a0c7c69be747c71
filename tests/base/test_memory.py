"""Laws of memory counts: peaks never fall, and what is available is the least that any limit leaves."""

import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from onebase.base import memory

MB = 2**20


def test_the_peak_holds_what_was_held_once():
    before = memory.rss_bytes()
    held = np.ones(300 * MB, dtype=np.uint8)
    during = memory.rss_bytes()
    del held
    assert during - before > 280 * MB
    assert memory.rss_bytes() < during - 200 * MB
    assert memory.peak_rss_bytes() >= during - MB  # the kernel counts in batches of pages


def test_the_peak_is_not_that_of_who_started_the_process():
    held = np.ones(600 * MB, dtype=np.uint8)
    code = "from onebase.base import memory; print(memory.peak_rss_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(told.stdout) < 300 * MB < held.nbytes


@pytest.mark.parametrize(("platform", "unit"), [("freebsd", 1024), ("darwin", 1)])
def test_the_systems_unit_of_the_peak_is_known(monkeypatch, platform, unit):
    import resource

    enormous = 2**50

    class Usage:
        ru_maxrss = enormous // unit

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: Usage)
    assert memory.peak_rss_bytes() == enormous


def _groups(monkeypatch, folder, own, files):
    monkeypatch.setattr(memory, "_CGROUPS", folder)
    monkeypatch.setattr(memory, "_OWN_CGROUP", folder / "own")
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = "0::/outer/inner\n"
V1 = "5:cpu,cpuacct:/elsewhere\n4:memory:/outer/inner\n"
LEFT = 50 * MB


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (V2, {"outer/inner/memory.max": f"{90 * MB}\n", "outer/inner/memory.current": f"{40 * MB}\n"}),
        (  # the outer group is the tighter one, and file cache is given back
            V2,
            {
                "outer/inner/memory.max": "max\n",
                "outer/inner/memory.current": f"{40 * MB}\n",
                "outer/memory.max": f"{90 * MB}\n",
                "outer/memory.current": f"{60 * MB}\n",
                "outer/memory.stat": f"anon 1\ninactive_file {20 * MB}\n",
            },
        ),
        (  # in a container the path is the host's, and its own group is mounted at the root
            V2,
            {"memory.max": f"{90 * MB}\n", "memory.current": f"{40 * MB}\n"},
        ),
        (
            V1,
            {
                "memory/outer/inner/memory.limit_in_bytes": f"{90 * MB}\n",
                "memory/outer/inner/memory.usage_in_bytes": f"{70 * MB}\n",
                "memory/outer/inner/memory.stat": f"cache 1\ninactive_file 0\ntotal_inactive_file {30 * MB}\n",
            },
        ),
    ],
    ids=["own group", "outer group", "container", "version 1"],
)
def test_a_containers_limit_is_heeded(monkeypatch, tmp_path, own, files):
    _groups(monkeypatch, tmp_path, own, files)
    assert memory.available_bytes() == LEFT


def test_a_group_that_is_full_leaves_nothing(monkeypatch, tmp_path):
    _groups(monkeypatch, tmp_path, V2, {"memory.max": "1000\n", "memory.current": "3000\n"})
    assert memory.available_bytes() == 0


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (V2, {"memory.max": "max\n", "memory.current": "1\n"}),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1\n"}),
        ("", {}),
    ],
    ids=["max", "version 1's largest number", "no groups"],
)
def test_without_a_limit_the_machine_decides(monkeypatch, tmp_path, own, files):
    _groups(monkeypatch, tmp_path, own, files)
    assert memory.available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_the_processs_own_limit_is_heeded():
    code = """
import resource
from onebase.base import memory
import psutil
limit = psutil.Process().memory_info().vms + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
left = memory.available_bytes()
assert 250 * 2**20 < left <= 300 * 2**20, left
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_cpu_has_no_memory_beside_the_processs():
    memory.reset_peak_device_bytes("cpu")
    assert memory.peak_device_bytes(torch.device("cpu")) == 0


@pytest.mark.gpu
def test_a_devices_peak_can_be_counted_again():
    held = torch.ones(64 * MB, device="cuda")
    assert memory.peak_device_bytes("cuda") >= 4 * 64 * MB
    del held
    memory.reset_peak_device_bytes("cuda")
    assert memory.peak_device_bytes("cuda") < 4 * 64 * MB
