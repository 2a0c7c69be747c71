"""The bank puts adapters on one base, routes rows to them, and leaves no trace when they go."""

import hashlib
import zlib
from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.adapters.layer import AdaptedLayer
from onebase.base.route import RowSpace
from onebase.config.methods import Full, Lora
from onebase.errors import ConfigError, FileFormatError
from onebase.measure.forward import forward_loss
from onebase.ops.keyed import mix_rows
from onebase.ops.layout import Layout, Node
from onebase.ops.segments import NO_OWNER
from tests import tiny


def hash_of(base):
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        digest.update(name.replace(".base_layer", "").encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.5}])
def test_a_fresh_adapter_is_a_bitwise_no_op(name, settings):
    base = tiny.base_of(name)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 3), None)
    bank = Bank(base)
    before = base.hidden(batch.token_ids, bank.route(batch.layout))
    bank.add("one", Lora(**settings))
    bank.add("two", Lora(r=3, **settings), seed=1)
    mixed = tiny.batch_of(tiny.examples_of(7, 20, 3), "one", "two", None)
    after = base.hidden(mixed.token_ids, bank.route(mixed.layout, dropout_step=0))
    assert torch.equal(before, after)


def test_removing_the_last_adapter_puts_the_modules_themselves_back():
    base = tiny.base_of()
    modules = {name: id(module) for name, module in base.model.named_modules()}
    bank = Bank(base)
    bank.add("one", Lora(target_modules=["q_proj", "lm_head"]))
    bank.add("two", Lora(target_modules=["q_proj", "up_proj"]))
    assert sum(isinstance(m, AdaptedLayer) for m in base.model.modules()) == 5
    bank.remove("one")
    assert sum(isinstance(m, AdaptedLayer) for m in base.model.modules()) == 4
    bank.remove("two")
    assert {name: id(module) for name, module in base.model.named_modules()} == modules
    assert bank.head is base.head


def test_removing_one_adapter_changes_no_bit_of_another_and_its_number_is_used_again():
    base = tiny.base_of()
    bank = tiny.bank_of(base, "one", "two")
    batch = tiny.batch_of(tiny.examples_of(7, 20), "two")
    before = base.hidden(batch.token_ids, bank.route(batch.layout))
    bank.remove("one")
    assert torch.equal(base.hidden(batch.token_ids, bank.route(batch.layout)), before)
    tiny.fill_(bank.add("three", Lora(r=2)), seed=9)
    assert torch.equal(base.hidden(batch.token_ids, bank.route(batch.layout)), before)
    other = tiny.batch_of(tiny.examples_of(7, 20), "three")
    assert not torch.equal(base.hidden(other.token_ids, bank.route(other.layout)), before)


