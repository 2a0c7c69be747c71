"""A draw depends on what it is for alone, and draws for different things have nothing to do with each other."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.ops.keyed import keep_mask, mix, mix_rows, position_keys
from tests.tiny import global_randomness_untouched

ROWS, COLUMNS = 200, 576


def keys(*parts, first=0, count=ROWS):
    return position_keys(mix(*parts), first, count)


def assert_unrelated(one, other, p):
    """Both keep (1 - p); kept together as often as independent draws are, within five standard deviations."""
    together, share = (one & other).double().mean().item(), (1 - p) ** 2
    assert abs(together - share) < 5 * math.sqrt(share * (1 - share) / one.numel())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_that_is_kept_is_one_minus_p(p, seed):
    mask = keep_mask(keys(seed, 0, 0), COLUMNS, p)
    bound = 5 * math.sqrt(p * (1 - p))
    assert abs(mask.double().mean().item() - (1 - p)) < bound / math.sqrt(mask.numel())
    assert (mask.double().mean(0) - (1 - p)).abs().max() < bound / math.sqrt(ROWS)
    assert (mask.double().mean(1) - (1 - p)).abs().max() < bound / math.sqrt(COLUMNS)


def splitmix(number):
    """Return splitmix64's finaliser of a number, in whole numbers of Python."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return number ^ (number >> 31)


def murmur(bits):
    """Return murmur3's 32-bit finaliser of a number, in whole numbers of Python."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) % 2**32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) % 2**32
    return bits ^ (bits >> 16)


@given(st.integers(0, 2**64 - 1), st.integers(0, 5000), st.integers(0, 2**40), st.floats(0, 0.99))
def test_keys_and_masks_are_the_published_finalisers(key, position, part, p):
    """In 64- and 32-bit arithmetic without signs, so that shifts that copy a sign would show."""
    golden = 0x9E3779B97F4A7C15
    (found,) = position_keys(key, position, 1)
    assert int(found) % 2**64 == splitmix((position * golden + key) % 2**64)
    mixed = mix_rows(found[None], part)
    assert int(mixed) % 2**64 == splitmix((int(found) % 2**64) ^ mix(part))
    row = int(mixed) % 2**31
    kept = [murmur(row ^ (column * 0x9E3779B1 % 2**32)) % 2**31 >= int(p * 2**31) for column in range(40)]
    assert keep_mask(mixed, 40, p)[0].tolist() == kept


def test_nothing_is_dropped_at_zero():
    assert keep_mask(keys(1), COLUMNS, 0.0).all()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shift", [1, 2, 3, 8, 16, 64])
def test_neighbouring_columns_and_rows_are_unrelated(p, shift):
    mask = keep_mask(keys(3, 1, 4), COLUMNS, p)
    assert_unrelated(mask[:, shift:], mask[:, :-shift], p)
    assert_unrelated(mask[shift:], mask[:-shift], p)
    assert_unrelated(mask[shift:, shift:], mask[:-shift, :-shift], p)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 0, 0), (1, 0, 0)), ((0, 0, 0), (0, 1, 0)), ((0, 0, 0), (0, 0, 1)), ((0, 1, 0), (0, 0, 1))],
    ids=["seed", "step", "example", "step against example"],
)
def test_another_seed_step_or_example_is_another_mask(one, other, p):
    assert_unrelated(keep_mask(keys(*one), COLUMNS, p), keep_mask(keys(*other), COLUMNS, p), p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_another_target_is_another_mask(p):
    rows = keys(0, 0, 0)
    parts = [0, 1, 2, 2**31, 2**32 - 1]
    masks = [keep_mask(mix_rows(rows, part), COLUMNS, p) for part in parts]
    for place, one in enumerate(masks):
        for other in masks[:place]:
            assert_unrelated(one, other, p)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 20), st.integers(1, 20))
def test_a_position_has_one_key_whichever_stretch_it_is_drawn_in(first, count, skip, take):
    whole = keys(5, 6, 7, first=first, count=count)
    part = keys(5, 6, 7, first=first + skip, count=take)
    overlap = max(0, min(count - skip, take))
    assert torch.equal(whole[skip : skip + overlap], part[:overlap])


@given(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=8), st.integers(1, 40), st.floats(0, 0.99))
def test_a_rows_mask_depends_on_its_key_alone(rows, columns, p):
    every = keys(8)
    mask = keep_mask(every, 40, p)
    assert torch.equal(keep_mask(every[rows], columns, p), mask[rows, :columns])


def test_keys_rarely_meet():
    many = torch.cat(
        [keys(seed, step, example, count=50) for seed in range(3) for step in range(9) for example in range(9)]
    )
    assert many.unique().numel() == many.numel()
    assert (many & 0x7FFFFFFF).unique().numel() > many.numel() - 4


def test_the_order_of_the_parts_matters_and_names_are_parts():
    found = {mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(0, 1, 2), mix("1", 2), mix("a", 2), mix("b", 2), mix(-1, 2)}
    assert len(found) == 8


def test_keys_are_the_same_in_every_process():
    code = (
        "import torch; from onebase.ops.keyed import *; "
        "print(mix(1, 'a.b', 3), keep_mask(mix_rows(position_keys(mix(4), 2, 3), 9), 5, 0.5).int().tolist())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    mask = keep_mask(mix_rows(position_keys(mix(4), 2, 3), 9), 5, 0.5)
    assert runs == {f"{mix(1, 'a.b', 3)} {mask.int().tolist()}\n"}


def test_drawing_leaves_the_global_generators_alone():
    with global_randomness_untouched():
        keep_mask(mix_rows(keys(1), 2), COLUMNS, 0.5)
