"""Memory runs out before the first step or never, and the message says what would fit."""

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.base import memory
from onebase.base.model import load
from onebase.config.methods import Lora, PromptTuning
from onebase.data.batches import micro_batches
from onebase.errors import CapacityError
from onebase.measure.forward import forward_loss
from onebase.train import capacity
from tests import tiny
from tests.tiny import examples_of
from tests.train import runs
from tests.train.runs import FEW, Watching


def test_micro_batches_are_cut_to_the_memory_there_is(shop, tmp_path, monkeypatch):
    settings = shop.settings(adapter=FEW, train={"steps": 2, "batch_size": 8})
    runs.run(settings, tmp_path / "roomy", watching=(roomy := Watching()))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    runs.run(settings, tmp_path / "narrow", watching=(narrow := Watching()))
    assert 50 < narrow.plans[0].micro_batch_tokens < roomy.plans[0].micro_batch_tokens == 1024
    batches = micro_batches(examples_of(*[40] * 8), range(8), narrow.plans[0].micro_batch_tokens, None)
    assert len(list(batches)) > 1
    assert [s.loss for s in narrow.steps] == pytest.approx([s.loss for s in roomy.steps], rel=1e-5)


@pytest.fixture
def bank(shop):
    bank = Bank(load(str(shop.model), dtype="float32", device="cpu"))
    bank.add("learner", Lora(r=4))
    return bank


def limited(monkeypatch, bank, examples, tokens, recompute=False):
    """Let memory be enough for as many tokens, by the count that the check itself makes."""
    per_token = capacity.kept_bytes_per_token(bank, "learner", examples, recompute=recompute)
    beside = capacity._BESIDE_WEIGHTS * bank.adapters["learner"].parameter_count
    monkeypatch.setattr(memory, "available_bytes", lambda: int(beside + capacity._RESERVE * per_token * (tokens + 0.5)))


def test_an_adapter_whose_optimiser_state_does_not_fit_is_refused_by_name(bank, monkeypatch):
    count = bank.adapters["learner"].parameter_count
    monkeypatch.setattr(memory, "available_bytes", lambda: 19 * count)
    with pytest.raises(CapacityError, match=r"optimiser state.*'learner' need .*adapter\.r"):
        capacity.fit_budget(bank, "learner", examples_of(30, 30), 2, "auto")


def test_a_budget_that_was_set_and_does_not_fit_is_refused_with_one_that_does(bank, monkeypatch):
    examples = examples_of(*[30] * 20)
    limited(monkeypatch, bank, examples, 200)
    with pytest.raises(CapacityError, match=r"a micro-batch of 400 tokens needs .* enough for 200 tokens") as caught:
        capacity.fit_budget(bank, "learner", examples, 16, 400)
    assert "train.micro_batch_tokens: 200, or train.activation_checkpointing: true" in str(caught.value)
    assert capacity.fit_budget(bank, "learner", examples, 16, 200) == 200


def test_a_budget_larger_than_any_step_needs_no_memory_for_what_is_not_there(bank, monkeypatch):
    examples = examples_of(*[30] * 20)
    limited(monkeypatch, bank, examples, 200)
    assert capacity.fit_budget(bank, "learner", examples, 4, 10**6) == 200  # four rows of 30 tokens


def test_an_example_that_does_not_fit_is_refused_even_where_the_budget_is_automatic(bank, monkeypatch):
    examples = examples_of(10, 20, 120)
    limited(monkeypatch, bank, examples, 100)
    with pytest.raises(CapacityError, match=r"a micro-batch of 1[25]0 tokens .* Set data\.max_length: 100"):
        capacity.fit_budget(bank, "learner", examples, 16, "auto")
    limited(monkeypatch, bank, examples, 30)
    with pytest.raises(CapacityError, match="Set a smaller model"):
        capacity.fit_budget(bank, "learner", examples, 16, "auto")


