"""examples/demo.py and define.yaml, which `make demo` runs: here on a tiny model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onebase.config.reading import read_settings
from tests.examples.tiny import EXAMPLES, chat_model, chats, example, write_rows


@pytest.fixture
def config(tmp_path):
    chat_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", chats(16))
    write_rows(tmp_path / "valid.jsonl", chats(5))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "model: model\ndata: {train: train.jsonl, valid: valid.jsonl}\n"
        "adapter: {method: lora, r: 2}\ntrain: {steps: 6, batch_size: 4}\n"
    )
    return path


def test_the_demo_can_be_run_again_and_trains_only_once(config, tmp_path, capsys) -> None:
    demo = example("demo.py")
    demo.main(tmp_path / "runs" / "demo", config)
    first = capsys.readouterr().out
    adapter = tmp_path / "runs" / "demo" / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    demo.main(tmp_path / "runs" / "demo", config)
    again = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "demo" / "result.json").read_text())

    assert adapter.stat().st_mtime_ns == written
    for text in (first, again):
        assert f"{result['valid_loss_before']:.4f}" in text
        assert f"{result['valid_loss']:.4f}" in text
        words = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()]
        assert words.count("dictionary") == words.count("before") == words.count("after") == len(demo.ROWS)
        assert str(adapter.parent) in text
    assert result["valid_loss"] < result["valid_loss_before"]


def test_a_setting_that_is_wrong_ends_the_demo_without_a_traceback(config, tmp_path) -> None:
    import typer

    config.write_text(config.read_text().replace("r: 2", "r: 0"))
    demo = example("demo.py")
    app = typer.Typer()
    app.command()(demo.reported(demo.main))
    result = CliRunner().invoke(app, ["--config", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "adapter.r" in result.output
    assert "Traceback" not in result.output


def test_the_settings_of_the_demo_are_valid_and_its_rows_are_there() -> None:
    settings = read_settings(EXAMPLES / "define.yaml")
    assert settings.model == "smollm2-135m-instruct"
    assert isinstance(settings.data.valid, tuple)
    for part in (*settings.data.train, *settings.data.valid):
        first, *_ = Path(part.path).read_text().splitlines()
        assert json.loads(first)["messages"]
