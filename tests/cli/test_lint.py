"""`onebase lint`: what it prints, and its exit code."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.cli.world import invoke


@pytest.fixture
def run(trained, world):
    shutil.copytree(trained / "run", world / "run")
    return world / "run"


def set_field(run, **fields):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_adapter_that_loads_everywhere_exits_with_0_and_a_wrong_scale_with_1(run):
    result = invoke("lint", "run")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" loads ") == 4
    set_field(run, use_rslora=True)
    result = invoke("lint", "run", "--for", "vllm, sglang")
    assert result.exit_code == 1
    assert "loads wrong" in result.stdout and "onebase export run --out FOLDER --portable" in result.stdout
    assert invoke("lint", "run", "--for", "vllm").exit_code == 0


def test_json_has_the_verdict_the_reasons_and_where_they_were_read(run):
    set_field(run, bias="all")
    result = invoke("lint", "run", "--for", "llama.cpp", "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["tools"]
    assert found["verdict"] == "refused" and found["reasons"] and "convert_lora_to_gguf.py" in found["sources"]


@pytest.mark.parametrize("words", [("nowhere",), ("run", "--for", "ollama"), ("run", "--for", ",")])
def test_wrong_use_exits_with_2(run, words):
    result = invoke("lint", *words)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_it_needs_no_torch(run):
    code = f"""
import sys
sys.argv = ["onebase", "lint", {str(run)!r}]
from onebase.cli.app import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
