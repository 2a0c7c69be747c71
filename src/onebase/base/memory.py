"""Memory: what this process holds, held at most, and may still take; the same questions for a GPU.

`available_bytes` is the least of what the machine has free, what a container's limit leaves (cgroup v2 or v1) and what
the process's own limit leaves: a training that asks only the machine is killed in a container. Linux and macOS; on
other systems the peak is what the process holds now. torch is needed for devices alone. Cost: some 50 us a call.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from onebase.errors import CapacityError

if TYPE_CHECKING:
    import torch

UNLIMITED_BYTES = 1 << 60
"""Above this a cgroup's limit means none: version 1 writes the largest multiple of a page."""

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")


def rss_bytes() -> int:
    """Return the physical memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Return the most physical memory that this process has held since it started.

    On Linux by VmHWM (proc(5)), which begins anew with a program; getrusage's figure is never below what the process
    that started it held.
    """
    status = _STATUS.read_text() if sys.platform == "linux" and _STATUS.is_file() else ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
        return max(int(found.group(1)) * 1024, rss_bytes())
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", rss_bytes()))
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes elsewhere
    return max(int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit_bytes, rss_bytes())


def available_bytes() -> int:
    """Return how much more memory this process may take: the least of machine, container and own limit."""
    limits = [int(psutil.virtual_memory().available), *_cgroup_headroom(), *_own_headroom()]
    return max(0, min(limits))


def check_room_for(name: str, needed_bytes: int, todo: str) -> None:
    """Raise if weights do not fit: on a CPU nothing else does, the system ends the process in the middle of making them.

    Raises:
        CapacityError: how much is needed, how much there is, what would fit.
    """
    free = available_bytes()
    if needed_bytes > free:
        raise CapacityError(
            f"{name}: its weights need {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free. {todo}"
        )


def peak_device_bytes(device: torch.device | str) -> int:
    """Return the most memory that torch has held on a device since the last reset; 0 for the CPU."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())  # it keeps no peak; the driver gives little back
    return 0


def reset_peak_device_bytes(device: torch.device | str) -> None:
    """Start counting a device's peak again; for the CPU and devices without such a count nothing happens."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _cgroup_headroom() -> Iterator[int]:
    """Yield what is left under the limit of each control group that this process is in, outer ones included.

    A group's file cache counts as its usage, but is given back before anything is killed, so it is left out.
    """
    for folder in _cgroup_folders():
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None and limit < UNLIMITED_BYTES:
                yield limit - max(0, usage - _file_cache_bytes(folder))


def _cgroup_folders() -> list[Path]:
    """Return the folders of the memory groups that hold this process, from its own to the root."""
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: dict[Path, None] = {}
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        place = root / inside.strip("/")
        # In a container the path may be the host's, which is not there: its own group is then mounted at the root.
        for folder in (place, *place.parents):
            if folder == root or root in folder.parents:
                folders[folder] = None
    return [folder for folder in folders if folder.is_dir()]


def _file_cache_bytes(folder: Path) -> int:
    """Return the file cache that the kernel takes back first, as a group's memory.stat tells it."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
    found = counts.get("total_inactive_file", counts.get("inactive_file", "0"))
    return int(found) if found.isdecimal() else 0


def _own_headroom() -> Iterator[int]:
    """Yield what the process's address space may still grow by, where it is limited (ulimit -v)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and os.name == "posix":
        yield int(limit) - int(psutil.Process().memory_info().vms)


def _number(path: Path) -> int | None:
    """Return the number in a file of the kernel; None for "max", or where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
