"""Laws of the table of other tools' names."""

import re
from typing import Any

import pytest
from yaml import safe_load

from onebase.config.foreign import ABSENT, OURS, PLANNED, SPELLINGS, WRITTEN, explain
from onebase.config.methods import METHODS
from onebase.config.section import fields_of
from onebase.config.settings import Settings

NAMES = [name for name, _ in fields_of(Settings)]


@pytest.mark.parametrize("key", OURS)
def test_every_foreign_name_leads_to_a_setting_that_exists(key: str) -> None:
    name, _, note = OURS[key].partition("; ")
    assert name in NAMES
    written = re.match(r"write (\w+): ", note)
    assert (
        written is None or written[1] == name.rpartition(".")[2] or written[1] in {n.rpartition(".")[2] for n in NAMES}
    )


def test_no_name_is_both_ours_and_foreign() -> None:
    leaves = {name.rpartition(".")[2] for name in NAMES}
    assert not leaves & (OURS.keys() | ABSENT.keys())
    assert not OURS.keys() & ABSENT.keys()


@pytest.mark.parametrize("key", [*OURS, *ABSENT])
def test_every_foreign_name_is_answered_with_one_sentence_that_says_what_to_do(key: str) -> None:
    answer = explain(key, NAMES)
    assert answer is not None
    assert OURS.get(key, "").partition("; ")[0] in answer
    assert re.search(r"here it is '|Remove it\.|onebase train", answer)


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_at_the_wrong_place_is_told_its_place(name: str) -> None:
    answer = explain(name.rpartition(".")[2], NAMES)
    assert answer is not None and name in answer


def test_values_that_are_planned_or_spelt_differently_are_not_accepted_yet() -> None:
    fields = [(name.rpartition(".")[2], str(field.annotation)) for name, field in fields_of(Settings)]
    for name, values in PLANNED.items():
        taken = [annotation for leaf, annotation in fields if leaf == name]
        assert taken and not [value for value in values if repr(value) in "".join(taken)]
    assert not [value for value in SPELLINGS if any(repr(value) in annotation for _, annotation in fields)]


@pytest.mark.parametrize("word", WRITTEN["method"])
def test_what_others_call_a_method_leads_to_settings_that_are_accepted(word: str) -> None:
    own, _, outside = WRITTEN["method"][word].partition(", and outside of adapter ")
    sections: dict[str, Any] = {"model": "m", "data": {"train": "x"}, **safe_load(outside or "{}")}
    Settings(**sections)
    written = dict(part.split(": ") for part in own.split(" with "))
    method = METHODS[written["method"]]
    values: dict[str, Any] = {name: safe_load(value) for name, value in written.items()}
    assert method(**values).method == written["method"]
    assert word not in PLANNED["method"]
