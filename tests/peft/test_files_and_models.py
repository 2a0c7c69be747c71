"""Files both ways, heads of tasks, counts, copies, half precision, and models of every make: as with PEFT."""

import copy
import json
import warnings
from functools import partial
from typing import Any

import peft
import pytest
import torch

import onebase.peft as ours
from onebase.errors import FileFormatError
from tests import tiny
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


@pytest.mark.parametrize("writer", [peft, ours])
def test_each_loads_what_the_other_saved_default_in_the_folder_and_others_inside(writer, tmp_path) -> None:
    saved = front_of(writer, "gpt2", "LoraConfig", target_modules=GPT2, r=3)
    saved.add_adapter("b", writer.LoraConfig(target_modules=["c_attn"], r=2))
    fill_(saved)
    saved.set_adapter("b")
    fill_(saved, seed=8)
    saved.save_pretrained(tmp_path)
    saved.eval()
    ids = ids_of()
    for lib in (peft, ours):
        front = lib.PeftModel.from_pretrained(model_of("gpt2").train(), tmp_path)
        front.load_adapter(tmp_path / "b", "b")
        assert not front.training
        assert not front.get_base_model().training
        assert trained(front) == {}
        for name in ("default", "b"):
            front.set_adapter(name)
            saved.set_adapter(name)
            torch.testing.assert_close(front(input_ids=ids).logits, saved(input_ids=ids).logits, **CLOSE)
        trainable = lib.PeftModel.from_pretrained(model_of("gpt2"), tmp_path / "b", is_trainable=True)
        assert len(trained(trainable)) == 4
        config = lib.PeftConfig.from_pretrained(tmp_path)
        assert (config.r, config.peft_type, sorted(config.target_modules)) == (3, "LORA", GPT2)


def test_state_dicts_of_an_adapter_are_peft_s_and_are_set_again() -> None:
    theirs, mine = pair("llama")
    fill_(theirs, mine)
    expected, found = peft.get_peft_model_state_dict(theirs), ours.get_peft_model_state_dict(mine)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    fresh = front_of(ours, "llama", "LoraConfig")
    ours.set_peft_model_state_dict(fresh, expected)
    ids = ids_of()
    assert torch.equal(fresh(input_ids=ids).logits, mine(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_a_classifier_s_head_is_trained_and_saved_without_being_asked_for(name: str, tmp_path) -> None:
    fields: dict[str, Any] = {
        "task_type": "SEQ_CLS",
        "target_modules": "all-linear",
        "r": 4,
        "changes": {"num_labels": 3},
    }
    theirs, mine = pair(name, **fields)
    assert any("modules_to_save.default" in key for key in trained(mine))
    ids = ids_of(4)
    assert_same_step(
        theirs, mine, input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 2, 1, 1])
    )
    fill_(theirs, mine)
    for model, folder in ((theirs, tmp_path / "peft"), (mine, tmp_path / "ours")):
        model.save_pretrained(folder)
    assert_same_files(tmp_path / "peft", tmp_path / "ours")
    again = ours.PeftModel.from_pretrained(model_of(name, num_labels=3), tmp_path / "peft")
    torch.testing.assert_close(again(input_ids=ids).logits, theirs(input_ids=ids).logits, **CLOSE)


def test_gradient_checkpointing_changes_nothing_and_keeps_the_adapter_of_the_forward() -> None:
    ids = ids_of()
    grads = []
    for checkpointed in (False, True):
        mine = front_of(ours, "llama", "LoraConfig")
        fill_(mine)
        mine.add_adapter("b", ours.LoraConfig(r=2))
        mine.train()
        if checkpointed:
            mine.enable_input_require_grads()
            mine.gradient_checkpointing_enable()
        loss = mine(input_ids=ids, labels=ids).loss
        if checkpointed:
            mine._active.name = "b"
            mine._active.settle()
        loss.backward()
        grads.append({name: p.grad for name, p in mine.named_parameters() if ".default." in name})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())


def test_counts_are_peft_s(capsys) -> None:
    printed = []
    for model in pair("gpt2", target_modules=GPT2):
        assert model.num_parameters(only_trainable=True) == model.get_nb_trainable_parameters()[0] == 5632
        model.print_trainable_parameters()
        printed.append((capsys.readouterr().out, model.get_nb_trainable_parameters()))
    assert printed[0] == printed[1]


