"""transformers' Trainer with our PeftModel: where peft is installed and where it is not; checkpoints, best model, resume."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import onebase.peft as ours
from tests.data.tiny import byte_tokenizer
from tests.peft.pairs import CLOSE, GPT2, assert_same_files, front_of, ids_of, model_of, quietly, trained


@pytest.fixture(params=["with peft", "without peft"])
def peft_there(request, monkeypatch) -> bool:
    """transformers as it is with and without peft in the environment."""
    if request.param == "without peft":
        for module in ("transformers.trainer", "transformers.trainer_utils"):
            monkeypatch.setattr(f"{module}.is_peft_available", lambda: False)
            monkeypatch.delattr(f"{module}.PeftModel")
    return request.param == "with peft"


def trainer_of(model: Any, folder: Path, **arguments: Any) -> Any:
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1} | arguments
    rows = [{"input_ids": ids, "labels": ids, "unused": 3} for ids in ids_of(8)]
    args = transformers.TrainingArguments(
        output_dir=str(folder), logging_steps=1, report_to="none", use_cpu=True, **{"save_strategy": "no", **given}
    )
    return transformers.Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("peft_there")
@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_a_trainer_trains_exactly_the_adapter_and_saves_it(arguments, tmp_path) -> None:
    mine = front_of(ours, "gpt2", "LoraConfig", target_modules=GPT2, task_type="CAUSAL_LM")
    before = {name: p.detach().clone() for name, p in mine.named_parameters()}
    trainer = trainer_of(mine, tmp_path, **arguments)
    quietly(trainer.train)
    moved = {name for name, p in mine.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*trained(mine)}
    assert mine.training
    trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "model.safetensors").exists()
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(ours.get_peft_model_state_dict(mine))


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({}, {}),
        ({"gradient_checkpointing": True}, {"use_dora": True}),
        ({"label_smoothing_factor": 0.1}, {}),
        ({"gradient_accumulation_steps": 2}, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_losses_predictions_and_files_are_peft_s(arguments, fields, tmp_path) -> None:
    losses, predictions = [], []
    for lib in (peft, ours):
        trainer = trainer_of(
            front_of(lib, "gpt2", "LoraConfig", target_modules=GPT2, task_type="CAUSAL_LM", **fields),
            tmp_path / lib.__name__, **arguments,
        )  # fmt: skip
        quietly(trainer.train)
        trainer.save_model()
        losses.append([*losses_of(trainer), trainer.evaluate()["eval_loss"]])
        predictions.append(torch.tensor(trainer.predict(trainer.eval_dataset).predictions[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-4, atol=1e-5)
    assert_same_files(tmp_path / "peft", tmp_path / "onebase.peft")


def test_a_trainer_resumes_and_takes_the_best_model_where_peft_is_installed(tmp_path) -> None:
    fields: dict[str, Any] = {"target_modules": GPT2, "task_type": "CAUSAL_LM"}
    whole = trainer_of(
        front_of(ours, "gpt2", "LoraConfig", **fields), tmp_path / "a", save_steps=2, save_strategy="steps"
    )
    quietly(whole.train)
    resumed = trainer_of(front_of(ours, "gpt2", "LoraConfig", seed=99, **fields), tmp_path / "b")
    quietly(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")))
    for name, tensor in trained(whole.model).items():
        torch.testing.assert_close(trained(resumed.model)[name], tensor, **CLOSE)
    best = trainer_of(
        front_of(ours, "gpt2", "LoraConfig", **fields), tmp_path / "c", save_strategy="steps", eval_strategy="steps",
        save_steps=1, eval_steps=1, load_best_model_at_end=True, learning_rate=3.0,
    )  # fmt: skip
    quietly(best.train)
    state = json.loads((Path(best.state.best_model_checkpoint) / "trainer_state.json").read_text())
    assert best.evaluate()["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-4)


def test_a_prompt_is_trained_too(tmp_path) -> None:
    losses = []
    for lib in (peft, ours):
        model = front_of(lib, "gpt2", "PromptTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM")
        trainer = trainer_of(model, tmp_path / lib.__name__)
        quietly(trainer.train)
        quietly(trainer.save_model)
        losses.append(losses_of(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_files(tmp_path / "peft", tmp_path / "onebase.peft")


def test_what_a_trainer_saved_is_opened_again(tmp_path) -> None:
    mine = front_of(ours, "gpt2", "LoraConfig", target_modules=GPT2)
    trainer = trainer_of(mine, tmp_path)
    quietly(trainer.train)
    trainer.save_model()
    again = ours.PeftModel.from_pretrained(model_of("gpt2"), tmp_path)
    mine.eval()
    assert torch.equal(again(input_ids=ids_of()).logits, mine(input_ids=ids_of()).logits)


def test_trl_s_trainer_takes_it_for_what_it_is(tmp_path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = Dataset.from_list([{"text": "the cat ran away " * (1 + i % 2)} for i in range(8)])
    losses = []
    for lib in (peft, ours):
        model = front_of(lib, "gpt2", "LoraConfig", target_modules=GPT2, changes={"vocab_size": len(tokenizer)})
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none",
            use_cpu=True, bf16=False, learning_rate=1e-2, save_strategy="no",
        )  # fmt: skip
        trainer = quietly(lambda m=model, a=args: SFTTrainer(m, a, train_dataset=rows, processing_class=tokenizer))
        quietly(trainer.train)
        losses.append(losses_of(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]
