"""Adapters and models of a few hundred numbers, for the tests of files."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from onebase.files.record import AdapterRecord
from onebase.files.result import Result
from onebase.files.target_names import TargetNames

PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
TARGETS = TargetNames(("q_proj", "v_proj"))


def pairs(paths: Iterable[str] = PATHS, *, r: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random low-rank pairs for layers of 8 inputs and 6 outputs, by the bank's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        tensors[f"{path}.lora_A.weight"] = torch.randn(r, 8, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(6, r, generator=generator)
    return tensors


def record(**changes: Any) -> AdapterRecord:
    return AdapterRecord(**{"base": "tiny", "base_fingerprint": "abc", "seed": 3, **changes})


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "steps": 100,
        "examples": 1600,
        "tokens": 90_000,
        "seconds": 300.5,
        "compile_seconds": 0.0,
        "examples_per_s": 5.3,
        "tokens_per_s": 299.5,
        "peak_rss_bytes": 2_000_000_000,
        "peak_device_bytes": 0,
        "optimizer_state_bytes": 40_000_000,
        "train_loss": 2.9,
        "valid_loss_before": 3.8,
        "valid_loss": 2.7,
        "best_step": 80,
        "trainable_parameters": 4_884_480,
        "total_parameters": 139_399_488,
        "adapter_bytes": 19_600_000,
        "base_fingerprint": "abc",
    }
    return Result(**{**values, **changes})


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of four layers; the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return LlamaForCausalLM(config).eval()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
