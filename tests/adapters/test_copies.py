"""Modules of an adapter's own: full fine-tuning, LayerNorm tuning and modules_to_save."""

from typing import Any, cast

import peft
import pytest
import torch
from torch import nn

from onebase.adapters.bank import Bank
from onebase.adapters.copies import _own_part
from onebase.adapters.places import Places
from onebase.base.model import Base
from onebase.base.route import RowSpace
from onebase.base.targets import list_norms
from onebase.config.methods import Full, Ia3, LnTuning, Lora
from onebase.errors import ConfigError, TargetError
from onebase.measure.forward import forward_loss
from tests import tiny
from tests.adapters.against_peft import CLOSE, assert_equal_to_peft, filled, their_loss

NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "qwen3": ["input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "bloom": ["input_layernorm", "post_attention_layernorm", "ln_f", "word_embeddings_layernorm"],
}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_each_row_of_norms_that_is_listed_selects_its_norms_and_all_rows_are_all_norms(name):
    bank = Bank(tiny.base_of(name))
    rows = list_norms(bank.base.model)
    for number, row in enumerate(rows):
        pattern = row.pattern if "\\" in row.pattern else [row.pattern]
        assert bank.add(f"a{number}", LnTuning(target_modules=pattern)).target_paths == row.paths
    assert {path for row in rows for path in row.paths} == set(bank.add("all", LnTuning()).target_paths)
    assert {row.kind for row in rows} == {"norm"} and {row.shape for row in rows} <= {(32,), (8,), (16,)}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_layernorm_tuning_of_every_norm_equals_peft(name):
    adapter, _ = assert_equal_to_peft(name, LnTuning(), peft.LNTuningConfig(target_modules=NORMS[name]))
    assert adapter.parameter_count == sum(
        p.numel() for key, p in tiny.model_of(name).named_parameters() if "norm" in key or "ln_" in key
    )


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["model.norm", "v_proj"]])
def test_modules_to_save_beside_lora_equal_peft(saved):
    settings: Any = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": saved}
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    assert_equal_to_peft("llama", Lora(**({"r": 4, "lora_alpha": 8} | settings)), config)


def test_modules_to_save_beside_ia3_equal_peft():
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["model.norm"])
    assert_equal_to_peft("llama", Ia3(target_modules=["k_proj"], modules_to_save=["model.norm"]), config)


def test_a_whole_block_part_is_saved_and_learns_when_its_adapter_owns_the_batch():
    settings: Any = {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "model.layers.1.self_attn"]}
    with pytest.raises(TargetError, match=r"'model.layers.1.self_attn' is trained whole.*q_proj"):
        Bank(tiny.base_of()).add("one", Lora(**settings))
    settings["target_modules"] = ["layers.0.self_attn.q_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    assert_equal_to_peft("llama", Lora(**({"r": 4, "lora_alpha": 8} | settings)), config)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "qwen3", "mixtral", "bloom", "opt-projected"])
def test_full_fine_tuning_equals_training_the_model_itself(name):
    """One step's loss and gradients, tied weights once, with the gradient of both uses."""
    changes: Any = {"experts_implementation": "eager"} if name == "mixtral" else {}
    base = tiny.base_of(name, dtype=torch.float64, **changes)
    bank = Bank(base)
    adapter = filled(bank, "one", Full(), size=0.05)
    trained = dict(adapter.parameters())
    model = tiny.model_of(name, dtype=torch.float64, **changes).requires_grad_(True)
    assert trained.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        parameter.data = trained[key].detach().clone()
    examples = tiny.examples_of(9, 21, 4)
    batch = tiny.batch_of(examples, "one")
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    expected = their_loss(model, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for key, parameter in model.named_parameters():
        own, theirs = trained[key].grad, parameter.grad
        assert own is not None
        theirs = torch.zeros_like(own) if theirs is None else theirs
        scale = max(float(theirs.abs().max()), 1e-6 * float(largest))
        torch.testing.assert_close(own / scale, theirs / scale, **CLOSE)
    assert all(p.grad is None for p in base.model.parameters())


def test_a_fresh_copy_of_a_half_precision_base_changes_no_bit_and_is_kept_in_fp32():
    base = tiny.base_of("llama", dtype=torch.bfloat16)
    bank = Bank(base)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 3), None)
    before = base.hidden(batch.token_ids, bank.route(batch.layout))
    adapter = bank.add("one", Full())
    assert all(p.dtype == torch.float32 for _, p in adapter.parameters())
    mixed = tiny.batch_of(tiny.examples_of(7, 20, 3), "one", None, "one")
    assert torch.equal(base.hidden(mixed.token_ids, bank.route(mixed.layout)), before)
    segments = bank.route(mixed.layout).rows[RowSpace.LABEL]
    rows = before[mixed.label_rows]
    head: Any = base.head
    assert torch.equal(bank.head.logits(rows, segments), head.logits(rows, segments))
    forward_loss(bank, mixed, 1.0)[0].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in adapter.parameters())


