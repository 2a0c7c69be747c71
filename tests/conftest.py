"""What every test runs under: shapes are checked, hubs are never asked, and threads are few and fixed."""

import os
import signal
from importlib.metadata import version

# Before torch or a hub's client is imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE") or "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two pools of spinning threads on the same cores take many times as long. Tests that need more ask torch for them.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import hypothesis
import jaxtyping
import pytest

# Shapes in the signatures of these rooms are checked while tests run, and only then.
CHECKED_ROOMS = ("onebase.ops", "onebase.adapters", "onebase.measure")
jaxtyping.install_import_hook(CHECKED_ROOMS, "beartype.beartype")

import onebase  # noqa: E402, F401  before any test imports torch: it asks MKL for bits that do not depend on neighbours

hypothesis.settings.register_profile("here", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("here"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_report_header() -> str:
    """Name the versions that decide whether bits repeat."""
    return "onebase under " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none; torch is imported only if there are such tests."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wrap that a test looks for, however wide the terminal; tests of widths set their own."""
    monkeypatch.setenv("COLUMNS", "160")