def test_gpt2_small_with_rank_8_on_c_attn_and_c_proj_trains_811008_parameters() -> None:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    front = ours.get_peft_model(model, ours.LoraConfig(task_type="CAUSAL_LM", target_modules=GPT2))
    assert front.num_parameters(only_trainable=True) == 811_008
    assert front.get_nb_trainable_parameters() == (811_008, 124_439_808 + 811_008)


def test_moving_a_model_moves_its_adapters() -> None:
    mine, ids = front_of(ours, "llama", "LoraConfig"), ids_of()
    fill_(mine)
    before = mine(input_ids=ids).logits
    mine.double()
    assert {p.dtype for p in mine.parameters()} == {torch.float64}
    torch.testing.assert_close(mine(input_ids=ids).logits.float(), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("names", [["default", "b"], ["b", "b"]], ids=" and ".join)
def test_weighted_adapters_are_peft_s(names: list[str]) -> None:
    models = pair("llama")
    for lib, model in zip((peft, ours), models, strict=True):
        fill_(model)
        torch.manual_seed(2)
        model.add_adapter("b", lib.LoraConfig())
        model.set_adapter("b")
        fill_(model, seed=4)
        model.add_weighted_adapter(names, [0.7, -0.3], "both", combination_type="cat")
        model.set_adapter("both")
    theirs, mine = (model(input_ids=ids_of()).logits for model in models)
    torch.testing.assert_close(mine, theirs, **CLOSE)


def test_a_configuration_written_is_the_one_read(tmp_path) -> None:
    for kind, fields in (
        ("LoraConfig", {"r": 3, "target_modules": ["a", "b"]}),
        ("IA3Config", {"target_modules": ["a"]}),
    ):
        for lib in (peft, ours):
            getattr(lib, kind)(**fields).save_pretrained(tmp_path / lib.__name__)
        texts = [json.loads((tmp_path / lib.__name__ / "adapter_config.json").read_text()) for lib in (peft, ours)]
        for text in texts:
            text["target_modules"].sort()
        assert texts[0] == texts[1]


def test_forwarded_attributes_are_the_model_s_own() -> None:
    model = model_of("gpt2")
    front = ours.get_peft_model(model, ours.LoraConfig(target_modules=GPT2))
    assert front.config is model.config
    assert front.base_model.model is model
    assert front.transformer is model.transformer
    with pytest.raises(AttributeError, match="nothing_there"):
        front.nothing_there  # noqa: B018
    assert isinstance(front, ours.PeftModel)


def test_nothing_is_warned_about_where_peft_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        front = ours.get_peft_model(model_of("llama"), ours.LoraConfig(target_modules=["q_proj"]))
    assert front.active_adapters == ["default"]


def test_a_copy_of_a_model_is_apart() -> None:
    mine, ids = front_of(ours, "llama", "LoraConfig"), ids_of()
    fill_(mine)
    before = mine(input_ids=ids).logits
    other = copy.deepcopy(mine)
    assert torch.equal(other(input_ids=ids).logits, before)
    for parameter in trained(other).values():
        parameter.data.zero_()
    assert torch.equal(mine(input_ids=ids).logits, before)
    with mine.disable_adapter():
        assert torch.equal(other(input_ids=ids).logits, mine(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
        ("vit", {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}),
        ("plain", {"target_modules": ["first", "along", "linear"], "r": 4}),
    ],
)
def test_models_of_two_stacks_of_images_and_of_nobody_s_making_are_adapted_alike(name, fields, tmp_path) -> None:
    theirs, mine = pair(name, **fields)
    fill_(theirs, mine)
    inputs = tiny.native_inputs(name, 3)
    for model in (theirs, mine):
        out = model(inputs["images"]) if name == "plain" else model(**inputs)
        (out if name == "plain" else out.logits).square().sum().backward()
        model.save_pretrained(tmp_path / type(model).__module__.partition(".")[0])
    assert_same_files(tmp_path / "peft", tmp_path / "onebase")
    for key, parameter in trained(theirs).items():
        expected = parameter.grad
        assert expected is not None
        torch.testing.assert_close(
            trained(mine)[key].grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"target_modules": ["embed_tokens", "q_proj"]}, "auto"), ({"target_modules": ["q_proj"]}, True), ({}, "auto")],
    ids=str,
)
def test_embeddings_of_the_base_are_saved_where_peft_saves_them(fields, wanted, tmp_path) -> None:
    for lib in (peft, ours):
        front = front_of(lib, "llama", "LoraConfig", **fields)
        quietly(partial(front.save_pretrained, tmp_path / lib.__name__, save_embedding_layers=wanted))
    assert_same_files(tmp_path / "peft", tmp_path / "onebase.peft")
    assert ours.PeftModel.from_pretrained(model_of("llama"), tmp_path / "onebase.peft").active_adapter == "default"


