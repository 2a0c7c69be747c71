"""What holds of any base holds of one in 8 bits: rows keep to themselves, runs repeat and resume, files are PEFT's."""

from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from onebase.adapters.bank import Bank
from onebase.base.int8 import Int8Linear, LastRows
from onebase.base.model import load
from onebase.base.quantise import quantise_
from onebase.base.route import Route
from onebase.config.methods import AdapterSettings, Full, Ia3, Lora
from onebase.errors import ModelError, TargetError
from onebase.measure.forward import batches_of, forward_loss
from onebase.train.opening import open_adapter
from onebase.train.stop import Stopped
from tests import tiny
from tests.laws.test_together_and_alone import batch_with, results
from tests.train import runs
from tests.train.runs import Watching, adapter_bytes

FAMILIES = ["llama", "gpt-neox", "opt", "mistral", "bert"]
INT8: dict[str, Any] = {"quantize": "int8"}


def int8_base(name="llama", **changes):
    base = tiny.base_of(name, **changes)
    quantise_(base, "int8")
    return base


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with runs.own_home(folder / "home"):
        yield runs.workshop(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_of_the_trunk_are_held_in_8_bits_and_nothing_else(name):
    base = int8_base(name)
    held = [path for path, module in base.model.named_modules() if isinstance(module, Int8Linear)]
    left = [m for m in base.model.modules() if type(m) is torch.nn.Linear and m is not base.head_module]
    assert held and base.parameter_count == tiny.base_of(name).parameter_count
    assert all(m.in_features % 8 or m.out_features % 8 for m in left)


def test_columns_that_are_large_in_every_row_are_evened_out_and_change_no_product():
    plain, base = tiny.base_of(), tiny.base_of()
    for one in (plain, base):
        one.model.model.layers[0].input_layernorm.weight.data[5] *= 300
    quantise_(base, "int8")
    attention = base.model.model.layers[0].self_attn
    assert attention.q_proj.shares is attention.k_proj.shares is attention.v_proj.shares  # so they share their rows
    assert attention.q_proj.shares[5] < attention.q_proj.shares.median() / 4
    theirs = plain.model.model.layers[0].self_attn.q_proj
    half_steps = attention.q_proj.scales[:, None] * attention.q_proj.shares / 2
    assert ((attention.q_proj.weight - theirs.weight).abs() <= half_steps * (1 + 1e-4)).all()
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 300
    true = x.double() @ theirs.weight.T.double()
    even = Int8Linear(theirs, LastRows(), attention.q_proj.shares)(x)
    assert (even - true).norm() < 0.5 * (Int8Linear(theirs, LastRows())(x) - true).norm()


@pytest.mark.parametrize("place", ["first", "last"])
def test_rows_losses_and_gradients_are_byte_identical_together_and_alone(place):
    together = tiny.bank_of(int8_base(), "one", "two", lora_dropout=0.2)
    alone = tiny.bank_of(int8_base(), "one", lora_dropout=0.2, dummy=False)
    alone.adapters["one"].load_state_(together.adapters["one"].state)
    order = ("one", "two") if place == "first" else ("two", "one")
    found = results(together, batch_with(*order), "one", dropout_step=4)
    expected = results(alone, batch_with("one"), "one", dropout_step=4)
    for part, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), part


def test_a_fresh_adapter_changes_no_bit_and_recomputed_activations_give_the_same_gradients():
    bank = Bank(int8_base())
    examples = tiny.examples_of(9, 14, 5)
    batch = next(batches_of(bank, None, examples, range(3), 1000))
    plain = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    bank.add("one", Lora(r=3))
    batch = next(batches_of(bank, "one", examples, range(3), 1000))
    assert torch.equal(plain, bank.base.hidden(batch.token_ids, bank.route(batch.layout)))
    tiny.fill_(bank.adapters["one"])
    found = []
    for recompute in (False, True):
        tiny.clear_gradients(bank)
        with bank.base.activation_checkpointing(recompute):
            forward_loss(bank, batch, 1.0)[0].backward()
        found.append(tiny.gradients(bank, "one"))
    assert all(torch.equal(found[0][key], found[1][key]) and found[0][key].any() for key in found[0])


def test_what_would_train_the_integers_is_refused_and_what_reads_the_weight_is_not():
    base = int8_base()
    with pytest.raises(TargetError, match="held in fewer bits"):
        Bank(base).add("full", Full())
    bank = Bank(base)
    several: list[AdapterSettings] = [Lora(r=3, use_dora=True), Lora(r=3, init_lora_weights="pissa"), Ia3()]
    for number, settings in enumerate(several):
        bank.add(f"a{number}", settings)
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    batch = next(batches_of(bank, "a0", tiny.examples_of(9, 14), range(2), 1000))
    forward_loss(bank, batch, 1.0)[0].backward()
    assert all(torch.equal(before[key], tensor) for key, tensor in base.model.state_dict().items())


def test_a_run_learns_resumes_to_the_same_bytes_and_its_adapter_opens_on_both_bases_and_in_peft(shop):
    settings = shop.settings(train={"steps": 6, "save_every": 2, "learning_rate": 0.02}, **INT8)
    whole = runs.run(settings, shop.folder / "whole")
    assert whole.valid_loss is not None and whole.valid_loss_before is not None
    assert whole.valid_loss < whole.valid_loss_before
    with pytest.raises(Stopped):
        runs.run(settings, shop.folder / "killed", watching=Watching(stop_after={3}))
    runs.run(settings, shop.folder / "killed", resume=True)
    assert adapter_bytes(shop.folder / "killed") == adapter_bytes(shop.folder / "whole")

    folder = shop.folder / "whole" / "adapter"
    opened = open_adapter(folder, quantize="int8")
    assert opened.stored.record is not None
    assert opened.bank.base.quantize == "int8" and opened.stored.record.quantize == "int8"
    examples = tiny.examples_of(7)
    in_full = open_adapter(folder)
    batch = next(batches_of(in_full.bank, "adapter", examples, [0], 100))
    hidden = in_full.bank.base.hidden(batch.token_ids, in_full.bank.route(batch.layout))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shop.model), folder)
    ids = batch.token_ids[None]
    expected = theirs(ids).logits[0]
    head = in_full.bank.base.head_module
    assert head is not None
    torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-5)


def test_answers_are_generated_as_from_the_full_forward():
    base = int8_base()
    bank = Bank(base)
    ids = [5, 6, 7]
    given = torch.tensor([ids])
    with torch.inference_mode(), base.native(Route()) as model:
        made = model.generate(given, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    for _ in made:
        batch = next(batches_of(bank, None, tiny.examples_of(len(ids)), [0], 100))
        hidden = base.hidden(torch.tensor(ids), bank.route(batch.layout))
        assert base.head_module is not None
        ids.append(int(base.head_module(hidden)[-1].argmax()))
    assert ids[3:] == made


def test_what_others_read_of_it_are_plain_layers_and_its_number_format_stays(tmp_path):
    base = int8_base()
    assert [*base.model.state_dict()] == [*tiny.base_of().model.state_dict()]
    base.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = base.model.model.layers[0].mlp.down_proj
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, own.weight)
    with pytest.raises(ModelError, match="number format"):
        base.model.to(torch.bfloat16)


def test_a_model_without_such_layers_is_refused(shop):
    with pytest.raises(ModelError, match="quantize"):
        int8_base("gpt2")
    assert load(str(shop.model), quantize="int8").quantize == "int8"
