"""What the verbs are tried on: a tiny chat model in a folder, rows, settings, and the command line in this process."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from onebase.cli.app import app
from tests.data.tiny import byte_tokenizer
from tests.tiny import model_of

WORDS = ("dog", "cat", "mat", "house", "thing", "noun", "animal", "away")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def invoke(*words: Any, stdin: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
    """Return what a command prints on both streams, and its exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin, env=env)
    unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
    assert not unexpected, f"{result.exception!r}"
    return result


def process(folder: Path, *words: Any, **more: Any) -> "subprocess.Popen[str]":
    """Start a command in a process of its own, in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "onebase", *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONUNBUFFERED": "1"} | more.pop("env", {}),
        **more,
    )


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, folder, *words):
        self.own, theirs = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onebase", *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(theirs)

    def type(self, text):
        os.write(self.own, text.encode())

    def press_ctrl_c(self):
        """Press Ctrl-C, not faster than people: Python's input() misses one between its prompt and its waiting."""
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, text):
        """Read on until `text` has come."""
        self._read_until(lambda: text in self.seen, f"no {text!r}")
        self.seen = self.seen.partition(text)[2]

    def wait_for_more(self, count):
        """Read on until `count` more characters have come."""
        self._read_until(lambda: len(self.seen) >= count, "too little")

    def _read_until(self, done, otherwise, seconds=120):
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{otherwise} in {self.seen!r}"
            if select.select([self.own], [], [], 0.2)[0]:
                self.seen += os.read(self.own, 4096).decode(errors="replace")


def model_in(folder: Path, max_position_embeddings: int = 256) -> Path:
    """Write a random Llama of two blocks with a chat tokenizer."""
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": max_position_embeddings}
    model_of("llama", **sizes, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return rows of questions with answers of different lengths."""
    rows = []
    for number in range(start, start + count):
        word = WORDS[number % len(WORDS)]
        answer = f"A {word} that " + "ran " * (number % 7) + f"away, number {number}."
        turns = [("user", f"Define the noun {word}."), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns], "number": number})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_in(folder: Path, train: str = "steps: 6, batch_size: 4", data: str = "", more: str = "") -> Path:
    """Write a settings file over `model`, `train.jsonl` and `valid.jsonl` in a folder."""
    path = folder / "run.yaml"
    path.write_text(
        f"model: ./model\ndata: {{train: train.jsonl, valid: valid.jsonl{data}}}\n"
        f"adapter: {{r: 2, lora_alpha: 4}}\ntrain: {{{train}}}\n{more}"
    )
    return path
