"""Laws of merged models as GGUF: transformers reads the file as the merged model, and only the base's own file is copied."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from onebase.adapters.bank import Bank
from onebase.adapters.merging import merged_state
from onebase.base import gguf_file
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.errors import ConfigError, VerificationError
from onebase.train import gguf_model
from onebase.train.gguf_model import export_merged
from tests.tiny import fill_, model_of


def base_gguf(path: Path, model: Any, vocabulary: str = "gpt2") -> Path:
    """Write the GGUF file of a tiny Llama, with the fields that llama.cpp's converter writes."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model(vocabulary)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.5] * config.vocab_size)
    writer.add_add_bos_token(False)
    family = gguf_file.family_of(config)
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        name = family.tensor_name(module)
        assert name is not None
        name = name.removesuffix("weight") + leaf
        if not (config.tie_word_embeddings and name == "output.weight"):
            writer.add_tensor(name, family.file_rows(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapted(kind: str) -> Bank:
    bank = Bank(Base(model_of(kind), name="tiny"))
    fill_(bank.add("a", Lora(r=4, rank_pattern={"q_proj": 2}, use_rslora=True)))
    return bank


@pytest.mark.parametrize(("kind", "bound"), [("F32", 0), ("F16", 2e-3), ("Q8_0", 2e-2)])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_transformers_reads_the_merged_model(name: str, kind: str, bound: float, tmp_path: Path) -> None:
    bank, like = adapted(name), base_gguf(tmp_path / "base.gguf", model_of(name))
    found = export_merged(bank, "a", like, tmp_path / "merged.gguf", kind)
    assert (found.largest_rounding > 0) == (kind != "F32")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf").state_dict()
    state = merged_state(bank, "a")
    assert read.keys() == state.keys()
    for key, tensor in state.items():
        assert float((read[key].float() - tensor).abs().max()) <= bound * float(tensor.abs().max()), key
    assert not torch.equal(
        state["model.layers.0.self_attn.q_proj.weight"], model_of(name).model.layers[0].self_attn.q_proj.weight
    )
    fields = [gguf.GGUFReader(path).fields for path in (like, tmp_path / "merged.gguf")]
    kept = {key for key in fields[0] if not key.startswith("GGUF.")}
    assert kept | {"general.file_type", "general.quantization_version"} == {
        key for key in fields[1] if not key.startswith("GGUF.")
    }
    assert all(fields[0][key].contents() == fields[1][key].contents() for key in kept)
    assert all(fields[0][key].types == fields[1][key].types for key in kept)


def test_biases_of_queries_and_keys_are_reordered_as_their_weights_are(tmp_path: Path) -> None:
    model = model_of("llama", attention_bias=True)
    own = {key: tensor.numpy().copy() for key, tensor in model.state_dict().items() if key.endswith("bias")}
    assert all(bias.any() for bias in own.values())
    like, bank = base_gguf(tmp_path / "base.gguf", model), Bank(Base(model, name="tiny"))
    fill_(bank.add("a", Lora(r=4)))
    export_merged(bank, "a", like, tmp_path / "merged.gguf")
    read, config = gguf_file.read_gguf(tmp_path / "merged.gguf")[1], model.config
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    reorder = LlamaTensorProcessor(config=heads)
    for theirs, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        name = f"blk.1.{theirs}.bias"
        np.testing.assert_array_equal(
            reorder.process(read[name], name=name).weights, own[f"model.layers.1.self_attn.{ours}.bias"]
        )


def test_a_base_in_half_precision_costs_the_merged_numbers_nothing(tmp_path: Path) -> None:
    like = base_gguf(tmp_path / "base.gguf", model_of("llama").to(torch.bfloat16).float())
    written = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, out = model_of("llama").to(torch.bfloat16).to(dtype), tmp_path / f"{dtype}.gguf"
        bank = Bank(Base(model, name="tiny"))
        fill_(bank.add("a", Lora(r=4)))
        export_merged(bank, "a", like, out)
        written[dtype] = gguf_file.read_gguf(out)[1]
    for name, numbers in written[torch.float32].items():
        np.testing.assert_allclose(written[torch.bfloat16][name], numbers, rtol=1e-6, atol=1e-7)


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    like = base_gguf(tmp_path / "base.gguf", model_of("llama", seed=1))
    with pytest.raises(ConfigError, match="has other numbers than the base"):
        export_merged(adapted("llama"), "a", like, tmp_path / "merged.gguf")
    with pytest.raises(ConfigError, match=r"output\.weight is in one of both only"):
        export_merged(adapted("llama-tied"), "a", like, tmp_path / "merged.gguf")
    with pytest.raises(ConfigError, match="there is no such file"):
        export_merged(adapted("llama"), "a", tmp_path / "none.gguf", tmp_path / "merged.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_a_file_that_holds_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = base_gguf(tmp_path / "base.gguf", model_of("llama"))

    def damaged(path: Path, own: Path, tensors: dict[str, np.ndarray], kind: str) -> None:
        gguf_file.write_model_like(path, own, tensors | {"output.weight": tensors["output.weight"] * 1.01}, kind)

    monkeypatch.setattr(gguf_model, "write_model_like", damaged)
    with pytest.raises(VerificationError, match=r"output\.weight differs by"):
        export_merged(adapted("llama"), "a", like, tmp_path / "merged.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]
