"""The Python interface: the example of the README as it stands, the types it gives, and what it shares with `onebase train`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import onebase as ob
from onebase.errors import ConfigError, DataError, FileFormatError, TargetError, TrainingError
from onebase.train.opening import open_adapter
from tests.train import runs
from tests.train.runs import FEW, Watching, adapter_bytes


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with runs.own_home(folder / "home"):
        yield runs.workshop(folder)


@pytest.fixture
def base(shop):
    return ob.load(str(shop.model), dtype="float32", device="cpu")


def test_the_example_runs_and_gives_what_it_says(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows, test_rows = runs.definitions(16), runs.definitions(4, seed=1)

    base = ob.load(str(shop.model))
    bank = ob.Bank(base)
    bank.add("math", ob.Lora(r=16, lora_alpha=32))
    before = ob.evaluate(bank, None, test_rows)
    result = ob.train(bank, {"math": ob.Job(data=rows, learning_rate=2e-4, epochs=1)})
    print(ob.evaluate(bank, "math", test_rows))
    bank.save("math", "adapters/math")

    assert isinstance(base, ob.Base)
    assert isinstance(bank, ob.Bank)
    assert isinstance(bank.adapters["math"], ob.Adapter)
    assert isinstance(result, ob.Result)
    assert result.steps == 1 and result.examples == 16
    assert "loss=" in capsys.readouterr().out
    after = ob.evaluate(bank, "math", test_rows)
    assert isinstance(after, ob.Scores)
    assert after.loss < before.loss
    opened = open_adapter(Path("adapters/math"))
    assert {n: t.tolist() for n, t in opened.adapter.state.items()} == {
        n: t.tolist() for n, t in bank.adapters["math"].state.items()
    }
    assert ob.model_path(str(shop.model)) == shop.model


def test_every_name_that_is_promised_is_there():
    for name in ob.__all__:
        assert getattr(ob, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ob.nothing


def test_the_function_train_wins_over_the_room_of_that_name_in_any_order():
    script = """
