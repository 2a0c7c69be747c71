"""examples/peft: scripts written for PEFT give the same losses and files with the import line changed."""

import math
from pathlib import Path

import pytest
import transformers

from tests import tiny
from tests.data.tiny import byte_tokenizer
from tests.examples.tiny import example
from tests.peft.pairs import CLASSIFIERS, assert_same_files, quietly

SCRIPTS = {"01_trainer.py": "gpt2", "02_classifier.py": "bert", "03_two_adapters.py": "gpt2"}


def stored_model(name: str, classifier: bool, folder: Path) -> Path:
    """Write a tiny model, with the dropout that its class has, and a tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if classifier:
        model_class, config_class = CLASSIFIERS[name]
        config = getattr(transformers, config_class)(**(tiny.ENCODERS[name][2] | sizes))
        getattr(transformers, model_class)(config).base_model.save_pretrained(folder)
    else:
        tiny.model_of(name, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_written_for_peft_runs_with_the_import_line_changed(script: str, tmp_path) -> None:
    model = stored_model(SCRIPTS[script], script.startswith("02"), tmp_path / "model")
    losses = {
        library: quietly(
            lambda library=library: example(f"peft/{script}").main(library, str(model), str(tmp_path / library))
        )
        for library in ("peft", "onebase.peft")
    }
    expected = losses["peft"]
    assert len(expected) >= 6
    assert expected[3] < expected[0]
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses["onebase.peft"], expected, strict=True)), losses
    assert_same_files(tmp_path / "peft", tmp_path / "onebase.peft")
    if script.startswith("03"):
        assert_same_files(tmp_path / "peft" / "formal", tmp_path / "onebase.peft" / "formal")
