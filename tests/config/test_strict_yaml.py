"""Laws of reading and writing YAML."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.config.strict_yaml import parse_yaml, write_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        "no",
        "2e-4",
        "1_0",
        "0o17",
        "010",
        "true",
        "",
        "~",
        "<<",
        "2024-01-01",
        "1:30",
        "=",
        "a: b",
        "- a",
        "# a",
        "\t",
        ".",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_as_the_same_value_of_the_same_type(value: Any) -> None:
    document = parse_yaml(write_yaml(value))
    assert document.problems == []
    assert document.value == value
    assert repr(document.value) == repr(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_as_python_reads_it(number: float) -> None:
    for written in (f"{number!r}", f"{number:.3e}", f"{number:E}"):
        assert parse_yaml(f"a: {written}").value == {"a": float(written)}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4), ("1E5", 1e5), ("-.5", -0.5), ("010", 10), ("0x1F", 31), ("0o17", 15), (".inf", math.inf),
        ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"),
        ("true", True), ("", None), ("null", None), ("'2e-4'", "2e-4"),
    ],
)  # fmt: skip
def test_plain_values_mean_what_yaml_1_2_says(written: str, value: object) -> None:
    read = parse_yaml(f"a: {written}").value["a"]
    assert read == value and type(read) is type(value)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8))
def test_every_key_has_the_line_where_it_first_stands_and_repeats_are_problems(keys: list[str]) -> None:
    document = parse_yaml("top:\n" + "".join(f"  {key}: [x,\n    y]\n" for key in keys))
    assert {path: line for path, line in document.lines.items() if len(path) == 2} == {
        ("top", key): 2 + 2 * keys.index(key) for key in keys
    }
    repeats = [index for index, key in enumerate(keys) if key in keys[:index]]
    assert [problem.line for problem in document.problems] == [2 + 2 * index for index in repeats]
    for problem, index in zip(document.problems, repeats, strict=True):
        first = 2 + 2 * keys.index(keys[index])
        assert str(problem) == f"top.{keys[index]}: is given twice, on lines {first} and {2 + 2 * index}. Keep one."


def test_list_items_have_lines_and_a_missing_part_has_the_line_of_what_is_around_it() -> None:
    document = parse_yaml("a:\n  - x\n  - {p: 1}\n")
    assert [document.line_of(("a", 1, *rest)) for rest in ([], ["p"], ["q"])] == [3, 3, 3]
    assert document.line_of(("b",)) is None


def test_anchors_and_merge_keys_work_and_own_keys_win() -> None:
    text = "x: &x {p: 1, q: 2}\ny: {<<: *x, q: 3}\nz: {q: 4, <<: [{p: 5}, *x]}\nw: *x\n"
    document = parse_yaml(text)
    assert document.value == {
        "x": {"p": 1, "q": 2},
        "y": {"p": 1, "q": 3},
        "z": {"p": 5, "q": 4},
        "w": {"p": 1, "q": 2},
    }
    assert document.problems == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1, column 6: not valid YAML"),
        ("a:\n\t- b", "line 2, column 1: not valid YAML: a tab, where YAML allows only spaces."),
        ("a: 1\n---\nb: 2", "line 2, column 1: not valid YAML: a second document begins"),
        ("a: *nothing", "line 1, column 4: not valid YAML: found undefined alias 'nothing'."),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_text_that_is_no_yaml_is_broken_and_says_where(text: str, said: str) -> None:
    document = parse_yaml(text)
    assert document.broken
    assert said in str(document.problems[0])


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("b: 1\na: &a [*a]", 2, "a[0]: holds itself through an anchor. Write it out."),
        ("a: !!python/object:os.system x", 1, "a: has the tag 'tag:yaml.org,2002:python/object:os.system'."),
        ("a: !mine {b: 1}", 1, "a: has the tag '!mine'. Settings are plain values; remove it."),
        ("a:\n  1: x", 2, "a: a key must be text, got '1'. Quote it."),
        ("? [a]\n: x", 1, "a key must be text, got a list or mapping. Quote it."),
        ("a: {<<: 3}", 1, "a: '<<' takes a mapping or a list of mappings."),
        ("a: " + "9" * 5000, 1, "a: is no int: '999"),
        ("a: !!bool x", 1, "a: is no bool: 'x'."),
    ],
)
def test_what_settings_cannot_hold_is_a_problem_with_its_line(text: str, line: int, said: str) -> None:
    document = parse_yaml(text)
    assert not document.broken
    assert [problem.line for problem in document.problems] == [line]
    assert str(document.problems[0]).startswith(said)
