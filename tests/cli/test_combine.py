"""`onebase merge A B ...`: what PEFT makes of the same adapters, what is said, and how it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from onebase.adapters import combining
from tests.cli.world import invoke, model_in, settings_in

THEIRS: dict[str, dict[str, Any]] = {
    "cat": {},
    "linear": {},
    "svd": {"svd_rank": 3},
    "ties": {"density": 0.6, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.6},
    "ties_svd": {"density": 0.6, "svd_rank": 3},
}
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="session")
def two(trained, tmp_path_factory) -> Path:
    """A folder with the trained run and an adapter of PEFT's own, for the same base, on other layers too."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(trained / "run", folder / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(trained / "model")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj", "lm_head"], use_rslora=True)
    model = peft.get_peft_model(base, config)
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws)
    model.save_pretrained(folder / "other")
    return folder


@pytest.fixture
def pair(two, world):
    for name in ("run", "other"):
        shutil.copytree(two / name, world / name)
    return world


def updates(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {
        path: module.get_delta_weight(name).detach()
        for path, module in model.base_model.model.named_modules()
        if name in getattr(module, "lora_A", {})
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", THEIRS)
def test_the_new_adapter_is_what_peft_makes_of_the_same_two(how, pair):
    given = THEIRS[how]
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    weights = ",".join(map(str, WEIGHTS))
    result = invoke("merge", "run", "other", "--weights", weights, "--how", how, *words, "--out", "new")
    assert result.exit_code == 0, result.output
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    model: Any = peft.PeftModel.from_pretrained(base, "run/adapter", adapter_name="run")
    for name in ("other", "new"):
        model.load_adapter(name, name)
    model.add_weighted_adapter(["run", "other"], WEIGHTS, "theirs", combination_type=how, **given)
    ours, theirs = updates(model, "new"), updates(model, "theirs")
    assert ours.keys() == theirs.keys() and len(ours) == 15
    for path, update in theirs.items():
        size = float(update.abs().max())
        assert size > 1e-4, path
        torch.testing.assert_close(ours[path], update, rtol=0, atol=2e-6 * size, msg=path)


def test_the_folder_says_what_it_is_made_of_and_works_wherever_an_adapter_does(pair):
    result = invoke("merge", "run/adapter", "other", "--weights=-0.5,1", "--out", "new")
    assert result.exit_code == 0, result.output
    for said in ("-0.5 x run/adapter + 1 x other on", "15 pairs", "ranks 2 to 4", "cat", "from the weighted sum by at"):
        assert said in result.stdout
    record = json.loads(Path("new/onebase.json").read_text())
    sources = [{"name": "run", "weight": -0.5}, {"name": "other", "weight": 1.0}]
    assert record["extras"]["combined"] == {"how": "cat", "from": sources}
    assert record["task"] == "chat" and record["base_fingerprint"]
    card = Path("new/README.md").read_text()
    assert "| run | -0.5 |" in card and "# new" in card and str(pair) not in card
    assert Path("new/chat_template.jinja").read_text() == Path("run/adapter/chat_template.jinja").read_text()
    scores = json.loads(invoke("eval", "new", "--data", "valid.jsonl", "--json").stdout)
    merged = invoke("merge", "new", "--out", "whole", "--rows", "valid.jsonl")
    assert merged.exit_code == 0, merged.output
    plain = json.loads(invoke("eval", "whole", "--data", "valid.jsonl", "--json").stdout)
    assert plain["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert scores["loss"] != pytest.approx(scores["base"]["loss"], rel=1e-3)
    assert invoke("export", "new", "--portable", "--out", "plain").exit_code == 0
    assert json.loads(Path("plain/onebase.json").read_text())["extras"] == record["extras"]


def test_json_has_every_figure_and_the_same_seed_drops_the_same(pair):
    found = {}
    for name, seed in (("one", 3), ("same", 3), ("another", 4)):
        words = ("--weights", "1,-0.5", "--how", "dare_linear", "--density", "0.5", "--seed", seed)
        result = invoke("merge", "run", "other", *words, "--out", name, "--json")
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)
    assert found["one"]["how"] == "dare_linear" and found["one"]["seed"] == 3 and found["one"]["density"] == 0.5
    assert found["one"]["adapters"] == [{"adapter": "run", "weight": 1.0}, {"adapter": "other", "weight": -0.5}]
    assert 0 < found["one"]["distance"] < found["one"]["worst_layer_distance"]
    assert found["one"]["worst_layer"].startswith("model.layers.")
    assert found["one"]["update_difference"] < 1e-6 and found["one"]["seconds"] > 0
    tensors = {name: load_file(f"{name}/adapter_model.safetensors") for name in found}
    assert all(torch.equal(tensors["same"][key], tensor) for key, tensor in tensors["one"].items())
    assert not all(torch.equal(tensors["another"][key], tensor) for key, tensor in tensors["one"].items())


def test_one_adapter_is_scaled_or_cut_and_twice_the_same_is_the_sum_of_its_weights(pair):
    for name, words in (
        ("scaled", ("run", "--weights", "0.5")),
        ("twice", ("run", "run", "--weights", "0.75,-0.25")),
        ("cut", ("run", "--how", "svd", "--svd-rank", "1")),
    ):
        result = invoke("merge", *words, "--out", name, "--json")
        assert result.exit_code == 0, result.output
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    model: Any = peft.PeftModel.from_pretrained(base, "run/adapter", adapter_name="run")
    for name in ("scaled", "twice", "cut"):
        model.load_adapter(name, name)
    for path, update in updates(model, "run").items():
        close = 1e-6 * float(update.abs().max())
        torch.testing.assert_close(updates(model, "scaled")[path], 0.5 * update, rtol=0, atol=close)
        torch.testing.assert_close(updates(model, "twice")[path], 0.5 * update, rtol=0, atol=close)
        singular = torch.linalg.svdvals(update.double())
        left = torch.linalg.matrix_norm(updates(model, "cut")[path].double() - update.double())
        assert float(left) == pytest.approx(float(singular[1:].square().sum().sqrt()), rel=1e-3)


BOTH = ("run", "other")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (BOTH, ["--weights: is missing; it takes 2 numbers", "For example --weights 0.5,0.5"]),
        ((*BOTH, "--weights", "1"), ["--weights: must be 2 numbers", "got 1. For example --weights 0.5,0.5"]),
        ((*BOTH, "--weights", "1;2"), ["--weights: must be 2 numbers", "got '1;2'"]),
        ((*BOTH, "--weights", "0,0"), ["--weights: all are 0"]),
        (("run", "run", "--weights", "1,-1"), ["with weights 1, -1 nothing is left of them (cat)"]),
        (("run", "run", "--weights", "1,-1", "--how", "svd"), ["nothing is left of them (svd)"]),
        ((*BOTH, "--weights", "1,1", "--how", "dare_linear", "--density", "1e-7"), ["nothing is left of them (dare_l"]),
        (
            (*BOTH, "--weights", "1,1", "--majority-sign-method", "total"),
            ["--majority-sign-method: cat elects no sign"],
        ),
        ((*BOTH, "--weights", "1,nan"), ["--weights: must be finite numbers, got nan"]),
        ((*BOTH, "--weights", "1,1", "--how", "tie"), ["--how: 'tie' is no way to combine; closest is 'ties'"]),
        ((*BOTH, "--weights", "1,1", "--how", "ties"), ["--density: ties needs it"]),
        ((*BOTH, "--weights", "1,1", "--seed", "1"), ["--seed: cat draws nothing"]),
        (
            (*BOTH, "--dtype", "float16", "--rows", "valid.jsonl", "--density", "2", "--svd-rank", "3"),
            [
                "5 problems in the options of merge",
                "--dtype: is for",
                "--rows: is for",
                "--density: cat",
                "--svd-rank: c",
            ],
        ),
        (
            (*BOTH, "--weights", "1", "--how", "tie", "--seed", "1"),
            ["2 problems in the options of merge", "--how: 'tie'", "--weights: must be 2"],
        ),
        (("run", "--density", "0.5"), ["--density: is for combining adapters. Remove it, or say --how."]),
        ((*BOTH, "--weights", "1,1", "--out", "model"), ["model: is there already. Choose another --out."]),
        (("run", "nowhere", "--weights", "1,1"), ["nowhere: there is no such folder"]),
    ],
)
def test_wrong_use_exits_with_2_and_says_all_of_it(words, told, pair):
    result = invoke("merge", "--out", "new", *words)
    assert result.exit_code == 2, result.output
    assert not [text for text in told if text not in result.stderr], result.stderr
    assert not Path("new").exists()


