"""What holds of any base holds of one in 4 bits, and it is QLoRA's: bitsandbytes, transformers and peft get the same."""

import gc
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from onebase.adapters.bank import Bank
from onebase.adapters.merging import Merged, plain_state
from onebase.base.model import load
from onebase.base.nf4 import Nf4Linear
from onebase.base.quantise import quantise_
from onebase.config.methods import AdapterSettings, Full, Ia3, Lora
from onebase.errors import ConfigError, MissingExtraError, ModelError, TargetError
from onebase.measure.forward import batches_of, forward_loss
from onebase.train.comparing import inputs_for, numbers_of
from onebase.train.merging import merge
from onebase.train.opening import open_adapter
from onebase.train.stop import Stopped
from tests import families, tiny
from tests.laws.test_together_and_alone import batch_with, results
from tests.train import runs
from tests.train.runs import Watching, adapter_bytes

bnb = pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed: pip install 'onebase[nf4]'")

ROWS = [[5, 9, 11, 40, 7, 3], [8, 60, 4]]
NF4: dict[str, Any] = {"quantize": "nf4"}
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}  # with others bitsandbytes is wrong on AVX-512
QLORA = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def nf4_base(name="llama", **changes):
    base = tiny.base_of(name, **changes)
    quantise_(base, "nf4")
    return base


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with runs.own_home(folder / "home"):
        yield runs.workshop(folder, **WHOLE_BLOCKS)


def by_hand(weight):
    """Return the nearest NF4 numbers of a weight, in blocks of 64 along its rows, with scales as bitsandbytes rounds them."""
    numbers, count = weight.float().flatten(), weight.numel()
    blocks = functional.pad(numbers, (0, -count % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    nearest = code[(blocks[:, :, None] / largest[:, :, None] - code).abs().argmin(-1)]
    rounded = bnb.functional.quantize_blockwise(largest[:, 0] - largest.mean(), blocksize=256)
    scales = bnb.functional.dequantize_blockwise(*rounded) + largest.mean()
    return (nearest * scales[:, None]).flatten()[:count].view(weight.shape).to(weight.dtype)


@given(
    outputs=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 100), st.sampled_from([16, 48, 64, 128])),
    rows=st.integers(1, 5),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(outputs=4, inputs=48, rows=2, bias=True, dtype=torch.float32)
@settings(max_examples=30, deadline=None)
def test_a_layer_and_its_gradient_are_those_of_nf4_numbers_by_hand_and_of_bitsandbytes_to_the_bit(
    outputs, inputs, rows, bias, dtype
):
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    own = Nf4Linear(linear)
    torch.testing.assert_close(
        own.weight, by_hand(linear.weight), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    others = [own.plain()]
    if inputs % 64 == 0:  # of others Linear4bit is wrong on AVX-512, or compiles
        others.append(bnb.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=dtype, quant_type="nf4"))
        others[1].weight = bnb.nn.Params4bit(linear.weight, requires_grad=False, quant_type="nf4")
        others[1].bias = linear.bias
        others[1].to("cpu")  # which quantises
    x, grad = torch.randn(rows, inputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)
    found = []
    for layer in (own, *others):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        found.append((y, leaf.grad))
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(found[0], pair, strict=True))
    assert torch.equal(own.state_dict()["weight"], own.plain().weight)


def test_nothing_in_full_is_kept_between_the_passes_and_a_weight_takes_half_a_byte():
    layer = Nf4Linear(nn.Linear(256, 128).requires_grad_(False))
    kept: list[torch.Tensor] = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        y = layer(torch.randn(3, 256, requires_grad=True))
    assert y.requires_grad and not kept
    scales = layer._scales
    held = [layer.codes, scales.absmax, scales.state2.absmax]
    assert sum(t.numel() * t.element_size() for t in held) < 0.53 * 256 * 128


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "opt", "mixtral", "bert"])
def test_linear_layers_of_the_trunk_are_held_in_4_bits_and_nothing_else(name):
    base = nf4_base(name)
    assert any(isinstance(module, Nf4Linear) for module in base.model.modules())
    assert all(m is base.head_module for m in base.model.modules() if type(m) is nn.Linear)
    plain = tiny.base_of(name)
    assert base.parameter_count == plain.parameter_count
    assert base.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("place", ["first", "last"])
