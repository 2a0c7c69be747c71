"""Laws of lint: what it says of transformers is what transformers does, every scale is the tool's own, damage is told."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import BitFit, Bottleneck, Full, Ia3, LnTuning, Lora, PrefixTuning, PromptTuning
from onebase.errors import ConfigError, FileFormatError
from onebase.files import tensor_file
from onebase.files.lint import lint
from onebase.files.peft_format import read_adapter
from onebase.files.serving import FACTS, PROPERTIES, TOOLS
from onebase.train import saving
from tests.tiny import fill_, model_of

EVERY: dict[str, Any] = {
    "lora": Lora(r=4, lora_alpha=8),
    "patterns": Lora(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "bias": Lora(r=4, bias="lora_only"),
    "modules_to_save": Lora(r=4, modules_to_save=["lm_head"]),
    "tokens": Lora(r=4, trainable_token_indices=[3, 5]),
    "embedding": Lora(r=4, target_modules=["embed_tokens", "q_proj"]),
    "head": Lora(r=4, target_modules=["lm_head", "q_proj"]),
    "pissa": Lora(r=4, init_lora_weights="pissa"),
    "ia3": Ia3(),
    "ln-tuning": LnTuning(),
    "prompt": PromptTuning(num_virtual_tokens=3, prompt_tuning_init="RANDOM"),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "bitfit": BitFit(),
    "bottleneck": Bottleneck(),
    "full": Full(target_modules=["q_proj"]),
}


def saved(folder: Path, settings: Any, model: Any) -> Path:
    base = Base(copy.deepcopy(model), name="tiny")
    adapter = fill_(Bank(base).add("a", settings))
    saving.write(folder, base, adapter, task="text")
    return folder


def verdicts(folder: Path, *tools: str) -> dict[str, str]:
    return {one.tool: one.verdict for one in lint(folder, tools or TOOLS)}


@pytest.mark.parametrize("name", EVERY)
def test_what_it_says_of_transformers_is_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = model_of("llama", attention_bias=True)
    folder = saved(tmp_path / "a", EVERY[name], model)
    ids = torch.arange(3, 15).view(2, 6)
    loaded = copy.deepcopy(model)
    try:
        loaded.load_adapter(str(folder))
    except (ValueError, KeyError):
        done = "refused"
    else:
        with torch.no_grad():
            same = torch.equal(peft.PeftModel.from_pretrained(model, folder).eval()(ids).logits, loaded(ids).logits)
        done = "loads" if same else "loads wrong"
    assert verdicts(folder, "transformers") == {"transformers": done}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", ("loads", "loads", "loads")),
        ("pissa", ("loads", "loads", "loads")),  # a plain pair of twice the rank in the file
        ("dora", ("refused", "refused", "refused")),
        ("bias", ("refused", "loads wrong", "refused")),
        ("modules_to_save", ("refused", "loads wrong", "refused")),
        ("tokens", ("refused", "loads wrong", "refused")),
        ("ia3", ("refused", "refused", "refused")),
        ("prompt", ("refused", "refused", "refused")),
        ("full", ("refused", "refused", "refused")),
    ],
)
def test_what_it_says_of_servers(name: str, expected: tuple[str, str, str], tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", EVERY[name], model_of("llama", attention_bias=True))
    assert tuple(verdicts(folder, "vllm", "sglang", "llama.cpp").values()) == expected


def small(folder: Path, **changes: Any) -> Path:
    saved(folder, Lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), model_of("llama"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, {"diffusers": (2, 1)}),
        ({"lora_alpha": 4}, {}),
        ({"lora_alpha": 2, "use_rslora": True}, {"sglang": (1, 0.5), "llama.cpp": (1, 0.5)}),
        (
            {"lora_alpha": 4, "alpha_pattern": {"q_proj": 12}},
            {"vllm": (3, 1), "sglang": (3, 1), "llama.cpp": (3, 1), "diffusers": (3, 1)},
        ),
    ],
)
def test_every_tool_is_judged_by_its_own_scale(
    changes: dict[str, Any], wrong: dict[str, tuple[float, float]], tmp_path: Path
) -> None:
    folder = small(tmp_path / "a", task_type=None, **changes)
    found = {one.tool: one for one in lint(folder, TOOLS)}
    for tool, one in found.items():
        assert one.verdict == ("loads wrong" if tool in wrong else "loads"), one
        if tool in wrong:
            right, there = wrong[tool]
            assert f"q_proj by {there:g} instead of {right:g}" in one.reasons[0]
            assert one.todo == f"onebase export {folder} --out FOLDER --portable"


def test_ranks_and_alphas_in_proportion_are_one_scale_to_those_that_take_one(tmp_path: Path) -> None:
    model = model_of("llama")
    settings = Lora(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})
    found = verdicts(saved(tmp_path / "a", settings, model), "vllm", "sglang", "llama.cpp")
    assert found == {"vllm": "loads", "sglang": "loads", "llama.cpp": "loads wrong"}
    settings = settings.model_copy(update={"alpha_pattern": {}})
    found = verdicts(saved(tmp_path / "b", settings, model), "vllm", "sglang", "llama.cpp")
    assert found == {"vllm": "loads wrong", "sglang": "loads wrong", "llama.cpp": "loads"}


@pytest.mark.parametrize(
    ("r", "verdict", "todo"),
    [
        (16, "loads", ""),
        (17, "loads", "--max-lora-rank 32"),
        (300, "loads", "--max-lora-rank 320"),
        (513, "refused", "onebase merge {folder} --out MODEL"),
    ],
)
def test_a_rank_above_the_default_names_the_flag(r: int, verdict: str, todo: str, tmp_path: Path) -> None:
    folder = small(tmp_path / "a", r=r, lora_alpha=r)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {key.format("A"): torch.ones(r, 2), key.format("B"): torch.ones(2, r)}, folder / "adapter_model.safetensors"
    )
    (found,) = lint(folder, ["vllm"])
    assert (found.verdict, found.todo) == (verdict, todo.format(folder=folder))


@pytest.mark.parametrize(
    ("changes", "tool", "verdict"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "vllm", "loads wrong"),
        ({"alora_invocation_tokens": [1]}, "vllm", "loads wrong"),
        ({"target_modules": "model.*[qv]_proj"}, "sglang", "refused"),
        ({"peft_type": "LOKR"}, "llama.cpp", "refused"),
        ({"peft_type": "LOKR"}, "transformers", "loads"),
    ],
)
def test_fields_of_peft_that_onebase_never_writes_are_judged_too(
    changes: dict[str, Any], tool: str, verdict: str, tmp_path: Path
) -> None:
    assert verdicts(small(tmp_path / "a", **changes), tool) == {tool: verdict}


def test_damage_and_unknown_tools_are_told(tmp_path: Path) -> None:
    folder = small(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"--for: must name some of transformers, .* got ollama"):
        lint(folder, ["vllm", "ollama"])
    for field, value, told in (
        ("r", 0, "r must be"),
        ("lora_alpha", math.inf, "lora_alpha must be"),
        ("peft_type", 3, "peft_type must"),
    ):
        with pytest.raises(FileFormatError, match=told):
            lint(small(tmp_path / field, **{field: value}), ["vllm"])
    config = json.loads((small(tmp_path / "rank") / "adapter_config.json").read_text())
    (tmp_path / "rank" / "adapter_config.json").write_text(json.dumps(config | {"r": 3 * config["r"]}))
    with pytest.raises(FileFormatError, match=r"q_proj: lora_A must be \(12, in\) and lora_B \(out, 12\), got \(4"):
        lint(tmp_path / "rank", ["vllm"])
    weights = folder / "adapter_model.safetensors"
    for content in (b"", b"\xff" * 9, weights.read_bytes()[:20]):
        weights.write_bytes(content)
        with pytest.raises(FileFormatError, match="damaged, or no safetensors file"):
            lint(folder, ["vllm"])
    weights.unlink()
    with pytest.raises(FileFormatError, match="the file is missing"):
        lint(folder, ["vllm"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must be an object"),
        ({"target_modules": ["q_proj"]}, r"2 of 4 pairs lie on modules that target_modules .* does not mean"),
        ({"layers_to_transform": [0]}, r"2 of 4 pairs lie on modules that target_modules .* does not mean"),
    ],
)
def test_a_config_that_is_not_the_tensors_is_told_by_lint_and_by_whoever_reads_the_adapter(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = small(tmp_path / "a", **changes)
    with pytest.raises(FileFormatError, match=told):
        lint(folder, ["transformers"])
    with pytest.raises(FileFormatError, match=told.replace(" must", ": must")):
        read_adapter(folder)


def test_a_file_without_all_of_its_tensors_is_told(tmp_path: Path) -> None:
    folder = small(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors, content = load_file(path), path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(FileFormatError, match="damaged, or no safetensors file"):
        lint(folder, ["transformers"])
    for kept, told in (({}, "there is no tensor"), (dict([*tensors.items()][1:]), "has half a pair, lora_B alone")):
        save_file(kept, path)
        with pytest.raises(FileFormatError, match=told):
            lint(folder, ["transformers"])


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_told_with_their_tensor(
    name: str, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    folder = small(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert verdicts(folder, "vllm") == {"vllm": "loads"}
    key = next(key for key in tensors if name in key)
    tensors[key].view(-1)[-2:] = value
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match=rf"{key}: 2 of {tensors[key].numel()} values are NaN or infinite"):
        lint(folder, ["vllm"])


def test_numbers_are_searched_to_the_end_of_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_CHUNK", 7)
    values = torch.linspace(-1e38, 1e38, 100)
    values[torch.tensor([0, 6, 7, 50, 99])] = math.nan
    save_file({"a": values, "b": torch.ones(3), "c": torch.tensor([1])}, tmp_path / "f")
    assert tensor_file.not_finite(tmp_path / "f") == {"a": 5}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_pairs_of_whole_numbers_are_told(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = small(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(FileFormatError, match=r"must hold floating-point numbers, got [IB]"):
        lint(folder, ["vllm"])


def test_a_lora_B_of_another_shape_than_its_lora_A_is_told(tmp_path: Path) -> None:
    folder = small(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj.lora_B" in key)
    for wrong in (tensors[key][:, :3].contiguous(), tensors[key].T.contiguous()):
        save_file(tensors | {key: wrong}, path)
        with pytest.raises(
            FileFormatError, match=rf"q_proj: lora_A must be .* and \({wrong.shape[0]}, {wrong.shape[1]}\)"
        ):
            lint(folder, ["transformers"])


def test_an_alpha_of_nothing_is_told_where_it_leaves_no_pair(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="lora_alpha is 0, so every pair is multiplied by 0"):
        lint(small(tmp_path / "a", lora_alpha=0), ["transformers"])
    folder = small(tmp_path / "b", lora_alpha=0, alpha_pattern={"q_proj": 8})
    assert verdicts(folder, "transformers") == {"transformers": "loads"}


@pytest.mark.parametrize("task", ["FOO", "", 3, None, *peft.TaskType])
def test_the_task_types_that_peft_takes_are_those_that_load(task: Any, tmp_path: Path) -> None:
    folder = small(tmp_path / "a", task_type=task)
    try:
        peft.PeftConfig.from_pretrained(folder)
    except ValueError:
        expected = "refused"
    else:
        expected = "loads"
    (found,) = lint(folder, ["transformers"])
    assert found.verdict == expected
    assert "peft takes SEQ_CLS" in "".join(found.reasons) or expected == "loads"


def test_the_table_speaks_of_its_own_tools_and_properties() -> None:
    assert set(FACTS) == set(PROPERTIES)
    assert all(set(by_tool) <= set(TOOLS) for by_tool in FACTS.values())
