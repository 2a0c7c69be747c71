"""Scores are those of a plain padded loop in transformers, however the examples are batched."""

import math

import pytest
import torch
import torch.nn.functional as F

from onebase.measure.evaluate import evaluate
from tests import tiny
from tests.laws.test_equals_peft import padded


def plain(bank, name, examples):
    """Return mean loss and accuracy over labelled tokens, by transformers alone on one padded batch."""
    ids, mask, labels = padded(examples)
    with torch.no_grad(), bank.base.native(bank.sole_route(name)) as model:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    seen = labels >= 0
    right = (logits.argmax(1) == labels)[seen].double().mean().item()
    return F.cross_entropy(logits.double(), labels).item(), right


@pytest.mark.parametrize("name", ["llama", "mistral", "granite", "bloom"])
@pytest.mark.parametrize("member", [None, "one", "two"])
def test_the_scores_are_those_of_plain_transformers(name, member):
    bank = tiny.bank_of(tiny.base_of(name), "one", "two")
    examples = tiny.examples_of(9, 21, 4, 16, 13, 2)
    loss, accuracy = plain(bank, member, examples)
    scores = evaluate(bank, member, examples)
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores.token_accuracy == pytest.approx(accuracy)
    assert (scores.examples, scores.labelled_tokens, scores.tokens) == (6, examples.label_count, 65)
    if name == "llama":
        ids, mask, labels = padded(examples)
        with torch.no_grad(), bank.base.native(bank.sole_route(member)) as model:
            theirs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.item()
        assert scores.loss == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_the_scores_do_not_depend_on_how_examples_are_batched(name):
    bank = tiny.bank_of(tiny.base_of(name), "one")
    examples = tiny.examples_of(9, 21, 4, 16, 13, 2)
    whole = evaluate(bank, "one", examples)
    for batch_tokens in (1, 20, 40):
        cut = evaluate(bank, "one", examples, batch_tokens=batch_tokens)
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        assert cut.token_accuracy == whole.token_accuracy


def test_a_mean_over_tokens_is_no_mean_of_examples_means():
    bank = tiny.bank_of(tiny.base_of(), "one")
    examples = tiny.examples_of(3, 40)
    each = [evaluate(bank, "one", examples[n : n + 1]) for n in range(2)]
    labels = [score.labelled_tokens for score in each]
    assert labels[0] != labels[1]
    weighted = sum(score.loss * count for score, count in zip(each, labels, strict=True)) / sum(labels)
    assert evaluate(bank, "one", examples).loss == pytest.approx(weighted, rel=1e-6)


def test_dropout_is_off_and_nothing_is_left_behind():
    bank = tiny.bank_of(tiny.base_of(), "one", lora_dropout=0.5, target_modules=["q_proj", "lm_head"])
    examples = tiny.examples_of(9, 21)
    with tiny.global_randomness_untouched():
        first = evaluate(bank, "one", examples)
    assert evaluate(bank, "one", examples) == first
    assert first.loss == pytest.approx(plain(bank, "one", examples)[0], rel=1e-5)
    assert all(p.grad is None for a in bank.adapters.values() for _, p in a.parameters())


def test_progress_counts_examples_to_the_end():
    bank, seen = tiny.bank_of(tiny.base_of(), "one"), []
    evaluate(bank, "one", tiny.examples_of(9, 21, 4), batch_tokens=25, on_progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (3, 3)]


def test_examples_without_any_label_are_refused():
    bank = tiny.bank_of(tiny.base_of(), "one")
    for examples in (tiny.examples_of(), tiny.examples_of(1, 1)):
        with pytest.raises(ValueError, match="label"):
            evaluate(bank, "one", examples)


def test_evaluating_an_adapted_head_computes_no_gradient(monkeypatch):
    from onebase.ops import loss

    bank = tiny.bank_of(tiny.base_of(), "one", target_modules=["lm_head"])
    monkeypatch.setattr(loss, "_chunk_by_autograd", lambda *a: pytest.fail("a backward ran"))
    evaluate(bank, "one", tiny.examples_of(9, 21))