@pytest.mark.parametrize("names", [["mlp"], ["layers.1"], "attention", ["q_proj", "norm"], r".*layers\.0\.mlp\..*"])
def test_full_takes_what_the_named_modules_and_those_inside_them_own(names):
    bank = Bank(tiny.base_of())
    adapter = bank.add("one", Full(target_modules=names))
    inside = {
        "mlp": lambda path: ".mlp." in path,
        "layers.1": lambda path: ".layers.1." in path,
        "a": lambda path: ".self_attn." in path,
        "q_proj": lambda path: ".q_proj." in path or path == "model.norm.weight",
        ".": lambda path: ".layers.0.mlp." in path,
    }[names[0]]
    expected = {path for path, _ in tiny.model_of("llama").named_parameters() if inside(path)}
    assert {path for path, _ in adapter.parameters()} == expected


def test_a_batch_of_several_adapters_cannot_share_a_module_that_sees_all_tokens_at_once():
    bank = Bank(tiny.base_of())
    bank.add("one", Lora(target_modules=["q_proj"], modules_to_save=["mlp"]))
    bank.add("two", Lora())
    batch = tiny.batch_of(tiny.examples_of(7, 9), "one", "two")
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp: a LlamaMLP sees all tokens.*take turns"):
        bank.base.hidden(batch.token_ids, bank.route(batch.layout))


def test_in_a_batch_of_entries_a_whole_module_and_adapters_inside_it_share():
    """Padded entries of three owners: one has its own MLP, one LoRA inside the frozen MLP, one nothing."""
    base = tiny.base_of(dtype=torch.float64)
    bank = Bank(base)
    filled(bank, "one", Lora(target_modules=["layers.0.self_attn.q_proj"], modules_to_save=["mlp", "1.self_attn"]))
    filled(bank, "two", Lora(target_modules=["up_proj", "k_proj"]))
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    owners = ["two", "one", None]
    with base.native(bank.batch_route(owners)) as model:
        together = model(ids, use_cache=False).logits
    for number, owner in enumerate(owners):
        with base.native(bank.sole_route(owner)) as model:
            alone = model(ids[number : number + 1], use_cache=False).logits[0]
        torch.testing.assert_close(together[number], alone)
    with base.native(bank.sole_route(None)) as model:
        assert not torch.allclose(together[1], model(ids, use_cache=False).logits[1])


def test_wrapping_a_parent_and_a_child_in_either_order_and_taking_them_off_leaves_the_model_as_it_was():
    base = tiny.base_of()
    modules = {name: id(module) for name, module in base.model.named_modules()}
    for order in (("whole", "inner"), ("inner", "whole")):
        bank = Bank(base)
        settings: dict[str, Any] = {
            "whole": Lora(target_modules=["q_proj"], modules_to_save=["mlp"]),
            "inner": Lora(target_modules=["up_proj", "v_proj"]),
        }
        for name in order:
            filled(bank, name, settings[name])
        batch = tiny.batch_of(tiny.examples_of(7, 9), "inner")
        alone = Bank(tiny.base_of())
        filled(alone, "inner", settings["inner"])
        torch.testing.assert_close(
            base.hidden(batch.token_ids, bank.route(batch.layout)),
            alone.base.hidden(batch.token_ids, alone.route(batch.layout)),
        )
        for name in order:
            bank.remove(name)
        assert {name: id(module) for name, module in base.model.named_modules()} == modules


