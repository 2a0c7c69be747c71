"""Laws that hold for every section of settings, whatever is in it."""

import pickle
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from onebase.config.method import Method
from onebase.config.methods import METHODS, Lora
from onebase.config.section import Section, fields_of, phrase, show
from onebase.config.settings import DataPart, DataSettings, EvalSettings, Settings, TrainSettings
from onebase.config.targeting import Targeted
from onebase.errors import ConfigError

SECTIONS = [DataPart, DataSettings, EvalSettings, Settings, TrainSettings, *METHODS.values()]
FIELDS = dict(fields_of(Settings))


def make(section: type[Section], **values: Any) -> Section:
    needed: dict[type[Section], dict[str, Any]] = {
        DataPart: {"path": "x"},
        DataSettings: {"train": "x"},
        Settings: {"model": "m", "data": {"train": "x"}},
    }
    return section(**needed.get(section, {}) | values)


def every_section(kind: type[Section] = Section) -> Iterator[type[Section]]:
    for inner in kind.__subclasses__():
        yield from every_section(inner) if inner.__subclasses__() else [inner]


def test_every_section_is_tested_here() -> None:
    assert set(SECTIONS) == set(every_section())


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_one_line_of_help_that_is_a_sentence(name: str) -> None:
    text = FIELDS[name].description or ""
    assert text.endswith(".")
    assert text[0].isupper()
    assert text.isascii()
    assert "\n" not in text


@pytest.mark.parametrize("name", FIELDS)
def test_optional_settings_default_to_none_so_that_none_need_never_be_written(name: str) -> None:
    field = FIELDS[name]
    default = field.get_default(call_default_factory=True, validated_data={})
    optional = type(None) in get_args(field.annotation)
    assert (default is None) == optional or default is PydanticUndefined


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}])
def test_a_value_of_a_foreign_kind_is_refused_by_every_setting_in_our_words(section: type[Section], value: Any) -> None:
    for name, field in section.model_fields.items():
        with pytest.raises(ConfigError) as caught:
            make(section, **{name: value})
        assert f"  {name}: must be {phrase(field.annotation, field.metadata)}, got {show(value)}." in str(caught.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_no_message_of_pydantic_reaches_the_user(section: type[Section]) -> None:
    values: list[Any] = [None, True, -1, 2.5, "(", "", [], [None], {}, {"": 1}, [{}], float("nan"), "x" * 999]
    messages: list[str] = []
    for value in values:
        for name in section.model_fields:
            try:
                make(section, **{name: value})
            except ConfigError as error:
                messages += str(error).split("\n")
    assert messages
    assert not [line for line in messages if "Input should" in line or "pydantic" in line or len(line) > 250]


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_are_frozen_and_survive_a_process_border(section: type[Section]) -> None:
    settings = make(section)
    name = next(iter(section.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, name, getattr(settings, name))
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_faults_of_inner_sections_are_reported_with_those_around_them() -> None:
    with pytest.raises(ConfigError) as caught:
        make(Settings, model=3, data={"train": [{"path": "x", "weight": 0}], "lora_r": 3}, train={"steps": 0, "lr": 1})
    assert str(caught.value).split("\n") == [
        "5 problems in Settings",
        "  model: must be text, got 3.",
        "  data.train[0].weight: must be above 0, got 0.",
        "  data.lora_r: unknown setting; here it is 'adapter.r'.",
        "  train.steps: must be at least 1, got 0.",
        "  train.lr: unknown setting; here it is 'train.learning_rate'.",
    ]


def test_inner_sections_may_be_given_as_objects() -> None:
    settings = make(Settings, data=make(DataSettings), adapter=Lora(r=3))
    assert settings == make(Settings, adapter={"r": 3})


def test_a_section_is_only_a_pydantic_model() -> None:
    assert [kind for kind in Lora.__mro__ if kind not in (Lora, Targeted, Method, Section, BaseModel, object)] == []
