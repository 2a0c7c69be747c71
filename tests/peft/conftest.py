"""Both sides compute with torch's own operations here: what is compared is what they do, to the last bits where it can be.

The compiled kernels round otherwise than torch does, by parts in 1e7, which steps of AdamW make 1e-4 of. They have tests of
their own against fp64 (tests/ops, tests/base, tests/laws/test_real_model.py).
"""

import pytest

from onebase.ops import native


@pytest.fixture(autouse=True)
def _torchs_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "fits", lambda *_: False)
