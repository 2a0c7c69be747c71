"""An adapter whose file lost tensors is refused, for whatever way of naming its modules; one that lost none opens.

The oracle is peft on the same folder, which reports the keys that it misses.
"""

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase import api
from onebase.adapters.bank import Bank
from onebase.config.methods import Lora
from onebase.errors import FileFormatError
from onebase.files.peft_format import read_adapter
from onebase.train import saving
from onebase.train.opening import put_on
from tests import tiny
from tests.train.test_opening import NOW, OLD, base_on, change, classifier, llava, rename

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q, DOWN, NORM = "layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.input_layernorm"
CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, tuple[Any, str]] = {  # config, the module whose tensors are lost
    "names": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "down_proj"]), Q),
    "an expression": (peft.LoraConfig(**CAUSAL, target_modules=r".*layers\.\d\.(self_attn\.q|mlp\.down)_proj"), Q),
    "every linear layer": (peft.LoraConfig(**CAUSAL, target_modules="all-linear"), DOWN),
    "layers": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]), Q),
    "exclusions": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "k_proj"], exclude_modules=["0.self_attn.q_proj"]), Q),
    "an embedding": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
    "magnitudes": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj"], use_dora=True), Q),
    "token rows": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj"], trainable_token_indices=[3]), Q),
    "whole modules": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj"], modules_to_save=["input_layernorm"]), NORM),
    "a whole module inside": (peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "k_proj"], modules_to_save=["mlp", "0.self_attn"]), Q),
    "IA3": (peft.IA3Config(**CAUSAL, target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), DOWN),
    "LayerNorm tuning": (peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm", "norm"]), NORM),
}  # fmt: skip


def lose(folder: Any, module: str) -> int:
    """Take a module's tensors out of a tensor file and return how many there were."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {key: tensor for key, tensor in tensors.items() if f".{module}." not in key}
    save_file(kept, path)
    return len(tensors) - len(kept)


def missed_by_peft(folder: Any) -> list[str]:
    try:
        model = peft.PeftModel.from_pretrained(tiny.model_of("llama"), folder)
        return [key for key in model.load_adapter(folder, "again").missing_keys if ".again" in key]
    except KeyError as error:  # of a whole module, peft says no more
        return [str(error)]


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_that_lost_a_modules_tensors_is_refused(tmp_path, case):
    config, module = CONFIGS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(tiny.model_of("llama"), config).save_pretrained(tmp_path)
        assert not missed_by_peft(tmp_path)
        put_on(tiny.base_of("llama"), read_adapter(tmp_path))
        assert lose(tmp_path, module)
        assert missed_by_peft(tmp_path)
    with pytest.raises(
        FileFormatError, match=r"1 of them have no tensors: model\." + module.replace(".", r"\.") + r"\."
    ):
        put_on(tiny.base_of("llama"), read_adapter(tmp_path))


def test_the_front_door_counts_what_is_lost_and_says_what_to_do(tmp_path):
    peft.get_peft_model(tiny.model_of("llama"), CONFIGS["every linear layer"][0]).save_pretrained(tmp_path)
    lose(tmp_path, "layers.0.self_attn.q_proj")
    lose(tmp_path, Q)
    change(tmp_path, target_modules="all-linear")  # as other tools leave it
    with pytest.raises(
        FileFormatError, match=r"target_modules .* means 14 modules of .*, but 2 of them .*Get the file"
    ):
        api.Bank(tiny.base_of("llama")).load("one", tmp_path)


def test_modules_that_an_older_transformers_named_are_missed_too(tmp_path):
    bank = Bank(base_on(llava()))
    saving.write(tmp_path, bank.base, tiny.fill_(bank.add("one", Lora(r=2, target_modules=["q_proj"]))), task="chat")
    rename(tmp_path, (NOW, OLD), ("model.vision_tower.", "vision_tower.vision_model."))
    names = [f"{OLD}layers.0.self_attn.q_proj", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"]
    change(tmp_path, target_modules=names)
    put_on(base_on(llava()), read_adapter(tmp_path))
    assert lose(tmp_path, names[0])
    with pytest.raises(FileFormatError, match=r"means 2 modules .* 1 of them .*: model\.language_model\.layers\.0"):
        put_on(base_on(llava()), read_adapter(tmp_path))


def test_names_that_mean_nothing_on_this_base_are_not_asked_for(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    peft.get_peft_model(classifier(), config).save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == {"classifier", "score"}
    change(tmp_path, target_modules=["q_proj", "w1", "language_model.model.layers.0.self_attn.k_proj"])
    put_on(base_on(classifier()), read_adapter(tmp_path))


def test_a_head_that_is_tied_to_a_trained_embedding_needs_no_tensors_of_its_own(tmp_path):
    bank = Bank(tiny.base_of("llama-tied"))
    settings = Lora(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    adapter = tiny.fill_(bank.add("one", settings))
    saving.write(tmp_path, bank.base, adapter, task="chat")
    _, opened = put_on(tiny.base_of("llama-tied"), read_adapter(tmp_path))
    assert all(torch.equal(tensor, adapter.state[name]) for name, tensor in opened.state.items())


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_broken_expression_in_a_config_is_told(tmp_path, name):
    peft.get_peft_model(tiny.model_of("llama"), CONFIGS["layers"][0]).save_pretrained(tmp_path)
    change(tmp_path, **{name: "(q_proj"})
    with pytest.raises(FileFormatError, match=rf"{name}: must be .* got '\(q_proj'"):
        read_adapter(tmp_path)