def test_checkpointing_makes_room_as_the_message_says(bank, monkeypatch):
    examples = examples_of(*[30] * 20)
    limited(monkeypatch, bank, examples, 200)
    with pytest.raises(CapacityError):
        capacity.fit_budget(bank, "learner", examples, 16, 250)
    assert capacity.fit_budget(bank, "learner", examples, 16, 250, recompute=True) == 250
    limited(monkeypatch, bank, examples, 100, recompute=True)
    with pytest.raises(CapacityError) as caught:
        capacity.fit_budget(bank, "learner", examples, 16, 250, recompute=True)
    assert "activation_checkpointing" not in str(caught.value)  # it is on already


@pytest.mark.parametrize("recompute", [False, True])
def test_the_bytes_of_a_token_are_near_those_that_a_large_batch_takes(recompute, monkeypatch):
    """Within a quarter of the truth, which is the peak of torch's own allocations over a forward and backward."""
    bank = Bank(tiny.base_of("llama", hidden_size=64, intermediate_size=160, num_hidden_layers=6, vocab_size=200))
    bank.add("learner", Lora(r=4))
    examples = examples_of(*[60] * 60, vocabulary=200)
    per_token = capacity.kept_bytes_per_token(bank, "learner", examples, recompute=recompute)
    tokens = 50 * 60
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**12)
    with bank.base.activation_checkpointing(recompute):
        peak = peak_of(lambda: capacity._try_largest(bank, "learner", examples, 50, tokens))
    held = sum(p.numel() * 4 for _, p in bank.adapters["learner"].parameters())  # gradients
    # A step may take more than what is kept, by the reserve; it must not take much less, or memory lies idle.
    assert 0.75 < (peak - held) / (per_token * tokens) < capacity._RESERVE


def peak_of(action) -> int:
    """Return the most bytes that torch held on the CPU while an action ran, beyond those it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_trying_the_largest_batch_leaves_no_gradient_and_no_other_trace(bank, monkeypatch):
    examples = examples_of(*[10, 30] * 10, *[40] * 16)
    before = {name: tensor.clone() for name, tensor in bank.adapters["learner"].state.items()}
    tried = []

    def noted(bank, batch, *rest, **named):
        tried.append(batch.layout.token_count)
        return forward_loss(bank, batch, *rest, **named)

    monkeypatch.setattr(capacity, "forward_loss", noted)
    with tiny.global_randomness_untouched():
        assert capacity.fit_budget(bank, "learner", examples, 16, "auto") == 1024
    assert max(tried) == 16 * 40  # the largest step that there can be was run
    assert all(parameter.grad is None for _, parameter in bank.adapters["learner"].parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in bank.adapters["learner"].state.items())


def test_virtual_tokens_count_into_the_largest_micro_batch(bank, monkeypatch):
    bank.remove("learner")
    bank.add("learner", PromptTuning(num_virtual_tokens=70))
    examples = examples_of(*[30] * 20)
    tried = []

    def noted(bank, batch, *rest, **named):
        tried.append(batch.layout.token_count)
        return forward_loss(bank, batch, *rest, **named)

    monkeypatch.setattr(capacity, "forward_loss", noted)
    assert capacity.fit_budget(bank, "learner", examples, 4, 400) == 400
    assert max(tried) == 70 + 4 * 30
    limited(monkeypatch, bank, examples, 95)
    with pytest.raises(CapacityError, match=r"a micro-batch of \d+ tokens needs"):
        capacity.fit_budget(bank, "learner", examples, 4, "auto")


def test_a_device_that_runs_out_gets_smaller_micro_batches_or_a_clear_error(bank, monkeypatch):
    examples = examples_of(*[30] * 20)
    run = capacity._try_largest

    def narrow(bank, name, examples, batch_size, budget):
        if budget > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(bank, name, examples, batch_size, budget)

    monkeypatch.setattr(capacity, "_try_largest", narrow)
    assert capacity.fit_budget(bank, "learner", examples, 16, "auto") == 256
    with pytest.raises(CapacityError, match=r"a micro-batch of 400 tokens does not fit the memory of cpu\. Set train"):
        capacity.fit_budget(bank, "learner", examples, 16, 400)
