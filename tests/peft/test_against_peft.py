"""Whatever code written for PEFT does, ours does the same: first values, losses, gradients, names, files, switching."""

from functools import partial
from typing import Any

import peft
import pytest
import torch

import onebase.peft as ours
from onebase.adapters.layer import AdaptedLayer
from tests.peft.pairs import (
    CLOSE,
    GPT2,
    assert_same_files,
    assert_same_step,
    fill_,
    front_of,
    ids_of,
    model_of,
    pair,
    quietly,
    trained,
)

LORAS: dict[str, Any] = {
    "gpt2": ("gpt2", {"target_modules": GPT2}),
    "defaults": ("llama", {}),
    "gaussian": ("llama", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
    "random B": ("llama", {"init_lora_weights": False, "r": 3, "lora_alpha": 5}),
    "expression": ("llama", {"target_modules": r".*\.(q_proj|down_proj)"}),
    "rslora": ("qwen3", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj"]}),
    "one block": ("gpt2", {"target_modules": GPT2, "layers_to_transform": [1]}),
    "excluded": ("gpt2", {"target_modules": GPT2, "exclude_modules": ["mlp.c_proj"]}),
    "whole head": ("llama", {"modules_to_save": ["lm_head"]}),
}
OTHERS: dict[str, Any] = {
    "ia3": ("llama", "IA3Config", {}),
    "ia3 of gpt2": (
        "gpt2",
        "IA3Config",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "norms": ("llama", "LNTuningConfig", {}),
    "prompt": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prompt of words": ("llama", "PromptTuningConfig", {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prefix": ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prefix, projected": (
        "gpt2",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
}
EVERY: dict[str, Any] = {key: (name, "LoraConfig", fields) for key, (name, fields) in LORAS.items()} | OTHERS


@pytest.mark.parametrize("case", EVERY)
def test_the_same_seed_gives_the_same_adapter_and_the_same_first_steps(case: str, tmp_path) -> None:
    name, kind, fields = EVERY[case]
    theirs, mine = pair(name, kind, task_type="CAUSAL_LM", **fields)
    start = {key: p.detach().clone() for key, p in trained(theirs).items()}
    for key, parameter in trained(mine).items():
        torch.testing.assert_close(parameter, start[key], rtol=0, atol=0 if "magnitude" not in key else 1e-6)
    ids = ids_of()
    for _ in range(2):
        assert_same_step(theirs, mine, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        fill_(theirs, mine)
    for model, folder in ((theirs, tmp_path / "peft"), (mine, tmp_path / "ours")):
        quietly(lambda model=model, folder=folder: model.save_pretrained(folder))
    assert_same_files(tmp_path / "peft", tmp_path / "ours")


def test_the_global_generator_is_left_where_peft_leaves_it() -> None:
    front_of(peft, "gpt2", "LoraConfig", target_modules=GPT2)
    expected = torch.rand(3)
    front_of(ours, "gpt2", "LoraConfig", target_modules=GPT2)
    assert torch.equal(torch.rand(3), expected)


def test_the_base_s_own_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    theirs, mine = pair("gpt2", target_modules=GPT2)
    ids = ids_of()
    for model in (theirs, mine):
        model.train()
    assert_same_step(theirs, mine, input_ids=ids, labels=ids)
    torch.manual_seed(0)
    first = mine(input_ids=ids).logits
    assert not torch.equal(first, mine(input_ids=ids).logits)
    mine.eval()
    assert torch.equal(mine(input_ids=ids).logits, mine(input_ids=ids).logits)


def test_a_model_keeps_its_mode_and_its_attention() -> None:
    for training in (True, False):
        model = model_of("gpt2").train(training)
        model.transformer.h[0].eval()
        attention = model.config._attn_implementation
        modes = {name: module.training for name, module in model.named_modules()}
        front = ours.get_peft_model(model, ours.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        front.add_adapter("b", ours.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        after = {name: module.training for name, module in model.named_modules()}
        assert all(after[name] == mode for name, mode in modes.items() if name in after)
        assert model.config._attn_implementation == attention


def test_lora_dropout_is_drawn_from_the_global_generator_anew_in_every_training_step() -> None:
    mine = front_of(ours, "llama", "LoraConfig", lora_dropout=0.5, r=4)
    fill_(mine)
    ids = ids_of(4, 20)
    mine.eval()
    whole = mine(input_ids=ids).logits
    with mine.disable_adapter():
        base = mine(input_ids=ids).logits
    mine.train()
    torch.manual_seed(0)
    first, second = mine(input_ids=ids).logits, mine(input_ids=ids).logits
    torch.manual_seed(0)
    assert torch.equal(mine(input_ids=ids).logits, first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, whole)
    assert torch.equal(mine.eval()(input_ids=ids).logits, whole)
    layer = next(m for m in mine.modules() if isinstance(m, AdaptedLayer))
    x = torch.ones(1, 1, 32)
    with torch.no_grad():
        exact = mine.eval().get_base_model() and layer(x) - layer.base_layer(x)
        mine.train()
        draws = []
        for _ in range(2000):
            mine._active.renew(mine.get_base_model(), ())
            draws.append(layer(x) - layer.base_layer(x))
    spread = torch.stack(draws).std(0) / 2000**0.5
    assert ((torch.stack(draws).mean(0) - exact).abs() <= 5 * spread).all()
    assert not torch.equal(base, whole)


def test_two_adapters_are_switched_trained_and_mixed_alike() -> None:
    models = pair("llama", target_modules=["q_proj", "v_proj"], r=4)
    ids = ids_of()
    for lib, model in zip((peft, ours), models, strict=True):
        fill_(model)
        torch.manual_seed(9)
        model.add_adapter("b", lib.LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
        assert model.active_adapter == "default"
        assert list(model.active_adapters) == ["default"]
        assert not any(".b." in name for name in trained(model))
    theirs, mine = models
    torch.testing.assert_close(mine(input_ids=ids).logits, theirs(input_ids=ids).logits, **CLOSE)
    for model in models:
        model.set_adapter("b")
        assert all(".b." in name for name in trained(model))
        fill_(model, seed=2)
    assert_same_step(theirs, mine, input_ids=ids, labels=ids)
    for model in models:
        model.eval()
    names = ["b", "default", "__base__"]
    rows = ids_of(3)
    torch.testing.assert_close(
        mine(input_ids=rows, adapter_names=names).logits, theirs(input_ids=rows, adapter_names=names).logits, **CLOSE
    )
    generated = [m.generate(rows, adapter_names=names, max_new_tokens=5, do_sample=False) for m in models]
    assert torch.equal(*generated)
    assert torch.equal(mine.get_base_model()(input_ids=rows).logits, mine(input_ids=rows).logits)


def test_disable_adapter_is_the_base_to_the_bit_and_comes_back() -> None:
    prompt: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    for kind, fields in (("LoraConfig", {}), ("PromptTuningConfig", prompt)):
        mine, ids = front_of(ours, "llama", kind, **fields), ids_of()
        fill_(mine)
        before = mine(input_ids=ids).logits
        plain = model_of("llama")(input_ids=ids).logits
        with mine.disable_adapter():
            assert torch.equal(mine(input_ids=ids).logits, plain)
            with mine.disable_adapter():
                pass
            assert torch.equal(mine(input_ids=ids).logits, plain)
        assert torch.equal(mine(input_ids=ids).logits, before)
        assert before.shape != plain.shape or not torch.equal(before, plain)


def test_merging_equals_peft_and_unmerging_restores_every_byte() -> None:
    theirs, mine = pair("gpt2", target_modules=GPT2)
    fill_(theirs, mine)
    ids = ids_of()
    before = {name: tensor.clone() for name, tensor in mine.get_base_model().state_dict().items()}
    apart = mine(input_ids=ids).logits
    for model in (theirs, mine):
        model.merge_adapter()
    torch.testing.assert_close(mine(input_ids=ids).logits, theirs(input_ids=ids).logits, **CLOSE)
    torch.testing.assert_close(mine(input_ids=ids).logits, apart, **CLOSE)
    merged = mine.get_base_model().state_dict()
    assert any(not torch.equal(merged[name], tensor) for name, tensor in before.items())
    for name, tensor in theirs.get_base_model().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, **CLOSE)
    mine.unmerge_adapter()
    after = mine.get_base_model().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(mine(input_ids=ids).logits, apart)
    mine.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged first"), mine.disable_adapter():
        assert torch.equal(mine(input_ids=ids).logits, model_of("gpt2")(input_ids=ids).logits)


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
def test_unloading_returns_the_user_s_own_plain_model(verb: str) -> None:
    theirs, mine = pair("gpt2", target_modules=GPT2)
    fill_(theirs, mine)
    ids = ids_of()
    own = mine.get_base_model()
    expected, plain = getattr(theirs, verb)(), getattr(mine, verb)()
    assert plain is own
    assert type(plain) is type(expected)
    assert not any(isinstance(module, AdaptedLayer) for module in plain.modules())
    state, other = plain.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    for name, tensor in other.items():
        torch.testing.assert_close(state[name], tensor, **CLOSE)
    torch.testing.assert_close(plain(input_ids=ids).logits, expected(input_ids=ids).logits, **CLOSE)
    again = ours.get_peft_model(plain, ours.LoraConfig(target_modules=["c_attn"]))
    assert torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_an_adapter_is_deleted_with_all_that_was_held_of_it() -> None:
    theirs, mine = pair("llama")
    for lib, model in ((peft, theirs), (ours, mine)):
        model.add_adapter("b", lib.LoraConfig(target_modules=["q_proj", "o_proj"]))
        with pytest.warns(UserWarning, match="active"):
            model.delete_adapter("default")
        assert list(model.active_adapters) == ["b"]
        assert [*model.peft_config] == ["b"]
    assert {name for name in theirs.state_dict() if "lora" in name} == {n for n in mine.state_dict() if "lora" in n}
    mine.delete_adapter("b")
    assert mine.active_adapters == []
    assert {*mine.get_base_model().state_dict()} == {*model_of("llama").state_dict()}
    ids = ids_of()
    assert torch.equal(mine(input_ids=ids).logits, model_of("llama")(input_ids=ids).logits)


@pytest.mark.parametrize("case", ["prompt", "prefix", "gpt2"])
def test_generation_writes_the_same_tokens_with_beams_too(case: str) -> None:
    name, kind, fields = EVERY[case]
    theirs, mine = pair(name, kind, task_type="CAUSAL_LM", **fields)
    fill_(theirs, mine)
    ids = ids_of(3, 6)
    mask = torch.ones_like(ids)
    for more in ({}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
        given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **more}
        expected, found = (quietly(partial(m.generate, ids, **given)) for m in (theirs, mine))
        assert torch.equal(found, expected), more
    longer, padded = torch.nn.functional.pad(ids[:1], (2, 0)), torch.nn.functional.pad(mask[:1], (2, 0))
    alone = mine.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    beside = mine.generate(
        torch.cat([longer, ids_of(1, 8)]), attention_mask=torch.cat([padded, torch.ones_like(longer)]),
        max_new_tokens=6, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(beside[0, 2 : 2 + alone.shape[1]], alone[0])
