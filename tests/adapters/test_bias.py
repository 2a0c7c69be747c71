"""Trained biases: BitFit and LoRA's `bias` equal PEFT's, change nothing at first, and say so where there is none."""

import copy

import peft
import pytest
import torch
from torch import nn

from onebase.adapters import build
from onebase.adapters.bank import Bank
from onebase.adapters.bias import BiasPart
from onebase.adapters.merging import merged_state
from onebase.adapters.part import RowCall
from onebase.config.methods import BitFit, Lora
from onebase.errors import TargetError
from onebase.measure.forward import forward_loss
from tests import tiny
from tests.adapters.against_peft import assert_equal_to_peft, filled, their_loss


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["opt", "gpt-neox", "qwen2", "bloom"])
def test_loras_biases_equal_pefts_in_name_loss_gradient_and_merged_weight(name, bias):
    targets = ["query_key_value"] if name in ("gpt-neox", "bloom") else ["q_proj", "v_proj"]
    settings = Lora(r=4, lora_alpha=8, target_modules=targets, bias=bias)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, bias=bias)
    adapter, _ = assert_equal_to_peft(name, settings, config)
    names = [name for name, _ in adapter.parameters() if "lora_" not in name]
    assert names
    assert all(name.endswith(".base_layer.bias") for name in names) == (bias == "lora_only")


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "bloom"])
def test_bitfit_trains_every_bias_and_nothing_else(name):
    base = tiny.base_of(name, dtype=torch.float64)
    bank = Bank(base)
    filled(bank, "dummy", BitFit())
    adapter = filled(bank, "one", BitFit())
    trained = dict(adapter.parameters())
    own = {key for key, _ in tiny.model_of(name).named_parameters() if key.endswith(".bias")}
    assert set(trained) == own
    examples = tiny.examples_of(9, 21, 4)
    batch = tiny.batch_of(examples, "one")
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    model = tiny.model_of(name, dtype=torch.float64)
    for key, parameter in model.named_parameters():
        if key in trained:
            parameter.data = trained[key].detach().clone()
    expected = their_loss(model, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    largest = max(p.grad.abs().max() for key, p in model.named_parameters() if key in trained)
    for key, parameter in model.named_parameters():
        if key in trained:
            torch.testing.assert_close(trained[key].grad, parameter.grad, rtol=1e-5, atol=1e-6 * float(largest))


def test_fresh_biases_change_no_bit():
    base = tiny.base_of("gpt2")
    bank = Bank(base)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 3), None)
    before = base.hidden(batch.token_ids, bank.route(batch.layout))
    bank.add("one", BitFit())
    mixed = tiny.batch_of(tiny.examples_of(7, 20, 3), "one", None, "one")
    assert torch.equal(base.hidden(mixed.token_ids, bank.route(mixed.layout)), before)


def test_a_base_without_biases_is_told_what_to_use_instead():
    bank = Bank(tiny.base_of("llama"))
    with pytest.raises(TargetError, match=r"tiny-llama: there is no bias to train: it has none.*ln-tuning"):
        bank.add("one", BitFit())
    with pytest.raises(TargetError, match=r"no bias to train: it has none. Remove adapter.bias"):
        bank.add("one", Lora(bias="all"))
    bank = Bank(tiny.base_of("qwen2"))
    with pytest.raises(TargetError, match=r"no bias to train: its targets have none"):
        bank.add("one", Lora(target_modules=["up_proj"], bias="lora_only"))
    with pytest.raises(
        TargetError, match=r"BitFit goes on modules with a bias in this version, got up_proj \(linear wi"
    ):
        bank.add("one", BitFit(target_modules=["up_proj"]))
    assert len(bank.add("one", BitFit(target_modules=["q_proj"])).target_paths) == 2


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 2), nn.Conv1d(3, 4, 2), nn.BatchNorm2d(3), nn.GroupNorm(1, 3)])
def test_what_has_channels_gets_its_bias_along_them(module):
    module = module.eval().requires_grad_(False)
    x = torch.randn(2, 3, *[5] * (1 if isinstance(module, nn.Conv1d) else 2))
    part = BiasPart("m", "m.bias", nn.Parameter(torch.randn_like(module.bias)), module.bias)
    changed = copy.deepcopy(module)
    part.merge_(changed)
    torch.testing.assert_close(part.on_output(module(x), RowCall(module, x)), changed(x))
    assert not torch.allclose(module(x), changed(x))


@pytest.mark.parametrize("saved", ["ln_f", "mlp"])
def test_biases_of_a_module_that_is_trained_whole_are_its_copys_alone(saved):
    bank = Bank(tiny.base_of("gpt2"))
    settings = Lora(r=2, target_modules=["c_attn"], bias="all", modules_to_save=[saved])
    adapter = tiny.fill_(bank.add("a", settings))
    names = [name for part in adapter.parts for name, _ in part.parameters()]
    assert len(names) == len(set(names))
    assert sum(tensor.numel() for tensor in adapter.state.values()) == adapter.parameter_count
    again = Bank(tiny.base_of("gpt2"))
    again.add("a", settings, tensors=adapter.state)
    ids = torch.arange(12)[None]
    outputs = []
    for one in (bank, again):
        with one.base.native(one.sole_route("a")) as model:
            outputs.append(model(input_ids=ids).logits)
    assert torch.equal(*outputs)
    plain = tiny.model_of("gpt2")
    plain.load_state_dict(merged_state(bank, "a"))
    assert torch.allclose(plain(input_ids=ids).logits, outputs[0], atol=1e-4)


def test_a_tensor_that_two_settings_would_train_is_an_error_that_names_it():
    part = BiasPart("a", "a.bias", nn.Parameter(torch.zeros(2)), torch.zeros(2))
    twin = BiasPart("a", "a.bias", nn.Parameter(torch.zeros(2)), torch.zeros(2))
    build._check_names([part, part])
    with pytest.raises(TargetError, match=r"a\.bias would be trained twice"):
        build._check_names([part, twin])
