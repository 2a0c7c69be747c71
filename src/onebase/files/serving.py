"""What tools that load LoRA adapters read of them, as one table: the facts that lint.py judges by. No torch.

Each fact was read in the tool's own source, at the version or commit named in `TOOLS`, or tried with what is installed
(tests/files/test_lint.py does it again for transformers). Where versions differ, the worse one stands here. docs/export.md
is made from this table.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["loads", "loads wrong", "refused"]

MERGE = "onebase merge {adapter} --out MODEL"
PORTABLE = "onebase export {adapter} --out FOLDER --portable"


@dataclass(frozen=True)
class Scales:
    """What the scale of one module's pair may be made of: the module's own numbers, and those of the whole adapter."""

    r: int
    lora_alpha: float
    common_r: int
    common_alpha: float
    use_rslora: bool


@dataclass(frozen=True)
class Tool:
    """A tool that loads adapters. `scaling` is the formula it multiplies B @ A with, `scale` the same as a function."""

    name: str
    version: str
    sources: str
    scaling: str
    scale: Callable[[Scales], float]


def peft_scale(of: Scales) -> float:
    """Return the scale that was trained with: PEFT's, each module its own."""
    return of.lora_alpha / (math.sqrt(of.r) if of.use_rslora else of.r)


def _common(of: Scales) -> float:
    return of.common_alpha / (math.sqrt(of.common_r) if of.use_rslora else of.common_r)


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "transformers",
            "5.23.0 with peft 0.21.2",
            "transformers/integrations/peft.py (load_adapter); tried",
            "lora_alpha / r (sqrt(r) with use_rslora), patterns included",
            peft_scale,
        ),
        Tool(
            "vllm",
            "0306474 (lora_model.py); peft_helper.py of the versions that read trainable_token_indices",
            "vllm/lora/peft_helper.py, lora_model.py, utils.py",
            "lora_alpha / r (sqrt(r) with use_rslora), the same for all modules: no patterns",
            _common,
        ),
        Tool(
            "sglang",
            "0ceb81f (lora_config.py), 002c60a (lora.py)",
            "python/sglang/srt/lora/lora_config.py, lora.py, lora_manager.py",
            "lora_alpha / r, the same for all modules: neither use_rslora nor patterns",
            lambda of: of.common_alpha / of.common_r,
        ),
        Tool(
            "llama.cpp",
            "0b03ada (convert_lora_to_gguf.py), 0650ea8 (llama-adapter.cpp)",
            "convert_lora_to_gguf.py, src/llama-adapter.cpp, src/llama-adapter.h",
            "lora_alpha / the rank of the module's own tensors: no use_rslora, no alpha_pattern",
            lambda of: of.common_alpha / of.r,
        ),
        Tool(
            "diffusers",
            "01e87cc (loaders/peft.py), 01a15cc (utils/peft_utils.py); pull request 14409 on mixed ranks",
            "src/diffusers/loaders/peft.py, src/diffusers/utils/peft_utils.py (get_peft_kwargs)",
            "1: adapter_config.json is not read, and no alpha stands beside the tensors",
            lambda of: 1.0,
        ),
    )
}

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""What task_type may be (peft/utils/peft_types.py); null beside them."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be (vllm/config/lora.py); 16 is the default."""


@dataclass(frozen=True)
class Fact:
    """What one tool makes of one property of an adapter, why, and what to do instead."""

    verdict: Verdict
    why: str
    todo: str | None = MERGE


