"""Calls that scripts written for PEFT make besides training: their arguments, what they return, what they look up."""

import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import onebase.peft as ours
from onebase.errors import ConfigError, FileFormatError
from tests.peft.pairs import (
    CLOSE,
    GPT2,
    assert_same_files,
    fill_,
    front_of,
    ids_of,
    model_of,
    pair,
    quietly,
    trained,
)

BOTH = pytest.mark.parametrize("lib", [peft, ours], ids=["peft", "ours"])


def two(lib: Any) -> Any:
    """Return a model with adapters "default" and "b", both filled, "default" active."""
    model = front_of(lib, "gpt2", "LoraConfig", target_modules=GPT2)
    fill_(model)
    torch.manual_seed(4)
    quietly(lambda: model.add_adapter("b", lib.LoraConfig(target_modules=GPT2, r=3, init_lora_weights=False)))
    return model.eval()


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "merged, asked of base_model": lambda model, _: model.base_model.merge_and_unload()(input_ids=ids_of()).logits,
    "merged with every argument": lambda model, _: (
        model.merge_and_unload(False, safe_merge=True, adapter_names=["b"])(input_ids=ids_of()).logits
    ),
    "merged in place": lambda model, _: (
        model.merge_adapter(adapter_names=["b"], safe_merge=True),
        model(input_ids=ids_of()).logits,
    ),
    "merged in place, then for good": lambda model, _: (
        model.merge_adapter(["b"]),
        model.merge_and_unload(safe_merge=True)(input_ids=ids_of()).logits,
    ),
    "merged one after the other": lambda model, _: (
        model.merge_adapter(["b"]),
        model.merge_adapter(),
        model(input_ids=ids_of()).logits,
    ),
    "switched by base_model": lambda model, _: (
        model.base_model.set_adapter("b"),
        model.active_adapters,
        sorted(trained(model)),
        model(input_ids=ids_of()).logits,
    ),
    "off and on": lambda model, _: (
        model.base_model.disable_adapter_layers(),
        model(input_ids=ids_of()).logits,
        model.enable_adapter_layers(),
        model(input_ids=ids_of()).logits,
    ),
    "requiring gradients": lambda model, _: (
        model.set_requires_grad("b"),
        sorted(trained(model)),
        model.set_requires_grad(["default", "b"], requires_grad=False),
        sorted(trained(model)),
    ),
    "the active one deleted": lambda model, lib: (
        model.add_adapter("c", lib.LoraConfig(target_modules=GPT2)),
        model.set_adapter("c"),
        model.delete_adapter("c"),
        model.active_adapters,
        model(input_ids=ids_of()).logits,
    ),
    "a state dict gathered elsewhere": lambda model, lib: sorted(
        lib.get_peft_model_state_dict(model, {k: v + 1 for k, v in model.state_dict().items()}, "b").items()
    ),
    "layers looked up": lambda model, _: [
        (sorted(layer.lora_A.keys()), layer.lora_A["b"].weight, "default" in layer.lora_B, "c" in layer.lora_B)
        for layer in [block.attn.c_attn for block in model.base_model.model.transformer.h]
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_does_what_it_does_in_peft(name: str) -> None:
    expected, found = (quietly(lambda lib=lib: CALLS[name](two(lib), lib)) for lib in (peft, ours))
    torch.testing.assert_close(*(_plain(result) for result in (found, expected)), **CLOSE)


def _plain(result: Any) -> Any:
    """Return a result with what is no tensor as one of nothing but its text's bytes, so that all can be compared."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, tuple | list):
        return [_plain(one) for one in result]
    return torch.tensor(list(repr(result).encode()))


def test_a_second_adapter_that_names_no_task_trains_a_head_too() -> None:
    found = []
    for lib in (peft, ours):
        model = front_of(lib, "bert", "LoraConfig", task_type="SEQ_CLS", changes={"num_labels": 3})
        torch.manual_seed(2)
        model.add_adapter("b", lib.LoraConfig(r=2, target_modules=["query"]))
        model.set_adapter("b")
        fill_(model)
        found.append([sorted(trained(model)), model(input_ids=ids_of()).logits])
    assert any("classifier.modules_to_save.b" in name for name in found[1][0])
    torch.testing.assert_close(_plain(found[1]), _plain(found[0]), **CLOSE)


def test_a_stored_adapter_without_a_head_is_trained_with_the_model_s_own(tmp_path) -> None:
    with pytest.warns(UserWarning, match="holds no classifier; the model's own is trained"):
        found = _loaded_without_head(ours, tmp_path)
    assert sum("classifier.modules_to_save.default" in name for name in trained(found)) == 2
    base = model_of("bert", num_labels=3)
    assert torch.equal(next(p for n, p in trained(found).items() if "classifier" in n), base.classifier.weight)
    fill_(found)
    expected = found.eval()(input_ids=ids_of()).logits
    found.save_pretrained(tmp_path / "again")
    for lib in (peft, ours):
        again = quietly(
            lambda lib=lib: lib.PeftModel.from_pretrained(model_of("bert", num_labels=3), tmp_path / "again")
        )
        torch.testing.assert_close(again(input_ids=ids_of()).logits, expected, **CLOSE)
    with pytest.raises(KeyError, match="classifier"):
        _loaded_without_head(peft, tmp_path)


def _loaded_without_head(lib: Any, folder: Any) -> Any:
    """Return an adapter for a classifier whose file holds no head, loaded to be trained."""
    model = front_of(peft, "bert", "LoraConfig", target_modules=["query"], changes={"num_labels": 3})
    quietly(lambda: model.save_pretrained(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS", "auto_mapping": None}))
    return lib.PeftModel.from_pretrained(model_of("bert", num_labels=3), folder, is_trainable=True)


def test_a_prefix_is_trained_while_the_model_drops_attention_weights() -> None:
    fields: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    losses: dict[tuple[float, int], list[float]] = {}
    for dropped in (0.0, 0.5):
        changes = {"attn_pdrop": dropped, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        front = front_of(ours, "gpt2", "PrefixTuningConfig", changes=changes, **fields).train()
        fill_(front)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            loss = front(input_ids=ids_of(), labels=ids_of()).loss
            loss.backward()
            losses.setdefault((dropped, seed), []).append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained(front).values())
    assert losses[0.5, 1] == [losses[0.5, 1][0]] * 2
    assert len({losses[0.0, 1][0], losses[0.0, 2][0]}) == 1
    assert len({losses[0.0, 1][0], losses[0.5, 1][0], losses[0.5, 2][0]}) == 3


@BOTH
def test_a_broken_adapter_is_not_merged_safely(lib) -> None:
    model = two(lib)
    next(iter(trained(model).values())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        model.merge_and_unload(safe_merge=True)


def test_after_a_merge_that_was_refused_the_model_is_as_it_was() -> None:
    model = two(ours)
    model.set_adapter("b")
    before = model(input_ids=ids_of()).logits
    broken = next(p for name, p in model.named_parameters() if "default" in name)
    broken.data.fill_(float("inf"))
    with pytest.raises(ConfigError, match=r"c_attn\.weight that are not finite"):
        model.merge_adapter(["default"], safe_merge=True)
    assert torch.equal(model(input_ids=ids_of()).logits, before)


def test_a_merge_that_was_refused_leaves_what_was_merged_before() -> None:
    model = two(ours)
    model.merge_adapter(["b"])
    before = model(input_ids=ids_of()).logits
    broken = next(p for name, p in model.named_parameters() if "default" in name)
    broken.data.fill_(float("inf"))
    with pytest.raises(ConfigError, match="not finite"):
        model.merge_adapter(["default"], safe_merge=True)
    assert torch.equal(model(input_ids=ids_of()).logits, before)
    with pytest.raises(ConfigError, match="run merged"):
        model.eval()(input_ids=ids_of(), adapter_names=["b", "b"])


def test_an_adapter_that_is_added_after_unload_drops_out_anew_in_every_forward() -> None:
    model = two(ours)
    model.unload()
    quietly(lambda: model.add_adapter("c", ours.LoraConfig(target_modules=GPT2, lora_dropout=0.5)))
    model.set_adapter("c")
    fill_(model)
    model.train()
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    first, second = (model(input_ids=ids_of()).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_an_adapter_in_a_folder_inside_is_opened_by_subfolder(tmp_path) -> None:
    model = two(ours)
    model.save_pretrained(tmp_path)
    model.set_adapter("b")
    expected = model(input_ids=ids_of()).logits
    opened = ours.PeftModel.from_pretrained(model_of("gpt2"), tmp_path, subfolder="b")
    assert torch.equal(opened(input_ids=ids_of()).logits, expected)
    beside = front_of(ours, "gpt2", "LoraConfig", target_modules=GPT2)
    beside.load_adapter(tmp_path, "x", subfolder="b")
    beside.set_adapter("x")
    assert torch.equal(beside(input_ids=ids_of()).logits, expected)


def test_a_state_dict_gathered_elsewhere_is_written_and_one_without_the_adapter_refused(tmp_path) -> None:
    for lib, model in zip((peft, ours), pair("llama", task_type="CAUSAL_LM"), strict=True):
        changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        quietly(
            lambda model=model, lib=lib, changed=changed: model.save_pretrained(
                tmp_path / lib.__name__, state_dict=changed
            )
        )
    assert_same_files(tmp_path / "peft", tmp_path / "onebase.peft")
    with pytest.raises(FileFormatError, match=r"state_dict: .*lora_A\.default\.weight is missing"):
        model.save_pretrained(tmp_path / "none", state_dict=model_of("llama").state_dict())
    pissa = front_of(ours, "llama", "LoraConfig", init_lora_weights="pissa")
    with pytest.raises(FileFormatError, match="holds what its tensors make"):
        ours.get_peft_model_state_dict(pissa, pissa.state_dict())


def test_what_neither_has_is_said_to_be_missing_in_both() -> None:
    model = two(ours)
    with pytest.raises(AttributeError, match=r"neither onebase\.peft's PeftModel nor GPT2LMHeadModel has 'get_prompt'"):
        model.get_prompt(2)
    assert not hasattr(model, "get_prompt")
    with pytest.raises(ConfigError, match=r"no adapter \['default', 'b'\]; one at a time"):
        model.set_adapter(["default", "b"])