def test_other_methods_tasks_and_bases_are_refused_at_once_before_a_base_is_opened(pair):
    config = settings_in(pair)
    for name, adapter in (("scales", "method: ia3"), ("dora", "use_dora: true")):
        config.write_text(
            f"model: ./model\ndata: {{train: train.jsonl}}\nadapter: {{{adapter}}}\ntrain: {{steps: 1}}\n"
        )
        assert invoke("train", config, "--out", name).exit_code == 0
    shutil.copytree("run/adapter", "elsewhere")
    record = Path("elsewhere/onebase.json")
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"task": "text", "base_fingerprint": "f" * 64}))
    shutil.rmtree("model")
    words = ("run", "scales", "dora", "elsewhere", "--weights", "1,1,1,1", "--out", "new")
    result = invoke("merge", *words)
    assert result.exit_code == 2
    for told in (
        "4 problems in combining adapters",
        "scales/adapter: is IA3; only LoRA adapters can be combined. Merge it into its base (onebase merge ADAPTER",
        "dora/adapter: use_dora cannot be combined. Merge the adapters into their base one after the other",
        "they are for different tasks (run/adapter chat, scales/adapter chat, dora/adapter chat, elsewhere text)",
        "they were trained on bases with different weights (run/adapter",
    ):
        assert told in result.stderr
    assert not Path("new").exists()


