"""A gang's runs are what each of them is alone, to the byte: together, failing beside others, killed and gone on with."""

import json
import signal
from typing import Any

import pytest

from onebase.adapters.bank import Bank
from onebase.base import memory
from onebase.base.model import load
from onebase.base.sharing import share_weights_
from onebase.config.methods import Lora
from onebase.config.reading import settings_from
from onebase.config.settings import Settings
from onebase.errors import CapacityError, ConfigError, DataError, ResumeError, TargetError, TrainingError
from onebase.train import gang
from onebase.train.gang import Outcome, train_gang
from onebase.train.stop import Stopped, StopRequest
from tests.train.runs import Watching, Workshop, adapter_bytes, definitions, metrics, run, workshop, write_rows

MEMBERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"r": 4}, "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "threads": 1}},
    "dropout": {
        "adapter": {"r": 8, "lora_dropout": 0.2, "use_dora": True},
        "train": {"steps": 4, "batch_size": 3, "learning_rate": 0.02, "seed": 3, "threads": 1},
    },
    "ia3": {"adapter": {"method": "ia3"}, "train": {"steps": 5, "batch_size": 2, "threads": 1}},
    "prefix": {
        "adapter": {"method": "prefix-tuning", "num_virtual_tokens": 3},
        "train": {"steps": 5, "batch_size": 2, "threads": 1},
    },
}


def members(shop: Workshop) -> dict[str, Settings]:
    """Return settings of several methods, sizes, seeds and lengths."""
    made = {}
    for name, sections in MEMBERS.items():
        values = shop.values(train=dict(sections["train"]))
        made[name] = settings_from(values | {"adapter": sections["adapter"]})
    return made


class Ended:
    def __init__(self, watching: Watching | None = None) -> None:
        self.watching, self.outcomes = watching or Watching(), list[Outcome]()

    def member(self, name: str) -> Watching:
        return self.watching

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def losses(folder) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


def test_each_member_is_to_the_byte_what_it_is_alone(shop: Workshop, tmp_path) -> None:
    settings = members(shop)
    outcomes = train_gang(settings, tmp_path / "gang")
    assert [outcome.name for outcome in outcomes] == list(settings)
    for name, own in settings.items():
        run(own, tmp_path / name)
        assert adapter_bytes(tmp_path / name) == adapter_bytes(tmp_path / "gang" / name), name
        assert losses(tmp_path / name) == losses(tmp_path / "gang" / name), name
    written = json.loads((tmp_path / "gang" / "result.json").read_text())
    assert [trial["name"] for trial in written["trials"]] == list(settings)
    result = outcomes[0].result
    assert result is not None and written["trials"][0]["train_loss"] == result.train_loss


def test_tasks_and_heads_of_their_own_share_the_bases_weights(shop: Workshop, tmp_path) -> None:
    rows = [{"text": f"{word} {number}", "label": word} for number, word in enumerate(["apple", "river"] * 6)]
    classes = write_rows(tmp_path / "classes.jsonl", rows)
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"text": r["text"], "target": i / 7} for i, r in enumerate(rows)])
    settings = {"chat": shop.settings(train={"steps": 3})}
    for task, path in (("classify", classes), ("regress", numbers)):
        settings[task] = shop.settings(valid=False, task=task, data={"train": str(path)}, train={"steps": 3})
    outcomes = train_gang(settings, tmp_path / "gang")
    assert [outcome.error for outcome in outcomes] == [None] * 3
    for name, own in settings.items():
        run(own, tmp_path / name)
        assert adapter_bytes(tmp_path / name) == adapter_bytes(tmp_path / "gang" / name), name


def test_the_second_base_of_a_model_holds_the_firsts_tensors(shop: Workshop) -> None:
    one, other = (load(str(shop.model), dtype="float32", device="cpu") for _ in range(2))
    Bank(one).add("a", Lora(r=2))
    own = sum(p.numel() * p.element_size() for p in other.model.parameters())
    assert share_weights_(other, one) >= own
    weights = [base.model.get_submodule("model.layers.0.mlp.up_proj").weight for base in (one, other)]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    assert share_weights_(other, one) == 0


