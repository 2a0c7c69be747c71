"""LoRA in adapter_config.json, with everything that PEFT trains beside it: DoRA, biases, token rows, whole modules.

Source: peft 0.21.2, tuners/lora/config.py. The meaning of the fields is the same from peft 0.5 on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from onebase.adapters.matching import for_path, pattern_matches
from onebase.config.methods import Lora
from onebase.files.json_file import is_int, is_number
from onebase.files.method_format import (
    TARGETED,
    Content,
    Format,
    Placement,
    Rules,
    chosen_modules,
    is_count,
    is_flag,
    is_layers,
    is_list_of_names,
    is_patterns,
    is_regular,
    or_null,
    targeted_fields,
    targeted_values,
)
from onebase.files.target_names import TargetNames, order_free_patterns

if TYPE_CHECKING:
    from torch import Tensor

MERGE = "Merge it into its base with peft (merge_and_unload, save_pretrained) and use that folder as the model."
_CONVERT = "Save it as plain LoRA with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # the weights belong to a base that they changed
OTHER_STARTS = ("eva", "mica")  # another start, on the plain base, that is none of ours
_BIASES = ("none", "all", "lora_only")
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (acts only after certain tokens)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA (changes the base)",
    "layer_replication": "a model with repeated layers",
    "lora_bias": "a bias in lora_B",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
_WITHOUT_EFFECT = {  # on what a stored adapter computes
    "corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "velora_config",
}  # fmt: skip
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(?:\.weight)?")


def _is_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_tokens(value[key]) for key in value)
    return isinstance(value, list) and all(is_int(one) and one >= 0 for one in value)


def _is_block_lists(value: Any) -> bool:
    return all(is_regular(one) for one in (value if isinstance(value, list) else [value]))


_RULES: Rules = {
    **TARGETED,
    "alpha_pattern": (or_null(is_patterns(is_number)), "an object of pattern: number"),
    "bias": (or_null(lambda value: value in _BIASES), "'none', 'all' or 'lora_only'"),
    "ensure_weight_tying": (or_null(is_flag), "true or false"),
    "layers_pattern": (or_null(_is_block_lists), "a name, a list of names or null, each a regular expression"),
    "layers_to_transform": (or_null(is_layers), "a layer's number, a list of them or null"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "r": (is_count, "a whole number from 1"),
    "rank_pattern": (or_null(is_patterns(is_count)), "an object of pattern: whole number from 1"),
    "target_parameters": (or_null(is_list_of_names), "a list of names or null"),
    "trainable_token_indices": (or_null(_is_tokens), "a list of token ids, an object of them by module, or null"),
    "use_dora": (or_null(is_flag), "true or false"),
    "use_rslora": (is_flag, "true or false"),
}


def _write(settings: Lora, placement: Placement) -> dict[str, Any]:
    places = (*placement.paths, *placement.parameters)
    alphas = order_free_patterns(settings.alpha_pattern, places)
    return targeted_fields(placement) | {
        "alpha_pattern": {key: whole(value) for key, value in alphas.items()},
        "bias": settings.bias,
        "ensure_weight_tying": settings.ensure_weight_tying,
        "fan_in_fan_out": placement.transposed,
        "init_lora_weights": settings.init_lora_weights,
        "layers_pattern": chosen_modules(placement.targets.layers_pattern),
        "layers_to_transform": _listed(placement.targets.layers_to_transform),
        "lora_alpha": whole(settings.lora_alpha),
        "lora_dropout": settings.lora_dropout,
        "r": settings.r,
        "rank_pattern": order_free_patterns(settings.rank_pattern, places),
        "target_parameters": settings.target_parameters,
        "trainable_token_indices": settings.trainable_token_indices,
        "use_dora": settings.use_dora,
        "use_rslora": settings.use_rslora,
    }


def _read(config: Mapping[str, Any], content: Content) -> dict[str, Any]:
    start = config.get("init_lora_weights")
    parameters = config.get("target_parameters") or []
    pairs = {found["module"] for name in content.tensors if (found := _PAIR.fullmatch(name))}
    paths = sorted(path for path in pairs if not _is_of_parameters(path, config))
    named = {f"{_unwrapped(path)}.{name.rpartition('.')[2]}" for path in pairs.difference(paths) for name in parameters}
    places = [*paths, *named]
    return targeted_values(content) | {
        "target_modules": paths,
        "r": config["r"],
        "lora_alpha": whole(config["lora_alpha"]),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": bool(config.get("use_dora")),
        "bias": config.get("bias") or "none",
        "rank_pattern": _in_use(config.get("rank_pattern"), places),
        "alpha_pattern": {key: whole(value) for key, value in _in_use(config.get("alpha_pattern"), places).items()},
        "init_lora_weights": "gaussian" if word(start) == "gaussian" else start is not False,
        "target_parameters": parameters or None,
        "trainable_token_indices": config.get("trainable_token_indices") or None,
        "ensure_weight_tying": bool(config.get("ensure_weight_tying")),
    }


def _is_of_parameters(path: str, config: Mapping[str, Any]) -> bool:
    """Return whether the pair at a path belongs to bare parameters: PEFT puts one wrapper for each around their module."""
    parameters = config.get("target_parameters") or []
    path = _unwrapped(path)
    owners = [name.rpartition(".")[0] for name in parameters]
    if any(path == owner or path.endswith(f".{owner}") for owner in owners if owner):
        return True
    return "" in owners and not _chosen(config, path)


def _unwrapped(path: str) -> str:
    """Return a module's path without PEFT's wrappers around it."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _chosen(config: Mapping[str, Any], path: str) -> bool:
    """Return whether target_modules names a module."""
    names = config.get("target_modules") or []
    return TargetNames(names if isinstance(names, str) else tuple(names)).matches(path)