PROPERTIES: dict[str, str] = {
    "virtual tokens": "Prompt tuning, prefix tuning: learned tokens before the sequence, no change of a layer.",
    "own format": "A method that PEFT does not have (peft_type ONEBASE_...).",
    "bottleneck": "Bottleneck adapters (peft_type ONEBASE_BOTTLENECK).",
    "other method": "Any other method of PEFT's than LoRA (IA3, LayerNorm tuning, ...).",
    "variant": "A variant of LoRA in a field of its own (alora_invocation_tokens, use_qalora, lora_bias, ...).",
    "changed base": "A start that changed the base (PiSSA, OLoRA, ... as PEFT saves them unconverted).",
    "use_dora": "DoRA: a magnitude for each output.",
    "bias": "Biases of the base, trained.",
    "modules_to_save": "Modules trained whole: an output head, a classifier, norms.",
    "trainable_token_indices": "Trained rows of an embedding.",
    "target_parameters": "Pairs on bare parameters: stacked experts.",
    "embedding": "Pairs on an embedding.",
    "head": "A pair on the output head (lm_head).",
    "convolution": "Pairs on convolutions.",
    "mixed ranks": "Pairs of different ranks (rank_pattern).",
    "expression": "target_modules is a regular expression, not a list of names.",
    "named keys": "The adapter's name stands in the keys (lora_A.default.weight), as old PEFT wrote them.",
    "pairs": "lora_A and lora_B as PEFT writes them.",
    "unknown task": "task_type is none of PEFT's.",
    "language model": "The base is a language model or a classifier (task_type is set).",
}
"""What an adapter may have beside plain pairs, in words."""

_NO_LORA = Fact("refused", "only LoRA is read; r and lora_alpha are asked for and not there.")
_KEEP = "Open it with peft or onebase; no plain model can hold it."
_CONVERT = "Save it with peft: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)."
_WHERE_PEFT = "Load it with onebase or peft (PeftModel.from_pretrained)"
_OTHER_BASE = Fact(
    "loads wrong", "the pair belongs to a base that its start changed; it is put on the plain one.", _CONVERT
)