def test_rows_losses_and_gradients_are_byte_identical_together_and_alone(place):
    together = tiny.bank_of(nf4_base(), "one", "two", lora_dropout=0.2)
    alone = tiny.bank_of(nf4_base(), "one", lora_dropout=0.2, dummy=False)
    alone.adapters["one"].load_state_(together.adapters["one"].state)
    order = ("one", "two") if place == "first" else ("two", "one")
    found = results(together, batch_with(*order), "one", dropout_step=4)
    expected = results(alone, batch_with("one"), "one", dropout_step=4)
    for part, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_losses_and_gradients_are_to_the_bit_those_on_plain_layers_of_the_dequantised_weights(name, dtype):
    found = []
    for plain in (False, True):
        base = nf4_base(name, dtype=dtype)
        for path, module in list(base.model.named_modules()) if plain else ():
            if isinstance(module, Nf4Linear):
                parent, _, last = path.rpartition(".")
                setattr(base.model.get_submodule(parent), last, module.plain())
        bank = Bank(base)
        tiny.fill_(bank.add("one", Lora(r=3)))
        batch = next(batches_of(bank, "one", tiny.examples_of(9, 14), range(2), 1000))
        loss, *_ = forward_loss(bank, batch, 1.0)
        loss.backward()
        found.append({"loss": loss, **tiny.gradients(bank, "one")})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_what_would_train_the_codes_is_refused_and_what_reads_the_weight_is_not():
    base = nf4_base()
    with pytest.raises(TargetError, match="held in fewer bits"):
        Bank(base).add("full", Full())
    bank = Bank(base)
    kinds: list[AdapterSettings] = [Lora(r=3, use_dora=True), Lora(r=3, init_lora_weights="pissa"), Ia3()]
    for number, kind in enumerate(kinds):
        bank.add(f"a{number}", kind)
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    found = []
    for recompute in (False, True):
        tiny.clear_gradients(bank)
        batch = next(batches_of(bank, "a0", tiny.examples_of(9, 14), range(2), 1000))
        with base.activation_checkpointing(recompute):
            forward_loss(bank, batch, 1.0)[0].backward()
        found.append(tiny.gradients(bank, "a0"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in base.model.state_dict().items())


def test_a_run_learns_resumes_to_the_same_bytes_and_its_adapter_gives_and_learns_what_it_does_under_qlora(shop):
    settings = shop.settings(train={"steps": 6, "save_every": 2, "learning_rate": 0.02}, **NF4)
    whole = runs.run(settings, shop.folder / "whole")
    assert whole.valid_loss is not None and whole.valid_loss_before is not None
    assert whole.valid_loss < whole.valid_loss_before
    with pytest.raises(Stopped):
        runs.run(settings, shop.folder / "killed", watching=Watching(stop_after={3}))
    runs.run(settings, shop.folder / "killed", resume=True)
    assert adapter_bytes(shop.folder / "killed") == adapter_bytes(shop.folder / "whole")

    folder = shop.folder / "whole" / "adapter"
    opened = open_adapter(folder, quantize="nf4")
    assert opened.stored.record is not None
    assert opened.bank.base.quantize == opened.stored.record.quantize == "nf4"
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        shop.model, dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**QLORA)
    )
    theirs = peft.PeftModel.from_pretrained(quantised, folder, is_trainable=True)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in theirs.modules())
    bank, examples = opened.bank, tiny.examples_of(7)
    batch = next(batches_of(bank, "adapter", examples, [0], 100))
    with bank.learning("adapter"):
        hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    assert bank.base.head_module is not None
    logits, expected = bank.base.head_module(hidden), theirs(batch.token_ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    own = {f"base_model.model.{n}": g for n, g in tiny.gradients(bank, "adapter").items()}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5 * float(gradients[name].abs().max()))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_into_the_dequantised_weights_is_unmerged_on_the_base_in_4_bits(name, dtype, tmp_path):
    bank = Bank(nf4_base(name, dtype=dtype))
    before = {key: tensor.clone() for key, tensor in bank.base.model.state_dict().items()}
    kinds: list[AdapterSettings] = [
        Lora(r=3, use_dora=True),
        Lora(r=3, bias="none" if "llama" in name else "all"),
        Ia3(),
    ]
    for number, kind in enumerate(kinds):
        families.perturb_(bank.add(f"a{number}", kind), 1, 0.05)
        found = merge(bank, f"a{number}", tmp_path / str(number), inputs_for(bank, ROWS))
        assert found.differences.worst[1].value < 1e-5  # in fp32 also of a base in half precision
        if dtype == torch.float32:
            model = type(bank.base.model).from_pretrained(tmp_path / str(number)).eval()
            for row in ROWS:
                ids = torch.tensor([row])
                with torch.no_grad(), bank.base.native(bank.sole_route(f"a{number}")) as own:
                    expected = numbers_of(own(input_ids=ids))
                    torch.testing.assert_close(numbers_of(model(input_ids=ids)), expected, rtol=1e-5, atol=1e-5)
    after = plain_state(bank.base.model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_is_merged_into_the_live_base():
    bank = tiny.bank_of(nf4_base(), "one")
    with pytest.raises(ConfigError, match=r"held in nf4.*quantize: none"):
        Merged(bank, "one")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_the_files_of_a_quantised_base_do_not_stay_in_memory(shop, tmp_path):
    folder = shutil.copytree(shop.model, tmp_path / "model")

    def is_mapped():
        gc.collect()
        return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()

    base = load(str(folder))
    assert is_mapped()
    quantise_(base, "nf4")
    assert not is_mapped()


def test_a_model_without_such_layers_is_refused_and_so_is_a_missing_library_before_anything_is_looked_for(
    shop, monkeypatch
):
    with pytest.raises(ModelError, match="quantize"):
        nf4_base("gpt2")
    assert load(str(shop.model), quantize="nf4").quantize == "nf4"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == bnb.__name__ else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'onebase\[nf4\]'"):
        load("no/such/folder", quantize="nf4")
