"""Answers behind virtual tokens: equal to full forwards of flat tokens, in any batch, with a cache or without."""

from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora, PrefixTuning, PromptTuning
from onebase.errors import DataError
from onebase.measure.generate import generate
from onebase.ops.layout import Layout, Node
from onebase.ops.segments import Segments
from tests import tiny

END = 2
COUNT = 5
METHODS: dict[str, Any] = {
    "prompt": PromptTuning(num_virtual_tokens=COUNT),
    "prefix": PrefixTuning(num_virtual_tokens=COUNT),
    "projected": PrefixTuning(num_virtual_tokens=COUNT, prefix_projection=True),
}
SOME = ["llama", "gpt2", "mistral", "gemma2", "gemma3", "opt", "qwen3", "gpt-neox", "phi3", "granite"]
CASES = [(name, method) for name in SOME for method in ("prompt", "prefix")]
CASES += [("bloom", "prompt"), ("mixtral", "prefix"), ("llama", "projected")]


def bank_of(name: str, method: str, dtype: torch.dtype = torch.float32) -> Bank:
    changes: dict[str, Any] = {"experts_implementation": "eager"} if name == "mixtral" else {}
    bank = Bank(tiny.base_of(name, dtype=dtype, **changes))
    for seed, adapter in enumerate(("one", "two")):
        bank.add(adapter, METHODS[method], seed=seed)
        tiny.fill_(tiny.as_dtype_(bank.adapters[adapter], dtype), seed=seed + 5, size=1.0)
    return bank


def prompts_of(*lengths: int) -> list[list[int]]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny.VOCABULARY, (length,), generator=draws).tolist() for length in lengths]


@torch.no_grad()
def flat_logits(bank: Bank, name: str, ids: list[int]) -> torch.Tensor:
    """Return the logits at every token of a text, from one flat forward."""
    virtual = bank.virtual_ids(name)
    whole = [*virtual, *ids]
    layout = Layout([Node(len(whole), name, virtual=len(virtual))])
    hidden = bank.base.hidden(torch.tensor(whole), bank.route(layout))[len(virtual) :]
    assert bank.base.head is not None
    return bank.base.head.logits(hidden, Segments.of([len(hidden)], [-1]))


def one_by_one(bank: Bank, name: str, prompt: list[int], count: int) -> list[int]:
    """Ask for the likeliest token again and again, with the whole text each time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(flat_logits(bank, name, ids)[-1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_greedy_answers_equal_full_flat_forwards(architecture, method):
    bank = bank_of(architecture, method)
    prompts = prompts_of(3, 2 * tiny.WINDOW, 9, 1)
    for name in ("one", "two"):
        expected = [one_by_one(bank, name, prompt, 2 * tiny.WINDOW) for prompt in prompts]
        assert generate(bank, name, prompts, max_new_tokens=2 * tiny.WINDOW) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "opt"])
def test_padded_batches_of_several_adapters_equal_flat_logits(architecture, method, side):
    bank = bank_of(architecture, method, torch.float64)
    bank.add("lora", Lora(r=2), seed=3)
    tiny.fill_(tiny.as_dtype_(bank.adapters["lora"], torch.float64))
    names = ("one", "lora", "two", "one")
    prompts = prompts_of(4, 17, 9, 12)
    lines = [[*bank.virtual_ids(name), *prompt] for name, prompt in zip(names, prompts, strict=True)]
    longest = max(map(len, lines))
    pads = [longest - len(line) for line in lines]
    left = [pad if side == "left" else 0 for pad in pads]
    both = list(zip(lines, left, strict=True))
    ids = torch.tensor([[line[-1]] * n + line + [line[-1]] * (longest - n - len(line)) for line, n in both])
    mask = torch.zeros_like(ids)
    for row, (line, before) in enumerate(zip(lines, left, strict=True)):
        mask[row, before : before + len(line)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with bank.base.native(bank.batch_route(names, left)) as model:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        own = out[row, left[row] + len(lines[row]) - len(prompt) : left[row] + len(lines[row])]
        torch.testing.assert_close(own.detach(), flat_logits(bank, name, prompt), rtol=1e-5, atol=2e-6)


def test_a_native_forward_has_the_gradients_of_a_flat_one():
    bank = bank_of("llama", "prefix", torch.float64)
    (prompt,) = prompts_of(9)
    ids = [*bank.virtual_ids("one"), *prompt]
    with bank.base.native(bank.sole_route("one")) as model:
        out = model.base_model(input_ids=torch.tensor([ids, ids]), use_cache=False).last_hidden_state[:, COUNT:]
    weight = torch.linspace(-1, 1, out[0].numel(), dtype=torch.float64).view_as(out[0])
    (out * weight).sum().backward()
    native = tiny.gradients(bank, "one")
    tiny.clear_gradients(bank)
    layout = Layout([Node(len(ids), "one", virtual=COUNT)])
    (bank.base.hidden(torch.tensor(ids), bank.route(layout))[COUNT:] * weight).sum().backward()
    for key, gradient in tiny.gradients(bank, "one").items():
        torch.testing.assert_close(native[key], 2 * gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_take_room_from_prompt_and_answer_and_are_never_written(method):
    bank = bank_of("llama", method)
    room = 128 - COUNT
    (fitting,) = generate(bank, "one", prompts_of(room - 3), max_new_tokens=50)
    assert len(fitting) == 3 or fitting[-1] == END
    with pytest.raises(DataError, match=rf"has {room} tokens; with an answer the model takes at most {room}"):
        generate(bank, "one", prompts_of(room))
    written = [token for answer in generate(bank, "two", prompts_of(5, 3), max_new_tokens=20) for token in answer]
    assert max(written) < tiny.VOCABULARY


def test_the_base_and_other_adapters_answer_as_without_it():
    prompts = prompts_of(3, 8)
    alone = generate(tiny.bank_of(tiny.base_of(), "a"), "a", prompts, max_new_tokens=8)
    bare = generate(Bank(tiny.base_of()), None, prompts, max_new_tokens=8)
    bank = tiny.bank_of(tiny.base_of(), "a")
    bank.add("one", METHODS["prefix"])
    bank.add("two", METHODS["prompt"])
    assert generate(bank, "a", prompts, max_new_tokens=8) == alone
    assert generate(bank, None, prompts, max_new_tokens=8) == bare
