"""Laws of the error tree."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase import errors
from onebase.errors import OnebaseError, list_problems

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OnebaseError)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_drawn_in_the_tree_on_top_of_the_file(kind: type[OnebaseError]) -> None:
    assert errors.__doc__ is not None
    lines = [line for line in errors.__doc__.splitlines() if kind.__name__ in line.split()[:2]]
    assert lines, f"{kind.__name__} is not in the tree"
    foreign = [base.__name__ for base in kind.__bases__ if base not in (OnebaseError, Exception)]
    assert [name for name in foreign if f"({name})" in lines[0]] == foreign


@pytest.mark.parametrize("kind", ALL)
def test_an_error_shows_its_message_and_nothing_else(kind: type[OnebaseError]) -> None:
    assert str(kind("adapter.r: must be at least 1, got 0.")) == "adapter.r: must be at least 1, got 0."


@pytest.mark.parametrize("kind", ALL)
def test_an_error_crosses_a_process_border_unchanged(kind: type[OnebaseError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("two\nlines")))
    assert type(copy) is kind and str(copy) == "two\nlines"


@pytest.mark.parametrize("kind", ALL)
def test_wrong_use_exits_with_2_and_other_failures_with_1(kind: type[OnebaseError]) -> None:
    ours = {errors.OnebaseError, errors.CapacityError, errors.TrainingError, errors.VerificationError}
    assert kind.exit_code == (1 if kind in ours else 2)


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1, max_size=30))
def test_a_list_counts_every_problem_and_shows_as_many_as_asked(problems: list[str]) -> None:
    first, *rest = list_problems("run.yaml", problems, shown=10).splitlines()
    assert first == f"{len(problems)} problem{'s' * (len(problems) > 1)} in run.yaml"
    assert rest[:10] == ["  " + problem for problem in problems[:10]]
    assert rest[10:] == ([f"  ... and {len(problems) - 10} more"] if len(problems) > 10 else [])
    assert list_problems("run.yaml", problems).splitlines()[1:] == ["  " + problem for problem in problems]
