"""Tiny runs: a random Llama and a byte tokenizer in a folder, definitions to learn, and settings that bring both together."""

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from onebase.config.reading import settings_from
from onebase.config.settings import Settings
from onebase.files.checkpoint import list_checkpoints
from onebase.files.metrics import read_metrics
from onebase.files.peft_format import TENSORS_NAME
from onebase.files.result import Result, read_result
from onebase.measure.evaluate import Scores
from onebase.measure.judge import TaskScores
from onebase.train.progress import Plan, StepRecord
from onebase.train.run import train_run
from onebase.train.stop import StopRequest
from tests.data.tiny import byte_tokenizer

WORDS = ["dog", "cat", "noun", "animal", "thing", "house", "mat", "barks", "ran", "sat", "think", "away", "ground"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
CLOCKS = {"seconds"}  # what a clock says is no part of what a run must repeat


@contextmanager
def own_home(folder: Path) -> Iterator[None]:
    """Keep the fingerprints of tiny models out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEBASE_HOME", str(folder))
        yield


def model_folder(folder: Path, *, seed: int = 0, poison: str | None = None, **config: Any) -> Path:
    """Write a tiny Llama with its tokenizer; the token that `poison` is, if given, has NaN for its embedding."""
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **SIZES | config))
    if poison is not None:
        [token] = tokenizer(poison, add_special_tokens=False)["input_ids"]
        model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def definitions(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of different lengths, in which the answer depends on the question."""
    draws = random.Random(seed)
    rows = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        answer = " ".join(draws.choices(WORDS, k=draws.randint(1, 5)))
        rows.append({"prompt": f"Define the noun {word}.", "completion": f"A {word} that {answer}."})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Workshop:
    """A folder with a model, rows to learn from and rows to validate on."""

    folder: Path
    model: Path
    train: Path
    valid: Path

    def settings(self, *overrides: str, valid: bool = True, **sections: Any) -> Settings:
        return settings_from(self.values(valid=valid, **sections), overrides=overrides)

    def values(self, *, valid: bool = True, **sections: Any) -> dict[str, Any]:
        data = {"train": str(self.train)} | ({"valid": str(self.valid)} if valid else {})
        own: dict[str, Any] = {
            "model": str(self.model),
            "dtype": "float32",
            "device": "cpu",
            "data": data | sections.pop("data", {}),
            "adapter": {"r": 4, "lora_alpha": 8} | sections.pop("adapter", {}),
            "train": {"batch_size": 4, "learning_rate": 0.01, "threads": 1} | sections.pop("train", {}),
        }
        return own | sections


def workshop(folder: Path, *, rows: int = 10, valid_rows: int = 4, **config: Any) -> Workshop:
    model = model_folder(folder / "model", **config)
    train = write_rows(folder / "train.jsonl", definitions(rows))
    return Workshop(folder, model, train, write_rows(folder / "valid.jsonl", definitions(valid_rows, seed=1)))


@dataclass
class Watching:
    """A progress that remembers, and that asks the training to stop after some steps."""

    stop_after: set[int] = field(default_factory=set)
    signal_number: int = signal.SIGTERM
    stop: StopRequest = field(default_factory=StopRequest)
    plans: list[Plan] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    scores: list[tuple[int, Scores | TaskScores]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def loaded(self, data: Any) -> None:
        pass

    def started(self, plan: Plan) -> None:
        self.plans.append(plan)
        if plan.first_step in self.stop_after:
            self.stop.signal_number = self.signal_number

    def stepped(self, record: StepRecord) -> None:
        self.steps.append(record)
        if record.step in self.stop_after:
            self.stop.signal_number = self.signal_number

    def evaluated(self, step: int, scores: Scores | TaskScores) -> None:
        self.scores.append((step, scores))

    def saved(self, path: Path) -> None:
        self.files.append(path)

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(settings: Settings, out: Path, *, resume: bool = False, watching: Watching | None = None) -> Result:
    watching = watching or Watching()
    return train_run(settings, out, resume=resume, progress=watching, stop=watching.stop)


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / TENSORS_NAME).read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl says, apart from clocks."""
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in read_metrics(out / "metrics.jsonl")]


def checkpoint_names(out: Path) -> list[str]:
    return [path.name for path in list_checkpoints(out / "checkpoints")]


def result_of(out: Path) -> Any:
    """Return the result of a finished run."""
    result = read_result(out)
    assert result is not None, f"{out} has no result"
    return result
