"""Tiny random models of many architectures, batches for them, and a bank that always holds a second, dummy adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.data.batches import FlatBatch, flatten
from onebase.data.examples import Example, Examples
from onebase.ops.layout import NO_PARENT, Layout, Node

VOCABULARY = 61
WINDOW = 8
# Widths are multiples of 32 times the threads: torch's SiLU and tanh-GELU round the rest of a vector differently, so
# that where a row ends in memory would show in its bits.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_NO_SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name: (model class, config class, configuration). Windows are shorter than the examples; what scales logits is on.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GROUPED
        | {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 5,
            "attn_implementation": "eager",  # transformers 5.17 takes sdpa, which drops the cap
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GROUPED | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _SIZES),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", _SIZES | {"ffn_dim": 64, "dropout": 0.3}),
    "opt-projected": ("OPTForCausalLM", "OPTConfig", _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _GROUPED | {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        _GROUPED
        | {
            "logits_scaling": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
        },
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED | {"logit_scale": 0.25}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _SIZES),
    "roberta": ("RobertaModel", "RobertaConfig", _SIZES | {"pad_token_id": 1}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        _SIZES | {"local_attention": WINDOW, "num_hidden_layers": 4, "global_attn_every_n_layers": 2},
    ),
}
PADDED = {"bloom"}
# What takes no flat tokens; "plain" is made by hand below.
NATIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 5,
        },
    ),
}


class Plain(nn.Module):
    """A module of nobody's making: convolutions, one of them grouped, a linear layer and two norms; no config."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.along = nn.Conv1d(8, 6, 2)
        self.last = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return one row of 5 numbers for each (3, 8, 8) image."""
        x = torch.relu(self.norm(self.first(images)))
        x = torch.relu(self.along(self.grouped(x).flatten(2)))
        return self.linear(self.last(x.mean(2)))


def model_of(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in evaluation mode; the global generator is as it was afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    if name == "plain":
        model: Any = Plain()
    else:
        model_class, config_class, sizes = (ARCHITECTURES | ENCODERS | NATIVE)[name]
        specials = {} if "pad_token_id" in sizes or name in NATIVE else _NO_SPECIALS
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(specials | sizes | changes)))
    for parameter in model.parameters():  # large enough that attention and gates matter, biases and norms included
        parameter.data += 0.2 * torch.randn_like(parameter)
    torch.set_rng_state(state)
    return model.to(dtype).eval()


def base_of(name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Base:
    return Base(model_of(name, dtype=dtype, seed=seed, **changes), name=f"tiny-{name}")


def native_inputs(name: str, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the inputs of a batch of `count` for a native model of this name, entries first."""
    draws = torch.Generator().manual_seed(seed)
    if name == "t5":
        ids = torch.randint(3, VOCABULARY, (2, count, 7), generator=draws)
        return {"input_ids": ids[0], "decoder_input_ids": ids[1, :, :5], "attention_mask": torch.ones(count, 7)}
    images = torch.randn(count, 3, 8, 8, generator=draws)
    return {"pixel_values": images} if name == "vit" else {"images": images}


def native_outputs(base: Base, route: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a native model's numbers (logits, where it calls them so) under a route."""
    with base.native(route) as model:
        return numbers_of(model(**inputs))


def numbers_of(out: Any) -> torch.Tensor:
    """Return what a model returned as one tensor: logits, hidden states, or what it is itself."""
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if "logits" in out else out.last_hidden_state


def fill_(adapter: Any, seed: int = 1, size: float = 0.3) -> Any:
    """Fill an adapter's tensors with normal numbers of its base's dtype, so that it changes the base."""
    draws = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=draws) * size).to(parameter.dtype)
    return adapter


def as_dtype_(adapter: Any, dtype: torch.dtype) -> Any:
    """Turn an adapter's tensors into `dtype` in place (they are fp32 when made)."""
    for _, parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    return adapter


def bank_of(base: Base, *names: str, dtype: torch.dtype | None = None, dummy: bool = True, **settings: Any) -> Bank:
    """Return a bank with these adapters, filled, behind a dummy of another rank that owns none of a test's rows."""
    bank = Bank(base)
    if dummy:
        bank.add("dummy", Lora(r=3, lora_alpha=7, target_modules=settings.get("target_modules", "all-linear")), seed=99)
    for number, name in enumerate(names):
        bank.add(name, Lora(**({"r": 4 + number, "lora_alpha": 8} | settings)), seed=number)
    for number, adapter in enumerate(bank.adapters.values()):
        fill_(as_dtype_(adapter, dtype or base.dtype), seed=number)
    return bank


def examples_of(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Examples:
    """Return random examples; about half of each one's tokens are labelled, never its first, at least its last."""
    draws = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        labelled = draws.random(length) < 0.5
        labelled[0], labelled[-1] = False, length > 1
        ids = draws.integers(3, vocabulary, length).astype(np.int32)
        made.append(Example(ids, labelled, f"row {number}", {}))
    return Examples(made)


def batch_of(examples: Examples, *owners: str | None) -> FlatBatch:
    """Return all examples as one flat batch, example i owned by owners[i] (one owner: by it alone)."""
    owners = owners * len(examples) if len(owners) == 1 else owners
    flat = flatten(list(examples), range(len(examples)), None)
    nodes = [
        Node(n.length, owner, n.example, n.parent, n.labels) for n, owner in zip(flat.layout.nodes, owners, strict=True)
    ]
    return FlatBatch(flat.token_ids, Layout(nodes), flat.label_rows, flat.label_ids, flat.examples)


def together(*batches: FlatBatch) -> FlatBatch:
    """Return batches one after the other as one, as a gang's would be."""
    nodes: list[Node] = []
    label_rows, tokens = [], 0
    for batch in batches:
        first = len(nodes)
        nodes += [
            replace(n, parent=n.parent if n.parent == NO_PARENT else n.parent + first) for n in batch.layout.nodes
        ]
        label_rows.append(batch.label_rows + tokens)
        tokens += batch.layout.token_count
    ids, labels = torch.cat([b.token_ids for b in batches]), torch.cat([b.label_ids for b in batches])
    return FlatBatch(ids, Layout(nodes), torch.cat(label_rows), labels, sum((b.examples for b in batches), ()))


def gradients(bank: Bank, name: str) -> dict[str, torch.Tensor]:
    """Return copies of an adapter's gradients by tensor name; zeros where there is none."""
    return {
        key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in bank.adapters[name].parameters()
    }


def clear_gradients(bank: Bank) -> None:
    for adapter in bank.adapters.values():
        for _, parameter in adapter.parameters():
            parameter.grad = None


@contextmanager
def global_randomness_untouched() -> Iterator[None]:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    assert torch.equal(before, torch.get_rng_state())
    assert str(numpy_before) == str(np.random.get_state())  # noqa: NPY002
