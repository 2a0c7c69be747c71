"""Tokenizers of GGUF files that split digits off: what transformers' reader leaves out. Called by pretrained.py."""

import mmap
import struct
from pathlib import Path
from typing import Any

# llama.cpp's pre-tokenizers that split every digit off before anything else; transformers' reader knows none of them.
# Without this, blanks before a number are cut differently from how the model learned them ("\n\n1" is 3 tokens, not 2).
# Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe, the case that begins with LLAMA_VOCAB_PRE_TYPE_STARCODER.
_SPLITS_DIGITS = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}


def mend_digits_(tokenizer: Any, gguf: Path) -> None:
    """Let a tokenizer split digits off first where its GGUF file says that the model learned them so."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if _gguf_text(gguf, "tokenizer.ggml.pre") in _SPLITS_DIGITS and isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _gguf_text(gguf: Path, key: str) -> str | None:
    """Return a text of a GGUF file's header: gguf's own reader takes seconds, for it reads the whole vocabulary too."""
    text_type = 8
    start = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", text_type)
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(start)
        if found < 0:
            return None
        at = found + len(start) + 8
        (length,) = struct.unpack("<Q", content[at - 8 : at])
        return content[at : at + length].decode("utf-8", errors="replace")
