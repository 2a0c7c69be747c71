"""What can be adapted is read off the module tree: roles, presets and patterns hold for every family alike."""

import re
import warnings

import pytest
import torch
import transformers
from torch import nn

from onebase.base import targets
from onebase.errors import TargetError
from tests.base.tiny import SIZES

LLAMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PHI3 = {key: value for key, value in LLAMA.items() if key != "head_dim"}
BERT = {**SIZES, "max_position_embeddings": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# family: class, configuration, names of attention, names of mlp (None: it has no linear ones)
FAMILIES = {
    "llama": ("LlamaForCausalLM", LLAMA, ATTENTION, MLP),
    "qwen2": ("Qwen2ForCausalLM", PHI3, ATTENTION, MLP),
    "mistral": ("MistralForCausalLM", LLAMA, ATTENTION, MLP),
    "gemma2": ("Gemma2ForCausalLM", LLAMA, ATTENTION, MLP),
    "phi3": ("Phi3ForCausalLM", PHI3, ["o_proj", "qkv_proj"], ["gate_up_proj", "down_proj"]),
    "gpt-neox": ("GPTNeoXForCausalLM", {**SIZES, "bos_token_id": 1, "eos_token_id": 2},
                 ["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]),
    "opt": ("OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "vocab_size": 300, "max_position_embeddings": 16},
            ["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]),
    "bert": ("BertForMaskedLM", BERT, ["query", "key", "value", "attention.output.dense"],
             ["intermediate.dense", "0.output.dense", "1.output.dense"]),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300},
                   ["q_lin", "k_lin", "v_lin", "out_lin"], ["lin1", "lin2"]),
    "modernbert": ("ModernBertForMaskedLM", {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                                             "cls_token_id": 1, "sep_token_id": 2},
                   ["Wqkv", "attn.Wo"], ["Wi", "mlp.Wo"]),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, ATTENTION, None),
}  # fmt: skip


def build(family):
    name, settings, _, _ = FAMILIES[family]
    kind = getattr(transformers, name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(kind.config_class(**settings))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param, build(request.param)


def selected(model, names):
    """Return what PEFT's rule for lists selects."""
    listed = [module.path for module in targets.list_modules(model)]
    return {path for path in listed for name in names if path == name or path.endswith("." + name)}


def test_every_layer_that_can_carry_an_adapter_is_listed_once_and_nothing_else_is_available(family):
    _, model = family
    rows = targets.list_targets(model)
    listed = [path for row in rows if row.available for path in row.paths]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    layers |= {name: module for name, module in model.named_modules() if name.endswith("mlp.experts")}
    counting = {name for name in layers if type(layers[name]).__name__ == "OPTLearnedPositionalEmbedding"}
    assert sorted(listed) == sorted(set(layers) - counting)


def test_a_row_describes_every_module_in_it(family):
    _, model = family
    for row in targets.list_targets(model):
        for path in row.paths:
            module = model.get_submodule(path)
            if row.kind == "linear":
                assert row.shape == (module.out_features, module.in_features)


def test_a_pattern_selects_exactly_the_modules_of_its_row(family):
    _, model = family
    for row in targets.list_targets(model):
        listed = [module.path for module in targets.list_modules(model)]
        if "\\" in row.pattern:
            assert {path for path in listed if re.fullmatch(row.pattern, path)} == set(row.paths)
        else:
            assert selected(model, [row.pattern]) == set(row.paths)


def test_the_presets_mean_what_the_family_calls_them(family):
    name, model = family
    _, _, attention, mlp = FAMILIES[name]
    assert set(targets.plain_names(model, targets.preset_paths(model, "attention"))) == set(attention)
    if mlp is None:
        with pytest.raises(TargetError, match="it has experts"):
            targets.preset_paths(model, "mlp")
    else:
        assert set(targets.plain_names(model, targets.preset_paths(model, "mlp"))) == set(mlp)


def test_plain_names_select_exactly_what_the_preset_means(family):
    _, model = family
    for preset in ("all-linear", "attention"):
        paths = targets.preset_paths(model, preset)
        assert selected(model, targets.plain_names(model, paths)) == set(paths)


def test_all_linear_is_what_peft_takes_it_to_be(family):
    import peft

    _, model = family
    adapted = peft.get_peft_model(build(family[0]), peft.LoraConfig(r=2, target_modules="all-linear"))
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and isinstance(module.get_base_layer(), nn.Linear)
    }
    assert set(targets.preset_paths(model, "all-linear")) == theirs


def test_the_output_head_is_the_models_own(family):
    _, model = family
    heads = [path for row in targets.list_targets(model) if row.role == "head" for path in row.paths]
    assert [model.get_submodule(path) for path in heads] == [model.get_output_embeddings()]


def test_what_every_block_has_is_counted_in_every_block(family):
    _, model = family
    rows = targets.list_targets(model)
    assert all((row.blocks, row.of) == (2, 2) for row in rows if row.role in ("attention", "mlp"))
    assert all(row.blocks == 0 for row in rows if row.role in ("head", "embedding"))


def test_a_layer_that_some_blocks_lack_is_counted_where_it_is():
    model = build("llama")
    model.model.layers[0].self_attn.v_proj = nn.Identity()
    (row,) = [row for row in targets.list_targets(model) if row.pattern == "v_proj"]
    assert (row.blocks, row.of, len(row.paths)) == (1, 2, 1)


def test_gpt2s_transposed_layers_are_linear_ones_and_the_presets_mean_them():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300))
    kinds = {row.pattern: (row.kind, row.shape) for row in targets.list_targets(model) if row.available}
    assert kinds["c_attn"] == ("transposed-linear", (96, 32))
    assert kinds["wte"][0] == "embedding"
    names = targets.plain_names(model, targets.preset_paths(model, "all-linear"))
    assert sorted(names) == ["c_attn", "c_fc", "c_proj"]