def test_training_a_copy_changes_no_byte_of_the_base():
    base = tiny.base_of("llama-tied")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    bank = Bank(base)
    adapter = bank.add("one", Full())
    optimiser = torch.optim.AdamW([p for _, p in adapter.parameters()], lr=0.01)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 4), "one")
    losses = []
    for _ in range(4):
        loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    bank.remove("one")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def test_what_modules_to_save_cannot_mean_is_said():
    bank = Bank(tiny.base_of())
    with pytest.raises(TargetError, match=r"adapter.modules_to_save: 'lm_haed' matches none.*'lm_head'"):
        bank.add("one", Lora(modules_to_save=["lm_haed"]))
    with pytest.raises(
        TargetError, match=r"modules_to_save goes on modules with parameters.*layers \(ModuleList, never"
    ):
        bank.add("one", Lora(target_modules=["q_proj"], modules_to_save=["layers"]))
    with pytest.raises(TargetError, match=r"'model.layers.0.mlp.up_proj' lies in 'model.layers.0.mlp'"):
        bank.add("one", Lora(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))
    with pytest.raises(TargetError, match=r"LayerNorm tuning goes on norms in this version, got q_proj \(linear\)"):
        bank.add("one", LnTuning(target_modules=["q_proj"]))


def test_a_batch_norms_means_belong_to_its_copy_and_are_kept_with_it():
    base = tiny.base_of()
    base.model.model.norm = norm = cast("Any", nn.BatchNorm1d(32).eval().requires_grad_(False))
    part: Any = _own_part(Places(base), "model.norm", "norm", {})
    assert [name for name, _ in part.constants()] == [
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    dict(part.constants())["norm.running_mean"].fill_(5)
    assert not norm.running_mean.any()
    assert torch.equal(part.twin.running_mean, torch.full((32,), 5.0))


class Recurrent(nn.Module):
    """A module of anyone's, with an LSTM in it."""

    def __init__(self, batch_first):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=batch_first)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def test_a_recurrent_module_is_copied_with_all_its_weights_and_split_by_entry():
    base = Base(Recurrent(True).double(), name="recurrent")
    bank = Bank(base)
    frozen = {name: p.clone() for name, p in base.model.named_parameters()}
    adapter = filled(bank, "one", Full(target_modules=["lstm"]))
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    with base.native(bank.batch_route([None, "one", None])) as model:
        mixed = model(x)
    own = Recurrent(True).double()
    own.load_state_dict(frozen | adapter.state)
    torch.testing.assert_close(mixed[1], own(x)[1])
    own.load_state_dict(frozen)
    torch.testing.assert_close(mixed[[0, 2]], own(x)[[0, 2]])
    assert not torch.allclose(mixed[1], own(x)[1])
    mixed.sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in adapter.parameters())


def test_entries_that_do_not_come_first_are_not_split():
    bank = Bank(Base(Recurrent(False), name="recurrent"))
    bank.add("one", Full(target_modules=["lstm"]))
    route = bank.batch_route(["one", None])
    with bank.base.native(route) as model, pytest.raises(ConfigError, match=r"lstm: a LSTM with batch_first=False"):
        model(torch.randn(4, 2, 3))
    with bank.base.native(bank.sole_route("one")) as model:
        model(torch.randn(4, 2, 3))


def test_an_adapter_on_one_of_two_modules_that_share_a_weight_says_what_becomes_of_the_other():
    for settings in (Full(target_modules=["embed_tokens"]), Lora(r=2, target_modules=["embed_tokens", "q_proj"])):
        adapter = Bank(tiny.base_of("llama-tied")).add("one", settings)
        assert any(
            "embed_tokens shares its weight with lm_head in the base, which keeps" in w for w in adapter.warnings
        )
    for settings in (Full(), Lora()):
        adapter = Bank(tiny.base_of("llama-tied")).add("one", settings)
        assert not any("shares its weight" in warning for warning in adapter.warnings)
