"""Laws of adapters as GGUF: what llama.cpp computes from the file is the adapter's update, by transformers' own reordering."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from onebase.adapters.bank import Bank
from onebase.base import gguf_file
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.errors import ConfigError, VerificationError
from onebase.train import gguf_adapter, saving
from onebase.train.gguf_adapter import export_gguf
from tests.tiny import fill_, model_of

MIXED = Lora(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3, "k_proj": 5}, use_rslora=True)
NAMES = {
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}


def bank_and_folder(kind: str, settings: Any, folder: Path) -> tuple[Bank, Path]:
    base = Base(model_of(kind), name="tiny")
    bank = Bank(base)
    saving.write(folder, base, fill_(bank.add("a", settings)), task="text")
    return bank, folder


def as_llama_cpp_reads(path: Path) -> dict[str, np.ndarray]:
    """Return what is added to each weight: scale * b @ a, with scale = alpha / b's rank (llama-adapter.h, get_scale)."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert {f"{name}.lora_{letter}" for name in names for letter in "ab"} == set(tensors)
    return {
        name: alpha / tensors[f"{name}.lora_b"].shape[1] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        for name in names
    }


def updates(bank: Bank) -> dict[str, np.ndarray]:
    """Return the update of each layer, by running the adapted layer on the unit vectors."""
    found = {}
    with bank.base.native(bank.sole_route("a")) as model, torch.no_grad():
        for path in bank.adapters["a"].target_paths:
            layer = model.get_submodule(path)
            eye = torch.eye(layer.base_layer.in_features)[None]
            found[path] = (layer(eye) - layer.base_layer(eye))[0].T.numpy()
    return found


@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-5), ("F16", 5e-3)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_adds_the_adapters_update_to_the_base_as_it_has_it(
    family: str, kind: str, bound: float, tmp_path: Path
) -> None:
    bank, folder = bank_and_folder(family, MIXED, tmp_path / "a")
    found = export_gguf(bank, "a", folder, tmp_path / "a.gguf", kind)
    assert (found.largest_rounding > 0) == (kind == "F16")
    read, wanted = as_llama_cpp_reads(tmp_path / "a.gguf"), updates(bank)
    assert len(read) == len(wanted) == found.pairs
    config = bank.base.model.config
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    reorder = LlamaTensorProcessor(config=heads)
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            delta = read[theirs.format(layer) + ".weight"]
            if family in ("llama", "mistral"):
                delta = reorder.process(delta, theirs.format(layer) + ".weight").weights
            size = np.abs(wanted[ours.format(layer)]).max()
            np.testing.assert_allclose(delta, wanted[ours.format(layer)], rtol=0, atol=bound * size)


def test_an_embedding_and_a_head_of_their_own_have_the_shapes_that_the_loader_asks_for(tmp_path: Path) -> None:
    settings = Lora(r=4, target_modules=["embed_tokens", "lm_head"])
    bank, folder = bank_and_folder("llama", settings, tmp_path / "a")
    export_gguf(bank, "a", folder, tmp_path / "a.gguf")
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    width, vocabulary = 32, 61
    assert shapes == {  # in ggml's order, the row length first (llama-adapter.cpp, "validate tensor shape")
        "token_embd.weight.lora_a": (4, vocabulary),
        "token_embd.weight.lora_b": (4, width),
        "output.weight.lora_a": (width, 4),
        "output.weight.lora_b": (4, vocabulary),
    }


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("gpt2", Lora(r=4), "onebase writes GGUF for gemma2"),
        ("llama-tied", Lora(r=4, target_modules=["embed_tokens"]), "the head is tied to the embedding"),
        ("llama", Lora(r=4, use_dora=True), "A plain model can hold it"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(family: str, settings: Lora, told: str, tmp_path: Path) -> None:
    bank, folder = bank_and_folder(family, settings, tmp_path / "a")
    with pytest.raises(ConfigError, match=told):
        export_gguf(bank, "a", folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_numbers_too_large_for_f16_and_other_types_are_refused(tmp_path: Path) -> None:
    bank, folder = bank_and_folder("llama", Lora(r=4, lora_alpha=1e6), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"numbers that F16 cannot\. Take --type F32"):
        export_gguf(bank, "a", folder, tmp_path / "a.gguf", "F16")
    with pytest.raises(ConfigError, match="must be one of F32, F16, got Q4_K"):
        export_gguf(bank, "a", folder, tmp_path / "a.gguf", "Q4_K")


def test_a_file_that_holds_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, folder = bank_and_folder("llama", MIXED, tmp_path / "a")

    def damaged(path: Path, architecture: str, alpha: float, tensors: Any, kind: str) -> None:
        changed = {
            name: tensor * (1.001 if name == "blk.1.attn_q.weight.lora_b" else 1) for name, tensor in tensors.items()
        }
        gguf_file.write_adapter(path, architecture, alpha, changed, kind)

    monkeypatch.setattr(gguf_adapter, "write_adapter", damaged)
    with pytest.raises(VerificationError, match=r"blk\.1\.attn_q\.weight\.lora_b differs by"):
        export_gguf(bank, "a", folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