FACTS: Mapping[str, Mapping[str, Fact]] = {
    "virtual tokens": {
        "transformers": Fact(
            "refused", "load_adapter does not take prompt learning.", _KEEP
        ),
        "vllm": Fact("refused", "only LoRA is read; r and lora_alpha are asked for and not there.", _KEEP),
        "sglang": Fact("refused", "asserts that peft_type is LORA.", _KEEP),
        "llama.cpp": Fact("refused", "the converter asks for lora_alpha, which is not there.", _KEEP),
        "diffusers": Fact("refused", "only tensors named lora_A and lora_B are read.", _KEEP),
    },
    "own format": {
        "transformers": Fact("refused", "peft knows no such peft_type."),
        "vllm": _NO_LORA,
        "sglang": Fact("refused", "asserts that peft_type is LORA."),
        "llama.cpp": Fact("refused", "the converter asks for lora_alpha, which is not there."),
        "diffusers": Fact("refused", "only tensors named lora_A and lora_B are read."),
    },
    "bottleneck": {
        tool: Fact("refused", "there is no such method there.", "Open it with onebase; no plain model can hold it.")
        for tool in TOOLS
    },
    "other method": {
        "vllm": _NO_LORA,
        "sglang": Fact("refused", "asserts that peft_type is LORA."),
        "llama.cpp": Fact("refused", "the converter asks for lora_alpha and for tensors named lora_A and lora_B."),
        "diffusers": Fact("refused", "only tensors named lora_A and lora_B are read."),
    },
    "variant": {
        tool: Fact("loads wrong", "the field is not read, so what it does is left out.")
        for tool in ("vllm", "sglang", "llama.cpp", "diffusers")
    },
    "changed base": dict.fromkeys(("vllm", "sglang", "llama.cpp", "diffusers"), _OTHER_BASE),
    "use_dora": {
        "transformers": Fact(
            "loads wrong",
            "load_adapter looks for the magnitudes under another key (lora_magnitude_vector.default.weight), reports them "
            "as missing and starts them anew.",
            f"{_WHERE_PEFT}, or merge it: {MERGE}",
        ),
        "vllm": Fact("refused", "use_dora is not supported."),
        "sglang": Fact("refused", "use_dora is not supported."),
        "llama.cpp": Fact("refused", "the converter stops at lora_magnitude_vector, which is neither lora_A nor lora_B."),
    },
    "bias": {
        "vllm": Fact("refused", "bias must be 'none'."),
        "sglang": Fact("loads wrong", "bias is not read: the trained biases are left out."),
        "llama.cpp": Fact("refused", "the converter stops at a tensor that is neither lora_A nor lora_B."),
        "diffusers": Fact("loads wrong", "biases are not read: they are left out."),
    },
    "modules_to_save": {
        "vllm": Fact("refused", "modules_to_save must be null."),
        "sglang": Fact("loads wrong", "modules_to_save is not read: the modules keep the base's weights."),
        "llama.cpp": Fact(
            "refused",
            "the converter stops at a tensor that is neither lora_A nor lora_B (norms alone are written, and then not used).",
        ),
        "diffusers": Fact("loads wrong", "modules_to_save is not read: the modules keep the base's weights."),
    },
    "trainable_token_indices": {
        "vllm": Fact(
            "refused",
            "needs --max-lora-trainable-tokens in versions that read it; the others know no such tensor.",
        ),
        "sglang": Fact("loads wrong", "trainable_token_indices is not read: the rows keep the base's numbers."),
        "llama.cpp": Fact("refused", "the converter stops at a tensor that is neither lora_A nor lora_B."),
        "diffusers": Fact("refused", "there is no embedding of tokens to put them on."),
    },
    "target_parameters": {
        "vllm": Fact("loads", "for models with fused experts, in recent versions only (issue 55545: not with use_rslora).", None),
        "sglang": Fact("refused", "target_parameters is not read, and the keys belong to no layer."),
        "llama.cpp": Fact("refused", "the converter has no tensor for such a pair."),
    },
    "embedding": {
        "vllm": Fact("loads", "for models whose class lists embedding_modules; others refuse it.", None),
        "sglang": Fact("loads wrong", "what lies outside the blocks is not used, unless the version has layers for it."),
        "llama.cpp": Fact("loads", "where the base has a head of its own: a tied head would be changed too.", None),
    },
    "head": {
        "vllm": Fact("loads", "for models whose class lists lm_head among its embedding_modules; others refuse it.", None),
        "sglang": Fact("loads wrong", "what lies outside the blocks is not used, unless the version has layers for it."),
        "llama.cpp": Fact("loads", "where the base has a head of its own: the converter stops where it is tied.", None),
    },
    "convolution": {
        "vllm": Fact("refused", "its layers with LoRA are linear ones and embeddings."),
        "sglang": Fact("refused", "its layers with LoRA are linear ones and embeddings."),
        "llama.cpp": Fact("refused", "pairs must have two dimensions."),
    },
    "mixed ranks": {
        "diffusers": Fact("loads wrong", "before pull request 14409 all pairs are scaled by the first one's rank.", PORTABLE),
    },
    "expression": {
        "sglang": Fact("refused", "target_modules is read as a list of plain names.", PORTABLE),
    },
    "named keys": {
        "vllm": Fact("refused", "the key must end with lora_A.weight or lora_B.weight.", PORTABLE),
        "llama.cpp": Fact("refused", "the converter looks for lora_A.weight and lora_B.weight.", PORTABLE),
    },
    "pairs": {
        "diffusers": Fact(
            "loads",
            "found only if it is told the file and the prefix.",
            "load_lora_adapter(FOLDER, weight_name='adapter_model.safetensors', prefix='base_model.model')",
        ),
    },
    "unknown task": {
        "transformers": Fact(
            "refused",
            f"peft takes {', '.join(TASK_TYPES)} or null.",
            "Write null, or the right one, into adapter_config.json.",
        ),
    },
    "language model": {
        "diffusers": Fact(
            "refused", "its pipelines have no such part.", "Serve it with vLLM, SGLang or llama.cpp instead."
        ),
    },
}  # fmt: skip
"""property -> tool -> what becomes of it; where a tool is missing, the property is no hindrance there."""
