"""Every method through every verb: trained from a file, stopped and resumed, evaluated, asked, and opened from Python."""

import json
from pathlib import Path
from typing import Any

import pytest

import onebase as ob
from onebase.adapters.build import BUILDERS
from onebase.config.methods import METHODS
from onebase.config.writing import dump_settings
from onebase.errors import ConfigError
from onebase.files.record import read_record
from onebase.train.opening import open_adapter
from onebase.train.stop import Stopped
from tests.cli.world import invoke
from tests.train import runs
from tests.train.runs import Watching, Workshop, adapter_bytes, metrics

MORE: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"num_virtual_tokens": 4},
    "prefix-tuning": {"num_virtual_tokens": 4},
    "bottleneck": {"reduction_factor": 4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"method": name, **MORE.get(name, {})} for name, kind in METHODS.items() if kind in BUILDERS
} | {
    "dora": {"method": "lora", "use_dora": True, "bias": "all", "r": 4},
    "projected": {"method": "prefix-tuning", "num_virtual_tokens": 4, "prefix_projection": True},
}
STEPS = {"steps": 4, "batch_size": 4, "threads": 1}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    with runs.own_home(folder / "home"):
        shop = runs.workshop(folder)
        runs.model_folder(folder / "model", attention_bias=True)
        yield shop


def settings_of(shop: Workshop, adapter: dict[str, Any]) -> Any:
    values = shop.values(train=STEPS)
    del values["train"]["learning_rate"]  # every method has its own
    return ob.config.reading.settings_from(values | {"adapter": adapter})


@pytest.fixture(scope="module", params=VARIANTS)
def finished(request: pytest.FixtureRequest, shop: Workshop) -> Path:
    """The run of one method, started by the command line."""
    config, out = shop.folder / f"{request.param}.yaml", shop.folder / "runs" / request.param
    config.write_text(dump_settings(settings_of(shop, VARIANTS[request.param])), encoding="utf-8")
    started = invoke("train", config, "--out", out)
    assert started.exit_code == 0, started.stderr
    assert settings_of(shop, VARIANTS[request.param]).adapter.title in started.stdout
    return out


def test_what_a_run_says_of_itself_names_the_method(finished: Path, shop: Workshop) -> None:
    adapter = VARIANTS[finished.name]
    record, kind = read_record(finished / "adapter"), METHODS[adapter["method"]]
    assert record is not None and record.method == adapter["method"]
    assert f"({kind.title})" in (finished / "adapter" / "README.md").read_text(encoding="utf-8")
    stored = runs.result_of(finished)
    assert stored.adapter_bytes > 4 * stored.trainable_parameters or finished.name == "projected"
    [told] = json.loads(invoke("runs", finished, "--json").stdout)["runs"]
    assert told["method"] == adapter["method"]
    assert invoke("runs", finished).stdout.split()[-1] == adapter["method"]


def test_the_method_learns_at_its_own_rate_and_saves_what_it_learned(finished: Path, shop: Workshop) -> None:
    result, settings = runs.result_of(finished), settings_of(shop, VARIANTS[finished.name]).adapter
    assert max(record["learning_rate"] for record in metrics(finished)) == pytest.approx(settings.usual_learning_rate)
    found = invoke("eval", finished, "--data", shop.valid, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["loss"] == pytest.approx(result.valid_loss, rel=1e-6)


def test_a_stopped_run_goes_on_to_the_same_bytes(finished: Path, shop: Workshop, tmp_path: Path) -> None:
    settings = settings_of(shop, VARIANTS[finished.name])
    with pytest.raises(Stopped):
        runs.run(settings, tmp_path / "run", watching=Watching(stop_after={2}))
    runs.run(settings, tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)
    assert metrics(tmp_path / "run") == metrics(finished)


def test_it_answers_in_the_terminal_and_for_a_file(finished: Path, shop: Workshop) -> None:
    chat = invoke("chat", finished, "--max-new-tokens", 3, stdin="What is a dog?\n")
    assert chat.exit_code == 0, chat.stderr
    answers = invoke("predict", finished, "--data", shop.valid, "--max-new-tokens", 3)
    assert answers.exit_code == 0, answers.stderr
    assert len(answers.stdout.splitlines()) == 4


def test_python_opens_it_and_saves_it_again_byte_for_byte(finished: Path, shop: Workshop, tmp_path: Path) -> None:
    bank = ob.Bank(ob.load(str(shop.model), dtype="float32", device="cpu"))
    bank.load("mine", finished)
    scores = ob.evaluate(bank, "mine", shop.valid)
    assert scores.loss == pytest.approx(runs.result_of(finished).valid_loss, rel=1e-6)
    bank.save("mine", tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_it_is_where_another_run_starts(finished: Path, shop: Workshop, tmp_path: Path) -> None:
    adapter = VARIANTS[finished.name] | {"init_from": str(finished)}
    if adapter.get("prefix_projection"):
        with pytest.raises(ConfigError, match="prefix_projection: false"):
            runs.run(settings_of(shop, adapter), tmp_path / "other")
        adapter["prefix_projection"] = False
    watching = Watching()
    runs.run(settings_of(shop, adapter), tmp_path / "run", watching=watching)
    assert watching.scores[0][1].loss == pytest.approx(runs.result_of(finished).valid_loss, rel=1e-6)
    assert open_adapter(tmp_path / "run", device="cpu").adapter.settings.method == adapter["method"]
