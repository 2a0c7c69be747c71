"""Trained rows of an embedding, and weights tied to it, equal PEFT's."""

from typing import Any

import peft
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora
from onebase.errors import TargetError
from onebase.measure.forward import forward_loss
from tests import tiny
from tests.adapters.against_peft import CLOSE, assert_equal_to_peft, filled, gradients_of, their_loss, theirs_of

IDS = [7, 3, 40]  # not in order
BOTH = {"embed_tokens": IDS, "lm_head": IDS}


def settings_of(**more: Any) -> tuple[Lora, Any]:
    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | more
    return Lora(**common), peft.LoraConfig(**common)


@pytest.mark.parametrize("ids", [IDS, {"embed_tokens": IDS}, {"lm_head": IDS}, BOTH], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3"])
def test_trained_rows_equal_pefts_the_tied_head_included(name, ids):
    adapter, _ = assert_equal_to_peft(name, *settings_of(trainable_token_indices=ids))
    keys = [key for key, _ in adapter.parameters() if "token" in key]
    tied = name != "llama"
    assert len(keys) == (2 if ids == BOTH and not tied else 1)
    assert len([part for part in adapter.parts if hasattr(part, "ids")]) == (
        2 if ids == BOTH or (tied and ids != {"lm_head": IDS}) else 1
    )


def test_other_ids_on_the_head_keep_the_two_apart_and_say_so():
    ids = {"embed_tokens": IDS, "lm_head": [4, 5]}
    settings, config = settings_of(trainable_token_indices=ids)
    adapter, _ = assert_equal_to_peft("llama-tied", settings, config, merges=False)  # PEFT's writes one over the other
    assert (
        "model.embed_tokens and lm_head share one weight in the base; their trained rows are apart" in adapter.warnings
    )
    settings, _ = settings_of(trainable_token_indices=ids, ensure_weight_tying=True)
    with pytest.raises(TargetError, match=r"model.embed_tokens and lm_head share one weight.*the same ids"):
        Bank(tiny.base_of("llama-tied")).add("one", settings)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fresh_rows_change_no_bit_of_hidden_states_and_logits(name, dtype):
    base = tiny.base_of(name, dtype=dtype)
    bank = Bank(base)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 3), "one", None, "one")
    plain = tiny.batch_of(tiny.examples_of(7, 20, 3), None)
    before = base.hidden(plain.token_ids, bank.route(plain.layout))
    loss, _ = forward_loss(bank, plain, 1.0)
    bank.add("one", Lora(target_modules="attention", trainable_token_indices=[*range(30)]))
    assert torch.equal(base.hidden(batch.token_ids, bank.route(batch.layout)), before)
    assert torch.equal(forward_loss(bank, batch, 1.0)[0], loss)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_whole_copies_of_tied_modules_are_one_and_equal_pefts(saved):
    settings, config = settings_of(modules_to_save=saved, ensure_weight_tying=True)
    bank = Bank(tiny.base_of("llama-tied", dtype=torch.float64))
    adapter = filled(bank, "one", settings)
    assert [key for key, _ in adapter.parameters() if "lora" not in key] == ["model.embed_tokens.weight"]
    same_loss_and_summed_gradients(bank, adapter, config, {"model.embed_tokens.weight": None})
    assert torch.equal(adapter.state["lm_head.weight"], adapter.state["model.embed_tokens.weight"])


def test_untied_copies_of_modules_that_share_a_weight_equal_peft_and_say_so():
    settings, config = settings_of(modules_to_save=["embed_tokens", "lm_head"])
    adapter, _ = assert_equal_to_peft("llama-tied", settings, config)
    assert any(
        "share one weight in the base; the copy of model.embed_tokens and lm_head is apart" in w
        for w in adapter.warnings
    )


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]])
def test_a_pair_on_a_tied_embedding_is_the_heads_too(targets):
    """PEFT has two gradients for the one memory; ours is their sum."""
    settings, config = settings_of(target_modules=targets, ensure_weight_tying=True)
    bank = Bank(tiny.base_of("llama-tied", dtype=torch.float64))
    adapter = filled(bank, "one", settings)
    keys = {"model.embed_tokens.lora_embedding_A": "lm_head.lora_B.weight",
            "model.embed_tokens.lora_embedding_B": "lm_head.lora_A.weight"}  # fmt: skip
    same_loss_and_summed_gradients(bank, adapter, config, keys)
    assert adapter.parameter_count == sum(p.numel() for key, p in adapter.parameters() if "lm_head" not in key)


def same_loss_and_summed_gradients(bank, adapter, config, tied):
    """Compare with PEFT's; its gradient of a tied tensor's other use is added to the first's."""
    model = tiny.model_of("llama-tied", dtype=torch.float64)
    theirs = theirs_of(model, config, adapter, save_embedding_layers=False)
    examples = tiny.examples_of(9, 21, 4)
    batch = tiny.batch_of(examples, "one")
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    expected = their_loss(theirs, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    found = gradients_of(theirs, save_embedding_layers=False)
    for key, gradient in tiny.gradients(bank, "one").items():
        other = tied.get(key)
        whole = found[key] if other is None else found[key] + found[other].T
        scale = float(whole.abs().max())
        assert scale > 0
        torch.testing.assert_close(gradient / scale, whole / scale, **CLOSE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"trainable_token_indices": [61]}, r"model.embed_tokens has 61 rows, 0 to 60, got 61"),
        ({"trainable_token_indices": [3, 3]}, r"an id of model.embed_tokens comes twice"),
        ({"trainable_token_indices": {"embed": [3]}}, r"trainable_token_indices: 'embed' matches none.*'embed_tokens'"),
        ({"trainable_token_indices": {"norm": [3]}}, r"trainable_token_indices: 'norm' matches"),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
            r"embed_tokens is in target_modules or",
        ),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, r"embed_tokens is in target_modules or"),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, r"lm_head shares its weight.*embed_tokens"),
        (
            {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
            r"adapter.use_dora: .*tied",
        ),
    ],
)
def test_what_cannot_be_meant_is_said(more, message):
    settings = Lora(**({"r": 4, "target_modules": ["q_proj"]} | more))
    with pytest.raises(TargetError, match=message):
        Bank(tiny.base_of("llama-tied")).add("one", settings)


def test_tying_where_nothing_is_tied_is_said():
    settings, _ = settings_of(trainable_token_indices=IDS, ensure_weight_tying=True)
    adapter = Bank(tiny.base_of("llama")).add("one", settings)
    assert "ensure_weight_tying: this base ties no weights, so nothing is tied" in adapter.warnings
