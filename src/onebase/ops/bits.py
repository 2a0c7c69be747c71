"""Reproducible bits: what must be in the environment before torch loads MKL.

MKL's default sgemm rounds a row differently as the number of rows changes, so a row's result would depend on its
neighbours. Its conditional numerical reproducibility in strict mode does not (Intel oneMKL developer guide,
"Reproducibility conditions"; in bench/reproducible_bits.json 101 of 546 products differ without it, 0 of 546 with it).
It covers products alone: torch's own SiLU, sigmoid and tanh-GELU depend on neighbours where a layer's width is no
multiple of about 32 x threads (LOG.md, "Reproducible bits"). This module imports no torch: it runs from
`import onebase`, first of all. It costs about 5 % of a step (bench/reproducible_bits.json), so `onebase train` does
without it for a run alone unless train.batch_invariant is set.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from pathlib import Path

VARIABLE = "MKL_CBWR"
_BRANCHES = ("AVX512", "AVX2")
_set_here: set[str] = set()


def processor_flags() -> frozenset[str]:
    """Return the instruction sets that the processor names; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def instruction_set() -> str:
    """Return "AVX512", "AVX2" or the machine's name: what decides the bits of a matrix product."""
    flags = processor_flags()
    if "avx512f" in flags:
        return "AVX512"
    return "AVX2" if "avx2" in flags else platform.machine()


def ask_for_batch_invariance() -> None:
    """Set MKL_CBWR to the machine's strict mode unless the user has set it; warn if torch was imported before."""
    branch = instruction_set()
    if VARIABLE in os.environ or branch not in _BRANCHES:
        return
    if "torch" in sys.modules:
        warnings.warn(
            f"torch was imported before onebase, so {VARIABLE} could not be set: results repeat on this machine, but "
            f"an example's bits may depend on its neighbours in the batch. Import onebase first, or set "
            f"{VARIABLE}={branch},STRICT in the environment.",
            stacklevel=3,
        )
        return
    os.environ[VARIABLE] = f"{branch},STRICT"
    _set_here.add(VARIABLE)


def do_without_batch_invariance() -> None:
    """Take back what `ask_for_batch_invariance` set: one run alone is as exact without it, and faster by about 5 %."""
    if VARIABLE in _set_here and "torch" not in sys.modules:
        del os.environ[VARIABLE]
        _set_here.clear()


def products_mode() -> str:
    """Return what decides the bits of a matrix product on this processor: the instruction set, or MKL_CBWR."""
    return os.environ.get(VARIABLE) or instruction_set()
