"""A base runs real tokens without padding, and what comes out is what its own model says."""

import threading
from typing import Any

import pytest
import torch

from onebase.base import check, pretrained
from onebase.base.model import Base, padded_rows, padded_segments
from onebase.base.route import Route, RowSpace
from onebase.errors import ConfigError, ModelError
from onebase.ops.layout import Layout, Node
from onebase.ops.segments import NO_OWNER, Segments
from tests import tiny

LENGTHS = (1, 2, 15, 16, 17, 30, 16)
# The fused experts of transformers know no fp64.
_EAGER = {"experts_implementation": "eager"}
IN_FP64: dict[str, dict[str, Any]] = {"mixtral": _EAGER, "qwen3-moe": _EAGER}


def fp64_base(name: str) -> Base:
    return tiny.base_of(name, dtype=torch.float64, **IN_FP64.get(name, {}))


def alone(base: Base, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (hidden states of an encoder) that the untouched model computes for one example."""
    with torch.no_grad(), base.native(Route(batch_owners=(NO_OWNER,))) as model:
        if base.head is None:
            return base.trunk(input_ids=ids[None]).last_hidden_state[0]
        return model(input_ids=ids[None], use_cache=False).logits[0]


def flat_results(base: Base, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    hidden = base.hidden(ids, check.probe_route(base, layout))
    if base.head is None:
        return hidden
    return base.head.logits(hidden, Segments.of([len(ids)], [NO_OWNER]))


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *tiny.ENCODERS])
def test_every_example_of_a_flat_batch_equals_the_models_own_forward_of_it_alone(name):
    base = fp64_base(name)
    lengths = [n for n in LENGTHS if n > 1 or base.layout_kind == "flat"]
    examples = tiny.examples_of(*lengths)
    batch = tiny.batch_of(examples, None)
    ours = flat_results(base, batch.token_ids, batch.layout)
    for example, piece in zip(examples, ours.split(list(lengths)), strict=True):
        own = alone(base, torch.from_numpy(example.token_ids.astype("int64")))
        torch.testing.assert_close(piece, own, rtol=1e-6, atol=1e-6 * float(own.abs().max()))


def test_a_model_that_caps_its_attention_runs_with_an_attention_that_caps():
    model = tiny.model_of("gemma2")
    ids = torch.arange(20)[None] % tiny.VOCABULARY
    capped = model(input_ids=ids).logits
    model.config._attn_implementation = "sdpa"  # as transformers 5.17 leaves it: the cap is dropped; refused later
    base = Base(model)
    with base.native(Route(batch_owners=(NO_OWNER,))) as own:
        assert torch.equal(own(input_ids=ids).logits, capped)
    assert base.layout_kind == "flat"


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *tiny.ENCODERS])
def test_the_layout_is_decided_by_the_self_check(name):
    base = tiny.base_of(name)
    assert base.layout_kind == ("padded" if name in tiny.PADDED else "flat")
    assert base.shares_prefixes == (name in tiny.ARCHITECTURES)
    assert base.position_offset == (2 if name == "roberta" else 0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "opt"])
def test_a_shared_prefix_gives_what_repeating_it_gives(name):
    base = fp64_base(name)
    draws = torch.Generator().manual_seed(0)
    root, middle, one, two, three = (torch.randint(3, 60, (n,), generator=draws) for n in (5, 14, 9, 17, 1))
    shared = Layout([Node(5), Node(14, parent=0), Node(9, parent=1), Node(17, parent=1), Node(1, parent=0), Node(9)])
    tree = torch.cat([root, middle, one, two, three, one])
    ours = flat_results(base, tree, shared)
    root_out, middle_out, *leaves = ours.split([n.length for n in shared.nodes])
    lines = [[root, middle, one], [root, middle, two], [root, three], [one]]
    heads = [[root_out, middle_out], [root_out, middle_out], [root_out], []]
    for line, head, leaf in zip(lines, heads, leaves, strict=True):
        own = alone(base, torch.cat(line))
        torch.testing.assert_close(torch.cat([*head, leaf]), own, rtol=1e-6, atol=1e-6 * float(own.abs().max()))


def test_an_encoder_refuses_a_shared_prefix():
    base = tiny.base_of("bert")
    layout = Layout([Node(3), Node(4, parent=0)])
    with pytest.raises(ValueError, match="prefix"):
        base.hidden(torch.arange(3, 10), check.probe_route(base, layout))


def test_a_number_of_tokens_that_is_not_the_layouts_raises():
    base = tiny.base_of()
    with pytest.raises(ValueError, match="layout"):
        base.hidden(torch.arange(3, 10), check.probe_route(base, Layout([Node(6)])))
    with pytest.raises(ValueError, match="layout"):
        base.hidden(torch.arange(3, 10), Route(batch_owners=(NO_OWNER,)))


def test_a_model_called_outside_of_a_route_fails_instead_of_mixing_examples():
    base = tiny.base_of()
    base.hidden(torch.arange(3, 10), check.probe_route(base, Layout([Node(7)])))
    with pytest.raises(RuntimeError, match="route"):
        base.model(torch.arange(3, 10)[None])


def test_the_native_model_is_the_transformers_model_before_and_after_flat_forwards():
    model = tiny.model_of("mistral")
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    before = model(ids).logits
    base = Base(model)
    layout = Layout([Node(20), Node(20)])
    base.hidden(ids.flatten(), check.probe_route(base, layout))
    with base.native(Route(batch_owners=(NO_OWNER,))) as native:
        assert torch.equal(native(ids).logits, before)
    flat = base.hidden(ids.flatten(), check.probe_route(base, layout))
    torch.testing.assert_close(model.lm_head(flat).view_as(before), before, rtol=1e-4, atol=1e-5)


def test_the_base_is_frozen_and_in_evaluation_mode():
    base = Base(tiny.model_of("opt").train())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(m.training for m in base.model.modules())


def test_a_model_whose_head_cannot_be_expressed_is_refused():
    model = tiny.model_of("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.sin())
    with pytest.raises(ModelError, match="do not equal the model's own"):
        Base(model, name="odd")


def test_attention_that_wants_more_than_flat_offers_makes_the_model_padded():
    model = tiny.model_of("llama")
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, inner=inner, **k: inner(*a, **k, s_aux=torch.zeros(4))
    assert Base(model).layout_kind == "padded"


def test_no_prefix_layout_is_padded_with_the_examples_own_tokens():
    layout = Layout([Node(2), Node(3, parent=0), Node(1, parent=0), Node(4)])
    rows, mask, place = padded_rows(layout)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 0, 0], [6, 7, 8, 9, 6]]
    assert mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert rows.flatten()[place].tolist() == list(range(10))
    assert mask.flatten()[place].all()
    assert padded_segments(layout) == ([5, 5, 5], [1, 2, 3])


def test_a_base_that_is_gone_leaves_no_attention_behind():
    import gc

    from transformers import AttentionInterface

    before = set(AttentionInterface._global_mapping)
    base = tiny.base_of()
    assert set(AttentionInterface._global_mapping) - before
    del base
    gc.collect()
    assert not set(AttentionInterface._global_mapping) - before


# ------------------------------------------------------------------------------------------- activation checkpointing

OWN_DROPOUT: dict[str, dict[str, Any]] = {
    "opt": {"dropout": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


def losses_and_gradients(bank, pieces, *, recompute: bool, between=lambda: None, run=lambda task: task()):
    """Forward of every (batch, member), then all backwards in reverse order; return losses and gradients by member."""
    from onebase.measure.forward import forward_loss

    tiny.clear_gradients(bank)
    with bank.base.activation_checkpointing(recompute):
        losses = [forward_loss(bank, batch, 0.1, dropout_step=3)[0] for batch in pieces]
    between()
    for loss in reversed(losses):
        run(loss.backward)
    return [loss.item() for loss in losses], {name: tiny.gradients(bank, name) for name in bank.adapters}


def assert_same(ours, theirs, **tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    for name, tensors in theirs[1].items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours[1][name][key], tensor, **tolerance)


def two_members(name):
    base = tiny.base_of(name, dtype=torch.float64, **(OWN_DROPOUT.get(name, {}) | IN_FP64.get(name, {})))
    bank = tiny.bank_of(base, "one", "two", lora_dropout=0.25)
    examples = tiny.examples_of(7, 12, 5)
    return bank, [tiny.batch_of(examples, owner) for owner in ("one", "two")]


@pytest.mark.parametrize("name", sorted(set(tiny.ARCHITECTURES) - {"llama-tied", "opt-projected"}))
def test_two_forwards_before_two_backwards_under_checkpointing_give_the_gradients_of_none(name):
    bank, pieces = two_members(name)
    plain = losses_and_gradients(bank, pieces, recompute=False)
    assert_same(losses_and_gradients(bank, pieces, recompute=True), plain, rtol=1e-6, atol=1e-9)
    assert any(g.abs().max() > 0 for g in plain[1]["one"].values())
    assert not any(g.any() for g in plain[1]["dummy"].values())


def test_recomputation_ignores_what_ran_in_between():
    bank, pieces = two_members("llama")
    plain = losses_and_gradients(bank, pieces, recompute=False)

    def something_else():
        with bank.base.native(bank.sole_route("dummy")) as model:
            model(torch.arange(3, 20)[None])

    assert_same(losses_and_gradients(bank, pieces, recompute=True, between=something_else), plain)


def test_backward_from_another_thread_sees_the_routes_of_the_forward():
    bank, pieces = two_members("llama")
    plain = losses_and_gradients(bank, pieces, recompute=False)

    def in_thread(task):
        errors = []

        def body():
            try:
                task()
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert not errors, errors

    assert_same(losses_and_gradients(bank, pieces, recompute=True, run=in_thread), plain)


def test_a_graph_can_be_recomputed_twice():
    bank, pieces = two_members("llama")
    plain = losses_and_gradients(bank, pieces, recompute=False)
    once = losses_and_gradients(bank, pieces, recompute=True, run=lambda task: (task(retain_graph=True), task())[0])
    for name in ("one", "two"):
        for key, tensor in plain[1][name].items():
            torch.testing.assert_close(once[1][name][key], 2 * tensor)


def test_checkpointing_keeps_fewer_activations_and_leaves_no_trace():
    bank, pieces = two_members("llama")
    from onebase.measure.forward import forward_loss

    def kept(recompute: bool) -> int:
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with bank.base.activation_checkpointing(recompute), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward_loss(bank, pieces[0], 1.0)
        return sum(sizes)

    assert kept(True) < kept(False) / 2
    assert not any(m.training for m in bank.base.model.modules())
    assert kept(False) == kept(False)


def test_checkpointing_is_not_reentrant(monkeypatch):
    base, arguments = tiny.base_of(), {}
    monkeypatch.setattr(
        type(base.model), "gradient_checkpointing_enable",
        lambda self, gradient_checkpointing_kwargs=None, **_: arguments.update(gradient_checkpointing_kwargs),
    )  # fmt: skip
    pretrained.enable_checkpointing(base.model, base.slot.for_recompute)
    assert arguments["use_reentrant"] is False
    assert callable(arguments["context_fn"])


def test_the_row_spaces_are_all_there():
    assert {space.value for space in RowSpace} == {"token", "example", "label", "batch"}


@pytest.mark.parametrize("name", [*tiny.NATIVE, "plain"])
def test_what_takes_no_flat_tokens_is_native_and_runs_as_it_is(name):
    model = tiny.model_of(name)
    inputs = tiny.native_inputs(name, 3)
    own = model.requires_grad_(False)(**inputs)
    base = Base(model, name=name)
    assert base.layout_kind == "native" and base.why_native and base.head is None
    found = tiny.native_outputs(base, Route(batch_owners=(NO_OWNER,)), inputs)
    assert torch.equal(found, own if isinstance(own, torch.Tensor) else own.logits)
    assert (base.dtype, base.device, base.max_length) == (torch.float32, torch.device("cpu"), None)
    assert base.embedding_rows == (tiny.VOCABULARY if name == "t5" else None)
    assert base.parameter_count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [*tiny.NATIVE, "plain"])
def test_a_native_base_has_no_hidden_states_of_tokens_and_says_how_it_is_run(name):
    base = tiny.base_of(name)
    with pytest.raises(ConfigError, match=r"with base\.native"):
        base.hidden(torch.tensor([3, 4]), Route(layout=Layout([Node(2)])))


def test_a_model_that_wants_more_than_token_ids_is_native():
    """Its configuration knows text, and only its own forward knows that text is not enough."""

    class WithImage(type(tiny.model_of("llama"))):  # type: ignore[misc]
        def forward(self, input_ids, pixel_values, **others):
            return super().forward(input_ids, **others)

    base = Base(WithImage(tiny.model_of("llama").config), name="seeing")
    assert base.layout_kind == "native" and "pixel_values" in base.why_native
    assert base.model.config._attn_implementation != base._flat_attention


def test_a_module_without_parameters_has_a_dtype_a_device_and_a_fingerprint():
    base = Base(torch.nn.Sequential(torch.nn.ReLU()), name="bare")
    assert (base.dtype, base.device.type, base.parameter_count) == (torch.float32, "cpu", 0)
    assert len(base.fingerprint) == 64