def test_training_changes_no_byte_of_the_base():
    base = tiny.base_of()
    before = hash_of(base)
    bank = tiny.bank_of(base, "one", "two")
    parameters = [p for a in bank.adapters.values() for _, p in a.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=0.1)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 4), "one", "two", None)
    losses = []
    for _ in range(4):
        loss, _ = forward_loss(bank, batch, 0.1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert hash_of(base) == before
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    for name in ("one", "two", "dummy"):
        bank.remove(name)
    assert hash_of(base) == before


def test_only_the_owners_adapter_learns():
    bank = tiny.bank_of(tiny.base_of(), "one", "two")
    forward_loss(bank, tiny.batch_of(tiny.examples_of(7, 20), "two"), 0.1)[0].backward()
    assert all(g.abs().max() > 0 for g in tiny.gradients(bank, "two").values())
    assert not any(g.any() for name in ("one", "dummy") for g in tiny.gradients(bank, name).values())


def test_a_route_names_the_owners_of_tokens_and_labels():
    bank = tiny.bank_of(tiny.base_of(), "one", "two")
    numbers = bank._numbers
    layout = Layout([Node(4, "two", 0, labels=2), Node(3, None, 1, labels=3), Node(5, "one", 2, labels=0)])
    route = bank.route(layout)
    owners = [numbers["two"], NO_OWNER, numbers["one"]]
    assert list(route.segments(RowSpace.TOKEN, 12)) == list(zip((0, 4, 7), (4, 7, 12), owners, strict=True))
    assert list(route.segments(RowSpace.LABEL, 5)) == list(zip((0, 2), (2, 5), owners, strict=False))
    assert not route.row_keys


def test_dropout_needs_a_step_and_an_adapter_that_drops():
    bank = tiny.bank_of(tiny.base_of(), "one")
    layout = Layout([Node(4, "one", labels=1)])
    assert not bank.route(layout, dropout_step=3).row_keys
    bank.add("two", Lora(lora_dropout=0.1))
    assert not bank.route(layout).row_keys
    assert set(bank.route(layout, dropout_step=3).row_keys) == {RowSpace.TOKEN, RowSpace.EXAMPLE}
    keys = bank.route(layout, dropout_step=3, label_rows=torch.tensor([2])).row_keys
    assert keys[RowSpace.LABEL].shape == (1,)


def test_names_that_are_taken_unknown_or_of_another_bank_raise():
    base = tiny.base_of()
    bank = tiny.bank_of(base, "one")
    with pytest.raises(ConfigError, match="'one' is in the bank already"):
        bank.add("one", Lora())
    for call in (bank.remove, bank.sole_route, lambda name: bank.route(Layout([Node(2, name)]))):
        with pytest.raises(ConfigError, match="no adapter 'two' in the bank; it has dummy, one"):
            call("two")
    with pytest.raises(ConfigError, match="already has a bank"):
        Bank(base)


def test_the_mapping_of_adapters_is_a_copy_in_the_order_of_adding():
    bank = tiny.bank_of(tiny.base_of(), "b", "a")
    assert list(bank.adapters) == ["dummy", "b", "a"]
    dict.clear(bank.adapters)  # type: ignore[arg-type]
    assert list(bank.adapters) == ["dummy", "b", "a"]


def test_an_adapter_put_in_with_tensors_is_the_one_they_came_from():
    bank = tiny.bank_of(tiny.base_of(), "one")
    tensors = {name: tensor.clone() for name, tensor in bank.adapters["one"].state.items()}
    bank.add("again", bank.adapters["one"].settings, seed=5, tensors=tensors)
    outs = []
    for name in ("one", "again"):
        batch = tiny.batch_of(tiny.examples_of(7, 20), name)
        outs.append(bank.base.hidden(batch.token_ids, bank.route(batch.layout)))
    assert torch.equal(*outs)
    next(iter(tensors.values())).fill_(0)
    assert next(iter(bank.adapters["again"].state.values())).any()


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_changed():
    bank = tiny.bank_of(tiny.base_of(), "one")
    settings = bank.adapters["one"].settings
    tensors = dict(bank.adapters["one"].state)
    missing, wrong, *_ = tensors
    del tensors[missing]
    tensors |= {wrong: torch.zeros(2, 2), "model.nowhere.lora_A.weight": torch.zeros(1)}
    with pytest.raises(FileFormatError) as caught:
        bank.add("two", settings, tensors=tensors)
    message = str(caught.value)
    assert f"{missing} is missing" in message
    assert f"{wrong} must have shape" in message
    assert "got (2, 2)" in message
    assert "model.nowhere.lora_A.weight belongs to no target" in message
    assert "two" not in bank.adapters
    before = {name: tensor.clone() for name, tensor in bank.adapters["one"].state.items()}
    with pytest.raises(FileFormatError):
        bank.adapters["one"].load_state_(tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.adapters["one"].state.items())


def test_parameters_come_in_model_order_with_pefts_names_and_are_counted():
    bank = Bank(tiny.base_of())
    adapter = bank.add("one", Lora(r=2, target_modules=["v_proj", "q_proj"]))
    names = [name for name, _ in adapter.parameters()]
    assert names == [
        f"model.layers.{n}.self_attn.{p}.lora_{part}.weight"
        for n in (0, 1)
        for p in ("q_proj", "v_proj")
        for part in "AB"
    ]
    assert adapter.parameter_count == 2 * (2 * (32 + 32) + 2 * (32 + 16))


def test_the_settings_seed_gives_the_weights():
    states = []
    for seed in (0, 0, 1):
        bank = Bank(tiny.base_of())
        bank.add("neighbour", Lora(r=7), seed=seed + 3)
        states.append(bank.add("one", Lora(), seed=seed).state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(next(iter(state.values())) for state in states[1:]))


def test_the_head_that_is_targeted_learns_in_the_space_of_labels():
    """Against autograd on the full logits, head adapted by two members."""
    base = tiny.base_of(dtype=torch.float64)
    bank = tiny.bank_of(base, "one", "two", target_modules=["lm_head", "q_proj"])
    assert bank._layers["lm_head"].space is RowSpace.LABEL
    assert bank.head.update is bank._layers["lm_head"].low_rank
    examples = tiny.examples_of(9, 14, 5)
    batch = tiny.batch_of(examples, "one", None, "two")
    loss, rows = forward_loss(bank, batch, 0.125)
    loss.backward()
    found = {name: tiny.gradients(bank, name) for name in bank.adapters}
    tiny.clear_gradients(bank)
    total = torch.zeros((), dtype=torch.float64)
    for example, owner in zip(examples, ("one", None, "two"), strict=True):
        ids = torch.from_numpy(example.token_ids.astype("int64"))
        with base.native(bank.sole_route(owner)) as model:
            logits = model(ids[None], use_cache=False).logits[0]
        targets = torch.where(torch.from_numpy(example.labelled.copy()), ids, -100)[1:]
        total = total + 0.125 * torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    assert rows.loss.sum().item() * 0.125 == pytest.approx(total.item(), rel=1e-9)
    for name in bank.adapters:
        for key, gradient in tiny.gradients(bank, name).items():
            torch.testing.assert_close(found[name][key], gradient, rtol=1e-7, atol=1e-9)
    assert found["one"]["lm_head.lora_A.weight"].any()
    assert not found["dummy"]["lm_head.lora_A.weight"].any()


def test_a_base_that_predicts_no_tokens_is_refused_by_name():
    bank = Bank(tiny.base_of("bert"))
    with pytest.raises(ConfigError, match=r"BertModel predicts no tokens.*causal language model"):
        _ = bank.head


def test_while_one_adapter_learns_a_backward_leaves_no_gradient_in_the_others():
    bank = tiny.bank_of(tiny.base_of(), "one", "two")
    batch = tiny.batch_of(tiny.examples_of(5, 6), "one", "two")
    with bank.learning("one"):
        forward_loss(bank, batch, 1.0)[0].backward()
    assert all(parameter.grad is not None for _, parameter in bank.adapters["one"].parameters())
    for other in set(bank.adapters) - {"one"}:
        assert all(parameter.grad is None for _, parameter in bank.adapters[other].parameters())
        assert all(parameter.requires_grad for _, parameter in bank.adapters[other].parameters())


def test_a_batch_has_a_row_in_the_space_of_examples_for_each_of_them():
    bank = tiny.bank_of(tiny.base_of(), "one", "two", dummy=False)
    route = bank.route(Layout([Node(4, "one"), Node(3, "one", parent=0), Node(2, "one", parent=0), Node(5, "two")]))
    for space in (RowSpace.EXAMPLE, RowSpace.BATCH):
        assert list(route.segments(space, 3)) == [(0, 2, 0), (2, 3, 1)]


def test_dropout_on_the_head_is_keyed_by_the_head_too():
    bank = tiny.bank_of(tiny.base_of(), "one", dummy=False, lora_dropout=0.5, target_modules=["lm_head"])
    layout, rows = Layout([Node(6, "one")]), torch.arange(5)
    keys = bank.route(layout, label_rows=rows, dropout_step=3).row_keys
    expected = mix_rows(keys[RowSpace.TOKEN][rows], zlib.crc32(b"lm_head"))
    assert torch.equal(keys[RowSpace.LABEL], expected)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "a b", "x\0", "-r", "a" * 101]
)
def test_a_name_that_could_lead_elsewhere_is_no_adapters(name):
    bank = Bank(tiny.base_of("llama"))
    with pytest.raises(ConfigError, match="an adapter's name must begin with a letter, digit or underscore"):
        bank.add(name, Lora(r=2))
    assert not bank.adapters


