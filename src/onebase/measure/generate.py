"""Answers: the tokens that an adapter, or the base alone, writes after a prompt, by transformers' own `generate`.

Prompts are grouped by length into batches that are padded on the left, an adapter's virtual tokens before each. Sampling is keyed, not consumed: the noise of
token i of prompt n depends on (seed, n, i) alone, so an answer does not change with the prompts beside it (up to the
rounding of a padded batch). It is added to the logits, whose largest is then taken: argmax(logits / temperature + g)
with Gumbel noise g is a draw from softmax(logits / temperature).

Called by `onebase chat`, `predict` and the Python API. From rows and messages to prompts: prompts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.base.pretrained import generation_config_of, silence
from onebase.data.chat import Renderer
from onebase.data.rows import BadRow
from onebase.data.tokens import encode, special_ids
from onebase.errors import ConfigError, DataError
from onebase.measure.prompts import prompt_fault
from onebase.ops.keyed import mix

ROWS_PER_BATCH = 16
TOKENS_PER_BATCH = 16_384
"""Prompt and answer tokens of a batch, padding included: what its keys and values take memory for."""

_ANSWER = "Zebra"


def generate(
    bank: Bank,
    name: str | None,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the tokens that adapter `name` (None: the base alone) writes after each prompt.

    An answer ends with its end token, or without one where it was cut off by `max_new_tokens` or by the model's limit.

    Args:
        temperature: 0 always takes the likeliest token.
        on_token: called with (number of the prompt, token) as tokens come.

    Raises:
        ConfigError: `max_new_tokens` or `temperature` is out of range.
        DataError: a prompt has no tokens, or leaves no room for an answer.
    """
    limit, virtual = bank.max_length(name), list(bank.virtual_ids(name))
    _check(prompts, limit, max_new_tokens, temperature)
    ends = end_ids(bank.base)
    answers: list[list[int]] = [[] for _ in prompts]

    def take(number: int, token: int) -> None:
        answers[number].append(token)
        if on_token is not None:
            on_token(number, token)

    rooms = [room_of(prompt, max_new_tokens, limit) for prompt in prompts]
    for numbers in _batches([len(virtual) + len(prompt) for prompt in prompts], rooms):
        batch = [virtual + prompts[number] for number in numbers]
        longest = max(map(len, batch))
        with bank.base.native(bank.sole_route(name, [longest - len(ids) for ids in batch])) as model:
            _generate_batch(
                model,
                batch,
                collector=_Collector(numbers, ends, take),
                noise=_Noise(numbers, temperature, seed) if temperature > 0 else None,
                max_new_tokens=rooms[numbers[0]],
                ends=ends,
            )
    return answers


def _check(prompts: Sequence[list[int]], limit: int | None, max_new_tokens: int, temperature: float) -> None:
    """Raise unless every prompt can be answered so by a model that takes `limit` tokens."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: must be a number from 0, got {temperature}.")
    for number, prompt in enumerate(prompts):
        fault = prompt_fault(prompt, limit)
        if fault is not None:
            raise DataError(f"prompt {number + 1} {fault}")


def end_ids(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer: the model's own, the tokenizer's, and the chat template's end of a turn."""
    own = generation_config_of(base.model).eos_token_id
    ids = {int(token) for token in (own if isinstance(own, list | tuple) else [own]) if token is not None}
    if base.tokenizer is not None:
        if base.tokenizer.eos_token_id is not None:
            ids.add(int(base.tokenizer.eos_token_id))
        ids |= _turn_ends(base.tokenizer)
    return frozenset(ids)


def _turn_ends(tokenizer: Any) -> set[int]:
    """Return the first special token that the chat template writes after an answer; nothing if it writes none."""
    if not tokenizer.chat_template:
        return set()
    asked = [{"role": "user", "content": "What is it?"}]
    try:
        text = Renderer(tokenizer).render([*asked, {"role": "assistant", "content": _ANSWER}], None, asking=False)
    except BadRow:  # a template for other conversations than this one
        return set()
    after = text[text.rfind(_ANSWER) + len(_ANSWER) :]
    specials = special_ids(tokenizer)
    (encoded,) = encode([after], tokenizer)
    found = (int(token) for token in encoded.token_ids if int(token) in specials)
    return next(({token} for token in found), set())


def room_of(prompt: Sequence[int], max_new_tokens: int, limit: int | None) -> int:
    """Return the most tokens that an answer to a prompt can have in a model that takes `limit` tokens."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))


def _batches(lengths: Sequence[int], rooms: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of prompts to be answered together, shortest first; all of a batch have the same room."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        tokens = (len(batch) + 1) * (lengths[number] + rooms[number])
        full = len(batch) == ROWS_PER_BATCH or tokens > TOKENS_PER_BATCH
        if batch and (full or rooms[number] != rooms[batch[0]]):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.inference_mode()
def _generate_batch(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    collector: _Collector,
    noise: _Noise | None,
    max_new_tokens: int,
    ends: frozenset[int],
) -> None:
    longest = max(map(len, prompts))
    # Padding repeats a token of the prompt itself: masked, but never a row that could hold a NaN of its own.
    ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    own = generation_config_of(model)
    config = type(own)(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        cache_implementation="dynamic",  # not the model's own wish: one of fixed length hides where a prompt ends
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        bos_token_id=own.bos_token_id,
    )
    with silence():
        model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=[] if noise is None else [noise],
            streamer=collector,
        )


class _Collector:
    """What `generate` calls a streamer: takes the prompts, then a token of each row at a time."""

    def __init__(self, numbers: Sequence[int], ends: frozenset[int], take: Callable[[int, int], None]) -> None:
        self._open = dict(enumerate(numbers))
        self._ends, self._take = ends, take
        self._saw_prompts = False

    def put(self, tokens: Tensor) -> None:
        """Take one token of each row; a row that has ended gets padding, which is dropped."""
        if not self._saw_prompts:
            self._saw_prompts = True
            return
        for row, token in enumerate(tokens.reshape(-1).tolist()):
            if row in self._open:
                self._take(self._open[row], token)
                if token in self._ends:
                    del self._open[row]

    def end(self) -> None:
        """Nothing is held back."""


class _Noise:
    """What `generate` calls a logits processor: turns the largest logit into a draw, keyed by prompt and position."""

    def __init__(self, numbers: Sequence[int], temperature: float, seed: int) -> None:
        self._numbers, self._temperature, self._seed = numbers, temperature, seed
        self._generator = torch.Generator()
        self._position = 0

    def __call__(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        """Return logits / temperature with Gumbel noise: -log of an exponential draw."""
        draws = torch.stack([self._draw(number, logits.shape[-1]) for number in self._numbers])
        self._position += 1
        return logits / self._temperature - draws.to(logits.device).log()

    def _draw(self, number: int, columns: int) -> Tensor:
        self._generator.manual_seed(mix("sample", self._seed, number, self._position) >> 1)
        return torch.empty(columns).exponential_(generator=self._generator)
