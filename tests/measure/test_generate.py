"""Laws of answers: what the model itself would write, token by token, whoever else is asked at the same time."""

from typing import Any

import pytest
import torch

from onebase.errors import ConfigError, DataError
from onebase.measure.generate import ROWS_PER_BATCH, end_ids, generate
from tests import tiny
from tests.data import tiny as texts

END = 2


def _prompts(*lengths, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCABULARY, (length,), generator=draws).tolist() for length in lengths]


@pytest.fixture(scope="module")
def bank():
    return tiny.bank_of(tiny.base_of(), "a", "b")


@torch.no_grad()
def _one_by_one(bank, name, prompt, count):
    """Ask for the likeliest token again and again, with the whole text each time."""
    ids = list(prompt)
    for _ in range(count):
        with bank.base.native(bank.sole_route(name)) as model:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", [None, "a", "b"])
def test_an_answer_is_the_likeliest_token_each_time_in_any_batch(bank, name):
    prompts = _prompts(3, 11, 1, 7, 7)
    assert generate(bank, name, prompts, max_new_tokens=9) == [_one_by_one(bank, name, p, 9) for p in prompts]


def test_the_adapters_of_a_bank_answer_differently(bank):
    prompts = _prompts(5, 6)
    assert len({str(generate(bank, name, prompts, max_new_tokens=8)) for name in (None, "a", "b")}) == 3


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "mistral", "bloom"])
def test_models_with_windows_and_other_positions_answer_in_batches_as_alone(architecture):
    bank = tiny.bank_of(
        tiny.base_of(architecture), "a", target_modules="attention" if architecture != "gpt2" else ["lm_head"]
    )
    prompts = _prompts(3, 2 * tiny.WINDOW, 9)
    assert generate(bank, "a", prompts, max_new_tokens=6) == [_one_by_one(bank, "a", p, 6) for p in prompts]


def test_a_drawn_answer_depends_on_seed_and_place_and_never_on_its_neighbours(bank):
    first, second = _prompts(6, 4)
    others = _prompts(*range(1, ROWS_PER_BATCH + 4), seed=1)
    settings: dict[str, Any] = {"max_new_tokens": 7, "temperature": 1.0}
    alone = generate(bank, "a", [first, second], seed=5, **settings)
    among = generate(bank, "a", [first, second, *others], seed=5, **settings)
    assert among[:2] == alone
    assert generate(bank, "a", [first, second], seed=6, **settings) != alone
    assert len({str(answer) for answer in generate(bank, "a", [first] * 8, seed=5, **settings)}) > 1


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_are_drawn_as_often_as_the_model_says(bank, temperature):
    (prompt,) = _prompts(5)
    count = 2000
    drawn = torch.tensor(generate(bank, "b", [prompt] * count, max_new_tokens=1, temperature=temperature)).flatten()
    with torch.no_grad(), bank.base.native(bank.sole_route("b")) as model:
        expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    found = torch.bincount(drawn, minlength=len(expected)) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5 * deviation + 1 / count).all()


def test_drawing_leaves_the_global_generator_alone(bank):
    with tiny.global_randomness_untouched():
        generate(bank, "a", _prompts(3, 4), max_new_tokens=5, temperature=1.0)


def test_an_answer_ends_with_its_end_token_or_at_its_longest(bank):
    answers = generate(bank, None, _prompts(*[4] * 60), max_new_tokens=40, temperature=3.0)
    assert {answer[-1] == END for answer in answers} == {True, False}
    for answer in answers:
        assert END not in answer[:-1]
        assert answer[-1] == END or len(answer) == 40


def test_tokens_are_told_as_they_come(bank):
    prompts = _prompts(2, 5, 5, 3)
    told: list[list[int]] = [[] for _ in prompts]
    answers = generate(
        bank, "a", prompts, max_new_tokens=6, temperature=2.0, on_token=lambda number, token: told[number].append(token)
    )
    assert told == answers


def test_an_answer_stays_within_the_models_limit(bank):
    limit = bank.base.max_length
    (answer,) = generate(bank, "a", _prompts(limit - 3), max_new_tokens=50)
    assert len(answer) <= 3


def test_a_neighbour_near_the_models_limit_cuts_no_answer_short(bank):
    short, long = _prompts(5, bank.base.max_length - 2)
    alone = generate(bank, "a", [short], max_new_tokens=9)
    assert len(alone[0]) > 2
    assert generate(bank, "a", [short, long], max_new_tokens=9)[:1] == alone


def test_prompts_that_cannot_be_answered_are_refused(bank):
    with pytest.raises(DataError, match="prompt 2 has no tokens"):
        generate(bank, "a", [[3], []])
    with pytest.raises(DataError, match=f"prompt 1 has 128 tokens.*at most {bank.base.max_length}"):
        generate(bank, "a", _prompts(bank.base.max_length))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(bank, "a", [[3]], max_new_tokens=0)
    with pytest.raises(ConfigError, match="temperature"):
        generate(bank, "a", [[3]], temperature=-1.0)


def test_no_prompts_have_no_answers(bank):
    assert generate(bank, "a", []) == []


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (texts.CHATML, "<|im_end|>"),
        (texts.CHATML_TOOLS, "<|im_end|>"),
        (texts.QWEN3, "<|im_end|>"),
        (texts.PHI3, "<|im_end|>"),
        (texts.GEMMA, "<end_of_turn>"),
        (texts.LLAMA2, "</s>"),
        (texts.PLAIN_WORDS, None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_in_the_chat_template_ends_an_answer(template, end):
    base = tiny.base_of()
    base.tokenizer = texts.byte_tokenizer(template)
    base.model.generation_config.eos_token_id = [7, 9]
    own = {7, 9, base.tokenizer.eos_token_id}
    assert end_ids(base) == own | ({base.tokenizer.convert_tokens_to_ids(end)} if end else set())