@pytest.mark.parametrize("name", ["a", "_", "3", "math-v1.2", "Frage_\u00fc", "a@b+c"])
def test_a_name_that_a_folder_may_have_is_an_adapters(name):
    assert Bank(tiny.base_of("llama")).add(name, Lora(r=2)).name == name


def test_positions_that_a_batch_shares_are_refused_to_several_adapters_and_no_one_elses_business():
    """T5 looks its distances up once for the batch, as (queries, keys): as many queries as entries prove nothing."""
    bank = Bank(tiny.base_of("t5"))
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    bank.add("there", Full(target_modules=[bias]))
    bank.add("elsewhere", Lora())
    inputs = tiny.native_inputs("t5", 7)  # of seven tokens each
    owners: list[str | None] = ["there", "elsewhere", None, "there", None, None, None]
    with pytest.raises(ConfigError, match=r"relative_attention_bias: positions .* members take turns"):
        tiny.native_outputs(bank.base, bank.batch_route(owners), inputs)
    others = [None if owner == "there" else owner for owner in owners]
    tiny.native_outputs(bank.base, bank.batch_route(others), inputs)
    tiny.native_outputs(bank.base, bank.batch_route(["there"] * 7), inputs)


def test_what_a_model_reads_of_a_module_it_reads_of_its_wrapper():
    """ViT asks its embeddings for the projection inside; Gemma 3 asks a block what it attends to."""
    bank = Bank(tiny.base_of("vit"))
    bank.add("whole", Lora(modules_to_save=["vit.embeddings"]))
    bank.add("inside", Full(target_modules=["vit.embeddings.patch_embeddings.projection"]))
    embeddings: Any = bank.base.model.vit.embeddings
    inner: Any = embeddings.patch_embeddings.projection
    assert [type(layer) for layer in (embeddings, inner)] == [AdaptedLayer] * 2
    assert inner is embeddings.base_layer.patch_embeddings.projection
    assert inner.stride == inner.base_layer.stride
    before = set(bank.base.model.state_dict())
    bank.remove("inside")
    assert embeddings.patch_embeddings.projection is inner.base_layer
    bank.remove("whole")
    assert set(bank.base.model.state_dict()) == set(tiny.model_of("vit").state_dict()) != before


def test_an_adapter_prints_as_one_line_without_its_numbers():
    bank = Bank(tiny.base_of())
    shown = repr(bank.add("first", Lora(r=2)))
    assert "first" in shown and "lora" in shown and "\n" not in shown and len(shown) < 120
