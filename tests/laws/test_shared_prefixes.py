"""A prefix that is computed once gives what it gives computed for every example: losses, gradients, together and alone."""

from typing import Any

import numpy as np
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import AdapterSettings, Bottleneck, Ia3, Lora, PrefixTuning, PromptTuning
from onebase.data.examples import Example, Examples
from onebase.measure.evaluate import evaluate
from onebase.measure.forward import batches_of, forward_loss
from onebase.measure.padded import flat_and_padded
from tests import tiny

FP64: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}  # norms and rotary of most families compute in fp32
FP32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
EAGER: dict[str, Any] = {"experts_implementation": "eager"}  # fused experts know no fp64
CHANGES = {"mixtral": EAGER, "qwen3-moe": EAGER}
CAUSAL = sorted({*tiny.ARCHITECTURES} - tiny.PADDED - {"bert", "roberta", "distilbert", "modernbert"})
KINDS: dict[str, AdapterSettings] = {
    "lora": Lora(r=3),
    "dora": Lora(r=3, use_dora=True),
    "dropout": Lora(r=3, lora_dropout=0.3),
    "ia3": Ia3(),
    "bottleneck": Bottleneck(reduction_factor=4),
    "prompt-tuning": PromptTuning(num_virtual_tokens=5),
    "prefix-tuning": PrefixTuning(num_virtual_tokens=5),
}


def chats() -> Examples:
    """Return examples of two system prompts, one longer than a sliding window, and one that begins like no other."""
    draws = np.random.default_rng(0)
    stems = [draws.integers(3, tiny.VOCABULARY, length) for length in (tiny.WINDOW + 9, 12)]
    made = []
    for number, (stem, own) in enumerate([(0, 5), (1, 1), (0, 9), (1, 7), (0, 1), (None, 11), (1, 4)]):
        first = stems[stem] if stem is not None else draws.integers(3, tiny.VOCABULARY, 3)
        ids = np.concatenate([first, draws.integers(3, tiny.VOCABULARY, own)]).astype(np.int32)
        labelled = np.arange(len(ids)) >= (len(first) if number % 2 else len(ids) - 1)
        made.append(Example(ids, labelled, f"row {number}", {}))
    return Examples(made)


def bank_of(name: str, *kinds: str, dtype: torch.dtype = torch.float64) -> Bank:
    bank = Bank(tiny.base_of(name, dtype=dtype, **CHANGES.get(name, {})))
    for seed, kind in enumerate(kinds):
        tiny.fill_(tiny.as_dtype_(bank.add(kind, KINDS[kind], seed=seed), dtype), seed=seed + 3)
    return bank


def learned(
    bank: Bank, name: str, *, shared: bool, budget: int = 10**6, dropout_step: int | None = None
) -> tuple[int, float, dict[str, torch.Tensor]]:
    """Return how many tokens were computed, the loss and the gradients of an adapter on all examples."""
    examples, before = chats(), bank.base.shares_prefixes
    bank.base.shares_prefixes = before and shared
    tiny.clear_gradients(bank)
    tokens, total = 0, 0.0
    try:
        for batch in batches_of(bank, name, examples, range(len(examples)), budget):
            loss, _ = forward_loss(bank, batch, 1 / examples.label_count, dropout_step=dropout_step)
            loss.backward()
            tokens, total = tokens + batch.layout.token_count, total + loss.item()
    finally:
        bank.base.shares_prefixes = before
    return tokens, total, tiny.gradients(bank, name)


def assert_same(one: Any, other: Any, rule: dict[str, Any]) -> None:
    assert one[1] == pytest.approx(other[1], rel=rule["rtol"])
    for key, gradient in other[2].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(one[2][key], gradient, **rule)


@pytest.mark.parametrize("name", CAUSAL)
def test_shared_equals_unshared_on_every_family(name):
    bank = bank_of(name, "lora")
    once, often = (learned(bank, "lora", shared=shared) for shared in (True, False))
    assert once[0] < often[0]
    assert_same(once, often, FP64)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_shared_equals_unshared_for_every_kind_of_part(kind):
    bank = bank_of("llama", kind)
    once, often = (learned(bank, kind, shared=shared) for shared in (True, False))
    assert once[0] < often[0]
    assert_same(once, often, FP64)


@pytest.mark.parametrize("budget", [1, 40, 60, 10**6])
def test_however_the_step_is_cut_into_micro_batches(budget):
    bank = bank_of("llama", "lora")
    assert_same(learned(bank, "lora", shared=True, budget=budget), learned(bank, "lora", shared=False), FP64)


@pytest.mark.parametrize("budget", [1, 40, 60])
def test_a_shared_token_has_one_dropout_mask_however_the_step_is_cut(budget):
    bank = bank_of("llama", "dropout")
    whole = learned(bank, "dropout", shared=True, dropout_step=4)
    assert_same(learned(bank, "dropout", shared=True, budget=budget, dropout_step=4), whole, FP64)
    assert whole[1] != pytest.approx(learned(bank, "dropout", shared=True, dropout_step=5)[1], rel=1e-6)


def test_in_fp32_within_its_rounding():
    bank = bank_of("llama", "lora", dtype=torch.float32)
    assert_same(learned(bank, "lora", shared=True), learned(bank, "lora", shared=False), FP32)


def test_with_activations_recomputed():
    bank = bank_of("llama", "lora", "dora")
    plain = learned(bank, "dora", shared=False)
    with bank.base.activation_checkpointing():
        assert_same(learned(bank, "dora", shared=True), plain, FP64)


def test_adapters_with_the_same_prompt_share_a_batch_and_no_prefix():
    bank = bank_of("llama", "lora", "dora", "prompt-tuning")
    names, examples = list(bank.adapters), chats()
    alone = {name: learned(bank, name, shared=False) for name in names}
    pieces = [next(batches_of(bank, name, examples, range(len(examples)), 10**6)) for name in names]
    both = tiny.together(*pieces)
    assert all(both.layout.nodes[n.parent].owner == n.owner for n in both.layout.nodes if n.parent >= 0)
    tiny.clear_gradients(bank)
    loss, _ = forward_loss(bank, both, 1 / examples.label_count)
    loss.backward()
    assert loss.item() == pytest.approx(sum(one[1] for one in alone.values()), rel=1e-9)
    for name in names:
        assert_same((0, alone[name][1], tiny.gradients(bank, name)), alone[name], FP64)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom"])
def test_flat_with_shared_prefixes_equals_the_models_own_padded_forward(name):
    bank = bank_of(name, "lora")
    assert flat_and_padded(bank, "lora", chats()) < 1e-6


def test_an_evaluation_counts_every_token_and_finds_the_same_loss():
    bank = bank_of("llama", "lora")
    shared = evaluate(bank, "lora", chats())
    bank.base.shares_prefixes = False
    unshared = evaluate(bank, "lora", chats())
    assert shared.loss == pytest.approx(unshared.loss, rel=1e-9)
    assert (shared.tokens, shared.labelled_tokens) == (unshared.tokens, unshared.labelled_tokens)