def test_another_base_is_refused_unless_it_is_meant(pair):
    other = model_in(pair / "changed")
    weights = transformers.AutoModelForCausalLM.from_pretrained(other)
    weights.model.layers[0].mlp.down_proj.weight.data += 1
    weights.save_pretrained(other)
    words = ("merge", "run", "other", "--weights", "1,1", "--model", "changed", "--out", "new")
    result = invoke(*words)
    assert result.exit_code == 2 and "has weights" in result.stderr
    assert invoke(*words, "--allow-base-mismatch").exit_code == 0


def test_adapters_that_are_asked_otherwise_are_said_and_the_first_is_followed(pair):
    shutil.copytree("run/adapter", "formal")
    record = Path("formal/onebase.json")
    content = json.loads(record.read_text())
    content["extras"] = {"data": {"system": "Be formal."}}
    record.write_text(json.dumps(content))
    result = invoke("merge", "formal", "run", "--weights", "1,1", "--out", "new")
    assert result.exit_code == 0, result.output
    assert "adapter: was trained with another data.system than formal" in result.stderr
    assert json.loads(Path("new/onebase.json").read_text())["extras"]["data"] == {"system": "Be formal."}


def test_what_is_not_the_weighted_sum_is_not_written(pair, monkeypatch):
    made = combining._on_layer

    def damaged(path: str, *given: Any) -> Any:
        A, B = made(path, *given)
        return A, B * (1 + 1e-4 * path.endswith("layers.1.mlp.up_proj"))

    monkeypatch.setattr(combining, "_on_layer", damaged)
    before = {path.name for path in pair.iterdir()}
    result = invoke("merge", *BOTH, "--weights", "1,1", "--out", "new")
    assert result.exit_code == 1
    assert "1 problem in the combined adapter, written and read again" in result.stderr
    assert "the update of model.layers.1.mlp.up_proj differs by" in result.stderr
    assert {path.name for path in pair.iterdir()} - {"home"} == before
