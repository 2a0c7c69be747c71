"""Laws of printing: JSON that every reader takes, numbers that read well, cells that are never cut."""

import io
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from onebase.cli import terminal

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(content=st.dictionaries(st.text(), JSON, max_size=4))
def test_what_is_printed_as_json_is_one_strict_object(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", written := io.StringIO())
        terminal.print_json(content)
    assert json.loads(written.getvalue(), parse_constant=lambda name: pytest.fail(name)) == _without_nan(content)


@given(size_bytes=st.integers(0, 10**15))
def test_a_size_is_within_a_percent_of_the_bytes(size_bytes):
    number, unit = terminal.size(size_bytes).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(size_bytes, rel=0.01)
    assert len(number) <= 5 or unit == "TB"


@given(seconds=st.floats(0, 10**6))
def test_a_duration_and_a_clock_are_within_their_last_unit(seconds):
    units = {"s": 1, "min": 60, "h": 3600}
    words = terminal.duration(seconds).split()
    told = sum(float(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(told - seconds) <= (30 if "h" in words else 0.5)
    parts = [int(part) for part in terminal.clock(seconds).split(":")]
    assert abs(sum(part * 60**place for place, part in enumerate(reversed(parts))) - seconds) <= 0.5
    assert all(part < 60 for part in parts[1:])


@pytest.mark.parametrize("width", [80, 40])
def test_no_cell_of_a_table_is_cut(width):
    words = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal.table(("pattern", "number"), [(words, "")]))
    assert words in console.file.getvalue().replace("\n", "").replace(" ", "")  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [160, 100, 80, 60])
def test_a_table_that_is_too_wide_loses_whole_columns_in_order_and_no_part_of_a_number(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    head = ("run", "state", "valid loss", "before", "method", "examples/s", "memory", "seconds a step")
    row = ("first-of-all", "finished", "106.9086", "10.1469", "prefix-tuning", "22.15", "1.53 GB", "0.1234")
    less = ("seconds a step", "memory", "examples/s", "before")
    terminal.stdout().print(terminal.table(head, [row], left=2, fold=("run", "state"), less=less))
    lines = capsys.readouterr().out.splitlines()
    gone = [name for name, cell in zip(head[2:], row[2:], strict=True) if not any(cell in line for line in lines)]
    assert sorted(gone) == sorted(less[: len(gone)]) and bool(gone) == (width < 100)
    assert max(map(len, lines)) <= width and lines[1].startswith("run") == (width < 100)


def test_what_comes_from_outside_is_no_markup(capsys):
    text = "[bold]x[/bold] :smile: [/] [link=a]"
    terminal.stdout().print(text)
    terminal.say(text)
    terminal.stdout().print(terminal.table(("a",), [(text,)]))
    captured = capsys.readouterr()
    assert captured.out.count(text) == 2
    assert captured.err == f"{text}\n"


def test_without_a_terminal_a_line_stays_a_line(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal.say("word " * 100)
    terminal.stdout().print(terminal.table(("a", "b"), [("word " * 30, "1")]))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out.count("\n") == 3


CELLS = st.lists(st.tuples(*[st.text("07 4", max_size=30)] * 3), min_size=1, max_size=5)


@example(rows=[("0" * 29, "", "")], left=1, width=30)
@given(rows=CELLS, left=st.sampled_from([1, 3, (0, 2)]), width=st.integers(30, 120))
def test_no_line_of_a_table_or_of_facts_ends_in_blanks_and_no_word_is_lost(rows, left, width):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        for made, cells in (
            (terminal.table(("one", "two", "three"), rows, left=left), rows),
            (terminal.facts((row[0], row[1]) for row in rows), [row[:2] for row in rows]),
        ):
            written = io.StringIO()
            Console(file=written, width=width).print(made)
            lines = written.getvalue().splitlines()
            assert lines == [line.rstrip() for line in lines]
            assert sorted(filter(str.isdigit, "".join(lines))) == sorted(
                filter(str.isdigit, "".join(cell for row in cells for cell in row))
            )
