"""What a run leaves behind, what its numbers mean, and what decides them."""

import hashlib
import json

import pytest
import torch
import yaml

from onebase.base.model import load
from onebase.config.reading import read_settings
from onebase.errors import ConfigError, FileFormatError
from onebase.measure.evaluate import EVALUATION_TOKENS, evaluate
from onebase.train.data import load_data
from onebase.train.opening import open_adapter
from tests.train import runs
from tests.train.runs import FEW, Watching, adapter_bytes, checkpoint_names, metrics, result_of


def test_the_validation_loss_of_the_result_is_that_of_the_adapter_on_disk(shop, finished):
    out, watching = finished
    result = result_of(out)
    settings = read_settings(out / "config.yaml")
    opened = open_adapter(out)
    valid = load_data(settings.data, settings.task, opened.bank.base).valid
    assert valid is not None
    scores = evaluate(opened.bank, opened.adapter.name, valid.examples)
    losses = {step: found.loss for step, found in watching.scores}
    assert scores.loss == result.valid_loss == losses[result.best_step] == min(loss for s, loss in losses.items() if s)
    assert result.best_step < result.steps  # else the last weights would do
    assert losses[result.steps] != result.valid_loss


def test_validation_happens_before_the_first_step_every_n_steps_and_after_the_last(finished):
    out, watching = finished
    result = result_of(out)
    assert [step for step, _ in watching.scores] == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert result.valid_loss_before == watching.scores[0][1].loss
    recorded = {record["step"]: record["valid_loss"] for record in metrics(out) if "valid_loss" in record}
    assert recorded == {step: scores.loss for step, scores in watching.scores if step}


def test_the_validation_loss_before_the_first_step_is_the_bases(shop, finished):
    settings = read_settings(finished[0] / "config.yaml")
    from onebase.adapters.bank import Bank

    bank = Bank(load(str(shop.model), dtype="float32", device="cpu"))
    valid = load_data(settings.data, settings.task, bank.base).valid
    assert valid is not None
    assert evaluate(bank, None, valid.examples).loss == result_of(finished[0]).valid_loss_before


def test_the_training_loss_is_the_mean_over_all_labelled_tokens_of_the_run(finished):
    out, watching = finished
    steps = watching.steps
    mean = sum(step.loss * step.labelled_tokens for step in steps) / sum(step.labelled_tokens for step in steps)
    result = result_of(out)
    assert result.train_loss == pytest.approx(mean, rel=1e-12)
    assert result.train_loss != pytest.approx(sum(s.loss for s in steps) / len(steps), rel=1e-4)  # no mean of means


def test_a_result_counts_what_was_done(shop, finished):
    out, watching = finished
    result, plan = result_of(out), watching.plans[0]
    assert result.steps == plan.steps == 15 == len(watching.steps)
    assert result.examples == 5 * plan.examples == 50
    assert result.tokens == 5 * plan.tokens == sum(step.tokens for step in watching.steps)
    assert sum(step.labelled_tokens for step in watching.steps) == 5 * plan.labelled_tokens
    assert result.seconds == pytest.approx(sum(step.seconds for step in watching.steps))
    assert result.examples_per_s == pytest.approx(result.examples / result.seconds)
    assert result.tokens_per_s == pytest.approx(result.tokens / result.seconds)
    stored = out / "adapter" / "adapter_model.safetensors"
    assert result.adapter_bytes == stored.stat().st_size
    tensors = open_adapter(out).adapter.state
    assert result.trainable_parameters == sum(t.numel() for t in tensors.values())
    assert result.optimizer_state_bytes == 8 * result.trainable_parameters + 4 * len(tensors)  # and a count a tensor
    base = load(str(shop.model), dtype="float32", device="cpu")
    assert result.total_parameters == base.parameter_count + result.trainable_parameters
    assert result.base_fingerprint == base.fingerprint
    assert plan.full_optimizer_bytes == 8 * plan.total_parameters
    assert result.peak_rss_bytes > 10**7 and result.peak_device_bytes == 0


