"""The learning rate is transformers' after warm-up; warm-up loses no step."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from onebase.train.schedule import Schedule, never_due, total_steps_of, warmup_of

TOTALS = st.integers(1, 80)


def of_transformers(kind, total, warmup, learning_rate):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    make = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }[kind]
    scheduler = make(optimiser, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


@given(st.sampled_from(["cosine", "linear"]), TOTALS, st.integers(0, 80), st.floats(1e-6, 1.0))
def test_the_curve_after_warm_up_is_transformers(kind, total, warmup, learning_rate):
    schedule = Schedule(kind, learning_rate, total, warmup)
    expected = of_transformers(kind, total, warmup, learning_rate)
    for step in range(warmup, total):
        assert schedule.at(step) == pytest.approx(expected[step], rel=1e-9, abs=1e-15)


@given(st.sampled_from(["cosine", "linear", "constant", "step"]), TOTALS, st.integers(1, 80), st.floats(1e-6, 1.0))
def test_warm_up_rises_by_equal_steps_from_above_zero_to_the_full_rate(kind, total, warmup, learning_rate):
    schedule = Schedule(kind, learning_rate, total, warmup, step_size=5)
    for step in range(warmup):
        assert schedule.at(step) == pytest.approx(learning_rate * (step + 1) / warmup)
    assert schedule.at(0) > 0
    assert schedule.at(warmup - 1) == pytest.approx(learning_rate)


@given(TOTALS, st.integers(0, 10), st.integers(1, 20), st.floats(0.01, 1.0))
def test_the_step_schedule_multiplies_by_gamma_every_so_many_steps_after_warm_up(total, warmup, size, gamma):
    schedule = Schedule("step", 1e-3, total, warmup, step_size=size, step_gamma=gamma)
    for step in range(warmup, total):
        assert schedule.at(step) == pytest.approx(1e-3 * gamma ** ((step - warmup) // size))


@given(TOTALS, st.integers(0, 10))
def test_constant_is_constant_after_warm_up(total, warmup):
    schedule = Schedule("constant", 1e-3, total, warmup)
    assert {schedule.at(step) for step in range(warmup, warmup + total)} == {1e-3}


@given(st.sampled_from(["cosine", "linear"]), st.integers(2, 200), st.floats(0, 0.5))
def test_every_step_of_a_run_learns(kind, total, ratio):
    schedule = Schedule(kind, 1e-3, total, warmup_of(total, None, ratio))
    assert all(0 < schedule.at(step) <= 1e-3 * (1 + 1e-12) for step in range(total))


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_warm_up_ratio_is_rounded_up_as_in_transformers(total, ratio):
    arguments = transformers.TrainingArguments(
        output_dir="unused", warmup_steps=ratio if ratio < 1 else 0, use_cpu=True
    )
    expected = arguments.get_warmup_steps(total) if 0 < ratio < 1 else total * ratio
    assert warmup_of(total, None, ratio) == expected
    assert warmup_of(total, 7, ratio) == 7


@given(st.integers(1, 1000), st.integers(1, 20))
def test_whole_epochs_are_whole_numbers_of_steps(per_epoch, epochs):
    assert (
        total_steps_of(per_epoch, epochs, None) == total_steps_of(per_epoch, float(epochs), None) == per_epoch * epochs
    )
    assert total_steps_of(per_epoch, epochs, 9) == 9


@pytest.mark.parametrize(("per_epoch", "epochs", "steps"), [(100, 0.5, 50), (3, 0.5, 2), (7, 1.01, 8)])
def test_parts_of_epochs_are_rounded_up(per_epoch, epochs, steps):
    assert total_steps_of(per_epoch, epochs, None) == steps


@pytest.mark.parametrize(("per_epoch", "epochs", "steps"), [(100, 1.1, 110), (300, 2.47, 741)])
def test_binary_fractions_add_no_step(per_epoch, epochs, steps):
    assert total_steps_of(per_epoch, epochs, None) == steps


EVERY = st.none() | st.integers(1, 80)


@given(TOTALS, EVERY, EVERY, EVERY)
def test_a_step_is_named_when_no_training_of_that_length_comes_to_it(total, warmup, evaluate, save):
    settings = {"warmup_steps": warmup, "eval_every": evaluate, "save_every": save}
    lines = never_due(total, **settings)
    named = [line.partition(" ")[0].removeprefix("train.") for line in lines]
    assert named == [name for name, steps in settings.items() if steps is not None and steps not in range(1, total + 1)]
