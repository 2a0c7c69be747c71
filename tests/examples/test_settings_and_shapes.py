"""The rows of examples/shapes, and the settings in own.yaml, columns.yaml and settings.yaml: they do what the docs say."""

import pytest
import yaml

from onebase.config import Lora
from onebase.config.reading import read_settings
from onebase.data.building import build_examples
from onebase.data.check import label_segments
from onebase.data.reading import read_rows
from onebase.train.data import labels_in
from tests.data.tiny import byte_tokenizer
from tests.examples.tiny import EXAMPLES, chat_model, chats, write_rows

SHAPES = EXAMPLES / "shapes"
KEEL = "The lengthwise timber along the bottom of a ship."
ANSWERS = {
    "messages.jsonl": [[KEEL], ["A poem of fourteen lines.", "A poem of three lines."]],
    "prompt.jsonl": [[KEEL]],
    "alpaca.jsonl": [["The old ship sank at night."]],
    "sharegpt.jsonl": [[KEEL]],
}


def learned(path, **settings) -> list[list[str]]:
    """Return the labelled stretches of every example."""
    tokenizer = byte_tokenizer()
    examples, _ = build_examples(read_rows(path, columns=settings.pop("columns", None)), tokenizer, **settings)
    return [[text for text, labelled in label_segments(e, tokenizer) if labelled] for e in examples]


@pytest.mark.parametrize("name", ANSWERS)
def test_of_every_shape_the_answers_and_their_end_tokens_are_learned_and_nothing_else(name: str) -> None:
    assert learned(SHAPES / name) == [[f"{text}<|im_end|>" for text in row] for row in ANSWERS[name]]


def test_of_plain_text_everything_is_learned() -> None:
    (stretches,) = learned(SHAPES / "text.jsonl", task="text")
    text = "".join(stretches)
    assert "keel is the lengthwise timber along the bottom of a ship." in text
    assert text.endswith("</s>")


def test_columns_map_other_names() -> None:
    settings = read_settings(EXAMPLES / "columns.yaml")
    assert learned(settings.data.train[0].path, columns=settings.data.columns) == [[f"{KEEL}<|im_end|>"]]


def test_the_settings_that_the_docs_explain_are_valid() -> None:
    settings = read_settings(EXAMPLES / "settings.yaml")
    assert isinstance(settings.adapter, Lora) and settings.adapter.r == 8
    assert settings.train.learning_rate == 5e-4


def test_five_lines_are_enough_to_train_on_rows_of_ones_own(tmp_path) -> None:
    from onebase.train.run import train_run

    text = (EXAMPLES / "own.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text)
    write_rows(tmp_path / "my-rows.jsonl", chats(60))
    model = chat_model(tmp_path / "model")
    assert yaml.safe_load(text)["data"]["valid"] == 0.05
    settings = read_settings(tmp_path / "own.yaml", [f"model={model}"])
    result = train_run(settings, tmp_path / "run")
    assert result.valid_loss is not None and result.valid_loss_before is not None
    assert result.valid_loss < result.valid_loss_before


def test_the_classifier_of_the_docs_finds_its_rows_and_their_25_classes() -> None:
    settings = read_settings(EXAMPLES / "classify.yaml")
    labels = labels_in(settings.data, settings.task)
    assert labels is not None and len(labels.names) == 25
    rows = list(read_rows(EXAMPLES / "data/category-valid.jsonl"))
    assert {row.values["label"] for row in rows} <= set(labels.names) and "frequency" in rows[0].values