import onebase
from onebase import train
assert callable(train)
from onebase.train import run
import onebase.train.loop
assert callable(onebase.train) and onebase.train is train and run.train_run
"""
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": source})


def test_training_from_python_equals_onebase_train(shop, base, tmp_path):
    settings = shop.settings(adapter=FEW | {"lora_dropout": 0.1}, train={"steps": 5, "eval_every": 2, "seed": 3})
    told = runs.run(settings, tmp_path / "run")
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=4, lora_alpha=8, lora_dropout=0.1, **FEW), seed=3)
    job = ob.Job(
        data=shop.train, valid=shop.valid, steps=5, eval_every=2, seed=3, batch_size=4, learning_rate=0.01, threads=1
    )
    result = ob.train(bank, {"a": job})
    bank.save("a", tmp_path / "saved")
    stored = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    assert stored == adapter_bytes(tmp_path / "run")
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("saved", "run/adapter")]
    told_of = [card.partition("## Training")[2].partition("## Settings")[0] for card in cards]
    assert told_of[0] == told_of[1] and "5 steps" in told_of[0] and "| valid |" in told_of[0]
    assert isinstance(result, ob.Result)
    for name in ("steps", "tokens", "train_loss", "valid_loss_before", "valid_loss", "best_step", "base_fingerprint"):
        assert getattr(result, name) == getattr(told, name), name


def test_jobs_train_one_after_the_other_and_leave_each_other_alone(shop, base):
    rows = runs.definitions(8)

    def alone() -> dict[str, torch.Tensor]:
        bank = ob.Bank(base)
        bank.add("b", ob.Lora(r=4), seed=2)
        ob.train(bank, {"b": ob.Job(data=rows, steps=3, learning_rate=0.01)})
        state = {name: tensor.clone() for name, tensor in bank.adapters["b"].state.items()}
        bank.remove("b")
        return state

    expected = alone()
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=3))
    bank.add("b", ob.Lora(r=4), seed=2)
    jobs = {name: ob.Job(data=rows, steps=3, learning_rate=0.01) for name in ("a", "b")}
    results = ob.train(bank, jobs)
    assert isinstance(results, dict) and list(results) == ["a", "b"]
    assert all(torch.equal(expected[name], tensor) for name, tensor in bank.adapters["b"].state.items())


def test_rows_are_evaluated_as_the_job_read_them(shop, base):
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=4))
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in runs.definitions(4)]
    reading = {"columns": {"prompt": "question", "completion": "answer"}}
    with pytest.raises(DataError):
        ob.evaluate(bank, "a", renamed)
    ob.train(bank, {"a": ob.Job(data=renamed, reading=reading, steps=1)})
    assert ob.evaluate(bank, "a", renamed).examples == 4


@pytest.mark.parametrize("task", ["chat", "text"])
def test_the_rows_of_a_loaded_adapter_are_read_as_in_its_training(base, tmp_path, task):
    chats = [{"question": row["prompt"], "answer": row["completion"]} for row in runs.definitions(4)]
    rows: list[dict[str, str]] = chats
    reading: dict[str, Any] = {"columns": {"prompt": "question", "completion": "answer"}, "system": "Be brief."}
    if task == "chat":
        (tmp_path / "chat.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
                                             "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
        reading["template"] = tmp_path / "chat.jinja"
    else:
        rows, reading = [{"text": row["answer"]} for row in chats], {"max_length": 9}
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=2))
    ob.train(bank, {"a": ob.Job(data=rows, task=task, reading=reading, steps=1)})
    bank.load("b", bank.save("a", tmp_path / "a"))
    bank.load("c", bank.save("b", tmp_path / "b"))
    scores = ob.evaluate(bank, "a", rows)
    assert scores == ob.evaluate(bank, "b", rows) == ob.evaluate(bank, "c", rows)
    assert (tmp_path / "a" / "onebase.json").read_bytes() == (tmp_path / "b" / "onebase.json").read_bytes()


def test_an_adapter_saved_from_python_comes_back_with_the_same_losses(shop, base, tmp_path):
    rows = runs.definitions(6)
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=4))
    ob.train(bank, {"a": ob.Job(data=rows, steps=2, learning_rate=0.01)})
    before = ob.evaluate(bank, "a", rows)
    bank.save("a", tmp_path / "a")
    bank.remove("a")
    bank.load("again", tmp_path / "a")
    card = (bank.save("again", tmp_path / "again") / "README.md").read_text()  # nobody knows of a training
    assert card.startswith("---\nbase_model:") and "# again" in card and "## Training" not in card
    assert ob.evaluate(bank, "again", rows) == before != ob.evaluate(bank, None, rows)


def test_someone_may_watch(shop, base):
    bank, watching = ob.Bank(base), Watching()
    bank.add("a", ob.Lora(r=4))
    ob.train(bank, {"a": ob.Job(data=runs.definitions(4), steps=3)}, progress=watching)
    assert [record.step for record in watching.steps] == [1, 2, 3] and len(watching.plans) == 1


def test_what_peft_opens_computes_the_same_logits(shop, base, tmp_path):
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=4, use_rslora=True, alpha_pattern={"v_proj": 5}, rank_pattern={"q_proj": 2}))
    rows = runs.definitions(8)
    ob.train(bank, {"a": ob.Job(data=rows, steps=4, learning_rate=0.02)})
    bank.save("a", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(plain(shop.model), tmp_path / "a")
    alone, ours = logits(plain(shop.model)), native_logits(bank, "a")
    assert (ours - alone).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-4)


def test_what_peft_trained_opens_with_a_note_and_computes_the_same_logits(shop, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3})
    theirs = peft.get_peft_model(plain(shop.model), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    notes: list[str] = []
    opened = open_adapter(tmp_path / "theirs", dtype="float32", device="cpu", note=notes.append)
    assert opened.bank.base.folder == shop.model  # by the path that PEFT wrote
    assert len(notes) == 1 and "no onebase.json" in notes[0]
    route = opened.bank.sole_route(opened.adapter.name)
    with torch.no_grad(), opened.bank.base.native(route) as model:
        ours = model(input_ids=IDS).logits
    assert (ours - logits(plain(shop.model))).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs.eval()), ours, rtol=0, atol=1e-4)


IDS = torch.tensor([[5, 9, 44, 101, 7, 250, 31, 12], [3, 8, 60, 77, 90, 14, 2, 45]])


def plain(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def native_logits(bank: ob.Bank, name: str) -> torch.Tensor:
    with bank.base.native(bank.routed.sole_route(name)) as model:
        return model(input_ids=IDS).logits


def test_an_adapter_of_another_base_opens_only_where_that_is_meant(shop, base, tmp_path):
    bank = ob.Bank(base)
    bank.add("a", ob.Lora(r=4))
    bank.save("a", tmp_path / "a")
    other = runs.model_folder(tmp_path / "other", seed=1)
    with pytest.raises(FileFormatError, match=r"was trained on .*model with weights .* but .*other has weights"):
        open_adapter(tmp_path / "a", model=str(other))
    elsewhere = ob.Bank(ob.load(str(other)))
    with pytest.raises(FileFormatError, match="was trained on"):
        elsewhere.load("a", tmp_path / "a")
    assert open_adapter(tmp_path / "a", model=str(other), allow_base_mismatch=True).adapter.name
    assert elsewhere.load("a", tmp_path / "a", allow_base_mismatch=True).name == "a"


def test_mistakes_are_named(shop, base, tmp_path):
    bank = ob.Bank(base)
    with pytest.raises(ConfigError, match="has none"):
        ob.train(bank, {"a": ob.Job(data=runs.definitions(4))})
    bank.add("a")
    with pytest.raises(ConfigError, match=r"must name adapters of the bank \(a\), got \['b'\]"):
        ob.train(bank, {"b": ob.Job(data=runs.definitions(4))})
    with pytest.raises(ConfigError, match="must name adapters"):
        ob.train(bank, {})
    with pytest.raises(ConfigError, match="'a' is in the bank already"):
        bank.add("a")
    with pytest.raises(ConfigError, match="no adapter 'b' in the bank; it has a"):
        bank.save("b", tmp_path / "b")
    with pytest.raises(ConfigError, match="no adapter 'b' in the bank; it has a"):
        ob.evaluate(bank, "b", runs.definitions(2))
    with pytest.raises(ConfigError, match="already has a bank"):
        ob.Bank(base)
    with pytest.raises(ConfigError, match="batch_size"):
        ob.Job(data=[], batch_size=0)
    with pytest.raises(ConfigError, match=r"learning_rte.*learning_rate"):
        ob.Job(data=[], learning_rte=1)
    with pytest.raises(ConfigError, match="r: must be at least 1"):
        ob.Lora(r=0)
    with pytest.raises(TargetError, match="q_prj"):
        bank.add("c", ob.Lora(target_modules=["q_prj"]))
    assert list(bank.adapters) == ["a"]


@pytest.mark.parametrize("setting", [{"eval_every": 2}, {"early_stopping_patience": 1, "eval_every": 1}])
def test_evaluations_without_rows_to_evaluate_on_are_refused(setting):
    with pytest.raises(ConfigError, match="valid"):
        ob.Job(data=runs.definitions(4), **setting)


@pytest.mark.parametrize("setting", ["save_every", "keep_checkpoints"])
def test_checkpoints_of_a_job_without_a_folder_are_refused(setting):
    settings: dict[str, Any] = {setting: 1}
    with pytest.raises(ConfigError, match=f"{setting}: .* folder"):
        ob.Job(data=runs.definitions(4), **settings)


@pytest.mark.parametrize("source", ["train", "valid", "test"])
def test_rows_named_where_a_job_would_not_read_them_are_refused(source):
    with pytest.raises(ConfigError, match=f"{source}: .*data=ROWS"):
        ob.Job(data=runs.definitions(4), reading={source: 0.5})


def test_a_job_computes_with_the_threads_it_asks_for(shop, base):
    before = torch.get_num_threads()
    try:
        bank = ob.Bank(base)
        bank.add("a", ob.Lora(r=2))
        watching = runs.Watching()
        ob.train(bank, {"a": ob.Job(data=runs.definitions(2), steps=1, threads=before + 1)}, progress=watching)
        assert watching.plans[0].threads == before + 1
    finally:
        torch.set_num_threads(before)


def test_no_rows_and_no_labels_are_data_errors(shop, base):
    bank = ob.Bank(base)
    bank.add("a")
    with pytest.raises(DataError):
        ob.train(bank, {"a": ob.Job(data=[])})
    with pytest.raises(DataError, match="row 2"):
        ob.train(bank, {"a": ob.Job(data=[*runs.definitions(1), {"prompt": "a", "completion": ""}])})
    with pytest.raises(DataError):
        ob.evaluate(bank, "a", [])


def test_a_failed_training_leaves_the_adapter_as_it_was_before_the_step(tmp_path):
    rows = [{"prompt": "a ~", "completion": "dog"}]
    bank = ob.Bank(ob.load(str(runs.model_folder(tmp_path / "model", poison="~"))))
    adapter = bank.add("a", ob.Lora(r=4))
    before = {name: tensor.clone() for name, tensor in adapter.state.items()}
    with pytest.raises(TrainingError, match=r"step 1.*row 1"):
        ob.train(bank, {"a": ob.Job(data=rows, steps=2)})
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state.items())


@pytest.mark.parametrize("settings", ["lora", {}, 5, ob.Lora])
def test_what_is_no_settings_is_refused_with_what_there_is(base, settings):
    with pytest.raises(ConfigError, match=r"the settings must be one of ob\.Lora\(\.\.\.\), .*, got"):
        ob.Bank(base).add("a", settings)


@pytest.mark.parametrize("seed", [None, 1.5, "a"])
def test_a_seed_is_a_whole_number(base, seed):
    with pytest.raises(ConfigError, match="the seed must be a whole number"):
        ob.Bank(base).add("a", ob.Lora(), seed=seed)


@pytest.mark.parametrize("path", [5, None, b"folder", "x" * 300, "nul\0"])
def test_what_is_no_path_is_refused(base, path):
    bank = ob.Bank(base)
    bank.add("one", ob.Lora(r=2))
    for refused in (lambda: bank.load("other", path), lambda: bank.save("one", path), lambda: ob.load(path)):
        with pytest.raises(ConfigError, match=r"a path must be text or a pathlib\.Path|cannot be a path here"):
            refused()
