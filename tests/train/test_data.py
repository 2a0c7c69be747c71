"""From data settings to examples: what is split off, what counts how often, and how long an example may be."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from onebase.config.labels import Labels
from onebase.config.settings import DEFAULT_MAX_LENGTH, DataSettings
from onebase.errors import ConfigError, ModelError
from onebase.train.data import load_data, max_length_of
from tests.data.tiny import byte_tokenizer
from tests.train.runs import definitions, write_rows


@dataclass(frozen=True)
class Reader:
    name: str = "tiny"
    tokenizer: Any = None
    max_length: int | None = 256
    embedding_rows: int | None = None
    labels: Labels | None = None


@pytest.fixture(scope="module")
def reader():
    return Reader(tokenizer=byte_tokenizer())


def data_settings(**values: Any) -> DataSettings:
    return DataSettings(**values)


def places(prepared):
    return [example.place for example in prepared.examples]


def test_a_weight_repeats_rows_in_training_and_none_of_those_held_out(tmp_path, reader):
    path = str(write_rows(tmp_path / "rows.jsonl", definitions(40)))
    once = load_data(data_settings(train=path, valid=0.4), "chat", reader)
    twice = load_data(data_settings(train={"path": path, "weight": 2}, valid=0.4), "chat", reader)
    assert once.valid is not None and twice.valid is not None
    assert places(twice.valid) == places(once.valid)
    assert sorted(places(twice.train)) == sorted(places(once.train) * 2)
    assert not set(places(twice.train)) & set(places(twice.valid))


@pytest.mark.parametrize(
    ("limit", "asked", "meant"),
    [
        (None, None, DEFAULT_MAX_LENGTH),
        (10**6, None, DEFAULT_MAX_LENGTH),
        (100, None, 100),
        (100, 60, 60),
        (None, 9, 9),
    ],
)
def test_an_example_is_as_long_as_asked_or_as_the_model_takes(limit, asked, meant):
    assert max_length_of(data_settings(train="rows", max_length=asked), Reader(max_length=limit)) == meant


def test_more_tokens_than_the_model_takes_and_a_model_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.max_length: tiny takes at most 100 tokens, got 101"):
        max_length_of(data_settings(train="rows", max_length=101), Reader(max_length=100))
    path = str(write_rows(tmp_path / "rows.jsonl", definitions(2)))
    with pytest.raises(ConfigError, match="tiny has no tokenizer"):
        load_data(data_settings(train=path), "chat", Reader())


def test_tokens_beyond_the_models_embedding_are_refused_with_both_numbers(tmp_path, reader):
    settings = data_settings(train=str(write_rows(tmp_path / "rows.jsonl", definitions(2))))
    largest = int(load_data(settings, "chat", reader).train.examples.token_ids.max())
    load_data(settings, "chat", replace(reader, embedding_rows=largest + 1))
    with pytest.raises(ModelError, match=rf"token id {largest}, but its embedding has {largest} rows"):
        load_data(settings, "chat", replace(reader, embedding_rows=largest))


def test_virtual_tokens_count_into_the_length_of_an_example(tmp_path, reader):
    path = str(write_rows(tmp_path / "rows.jsonl", definitions(9)))
    for virtual, longest in ((0, 45), (5, 40)):
        data = load_data(data_settings(train=path, max_length=45), "chat", reader, virtual)
        assert data.train.examples.lengths.max() == longest
    settings = data_settings(train=path, max_length=30)
    assert max_length_of(settings, reader, 20) == 10
    assert max_length_of(data_settings(train=path), reader, 20) == 236
    with pytest.raises(
        ConfigError, match=r"data\.max_length: 30 tokens with 27 virtual ones .* leave 3 for an example"
    ):
        max_length_of(settings, reader, 27)