def test_a_member_that_fails_ends_alone(shop: Workshop, tmp_path) -> None:
    """NaN in its rows (a poisoned letter of the model), rows that are none, a target that is not there."""
    poisoned = workshop(tmp_path / "poisoned", poison="~")
    bad_rows = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    nan_rows = write_rows(tmp_path / "nan.jsonl", [*definitions(3), {"prompt": "~", "completion": "apple"}])
    good = poisoned.settings(train={"steps": 5})
    settings = {
        "nan": poisoned.settings(data={"train": str(nan_rows)}, valid=False, train={"steps": 5}),
        "good": good,
        "rows": poisoned.settings(data={"train": str(bad_rows)}, train={"steps": 5}),
        "target": poisoned.settings(adapter={"target_modules": ["nowhere"]}, train={"steps": 5}),
    }
    watching = Ended()
    by_name = {outcome.name: outcome for outcome in train_gang(settings, tmp_path / "gang", progress=watching)}
    assert {name: type(outcome.error) for name, outcome in by_name.items()} == {
        "nan": TrainingError, "good": type(None), "rows": DataError, "target": TargetError,
    }  # fmt: skip
    assert {outcome.name for outcome in watching.outcomes} == set(settings)
    run(good, tmp_path / "good")
    assert adapter_bytes(tmp_path / "good") == adapter_bytes(tmp_path / "gang" / "good")
    trials = json.loads((tmp_path / "gang" / "result.json").read_text())["trials"]
    assert ["error" in trial for trial in trials] == [True, False, True, True]


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_gang_that_was_stopped_goes_on_to_the_same_bytes(shop: Workshop, tmp_path, step: int) -> None:
    settings = members(shop)
    train_gang(settings, tmp_path / "whole")
    watching = Watching(stop_after={step})
    with pytest.raises(Stopped) as stopped:
        train_gang(settings, tmp_path / "cut", progress=Ended(watching), stop=watching.stop)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    outcomes = train_gang(settings, tmp_path / "cut", resume=True)
    assert all(outcome.result is not None for outcome in outcomes)
    for name in settings:
        assert adapter_bytes(tmp_path / "cut" / name) == adapter_bytes(tmp_path / "whole" / name), name
        assert losses(tmp_path / "cut" / name) == losses(tmp_path / "whole" / name), name
    again = train_gang(settings, tmp_path / "cut", resume=True)
    assert [outcome.result for outcome in again] == [outcome.result for outcome in outcomes]


def test_a_stop_before_the_first_run_is_ready_ends_the_gang(shop: Workshop, tmp_path) -> None:
    stop = StopRequest()
    stop.signal_number = signal.SIGINT
    with pytest.raises(Stopped, match="0 of 4 runs have finished, 0 have a checkpoint"):
        train_gang(members(shop), tmp_path / "gang", stop=stop)


def test_runs_may_be_called_as_files_are(shop: Workshop, tmp_path) -> None:
    settings = {name: shop.settings(train={"steps": 1}) for name in ("my run (2)", "my_run _2_", ".r=4,lr=1e-4")}
    outcomes = train_gang(settings, tmp_path / "gang")
    assert all(outcome.result is not None for outcome in outcomes)


def test_runs_wait_for_memory_and_one_that_never_fits_says_so(shop: Workshop, tmp_path, monkeypatch) -> None:
    """Memory for one adapter at a time: all finish; for none: each has its reason."""
    settings = members(shop)
    running: list[int] = []
    opened = gang._Gang._opened

    def counting(self: gang._Gang, name: str) -> object:
        if self.running:
            raise CapacityError("no room")
        running.append(len(self.running))
        return opened(self, name)

    monkeypatch.setattr(gang._Gang, "_opened", counting)
    outcomes = train_gang(settings, tmp_path / "one-at-a-time")
    assert all(outcome.result is not None for outcome in outcomes)
    assert len(running) == len(settings)
    monkeypatch.setattr(gang._Gang, "_opened", opened)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10)
    outcomes = train_gang(settings, tmp_path / "none")
    assert {type(outcome.error) for outcome in outcomes} == {CapacityError}
    assert "are free" in str(outcomes[0].error)


def test_members_that_cannot_be_in_one_process_are_refused(shop: Workshop, tmp_path) -> None:
    settings = {"a": shop.settings(), "b": shop.settings(train={"threads": 2})}
    with pytest.raises(ConfigError, match=r"train.threads: .* a: 1, b: 2"):
        train_gang(settings, tmp_path / "gang")
    with pytest.raises(ConfigError, match="nothing to train"):
        train_gang({}, tmp_path / "gang")
    assert not (tmp_path / "gang").exists()


def test_other_members_do_not_go_on_in_a_folder_that_was_begun(shop: Workshop, tmp_path) -> None:
    settings = {name: shop.settings(train={"steps": 1}) for name in ("a", "b")}
    train_gang(settings, tmp_path / "gang")
    with pytest.raises(ConfigError, match="already"):
        train_gang(settings, tmp_path / "gang")
    with pytest.raises(ResumeError, match="a, b were begun there, not a, c"):
        train_gang({"a": settings["a"], "c": settings["b"]}, tmp_path / "gang", resume=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(ConfigError, match=r"gang\.json"):
        train_gang(settings, tmp_path / "else", resume=True)


def test_rows_are_read_and_a_base_is_opened_once(shop: Workshop, tmp_path, monkeypatch) -> None:
    opened: list[str] = []
    for name in ("open_base", "load_data"):
        monkeypatch.setattr(gang, name, _counted(getattr(gang, name), opened))
    train_gang(members(shop), tmp_path / "gang")
    assert opened.count("open_base") == 1
    assert opened.count("load_data") == 2  # with virtual tokens and without


def _counted(function, calls: list[str]):
    def called(*args):
        calls.append(function.__name__)
        return function(*args)

    return called
