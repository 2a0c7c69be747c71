"""A tiny chat model on disk, rows for it, and examples as modules."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.data.tiny import byte_tokenizer
from tests.tiny import model_of

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ("dog", "cat", "mat", "house", "thing", "noun", "animal", "away")


def example(name: str) -> ModuleType:
    """Return an example as a module (their names begin with numbers)."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chat_model(folder: Path) -> Path:
    """Write a random Llama of two blocks with a chat tokenizer."""
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_of("llama", vocab_size=len(tokenizer), max_position_embeddings=256, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chats(count: int) -> list[dict]:
    """Return rows of questions with answers of different lengths."""
    rows = []
    for number in range(count):
        word, other = WORDS[number % len(WORDS)], WORDS[(number * 3 + 1) % len(WORDS)]
        answer = f"A {other} that " + "ran " * (number % 5) + f"away from the {word}."
        turns = [("user", f'Define the noun "{word}".'), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns], "slice": "tiny"})
    return rows


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
