"""`verify` finds nothing wrong with what is right, and names the one thing that is broken, whichever it is."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase.adapters.lora import LoraPart
from onebase.config.reading import settings_from
from onebase.config.settings import TrainSettings
from onebase.data.reading import read_rows
from onebase.errors import TrainingError
from onebase.train import verifying
from onebase.train.data import prepare
from onebase.train.member import Member
from onebase.train.opening import open_adapter
from onebase.train.verifying import Check, Subject, verify
from tests.train import runs

NAMES = [
    "loaded = saved",
    "merged = unmerged",
    "flat = padded",
    "resumed = uninterrupted",
    "chat = transformers",
    "adapter has an effect",
    "base unchanged",
]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "ia3": {"method": "ia3"},
    "ln-tuning": {"method": "ln-tuning"},
    "bottleneck": {"method": "bottleneck", "reduction_factor": 4},
    "prompt-tuning": {"method": "prompt-tuning", "num_virtual_tokens": 3},
    "prefix-tuning": {"method": "prefix-tuning", "num_virtual_tokens": 3},
}
NO_WEIGHTS = {"bottleneck", "prompt-tuning", "prefix-tuning"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    with runs.own_home(folder / "home"):
        yield runs.workshop(folder)


def trained(shop: runs.Workshop, name: str, out: Path) -> Path:
    values = shop.values(adapter=METHODS[name], train={"steps": 4})
    if "method" in METHODS[name]:
        values["adapter"] = METHODS[name]
    runs.run(settings_from(values), out)
    return out / "adapter"


@pytest.fixture(scope="module")
def adapter(shop) -> Path:
    return trained(shop, "lora", shop.folder / "lora")


@pytest.fixture
def copied(adapter, tmp_path) -> Path:
    shutil.copytree(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def subject_of(shop: runs.Workshop, folder: Path) -> Subject:
    opened = open_adapter(folder, dtype="float32", device="cpu")
    rows = list(read_rows(shop.valid))
    reading = shop.settings().data
    virtual = opened.adapter.virtual_tokens
    examples = prepare(rows, reading, "chat", opened.bank.base, ("valid.jsonl",), virtual).examples
    train = TrainSettings(learning_rate=0.01, batch_size=4)
    return Subject(opened.bank, opened.adapter.name, folder, "chat", rows, examples, train, reading)


def failures(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.state == "failed"]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_wrong_with_an_adapter_of_any_method(method, shop, tmp_path):
    told: list[str] = []
    checks = verify(subject_of(shop, trained(shop, method, tmp_path / "run")), told.append)
    assert told == NAMES == [check.name for check in checks]
    assert failures(checks) == [], checks
    merged = next(check for check in checks if check.name == "merged = unmerged")
    assert merged.state == ("not applicable" if method in NO_WEIGHTS else "ok")
    assert ("Ship it as an adapter" in merged.said) == (method in NO_WEIGHTS)
    for check in checks:
        if check.state == "ok":
            assert check.found is not None and check.bound is not None
            assert check.found > check.bound if check.above else check.found <= check.bound


def test_a_changed_tensor_in_the_file_is_named(shop, copied):
    subject = subject_of(shop, copied)
    tensors = load_file(copied / "adapter_model.safetensors")
    changed = next(name for name in tensors if "lora_B" in name)
    tensors[changed][0, 0] += 1e-6
    save_file(tensors, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    checks = verify(subject)
    assert failures(checks) == ["loaded = saved"]
    assert f"1 of {len(tensors)} tensors differ: {changed}" in checks[0].said


def test_a_file_in_half_precision_holds_what_is_loaded(shop, copied):
    tensors = load_file(copied / "adapter_model.safetensors")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    subject = subject_of(shop, copied)
    assert failures(verify(subject)) == []
    changed = next(name for name in halves if "lora_B" in name)
    halves[changed][0, 0] *= 1.01
    save_file(halves, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    check = verify(subject)[0]
    assert check.state == "failed" and f"1 of {len(tensors)} tensors differ: {changed}" in check.said


def test_results_that_are_no_numbers_are_no_effect(shop, adapter, monkeypatch):
    monkeypatch.setattr(verifying, "numbers_of", lambda out: torch.full((1, 2, 3), float("nan")))
    check = next(check for check in verify(subject_of(shop, adapter)) if check.above)
    assert check.state == "failed" and "no numbers" in check.said


def test_an_adapter_that_does_nothing_is_told(shop, copied):
    tensors = load_file(copied / "adapter_model.safetensors")
    zeroed = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zeroed, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    checks = verify(subject_of(shop, copied))
    assert failures(checks) == ["adapter has an effect"]
    assert next(check for check in checks if check.above).found == 0


def test_a_chat_template_that_is_not_the_one_of_the_training_is_told(shop, copied):
    template = copied / "chat_template.jinja"
    template.write_text("A chat. " + template.read_text())
    checks = verify(subject_of(shop, copied))
    assert failures(checks) == ["chat = transformers"]
    chat = next(check for check in checks if check.name == "chat = transformers")
    assert chat.said.startswith("4 of 4 rows differ: ")
    assert "valid.jsonl line 1: token 0 is " in chat.said
    trained_so = replace(subject_of(shop, copied), template=template.read_text())
    assert failures(verify(trained_so)) == []


def test_a_merge_that_is_wrong_is_told_with_the_layer(shop, adapter, monkeypatch):
    right, damaged = LoraPart.merge_, "model.layers.1.self_attn.v_proj"

    def wrong(part: Any, module: Any) -> None:
        right(part, module)
        if part.path == damaged:
            right(part, module)

    monkeypatch.setattr(LoraPart, "merge_", wrong)
    checks = verify(subject_of(shop, adapter))
    assert failures(checks) == ["merged = unmerged"]
    assert f"merging failed: {damaged} does" in checks[1].said
    assert checks[1].found is not None and checks[1].bound is not None and checks[1].found > checks[1].bound


def test_a_flat_path_that_is_wrong_is_told(shop, adapter, monkeypatch):
    subject = subject_of(shop, adapter)
    base = subject.bank.base
    hidden = base.hidden
    monkeypatch.setattr(base, "hidden", lambda ids, route: hidden(ids.roll(1), route))
    checks = verify(subject)
    assert failures(checks) == ["flat = padded"]


def test_a_resumption_that_forgets_something_is_told(shop, adapter, monkeypatch):
    whole = Member.load_state

    def forgetful(self: Any, tensors: Any, books: Any, best: Any) -> None:
        whole(self, {name: t for name, t in tensors.items() if not name.endswith("exp_avg")}, books, best)
        for state in self.optimizer.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg_sq"])

    monkeypatch.setattr(Member, "load_state", forgetful)
    checks = verify(subject_of(shop, adapter))
    assert failures(checks) == ["resumed = uninterrupted"]


def test_a_check_that_cannot_be_carried_out_has_failed_and_says_why(shop, adapter, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise TrainingError("step 1: the loss is not finite")

    monkeypatch.setattr(verifying, "replay", fail)
    checks = verify(subject_of(shop, adapter))
    assert failures(checks) == ["resumed = uninterrupted"]
    assert checks[3].said == "TrainingError: step 1: the loss is not finite"


def test_a_base_that_changes_meanwhile_is_told_with_the_tensor(shop, adapter):
    subject = subject_of(shop, adapter)
    norm = subject.bank.base.model.model.norm

    def note(name: str) -> None:
        if name == "base unchanged":
            norm.weight.data[0] += 1

    checks = verify(subject, note)
    assert failures(checks) == ["base unchanged"]
    assert "model.norm.weight" in checks[-1].said
    assert list(subject.bank.adapters) == ["adapter"]
