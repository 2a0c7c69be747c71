"""Tasks on whole examples: flat batches, pooled by what a self-check found, learn what transformers and peft learn."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import AdapterSettings, BitFit, Full, LnTuning, Lora, PrefixTuning, PromptTuning
from onebase.config.settings import TrainSettings
from onebase.data.batches import batch_of_step
from onebase.errors import TargetError
from onebase.files.peft_format import read_adapter
from onebase.measure.forward import batches_of, forward_loss, task_logits
from onebase.measure.judge import judge
from onebase.train.member import Member
from onebase.train.opening import labels_of, put_on
from onebase.train.saving import write
from tests import tiny
from tests.classifiers import KINDS, labelled_examples, model_of, padded

LENGTHS = (4, 17, 9, 30, 5, 12)
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def base_of(kind: str, *, problem: Any = PROBLEMS[0], model: Any = None, fresh: tuple[str, ...] = ()) -> Base:
    """Return a base opened for its task; its head, and what else is said, is taken for new."""
    model = model or model_of(kind, problem)
    heads = [name for name, _ in model.named_children() if name in ("classifier", "score", "pre_classifier", "head")]
    base = Base(model, fresh=(*fresh, *heads))
    base.open_for_task()
    return base


def our_logits(bank: Bank, name: str | None, examples: Any, budget: int = 40) -> torch.Tensor:
    with torch.no_grad():
        batches = batches_of(bank, name, examples, range(len(examples)), budget)
        return torch.cat([task_logits(bank, batch) for batch in batches])


@pytest.mark.parametrize("kind", KINDS)
def test_flat_examples_get_the_numbers_of_the_models_own_padded_forward(kind: str) -> None:
    model, examples = model_of(kind), labelled_examples(*LENGTHS)
    ids, mask, _ = padded(list(examples))
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
    base = base_of(kind, model=model)
    assert not isinstance(base.task_head, str) and base.task_head.pooling == KINDS[kind][2]
    torch.testing.assert_close(our_logits(Bank(base), None, examples), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", ["bert", "modernbert-mean", "llama"])
def test_the_loss_is_that_of_the_models_own_forward(kind: str, problem: Any) -> None:
    model, examples = model_of(kind, problem), labelled_examples(*LENGTHS, problem=problem)
    ids, mask, targets = padded(list(examples))
    with torch.no_grad():
        labels = targets.float() if problem != PROBLEMS[0] else targets
        own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    bank = Bank(base_of(kind, problem=problem, model=model))
    batches = list(batches_of(bank, None, examples, range(len(examples)), 40))
    with torch.no_grad():
        ours = sum(forward_loss(bank, batch, 1 / len(examples))[0] for batch in batches)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    assert judge(bank, None, examples).loss == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_a_training_is_that_of_transformers_and_peft(kind: str) -> None:
    examples = labelled_examples(*LENGTHS)
    settings = TrainSettings(steps=12, batch_size=4, learning_rate=3e-3, lr_scheduler_type="constant", warmup_steps=0)
    bank = Bank(base_of(kind))
    adapter = bank.add("a", Lora(r=4, lora_alpha=8), seed=5)
    before = {name: tensor.clone() for name, tensor in adapter.state.items()}
    member = Member(bank, adapter, examples, settings, shuffle=True, budget=40)
    ours = [member.run_step().loss for _ in range(12)]
    modules = list({name.rpartition(".lora_")[0] for name in before if ".lora_" in name})
    saved = list({name.partition(".")[0] for name in before if ".lora_" not in name})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, modules_to_save=saved)
    theirs = peft.get_peft_model(model_of(kind), config)
    trained = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    for key, parameter in trained.items():
        plain = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
        parameter.data.copy_(before[plain])
    assert len(trained) == len(before)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    for step, ours_now in enumerate(ours):
        ids, mask, targets = padded([examples[int(i)] for i in batch_of_step(len(examples), step, 4, 0)])
        loss = theirs(input_ids=ids, attention_mask=mask, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours_now == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_numbers_that_are_none_are_told_by_the_loss_and_not_as_a_fault_of_the_rows(problem: Any) -> None:
    bank = Bank(base_of("bert", problem=problem))
    for name, tensor in bank.add("a", Lora(r=2)).state.items():
        if name == "classifier.bias":
            tensor.fill_(float("nan"))
    scores = judge(bank, "a", labelled_examples(*LENGTHS, problem=problem))
    assert scores.loss != scores.loss and not scores.metrics


METHODS = [Lora(r=4), PromptTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3)]
PEFTS = {
    Lora: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]),
    PromptTuning: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    PrefixTuning: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings.method)
def test_a_classifier_that_we_saved_is_the_same_in_peft(settings: AdapterSettings, tmp_path: Path) -> None:
    examples, bank = labelled_examples(*LENGTHS), Bank(base_of("bert"))
    tiny.fill_(bank.add("a", settings))
    write(tmp_path / "a", bank.base, bank.adapters["a"], task="classify")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    theirs = peft.PeftModel.from_pretrained(model_of("bert"), tmp_path / "a").eval()
    ids, mask, _ = padded(list(examples))
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(our_logits(bank, "a", examples), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PEFTS, ids=lambda kind: kind.__name__)
def test_a_classifier_that_peft_saved_is_the_same_here_with_its_head(kind: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(model_of("bert"), PEFTS[kind]).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "a")
    examples, stored = labelled_examples(*LENGTHS), read_adapter(tmp_path / "a")
    labels = labels_of(stored)
    assert labels is not None and labels.outputs == 3
    bank, _ = put_on(base_of("bert"), stored)
    ids, mask, _ = padded(list(examples))
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(our_logits(bank, "adapter", examples), wanted, rtol=1e-4, atol=1e-4)


def test_classifiers_of_several_adapters_in_one_batch_are_those_of_each_alone() -> None:
    bank, examples = Bank(base_of("bert")), labelled_examples(*LENGTHS)
    every: list[AdapterSettings] = [Lora(r=4), PromptTuning(num_virtual_tokens=2), Full(target_modules=["classifier"])]
    for seed, settings in enumerate(every):
        tiny.fill_(bank.add(settings.method, settings, seed=seed), seed=seed)
    names = list(bank.adapters)
    alone = {name: our_logits(bank, name, examples) for name in names}
    batches = [next(batches_of(bank, name, examples, range(len(examples)), 1000)) for name in names]
    with torch.no_grad():
        together = task_logits(bank, tiny.together(*batches))
    torch.testing.assert_close(together, torch.cat([alone[name] for name in names]), rtol=1e-5, atol=1e-5)


def alone_and_together(bank: Bank, settings: AdapterSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of two filled adapters with the same settings, one after the other and in one batch."""
    examples = labelled_examples(*LENGTHS)
    for seed, name in enumerate("ab"):
        tiny.fill_(bank.add(name, settings, seed=seed), seed=seed)
    batches = [next(batches_of(bank, name, examples, range(len(examples)), 1000)) for name in "ab"]
    with torch.no_grad():
        together = task_logits(bank, tiny.together(*batches))
    return torch.cat([our_logits(bank, name, examples) for name in "ab"]), together


