"""IA3, LayerNorm tuning, prompt and prefix tuning in adapter_config.json as PEFT has them, and the methods it has not.

Those are BitFit, bottleneck adapters and full fine-tuning: the same two files, with a peft_type that begins with
ONEBASE_, so that PEFT refuses them, and the exact paths of the targets. Source: peft 0.21.2, tuners/*/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onebase.config.methods import BitFit, Bottleneck, Full, Ia3, LnTuning, PrefixTuning, PromptTuning
from onebase.files.json_file import is_number
from onebase.files.method_format import (
    TARGETED,
    Content,
    Format,
    Placement,
    Rules,
    chosen_modules,
    is_choice,
    is_count,
    is_flag,
    is_list_of_names,
    or_null,
    targeted_fields,
    targeted_values,
)

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = "prompt_embeddings"


def _write_ia3(settings: Ia3, placement: Placement) -> dict[str, Any]:
    return targeted_fields(placement) | {
        "fan_in_fan_out": placement.transposed,
        "feedforward_modules": chosen_modules(placement.feedforward_modules),
        "init_ia3_weights": settings.init_ia3_weights,
    }


def _read_ia3(config: Mapping[str, Any], content: Content) -> dict[str, Any]:
    names = config["feedforward_modules"]
    feedforward = [path for path in content.paths if _ends_with(names, path)]
    return targeted_values(content) | {
        "feedforward_modules": feedforward,
        "init_ia3_weights": config.get("init_ia3_weights", True),
    }


def _ends_with(names: list[str] | str, path: str) -> bool:
    """Return PEFT's answer whether a target is feed-forward: by the bare end of its path, not by whole names."""
    return re.fullmatch(names, path) is not None if isinstance(names, str) else path.endswith(tuple(names))


IA3 = Format(
    peft_type="IA3",
    settings=Ia3,
    rules={
        **TARGETED,
        "feedforward_modules": (is_choice, "a list of names or a regular expression"),
        "init_ia3_weights": (is_flag, "true or false"),
    },
    write=_write_ia3,
    read=_read_ia3,
    endings=("ia3_l",),
    needed=frozenset({"feedforward_modules"}),
    without_effect=frozenset({"fan_in_fan_out"}),
)

LN_TUNING = Format(
    peft_type="LN_TUNING",
    settings=LnTuning,
    rules=TARGETED,
    write=lambda settings, placement: targeted_fields(placement),
    read=lambda config, content: targeted_values(content),
    endings=(r"ln_tuning_layers\.[^.]+",),
)