def test_training_changes_no_byte_of_the_base(shop, tmp_path):
    def digests():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(shop.model.iterdir())}

    before = digests()
    assert "model.safetensors" in before
    runs.run(shop.settings(adapter=FEW, train={"steps": 3}), tmp_path / "run")
    assert digests() == before
    base = load(str(shop.model), dtype="float32", device="cpu")
    held = {name: t.clone() for name, t in base.model.state_dict().items()}
    from onebase import api

    bank = api.Bank(base)
    bank.add("a", api.Lora(r=2))
    api.train(bank, {"a": api.Job(data=runs.definitions(4), steps=3, threads=1)})
    bank.remove("a")
    now = base.model.state_dict()
    assert held.keys() == now.keys() and all(torch.equal(held[name], now[name]) for name in held)


def test_the_settings_of_a_run_are_written_resolved_and_run_again_to_the_same_adapter(finished, tmp_path):
    out, _ = finished
    settings = read_settings(out / "config.yaml")
    assert settings == settings.resolved()
    runs.run(settings, tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(out)
    assert (tmp_path / "again" / "config.yaml").read_bytes() == (out / "config.yaml").read_bytes()


def test_the_learning_rate_that_the_method_decides_is_written_down(shop, tmp_path):
    settings = shop.settings(adapter=FEW, train={"steps": 1, "learning_rate": None, "warmup_ratio": 0.0})
    runs.run(settings, tmp_path / "run")
    assert read_settings(tmp_path / "run" / "config.yaml").train.learning_rate == 1e-3
    assert metrics(tmp_path / "run")[0]["learning_rate"] == 1e-3


def test_an_adapter_holds_the_tokenizer_the_card_and_the_base_but_no_time_and_no_place(shop, finished, tmp_path):
    adapter = finished[0] / "adapter"
    names = {path.name for path in adapter.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "onebase.json", "README.md", "tokenizer.json"}
    assert names >= expected | {"chat_template.jinja"}
    record = json.loads((adapter / "onebase.json").read_text())
    assert record["base_fingerprint"] == result_of(finished[0]).base_fingerprint
    assert "Zebra" not in (adapter / "README.md").read_text()  # no row ends up in the card
    runs.run(read_settings(finished[0] / "config.yaml"), tmp_path / "elsewhere")
    for path in adapter.iterdir():
        again = (tmp_path / "elsewhere" / "adapter" / path.name).read_text(errors="replace")
        assert path.read_text(errors="replace").replace("finished", "elsewhere") == again, path.name


# ------------------------------------------------------------------------------------------------------- what decides


@pytest.fixture(scope="module")
def four_steps(shop, tmp_path_factory):
    out = tmp_path_factory.mktemp("four") / "run"
    runs.run(shop.settings(valid=False, adapter=FEW, train={"steps": 4}), out)
    return out


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"batch_size": 5},
        {"learning_rate": 0.02},
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "step", "lr_step_size": 1},
        {"lr_scheduler_type": "step", "lr_step_size": 1, "lr_step_gamma": 0.5},
        {"warmup_ratio": 0.9},
        {"warmup_steps": 3},
        {"weight_decay": 0.5},
        {"max_grad_norm": 1e-4},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_epsilon": 1e-3},
    ],
    ids=str,
)
def test_every_setting_that_should_changes_the_adapter(shop, four_steps, tmp_path, changed):
    runs.run(shop.settings(valid=False, adapter=FEW, train={"steps": 4} | changed), tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(four_steps)


def test_the_tokens_of_an_evaluation_are_those_that_are_set_and_change_no_loss(shop, tmp_path, monkeypatch):
    from onebase.train import loop

    asked = []

    def noted(*parts, batch_tokens, objective):
        asked.append(batch_tokens)
        return evaluate(*parts, batch_tokens=batch_tokens)

    monkeypatch.setattr(loop, "score", noted)
    for name, tokens in (("few", 30), ("auto", "auto")):
        runs.run(shop.settings(adapter=FEW, train={"steps": 1}, eval={"batch_tokens": tokens}), tmp_path / name)
    assert asked == [30, 30, EVALUATION_TOKENS, EVALUATION_TOKENS]
    assert result_of(tmp_path / "few").valid_loss == pytest.approx(result_of(tmp_path / "auto").valid_loss, rel=1e-6)


def test_the_last_weights_are_kept_where_keep_best_is_off(shop, finished, tmp_path):
    settings = read_settings(finished[0] / "config.yaml", ["train.keep_best=false"])
    watching = Watching()
    result = runs.run(settings, tmp_path / "run", watching=watching)
    assert result.best_step is None
    assert result.valid_loss == watching.scores[-1][1].loss != result_of(finished[0]).valid_loss
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(finished[0])


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_run_after_as_many_evaluations_without_a_lower_loss(finished, tmp_path, patience):
    override = f"train.early_stopping_patience={patience}"
    settings = read_settings(finished[0] / "config.yaml", [override, "train.eval_every=1"])
    watching = Watching()
    result = runs.run(settings, tmp_path / "run", watching=watching)
    losses = [scores.loss for step, scores in watching.scores if step]
    without = 0
    for number, loss in enumerate(losses):  # the rule, said again
        without = 0 if loss < min(losses[:number], default=float("inf")) else without + 1
        assert (without == patience) == (number == len(losses) - 1)
    assert result.steps == len(losses) < 15
    assert result.best_step == 1 + losses.index(min(losses))


def test_weights_worse_than_the_bases_are_still_those_that_were_learned_best(shop, tmp_path):
    """The step before the first is none of the run's: an adapter that changes nothing is never the result."""
    runs.run(shop.settings(adapter=FEW, train={"steps": 2, "learning_rate": 0.02}), tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert result.valid_loss > result.valid_loss_before
    assert result.best_step == 2


def test_checkpoints_come_every_n_steps_and_the_newest_stay(shop, tmp_path):
    train = {"steps": 9, "save_every": 2, "keep_checkpoints": 3}
    runs.run(shop.settings(adapter=FEW, train=train), tmp_path / "run")
    assert checkpoint_names(tmp_path / "run") == ["step-00000004", "step-00000006", "step-00000008"]


def test_a_long_run_saves_by_the_clock_where_no_number_of_steps_is_given(shop, tmp_path, monkeypatch):
    from onebase.train import loop

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    watching = Watching()
    runs.run(shop.settings(adapter=FEW, train={"steps": 3}), tmp_path / "run", watching=watching)
    assert [path.name for path in watching.files] == ["step-00000001", "step-00000002", "adapter"]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
    runs.run(shop.settings(adapter=FEW, train={"steps": 3}), tmp_path / "short")
    assert checkpoint_names(tmp_path / "short") == []


def test_recomputed_activations_change_no_bit(shop, tmp_path):
    adapter = FEW | {"lora_dropout": 0.3}
    for name, recompute in (("kept", False), ("recomputed", True)):
        train = {"steps": 3, "activation_checkpointing": recompute}
        runs.run(shop.settings(adapter=adapter, train=train), tmp_path / name)
    assert adapter_bytes(tmp_path / "kept") == adapter_bytes(tmp_path / "recomputed")


def test_a_warm_start_begins_where_the_other_run_ended(shop, finished, tmp_path):
    out, _ = finished
    watching = Watching()
    settings = read_settings(out / "config.yaml", [f"adapter.init_from={out}", "train.steps=2"])
    runs.run(settings, tmp_path / "warm", watching=watching)
    assert watching.scores[0][1].loss == result_of(out).valid_loss


def test_a_warm_start_from_another_bases_adapter_is_refused(shop, finished, tmp_path):
    other = runs.model_folder(tmp_path / "other", seed=1)
    settings = shop.settings("train.steps=2", f"adapter.init_from={finished[0]}", f"model={other}", adapter=FEW)
    with pytest.raises(FileFormatError, match=r"init_from.*was trained on"):
        runs.run(settings, tmp_path / "warm")


def test_a_warm_start_of_another_rank_is_refused_by_name(shop, finished, tmp_path):
    settings = shop.settings("train.steps=2", f"adapter.init_from={finished[0]}", adapter=FEW | {"r": 3})
    with pytest.raises(FileFormatError, match=r"q_proj\.lora_A\.weight must have shape \(3, 32\), got \(4, 32\)"):
        runs.run(settings, tmp_path / "warm")


def test_the_configuration_file_of_a_run_is_yaml_that_people_can_read(finished):
    written = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert written["adapter"]["r"] == 4 and written["train"]["learning_rate"] == 0.05


def test_a_warm_start_under_another_scaling_is_refused(shop, finished, tmp_path):
    settings = shop.settings("train.steps=2", f"adapter.init_from={finished[0]}", adapter=FEW | {"lora_alpha": 5})
    with pytest.raises(ConfigError, match=r"init_from.*scaling.*lora_alpha"):
        runs.run(settings, tmp_path / "warm")
