"""Failing loudly: no number, no room, nothing learned; with what was done before kept."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.config.settings import TrainSettings
from onebase.data.batches import flatten
from onebase.data.examples import Example, Examples
from onebase.errors import CapacityError, ConfigError, DataError, TrainingError
from onebase.ops.loss import RowLosses
from onebase.train import checks
from onebase.train.member import Member
from tests import tiny
from tests.train import runs
from tests.train.runs import FEW, Watching, Workshop, adapter_bytes, checkpoint_names, metrics


def test_a_token_whose_embedding_is_nan_is_named_by_step_and_row_and_what_came_before_is_kept(tmp_path):
    shop = poisoned(tmp_path)
    rows = [
        *runs.definitions(6),
        {"prompt": "Define the noun dog.", "completion": "An ~ animal."},
        *runs.definitions(2),
    ]
    runs.write_rows(shop.train, rows)
    settings = shop.settings(valid=False, data={"shuffle": False}, adapter=FEW, train={"batch_size": 2, "epochs": 1})
    with pytest.raises(TrainingError, match=r"step 4: the loss is not finite.*train\.jsonl line 7\b") as caught:
        runs.run(settings, shop.folder / "run")
    assert "The 3 steps before it are kept in" in str(caught.value)
    assert checkpoint_names(shop.folder / "run") == ["step-00000003"]
    assert [record["step"] for record in metrics(shop.folder / "run")] == [1, 2, 3]


def test_a_run_that_fails_before_its_first_step_leaves_its_folder_free(tmp_path):
    shop = poisoned(tmp_path)
    runs.write_rows(shop.train, [{"prompt": "a ~", "completion": "dog"}])
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"step 1: the loss is not finite.*train\.jsonl line 1\b"):
            runs.run(shop.settings(valid=False, adapter=FEW, train={"steps": 3}), shop.folder / "run")
    runs.write_rows(shop.train, runs.definitions(4))
    assert runs.run(shop.settings(valid=False, adapter=FEW, train={"steps": 3}), shop.folder / "run").steps == 3


def test_validation_rows_whose_loss_is_nan_stop_a_run_before_its_first_step(tmp_path):
    shop = poisoned(tmp_path)
    runs.write_rows(shop.valid, [{"prompt": "a ~", "completion": "dog"}])
    with pytest.raises(TrainingError, match=r"data\.valid is not finite \(nan\) with what training starts from"):
        runs.run(shop.settings(adapter=FEW, train={"steps": 3}), shop.folder / "run")


def poisoned(folder: Path) -> Workshop:
    """Return a workshop whose model knows one token, ~, by a NaN."""
    shop = runs.workshop(folder)
    shutil.rmtree(shop.model)
    runs.model_folder(shop.model, poison="~")
    return shop


def test_a_boundless_update_stops_the_run_where_its_loss_or_validation_is_no_number(shop, tmp_path):
    boundless = {"lora_alpha": 9e8, "loraplus_lr_ratio": 1e6, "target_modules": "mlp"}
    settings = shop.settings(adapter=boundless, train={"steps": 4, "learning_rate": 1000, "warmup_ratio": 0.0})
    with pytest.raises(TrainingError, match="learning_rate"):
        runs.run(settings, tmp_path / "run")
    settings = shop.settings(adapter=boundless, train={"steps": 1, "learning_rate": 1000, "warmup_ratio": 0.0})
    with pytest.raises(TrainingError, match=r"data\.valid is not finite .* with what was learned in 1 steps"):
        runs.run(settings, tmp_path / "short")
    assert not (tmp_path / "short" / "adapter").exists()


def test_tensors_that_do_not_move_in_three_steps_are_named(shop, tmp_path):
    settings = shop.settings(valid=False, adapter=FEW, train={"steps": 6, "learning_rate": 1e-30})
    with pytest.raises(TrainingError, match=r"q_proj\.lora_A\.weight: has not changed in three steps"):
        runs.run(settings, tmp_path / "run")
    result = runs.run(
        shop.settings(valid=False, adapter=FEW, train={"steps": 2, "learning_rate": 1e-30}), tmp_path / "2"
    )
    assert result.steps == 2


@pytest.mark.parametrize("step", [2, 3])
def test_a_disk_that_is_full_at_a_steps_metrics_leaves_the_checkpoint_before(shop, tmp_path, monkeypatch, step):
    settings = shop.settings(adapter=FEW, train={"steps": 4, "save_every": 1})
    out = tmp_path / "run"
    full_disk_at(monkeypatch, "metrics.jsonl", 2 * step - 1)  # each step's are written, then synced by its checkpoint
    with pytest.raises(CapacityError, match=rf"metrics of step {step}: the disk is full.*step-0000000{step - 1}"):
        runs.run(settings, out)
    monkeypatch.undo()
    goes_on(shop, settings, out, tmp_path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "best.safetensors", "state.json", "manifest.json"])
def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before(shop, tmp_path, monkeypatch, name):
    settings = shop.settings(adapter=FEW, train={"steps": 4, "save_every": 1, "eval_every": 1})
    out = tmp_path / "run"
    full_disk_at(monkeypatch, name, 2)
    with pytest.raises(CapacityError, match=r"checkpoint of step 2: the disk is full.*can go on from .*step-00000001"):
        runs.run(settings, out)
    monkeypatch.undo()
    assert checkpoint_names(out) == ["step-00000001"]
    goes_on(shop, settings, out, tmp_path)


def test_a_disk_that_is_full_at_the_adapter_leaves_the_checkpoint_before(shop, tmp_path, monkeypatch):
    settings = shop.settings(adapter=FEW, train={"steps": 4, "save_every": 1})
    full_disk_at(monkeypatch, "adapter_model.safetensors", 1)
    with pytest.raises(CapacityError, match="cannot write the adapter: the disk is full"):
        runs.run(settings, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "adapter").exists()
    goes_on(shop, settings, tmp_path / "run", tmp_path)


def full_disk_at(monkeypatch, name: str, number: int) -> None:
    """Let the disk be full when a file of this name is opened for writing for the `number`th time."""
    import errno
    import os

    opened, seen = Path.open, []

    def open_or_fail(path, mode="r", *rest, **more):
        if path.name == name and mode != "r" and mode != "rb":
            seen.append(path)
            if len(seen) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", open_or_fail)


def goes_on(shop, settings, out, tmp_path):
    """The run goes on to what it would have been."""
    runs.run(settings, out, resume=True)
    runs.run(settings, tmp_path / "whole")
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    assert metrics(out) == metrics(tmp_path / "whole")


def test_a_disk_too_small_for_the_run_is_noticed_before_the_first_step(shop, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    watching = Watching()
    with pytest.raises(CapacityError, match=r"the run needs about .* MB free"):
        runs.run(shop.settings(adapter=FEW, train={"steps": 2}), tmp_path / "run", watching=watching)
    assert watching.steps == [] and watching.plans == []
    monkeypatch.undo()
    assert runs.run(shop.settings(adapter=FEW, train={"steps": 2}), tmp_path / "run").steps == 2


@pytest.mark.skipif(__import__("os").geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to_is_named(shop, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="permission denied"):
        runs.run(shop.settings(train={"steps": 2}), tmp_path / "run")


def test_a_fraction_that_leaves_a_side_without_rows_is_an_error_that_names_it(shop, tmp_path):
    one = tmp_path / "one.jsonl"
    runs.write_rows(one, [{"prompt": "Define the noun dog.", "completion": "An animal."}] * 3)
    settings = shop.settings(f"data.train={one}", "data.valid=0.5", valid=False, adapter=FEW, train={"steps": 2})
    with pytest.raises(DataError, match=r"splitting 3 rows .* leaves no (validation|training) row.*data\.valid"):
        runs.run(settings, tmp_path / "run")


def test_a_tensor_that_no_gradient_reaches_is_named_after_the_first_backward():
    model = tiny.model_of("llama")
    model.model.layers[0].mlp.unused = torch.nn.Linear(32, 32)
    bank = Bank(Base(model))
    adapter = bank.add("learner", Lora(r=2))
    settings = TrainSettings(steps=2, batch_size=2)
    member = Member(bank, adapter, tiny.examples_of(5, 9), settings, shuffle=True, budget=99)
    before = {name: tensor.clone() for name, tensor in adapter.state.items()}
    with pytest.raises(TrainingError, match=r"2 problems .*'learner'") as caught:
        member.run_step()
    for letter in "AB":
        assert f"model.layers.0.mlp.unused.lora_{letter}.weight: no gradient reaches it" in str(caught.value)
    assert member.books.step == 0 and all(torch.equal(before[name], t) for name, t in adapter.state.items())


@pytest.mark.parametrize(
    ("step", "words"), [(0, r"lora_B\.weight: its gradient is not finite"), (1, "step 2: .* norm")]
)
def test_a_gradient_that_is_no_number_stops_the_step_before_it_changes_anything(step, words):
    bank = Bank(tiny.base_of("llama"))
    adapter = bank.add("learner", Lora(r=2))
    settings = TrainSettings(steps=2, batch_size=2)
    member = Member(bank, adapter, tiny.examples_of(5, 9), settings, shuffle=True, budget=99)
    for _ in range(step):
        member.run_step()
    before = {name: tensor.clone() for name, tensor in adapter.state.items()}
    _, parameter = list(adapter.parameters())[-1]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=words):
        member.run_step()
    assert member.books.step == step and all(torch.equal(before[name], t) for name, t in adapter.state.items())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_loss_that_is_no_number_is_laid_at_its_own_rows_door(number):
    """Also that of an example's second token, which its very first row predicts."""
    marks = np.array([False, True, True])
    examples = Examples(Example(np.array([5, 6, 7], np.int32), marks, f"row {n}", {}) for n in range(3))
    batch = flatten(list(examples), range(3), "learner")
    for label in (0, 1):
        losses = torch.zeros(6)
        losses[2 * number + label] = float("inf")
        with pytest.raises(TrainingError, match=rf"\(1 of 6 labelled tokens\), first in row {number}\."):
            checks.check_losses(RowLosses(losses, losses == 0), batch, examples, 1)
