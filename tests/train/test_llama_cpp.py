"""What llama.cpp answers with the files written for it: the logits of the adapter, to the rounding of its own kernels.

Needs llama-cpp-python, which the package index has as source only; where it is not installed these are skipped.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.train import saving
from onebase.train.gguf_adapter import export_gguf
from onebase.train.gguf_model import export_merged
from tests.tiny import fill_, model_of
from tests.train.test_gguf_model import base_gguf

pytestmark = pytest.mark.slow
IDS = [3, 5, 8, 13, 21, 34]


def as_llama_cpp_answers(model: Path, adapter: Path | None = None) -> np.ndarray:
    llama_cpp: Any = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python"
    )
    opened = llama_cpp.Llama(
        str(model), lora_path=None if adapter is None else str(adapter), n_ctx=64, logits_all=True, verbose=False
    )
    opened.eval(IDS)
    return np.array(opened.scores[: len(IDS)])


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_llama_cpp_answers_as_the_adapter_does(form: str, tmp_path: Path) -> None:
    base = Base(model_of("llama"), name="tiny")
    bank = Bank(base)
    settings = Lora(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    saving.write(tmp_path / "a", base, fill_(bank.add("a", settings)), task="text")
    like = base_gguf(tmp_path / "base.gguf", model_of("llama"), vocabulary="no_vocab")
    if form == "adapter":
        export_gguf(bank, "a", tmp_path / "a", tmp_path / "a.gguf")
        found = as_llama_cpp_answers(like, tmp_path / "a.gguf")
    else:
        export_merged(bank, "a", like, tmp_path / "merged.gguf")
        found = as_llama_cpp_answers(tmp_path / "merged.gguf")
    with torch.no_grad(), base.native(bank.sole_route("a")) as model:
        wanted = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())