_SHAPES = frozenset({"num_attention_heads", "num_layers", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path"})
_VIRTUAL: Rules = {
    "modules_to_save": TARGETED["modules_to_save"],
    "num_transformer_submodules": (or_null(is_count), "a whole number from 1 or null"),
    "num_virtual_tokens": (is_count, "a whole number from 1"),
}
_NO_SHAPES = {"num_attention_heads": None, "num_layers": None, "num_transformer_submodules": None, "token_dim": None}
"""PEFT takes them from the model's configuration where they are null."""


def _write_prompt(settings: PromptTuning, placement: Placement) -> dict[str, Any]:
    # RANDOM: with TEXT peft would open a tokenizer to make first values that these tensors replace.
    return _NO_SHAPES | {
        "modules_to_save": list(placement.modules_to_save) or None,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
    }


def _write_prefix(settings: PrefixTuning, placement: Placement) -> dict[str, Any]:
    # no projection: the tensor is what it made, and peft would begin another one to train it further
    return _NO_SHAPES | {
        "encoder_hidden_size": None,
        "modules_to_save": list(placement.modules_to_save) or None,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "prefix_projection": False,
    }


def _read_virtual(config: Mapping[str, Any], content: Content) -> dict[str, Any]:
    return {"num_virtual_tokens": config["num_virtual_tokens"], "modules_to_save": list(content.saved) or None}


def _prompt_problems(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    if PROMPT not in tensors:
        return [f"{PROMPT} is missing."]
    shape, wanted = tuple(tensors[PROMPT].shape), config["num_virtual_tokens"]
    if len(shape) != 2 or shape[0] != wanted:
        return [f"{PROMPT}: must be ({wanted}, width), as num_virtual_tokens says, got {shape}."]
    return []


def _refuse_two_stacks(config: Mapping[str, Any]) -> list[str]:
    """Return that virtual tokens of an encoder-decoder lie in both of its stacks, which is not computed here."""
    if (config.get("num_transformer_submodules") or 1) == 1:
        return []
    return ["num_transformer_submodules: virtual tokens in both stacks of an encoder-decoder are not read."]


PROMPT_TUNING = Format(
    peft_type="PROMPT_TUNING",
    settings=PromptTuning,
    rules=_VIRTUAL,
    write=_write_prompt,
    read=lambda config, content: _read_virtual(config, content) | {"prompt_tuning_init": "RANDOM"},
    single=PROMPT,
    prefix="base_model.",
    needed=frozenset({"num_virtual_tokens"}),
    without_effect=_SHAPES | {"prompt_tuning_init", "prompt_tuning_init_text"},
    refuse=_refuse_two_stacks,
    problems=_prompt_problems,
)

PREFIX_TUNING = Format(
    peft_type="PREFIX_TUNING",
    settings=PrefixTuning,
    rules={**_VIRTUAL, "prefix_projection": (is_flag, "true or false")},
    write=_write_prefix,
    read=_read_virtual,  # what the projection makes is stored, not the projection
    single=PROMPT,
    prefix="base_model.",
    needed=frozenset({"num_virtual_tokens"}),
    without_effect=_SHAPES | {"encoder_hidden_size", "init_weights"},
    refuse=_refuse_two_stacks,
    problems=_prompt_problems,
)

_OWN: Rules = {
    "modules_to_save": TARGETED["modules_to_save"],
    "target_modules": (is_list_of_names, "a list of the targets' paths"),
}
_BOTTLENECK = ("placement", "reduction_factor", "non_linearity")


def _write_own(settings: Any, placement: Placement) -> dict[str, Any]:
    return {"modules_to_save": list(placement.modules_to_save) or None, "target_modules": list(placement.paths)}


def _read_own(config: Mapping[str, Any], content: Content) -> dict[str, Any]:
    return {"modules_to_save": config.get("modules_to_save"), "target_modules": config["target_modules"]}


BITFIT = Format(
    peft_type="ONEBASE_BITFIT",
    settings=BitFit,
    rules=_OWN,
    write=_write_own,
    read=_read_own,
    endings=("bias",),
    needed=frozenset({"target_modules"}),
)

BOTTLENECK = Format(
    peft_type="ONEBASE_BOTTLENECK",
    settings=Bottleneck,
    rules={
        **_OWN,
        "non_linearity": (lambda value: isinstance(value, str), "text"),
        "placement": (lambda value: isinstance(value, str), "text"),
        "reduction_factor": (is_number, "a number"),
    },
    write=lambda settings, placement: (
        _write_own(settings, placement) | {name: getattr(settings, name) for name in _BOTTLENECK}
    ),
    read=lambda config, content: _read_own(config, content) | {name: config[name] for name in _BOTTLENECK},
    endings=(r"adapter_(?:down|up)\.(?:weight|bias)",),
    needed=frozenset({"target_modules", *_BOTTLENECK}),
)

FULL = Format(
    peft_type="ONEBASE_FULL",
    settings=Full,
    rules=_OWN,
    write=_write_own,
    read=_read_own,
    endings=(r"[^.]+",),
    needed=frozenset({"target_modules"}),
)

OTHERS = (IA3, LN_TUNING, PROMPT_TUNING, PREFIX_TUNING, BITFIT, BOTTLENECK, FULL)
