"""What is checked and put right when an adapter of PEFT's meets its base: paths, copies of weights, heads, methods."""

import json
import shutil
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import METHODS, Ia3, Lora
from onebase.config.reading import settings_from
from onebase.errors import ConfigError, FileFormatError, TargetError
from onebase.files.peft_format import read_adapter
from onebase.train import saving
from onebase.train.opening import put_on
from onebase.train.run import add_adapter
from tests import tiny
from tests.train import runs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TEXT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def base_on(model: Any) -> Base:
    return Base(model.eval().requires_grad_(False), None, name="tiny", folder=None, fingerprint="0" * 64)


def llava(**experts: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = (
            transformers.MixtralConfig(**TEXT, num_key_value_heads=4, **experts)
            if experts
            else transformers.LlamaConfig(**TEXT)
        )
        vision = transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
        return transformers.LlavaForConditionalGeneration(config)


def classifier() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)
        )


def change(folder: Any, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Any, *pairs: tuple[str, str]) -> None:
    """Replace the beginnings of the keys in a tensor file."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in pairs:
        tensors = {
            "base_model.model." + new + key.removeprefix("base_model.model." + old)
            if key.startswith("base_model.model." + old)
            else key: tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, path)


def test_an_adapter_from_before_transformers_5_goes_where_its_modules_are_now(tmp_path):
    bank = Bank(base_on(llava()))
    adapter = bank.add("one", Lora(r=2, target_modules=["q_proj", "down_proj"]))
    tiny.fill_(adapter)
    saving.write(tmp_path, bank.base, adapter, task="chat")
    rename(
        tmp_path,
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    )
    stored = read_adapter(tmp_path)
    assert not [name for name in stored.tensors if name.startswith("model.")]
    _, opened = put_on(base_on(llava()), stored)
    assert {name: tensor.tolist() for name, tensor in opened.state.items()} == {
        name: tensor.tolist() for name, tensor in adapter.state.items()
    }


OLD, NOW = "language_model.model.", "model.language_model."
LAYER, MOE = f"{OLD}layers.0.self_attn.", {"num_local_experts": 2}
ELSEWHERE: dict[str, tuple[dict[str, int], Any, dict[str, Any]]] = {  # what else a file says of modules, by old names
    "feed-forward layers": (
        {},
        Ia3(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"feedforward_modules": [f"{OLD}layers.0.mlp.down_proj"]},
    ),
    "patterns": (
        {},
        Lora(
            r=2,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={r"language_model\..*q_proj": 3},
            alpha_pattern={r"language_model\..*v_proj": 8},
        ),
        {"rank_pattern": {f"{LAYER}q_proj": 3}, "alpha_pattern": {r"language_model\.model.*v_proj": 8}},
    ),
    "rows of tokens": (
        {},
        Lora(r=2, target_modules=["q_proj"], trainable_token_indices={"language_model.embed_tokens": [3, 5]}),
        {"trainable_token_indices": {f"{OLD}embed_tokens": [3, 5]}},
    ),
    "biases": ({}, Lora(r=2, target_modules=["q_proj"], bias="all"), {}),
    "whole modules": ({}, Lora(r=2, target_modules=["q_proj"], modules_to_save=["language_model.norm"]), {}),
    "bare parameters": (
        MOE,
        Lora(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]),
        {"target_parameters": [f"{OLD}layers.0.mlp.experts.down_proj", "experts.gate_up_proj"]},
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_old_names_are_understood_wherever_a_file_has_them(tmp_path, case):
    experts, settings, fields = ELSEWHERE[case]
    bank = Bank(base_on(llava(**experts)))
    adapter = tiny.fill_(bank.add("one", settings))
    saving.write(tmp_path, bank.base, adapter, task="chat")
    rename(tmp_path, (NOW, OLD), ("model.vision_tower.", "vision_tower.vision_model."))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    old = saved and [name.replace("model.language_model", "language_model.model") for name in saved]
    change(tmp_path, **fields, modules_to_save=old)
    stored = read_adapter(tmp_path)
    other, opened = put_on(base_on(llava(**experts)), stored)
    assert {name: tensor.tolist() for name, tensor in opened.state.items()} == {
        name: tensor.tolist() for name, tensor in adapter.state.items()
    }
    text = torch.arange(3, 9)[None]
    with bank.base.native(bank.sole_route("one")) as model:
        wanted = model(input_ids=text).logits
    with other.base.native(other.sole_route(opened.name)) as model:
        assert torch.equal(model(input_ids=text).logits, wanted)


def test_modules_that_this_base_never_had_are_named(tmp_path):
    bank = Bank(tiny.base_of("llama"))
    adapter = bank.add("one", Lora(r=2, target_modules=["q_proj"]))
    saving.write(tmp_path, bank.base, adapter, task="chat")
    rename(tmp_path, ("model.layers.1.", "model.layers.7."))
    with pytest.raises(TargetError, match=r"model\.layers\.7\.self_attn\.q_proj"):
        put_on(tiny.base_of("llama"), read_adapter(tmp_path))


@pytest.mark.parametrize("spoil", [lambda w: w.add_(0.1), lambda w: torch.cat([w, w[:3]])])
def test_a_weight_of_the_base_beside_the_adapter_must_be_the_bases(tmp_path, spoil):
    model = tiny.model_of("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    put_on(tiny.base_of("llama"), read_adapter(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path, key = tmp_path / "b" / "adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(path)
    save_file(tensors | {key: spoil(tensors[key].clone())}, path)
    with pytest.raises(FileFormatError, match=r"holds model\.embed_tokens\.weight \(6[14], 32\) beside the adapter"):
        put_on(tiny.base_of("llama"), read_adapter(tmp_path / "b"))


def test_the_head_of_a_classifier_is_read_though_nobody_asked_peft_to_save_it(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(classifier(), config)
    wrapped.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    assert isinstance(stored.settings, Lora) and stored.settings.modules_to_save == ["score"]
    assert stored.tensors["score.weight"].shape == (3, 32)
    assert not [note for note in stored.notes if "task_type" in note]


def test_a_warm_start_from_another_method_is_refused(tmp_path):
    shop = runs.workshop(tmp_path)
    with runs.own_home(tmp_path / "home"):
        bank = Bank(tiny.base_of("llama"))
        saving.write(tmp_path / "old", bank.base, bank.add("one", Ia3()), task="chat")
        change(tmp_path / "old", base_model_name_or_path=str(shop.model))
        (tmp_path / "old" / "onebase.json").unlink()
        settings = shop.settings(adapter={"init_from": str(tmp_path / "old")}, train={"steps": 1})
        with pytest.raises(ConfigError, match=r"is an adapter of ia3, these settings are of lora.*method: ia3"):
            runs.run(settings, tmp_path / "run")


EXPERTS = {"method": "lora", "r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["experts.down_proj"]}
RELU = {"method": "bottleneck", "reduction_factor": 4, "non_linearity": "relu"}
OTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # model, trained under, started under, refusal
    "lora_alpha of experts": ("mixtral", EXPERTS, {"lora_alpha": 8}, r"scaling 2 on .*experts\.down_proj.* give 4\."),
    "rslora of experts": ("mixtral", EXPERTS, {"use_rslora": True}, r"scaling 2 on .*Set .*use_rslora: false"),
    "non_linearity": ("llama", RELU, {"non_linearity": "gelu"}, r"non_linearity relu, .* have gelu\. Set .*: relu"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_warm_start_under_settings_that_make_the_weights_another_function_is_refused(tmp_path, case):
    name, trained, changed, refusal = OTHER[case]
    bank = Bank(tiny.base_of(name))
    old = tiny.fill_(bank.add("old", METHODS[trained["method"]](**trained)))
    saving.write(tmp_path, bank.base, old, task="chat")

    def started(adapter: dict[str, Any]) -> Any:
        (tmp_path / "rows.jsonl").touch()
        values = {"model": "tiny", "data": {"train": str(tmp_path / "rows.jsonl")}}
        settings = settings_from(values | {"adapter": adapter | {"init_from": str(tmp_path)}})
        return add_adapter(Bank(tiny.base_of(name)), settings.resolved())

    with pytest.raises(ConfigError, match=f"adapter.init_from: .*{refusal}"):
        started(trained | changed)
    assert all(torch.equal(tensor, old.state[key]) for key, tensor in started(trained).state.items())
