"""Every public name of PEFT's: it is here, and means what it means there, or its import says why not and what to use."""

import json

import peft
import pytest
import torch
import transformers

import onebase.peft as ours
from onebase.errors import ConfigError, FileFormatError
from onebase.peft.absent import ABSENT
from tests.peft.pairs import CLOSE, front_of, ids_of, model_of, quietly, trained
from tests.peft.test_auto import TASKS

FRONTS = [name for name in peft.__all__ if name.startswith("PeftModelFor")]


def test_every_name_is_here_or_says_what_to_use_instead() -> None:
    assert set(ours.__all__) | set(ABSENT) == set(peft.__all__)
    assert not set(ours.__all__) & set(ABSENT)
    for name in ABSENT:
        with pytest.raises(ImportError, match=rf"^onebase.peft: {name} .*(Use|Keep)"):
            getattr(ours, name)
    with pytest.raises(ImportError, match="LoraModel is of the classes"):
        from onebase.peft import LoraModel  # noqa: F401
    for name in ours.__all__:
        assert getattr(ours, name) is not None
    assert not hasattr(ours, "LoraConfg")


@pytest.mark.parametrize("name", FRONTS)
def test_a_task_has_its_class_whoever_makes_the_model(name, tmp_path) -> None:
    task = getattr(ours, name).task
    assert peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__ == name
    _, class_name, base, _ = TASKS[name.removeprefix("PeftModelFor")]
    fresh = lambda: getattr(transformers, class_name)(model_of(base).config)  # noqa: E731
    front = quietly(lambda: ours.get_peft_model(fresh(), ours.LoraConfig(task_type=task)))
    assert [found for found in FRONTS if isinstance(front, getattr(ours, found))] == [name]
    front.save_pretrained(tmp_path)
    for kind in (ours.PeftModel, getattr(ours, name)):
        again = quietly(lambda kind=kind: kind.from_pretrained(fresh(), tmp_path))
        assert type(again) is getattr(ours, name)


def test_a_class_made_by_hand_trains_the_head_of_its_task_as_in_peft() -> None:
    found = []
    for lib in (peft, ours):
        model = model_of("bert", num_labels=3)
        torch.manual_seed(0)
        front = quietly(lambda m=model, lib=lib: lib.PeftModelForSequenceClassification(m, lib.LoraConfig(r=2)))
        found.append([*trained(front)])
    assert found[0] == found[1]
    assert any("classifier" in name for name in found[1])


def test_a_configuration_comes_out_of_a_mapping() -> None:
    for kind, more in (("LoraConfig", {"r": 3}), ("PromptTuningConfig", {"num_virtual_tokens": 3})):
        stored = json.loads(json.dumps(getattr(peft, kind)(**more).to_dict(), default=list))
        stored.pop("runtime_config", None)
        assert ours.get_peft_config(stored).to_dict() == peft.get_peft_config(stored).to_dict() | {
            key: value for key, value in ours.get_peft_config(stored).to_dict().items() if key == "runtime_config"
        }
    with pytest.raises(ConfigError, match=r"peft_type must be one of LORA, .*got 'LOHA'"):
        ours.get_peft_config({"peft_type": "LOHA"})


def test_an_adapter_s_tensors_are_read_as_peft_reads_them(tmp_path) -> None:
    front_of(ours, "gpt2", "LoraConfig").save_pretrained(tmp_path)
    expected = peft.load_peft_weights(str(tmp_path), device="cpu")
    found = ours.load_peft_weights(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"adapter_model\.safetensors: the file is missing"):
        ours.load_peft_weights(tmp_path)


def test_casting_and_preparing_make_the_dtypes_that_peft_s_make() -> None:
    results = []
    for lib in (peft, ours):
        front = front_of(lib, "gpt2", "LoraConfig", task_type="CAUSAL_LM")
        lib.cast_mixed_precision_params(front, torch.bfloat16)
        dtypes = {name: (p.dtype, p.requires_grad) for name, p in front.named_parameters()}
        front.eval()
        prepared = lib.prepare_model_for_kbit_training(model_of("gpt2").bfloat16())
        states = {name: (p.dtype, p.requires_grad) for name, p in prepared.named_parameters()}
        results.append((dtypes, front(input_ids=ids_of()).logits, states, prepared(input_ids=ids_of()).logits))
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[1][3], results[0][3], **CLOSE)
    prepared.is_quantized = True
    with pytest.raises(ConfigError, match=r"a quantised GPT2LMHeadModel is not taken by onebase\.peft\. Open it"):
        ours.prepare_model_for_kbit_training(prepared)
