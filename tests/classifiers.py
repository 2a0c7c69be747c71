"""Tiny random models with a head for whole examples, of every way to pool, and examples with targets."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from onebase.config.labels import Problem
from onebase.data.examples import Example, Examples
from tests.data.tiny import byte_tokenizer

VOCABULARY = 61
CLASSES = 3
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_BERT = _SIZES | {"max_position_embeddings": 128}
_DECODER = _SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MODERN = _BERT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

# name: (transformers' name of the family, configuration, what the head reads of an example)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("Bert", _BERT, "first"),
    "roberta": ("Roberta", _BERT, "first"),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "first"),
    "modernbert": ("ModernBert", _MODERN | {"classifier_pooling": "cls"}, "first"),
    "modernbert-mean": ("ModernBert", _MODERN | {"classifier_pooling": "mean"}, "mean"),
    "llama": ("Llama", _DECODER, "last"),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}, "last"),
    "qwen3": ("Qwen3", _DECODER | {"num_key_value_heads": 2, "head_dim": 8}, "last"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}, "last"),
}
_TARGETS: dict[Problem, Any] = {
    "single_label_classification": lambda n: n % CLASSES,
    "multi_label_classification": lambda n: np.array([n % 2, 1, n % 3 == 0], dtype=np.float32),
    "regression": lambda n: n / 2 - 1,
}


def model_of(kind: str, problem: Problem = "single_label_classification", seed: int = 0) -> Any:
    """Return a random model of a kind; its weights are large enough for examples to differ."""
    family, config, _ = KINDS[kind]
    outputs = 1 if problem == "regression" else CLASSES
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = getattr(transformers, f"{family}Config")(
            vocab_size=VOCABULARY, num_labels=outputs, problem_type=problem, initializer_range=0.2, **config
        )
        return getattr(transformers, f"{family}ForSequenceClassification")(settings).eval()


def labelled_examples(
    *lengths: int, problem: Problem = "single_label_classification", seed: int = 0, vocabulary: int = VOCABULARY
) -> Examples:
    """Return examples of random tokens with targets."""
    draws = np.random.default_rng(seed)
    return Examples(
        Example(
            draws.integers(3, vocabulary, length).astype(np.int32),
            np.zeros(length, dtype=np.bool_),
            f"row {number}",
            {"half": "a" if number % 2 else "b"},
            _TARGETS[problem](number),
        )
        for number, length in enumerate(lengths)
    )


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and targets as a collator does, padded on the right with token 0."""
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.token_ids)] = torch.from_numpy(example.token_ids.astype(np.int64))
        mask[row, : len(example.token_ids)] = 1
    return ids, mask, torch.from_numpy(np.asarray([example.target for example in examples]))


def encoder_folder(folder: Path) -> Path:
    """Write a random encoder without any head, with a tokenizer of bytes."""
    tokenizer = byte_tokenizer(template=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **_SIZES)
        transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
