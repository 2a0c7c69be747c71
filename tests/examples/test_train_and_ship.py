"""examples/01_train_and_ship.py, on a tiny model."""

import re
import subprocess
import sys

from tests.examples.tiny import EXAMPLES, chat_model


def run(folder, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "01_train_and_ship.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_trains_measures_and_ships_an_adapter_that_peft_can_open(tmp_path) -> None:
    import peft
    import transformers

    model = chat_model(tmp_path / "model")
    printed = run(tmp_path, str(model))
    before, after = map(float, re.findall(r"(\d+\.\d+) (?:before|after)", printed))
    assert after < before
    opened = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(model), tmp_path / "runs" / "workshop"
    )
    assert opened.peft_config["default"].r == 8