def test_neither_an_attentions_table_of_distances_nor_a_lent_weight_is_an_embedding_of_ids():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=300)
    with torch.random.fork_rng():
        model = transformers.T5Model(config).eval()
    rows = {row.pattern: row.available for row in targets.list_targets(model) if row.kind == "embedding"}
    assert rows == {"shared": False, "relative_attention_bias": False, "embed_tokens": True}


class WithOneMoreHead(nn.Module):
    """A model whose second part reads ids again, through an embedding of its own with the first one's weight."""

    device, dummy_inputs = torch.device("cpu"), {"ids": torch.tensor([[3, 4]])}

    def __init__(self, *, calls_both: bool) -> None:
        super().__init__()
        self.embed, self.calls_both = nn.Embedding(8, 4), calls_both
        self.second = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
        self.second[0].weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(ids) + (self.embed(ids) if self.calls_both else 0)


@pytest.mark.parametrize("calls_both", [False, True])
def test_an_embedding_that_only_lends_its_weight_is_found_by_a_forward(calls_both):
    model = WithOneMoreHead(calls_both=calls_both)
    assert targets.lenders(model) == ({} if calls_both else {"embed": ("second.0",)})
    rows = {row.pattern: row.available for row in targets.list_targets(model) if row.kind == "embedding"}
    assert rows == {"embed": calls_both, "0": True}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_router_is_no_part_of_all_linear():
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    with torch.device("meta"):
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**PHI3, **experts))
    routers = [row.pattern for row in targets.list_targets(model) if row.role == "router"]
    assert routers == ["shared_expert_gate"]
    assert not selected(model, routers) & set(targets.preset_paths(model, "all-linear"))


def test_a_layer_whose_weight_is_read_past_its_forward_is_not_available():
    block = nn.TransformerEncoderLayer(8, 2, 16)
    rows = {row.pattern: row.available for row in targets.list_targets(nn.ModuleList([block]))}
    assert rows == {"out_proj": False, "linear1": True, "linear2": True}


def test_modules_of_the_same_name_but_another_shape_have_rows_of_their_own():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    rows = [row for row in targets.list_targets(model) if any(path.endswith("up_proj") for path in row.paths)]
    assert sorted(row.shape for row in rows) == [(48, 32), (64, 32)]
    for row in rows:
        assert {
            p
            for m in targets.list_modules(model)
            if re.fullmatch(row.pattern, p := m.path) or targets.ends_with(p, row.pattern)
        } == set(row.paths)