@pytest.mark.parametrize("settings", [BitFit(), LnTuning(), Full()], ids=lambda settings: settings.method)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "roberta"])
def test_methods_that_choose_all_of_a_kind_leave_the_head_to_its_own_copy(kind: str, settings: Any) -> None:
    bank = Bank(base_of(kind))
    if (kind, settings.method) == ("modernbert", "bitfit"):
        with pytest.raises(TargetError, match="outside its head it has none"):
            bank.add("a", settings)
        return
    alone, together = alone_and_together(bank, settings)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    head = {name for name, _ in bank.base.model.named_parameters() if name.startswith("classifier.")}
    head = {name.replace(".base_layer", "") for name in head}
    assert head and head <= {name for name, _ in bank.adapters["a"].parameters()}


def test_a_pooler_that_no_file_held_weights_for_sees_examples() -> None:
    """As in a BERT that was saved with its head for masked tokens."""
    bank = Bank(base_of("bert", fresh=("bert.pooler.dense",)))
    alone, together = alone_and_together(bank, Lora(r=2))
    assert bank.adapters["a"].settings.modules_to_save == ["bert.pooler.dense", "classifier"]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_a_new_head_begins_anew_for_every_seed_and_the_same_for_one() -> None:
    bank = Bank(base_of("roberta"))
    heads = [
        {name: t for name, t in bank.add(f"a{n}", Lora(r=2), seed=seed).state.items() if "classifier" in name}
        for n, seed in enumerate((0, 0, 1))
    ]
    weights = [name for name in heads[0] if name.endswith("weight")]
    assert len(weights) == 2  # a dense layer and the output
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not any(torch.equal(heads[0][name], heads[2][name]) for name in weights)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_adapter_brings_the_head_and_all_linear_leaves_it_out(kind: str) -> None:
    head = "classifier" if kind == "bert" else "score"
    bank = Bank(base_of(kind))
    adapter = bank.add("a", Lora(r=2))
    assert head not in adapter.target_paths and adapter.settings.modules_to_save == [head]
    assert f"{head}.weight" in adapter.state
    whole = bank.add("b", Full())
    assert whole.settings.modules_to_save is None and f"{head}.weight" in whole.state