def test_half_precision_is_peft_s_to_its_precision() -> None:
    found = []
    for lib in (peft, ours):
        front = front_of(lib, "llama", "LoraConfig", changes={"dtype": torch.bfloat16})
        fill_(front)
        assert {p.dtype for p in trained(front).values()} == {torch.float32}
        found.append(front(input_ids=ids_of(), labels=ids_of()))
    assert found[1].logits.dtype == found[0].logits.dtype
    largest = float(found[0].logits.detach().abs().max())
    torch.testing.assert_close(found[1].logits, found[0].logits, rtol=0, atol=4 * 2**-8 * largest)
    torch.testing.assert_close(found[1].loss, found[0].loss, rtol=2**-7, atol=0)


def test_an_adapter_of_onebase_train_opens_on_the_model_of_its_folder_and_on_no_other(tmp_path, monkeypatch) -> None:
    import transformers

    monkeypatch.setattr("onebase.base.model.use_kernels", lambda: "both compute as torch does")

    import onebase as ob

    model_of("llama").save_pretrained(tmp_path / "model")
    model_of("llama", seed=1).save_pretrained(tmp_path / "other")
    bank = ob.Bank(ob.load(str(tmp_path / "model"), dtype="float32"))
    tiny.fill_(bank.add("a", ob.Lora(r=3)))
    folder, ids = bank.save("a", tmp_path / "a"), ids_of()
    open_model = transformers.AutoModelForCausalLM.from_pretrained
    front = ours.PeftModel.from_pretrained(open_model(tmp_path / "model"), folder)
    with bank.base.native(bank.routed.sole_route("a")) as model:
        torch.testing.assert_close(front(input_ids=ids).logits, model(input_ids=ids).logits, **CLOSE)
    auto = ours.AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert torch.equal(auto(input_ids=ids).logits, front(input_ids=ids).logits)
    with pytest.raises(FileFormatError, match="was trained on"):
        ours.PeftModel.from_pretrained(open_model(tmp_path / "other"), folder)
    with pytest.warns(UserWarning, match="does not say which weights it has"):
        ours.PeftModel.from_pretrained(model_of("llama"), folder)


VIRTUAL: dict[str, Any] = {
    "prompt": ("PromptTuningConfig", {}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected prefix": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}


@pytest.mark.parametrize("case", VIRTUAL)
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_a_classifier_learns_virtual_tokens_and_its_head_alike(name: str, case: str, tmp_path) -> None:
    kind, more = VIRTUAL[case]
    fields = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3, **more}
    theirs, mine = pair(name, kind, changes={"num_labels": 3}, **fields)
    ids = ids_of(4)
    mask = torch.ones_like(ids)
    if case != "prompt":  # with a prompt, PEFT and transformers take a decoder's last column, padding or not
        mask[1, 4:], ids[1, 4:] = 0, int(name == "roberta")
    given = {"attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}
    given |= {"token_type_ids": torch.ones_like(ids)} if name == "bert" else {}
    for _ in range(2):
        assert_same_step(theirs, mine, input_ids=ids, **given)
        fill_(theirs, mine)
    for model in (theirs, mine):
        model.save_pretrained(tmp_path / type(model).__module__.partition(".")[0])
    assert_same_files(tmp_path / "peft", tmp_path / "onebase")
    seen = {"input_ids": ids, "attention_mask": mask}
    for lib, folder in ((ours, "peft"), (peft, "onebase")):
        again = quietly(partial(lib.PeftModel.from_pretrained, model_of(name, num_labels=3), tmp_path / folder))
        torch.testing.assert_close(again(**seen).logits, mine.eval()(**seen).logits, **CLOSE)


def test_what_has_no_effect_when_an_adapter_is_loaded_is_said(tmp_path) -> None:
    front_of(ours, "llama", "LoraConfig").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="torch_device has no effect"):
        front = ours.PeftModel.from_pretrained(model_of("llama"), tmp_path, torch_device="cpu")
    assert front.active_adapter == "default"