def _in_use(patterns: Mapping[str, Any] | None, module_paths: Iterable[str]) -> dict[str, Any]:
    """Return the patterns that mean one of the modules: PEFT keeps the others too, to no effect."""
    paths = list(module_paths)
    return {key: value for key, value in (patterns or {}).items() if any(pattern_matches(key, path) for path in paths)}


def _refuse(config: Mapping[str, Any]) -> list[str]:
    start = config.get("init_lora_weights", True)
    known = word(start)
    if known.startswith(CHANGES_BASE):
        return [f"init_lora_weights: {start!r} belongs to a base that it changed when it began. {_CONVERT}"]
    if not isinstance(start, bool) and start is not None and known not in ("gaussian", "orthogonal", *OTHER_STARTS):
        return [f"init_lora_weights: {start!r} is not known, so it may have changed the base. {MERGE}"]
    return []


def _problems(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """Return what keeps tensors from being low-rank pairs of the given ranks, with a magnitude each under DoRA."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in sorted(tensors.items()):
        found = _PAIR.fullmatch(name)
        if found is not None:
            pairs.setdefault(found["module"], {})[found["letter"]] = tuple(tensor.shape)
    problems = [] if pairs else ["there is no lora_A and no lora_B."]
    for module, pair in pairs.items():
        missing = [f"lora_{letter}" for letter in "AB" if letter not in pair]
        if missing:
            problems.append(f"{module}: {missing[0]} is missing beside lora_{'A' if missing[0] == 'lora_B' else 'B'}.")
        else:
            problems += rank_problems(module, pair["A"], pair["B"], config)
        if config.get("use_dora") and f"{module}.lora_magnitude_vector" not in tensors:
            problems.append(f"{module}: lora_magnitude_vector is missing, but use_dora is true.")
    return problems + _beside_problems(tensors, config)


_BESIDE = {
    ".lora_magnitude_vector": ("use_dora", "DoRA's magnitudes"),
    ".base_layer.bias": ("bias", "a trained bias"),
    ".token_adapter.trainable_tokens_delta": ("trainable_token_indices", "trained rows of an embedding"),
}


def _beside_problems(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """Return where tensors beside the pairs and the fields that speak of them do not agree."""
    problems = []
    for ending, (name, what) in _BESIDE.items():
        asked = config.get(name) not in (None, False, "none", [], {})
        found = [key for key in tensors if key.endswith(ending)]
        if found and not asked:
            problems.append(f"{found[0]}: {what}, but {name} is {config.get(name)!r}.")
    if config.get("trainable_token_indices") and not any(".token_adapter." in key for key in tensors):
        problems.append("token_adapter.trainable_tokens_delta is missing, but trainable_token_indices is given.")
    return problems


def rank_problems(module: str, A: tuple[int, ...], B: tuple[int, ...], config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the shapes of a pair, if anything; a bare parameter's experts lie behind each other along the rank."""
    rank = for_path(config.get("rank_pattern") or {}, module, config["r"])
    if len(A) < 2 or len(A) != len(B):
        return [f"{module}: lora_A and lora_B must have 2 dimensions, or a convolution's, got {A} and {B}."]
    if _is_of_parameters(module, config):
        return [] if A[0] == B[1] else [f"{module}: the ranks of {A} and {B} differ."]
    groups = A[0] // B[1] if len(A) > 2 and B[1] and A[0] % B[1] == 0 else 1  # of a convolution
    if A[:1] != (rank,) or groups * B[1] != rank:
        return [f"{module}: lora_A must be ({rank}, in) and lora_B (out, {rank}), got {A} and {B}."]
    return []


def word(value: Any) -> str:
    """Return a word in lower case, "" for what is no text."""
    return value.lower() if isinstance(value, str) else ""


def whole(value: float) -> float:
    """Return a number as an int if it is whole: PEFT writes 32, not 32.0."""
    return int(value) if float(value).is_integer() else value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


LORA = Format(
    peft_type="LORA",
    settings=Lora,
    rules=_RULES,
    write=_write,
    read=_read,
    endings=(
        r"lora_[AB]\.weight",
        "lora_embedding_[AB]",
        "lora_magnitude_vector",
        r"token_adapter\.trainable_tokens_delta",
        r"base_layer\.bias",
    ),
    needed=frozenset({"lora_alpha", "r"}),
    refused=_REFUSED,
    without_effect=frozenset(_WITHOUT_EFFECT | {"init_lora_weights"}),
    refuse=_refuse,
    problems=_problems,
)
