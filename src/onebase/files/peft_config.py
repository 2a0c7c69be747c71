"""adapter_config.json of PEFT's LoRA: what we write, and what we accept, refuse or only mention when reading.

Nothing that would change the result is ignored: a feature that onebase does not compute is refused by its name. A field
nobody here knows is mentioned unless it holds nothing (null, false, 0, "", [], {}), and kept.

Source: peft 0.21.2, tuners/lora/config.py. The meaning of the fields is the same from peft 0.5 on. No torch.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onebase.adapters.matching import pattern_matches
from onebase.config.methods import Lora
from onebase.errors import ConfigError, FileFormatError, list_problems
from onebase.files.json_file import Fits, is_int, is_number, read_json
from onebase.files.target_names import TargetNames, order_free_patterns

CONFIG_NAME = "adapter_config.json"
TASK_TYPES = {"chat": "CAUSAL_LM", "text": "CAUSAL_LM"}  # onebase's task: PEFT's task_type

_TODO = "Save the adapter again with peft's save_pretrained, or get an undamaged copy."
_MERGE = "Merge it into its base with peft (merge_and_unload, save_pretrained) and use that folder as the model."
_CONVERT = "Save it as plain LoRA with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # the weights belong to a base that they changed
_OTHER_STARTS = ("eva", "orthogonal", "mica")  # another start, on the plain base
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (acts only after certain tokens)",
    "arrow_config": "Arrow routing",
    "ensure_weight_tying": "adapters tied between embedding and head",
    "kasa_config": "KaSA (changes the base)",
    "layer_replication": "a model with repeated layers",
    "lora_bias": "a bias in lora_B",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "whole trained modules beside the adapter",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained rows of the embedding",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
_WITHOUT_EFFECT = {  # on what a stored adapter computes
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_layers(value: Any) -> bool:
    return is_int(value) or (isinstance(value, list) and all(is_int(one) for one in value))


def _is_patterns(fits: Fits) -> Fits:
    return lambda value: isinstance(value, dict) and all(_is_regular(key) and fits(value[key]) for key in value)


def _is_regular(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_rank(value: Any) -> bool:
    return is_int(value) and value >= 1


def _or_null(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


_RULES: dict[str, tuple[Fits, str]] = {
    "alpha_pattern": (_or_null(_is_patterns(is_number)), "an object of pattern: number"),
    "exclude_modules": (_or_null(_is_names), "a list of names, a regular expression or null"),
    "layers_pattern": (_or_null(_is_names), "a name, a list of names or null"),
    "layers_to_transform": (_or_null(_is_layers), "a layer's number, a list of them or null"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "r": (_is_rank, "a whole number from 1"),
    "rank_pattern": (_or_null(_is_patterns(_is_rank)), "an object of pattern: whole number from 1"),
    "target_modules": (_or_null(_is_names), "a list of names or a regular expression"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
}
_NEEDED = {"lora_alpha", "r"}
_HANDLED = {*_RULES, *_REFUSED, *_WITHOUT_EFFECT, "bias", "init_lora_weights", "peft_type", "task_type"}


def config_for(
    settings: Lora,
    targets: TargetNames,
    module_paths: Iterable[str],
    *,
    base_path: str,
    revision: str | None,
    task: str,
) -> dict[str, Any]:
    """Return the content of adapter_config.json for an adapter on the modules `module_paths`.

    `targets` are the resolved names; patterns are kept, whole numbers stay whole.
    """
    names = list(module_paths)
    alphas = order_free_patterns(settings.alpha_pattern, names)
    return {
        "alpha_pattern": {key: _whole(value) for key, value in alphas.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base_path,
        "bias": "none",
        "exclude_modules": _plain(targets.exclude_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": settings.init_lora_weights,
        "layers_pattern": _plain(targets.layers_pattern),
        "layers_to_transform": _plain(targets.layers_to_transform),
        "lora_alpha": _whole(settings.lora_alpha),
        "lora_dropout": settings.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.r,
        "rank_pattern": order_free_patterns(settings.rank_pattern, names),
        "revision": revision,
        "target_modules": _plain(targets.target_modules),
        "task_type": TASK_TYPES[task],
        "use_dora": False,
        "use_rslora": settings.use_rslora,
    }


def read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return adapter_config.json as it stands, checked, and what is worth mentioning about it.

    Raises:
        FileFormatError: the file is missing or damaged, another method, or uses what onebase does not compute.
    """
    path = folder / CONFIG_NAME
    config = read_json(path, todo=_TODO)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FileFormatError(
            f"{path}: peft_type must be one that onebase reads (LORA), got {kind!r}. {_MERGE if kind else _TODO}"
        )
    problems = [*_faults(config), *_refusals(config)]
    if problems:
        raise FileFormatError(list_problems(str(path), problems))
    return config, _mentions(path, config)


def settings_of(path: Path, config: Mapping[str, Any], module_paths: Iterable[str]) -> Lora:
    """Return the settings in a checked adapter_config.json, with the modules it holds as target_modules.

    The file's tensors say exactly which modules the adapter is on. Its names may not: PEFT says nothing when one of
    them matches no module, and a preset of ours would be a regular expression there.

    Raises:
        FileFormatError: a value that the settings do not allow.
    """
    start, paths = config.get("init_lora_weights"), sorted(module_paths)
    try:
        return Lora(
            r=config["r"],
            lora_alpha=_whole(config["lora_alpha"]),
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            target_modules=paths,
            rank_pattern=_in_use(config.get("rank_pattern"), paths),
            alpha_pattern={key: _whole(value) for key, value in _in_use(config.get("alpha_pattern"), paths).items()},
            init_lora_weights="gaussian" if _word(start) == "gaussian" else start is not False,
        )
    except ConfigError as error:
        raise FileFormatError(f"{path}: {error}\n{_TODO}") from error


def targets_of(settings: Lora) -> TargetNames:
    """Return what the settings say about modules in the fields of adapter_config.json, unresolved."""
    return TargetNames(
        _fixed(settings.target_modules),
        _fixed(settings.exclude_modules),
        _fixed(settings.layers_to_transform),
        _fixed(settings.layers_pattern),
    )


def stored_targets(config: Mapping[str, Any]) -> TargetNames:
    """Return the module names that a checked adapter_config.json holds."""
    return TargetNames(
        _fixed(config.get("target_modules")) or (),
        _fixed(config.get("exclude_modules")),
        _fixed(config.get("layers_to_transform")),
        _fixed(config.get("layers_pattern")),
    )


def _in_use(patterns: Mapping[str, Any] | None, module_paths: Iterable[str]) -> dict[str, Any]:
    """Return the patterns that mean one of the modules: PEFT keeps the others too, to no effect."""
    paths = list(module_paths)
    return {key: value for key, value in (patterns or {}).items() if any(pattern_matches(key, path) for path in paths)}


def _faults(config: Mapping[str, Any]) -> list[str]:
    """Return what is missing or of the wrong type."""
    faults = [f"{name}: is missing; it must be {_RULES[name][1]}. {_TODO}" for name in sorted(_NEEDED - set(config))]
    for name, (fits, rule) in _RULES.items():
        if name in config and not fits(config[name]):
            faults.append(f"{name}: must be {rule}, got {config[name]!r}. {_TODO}")
    return faults


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """Return what the adapter uses and onebase does not compute."""
    refusals = [
        f"{name}: {what} is not read by this onebase, got {config[name]!r}. {_MERGE}"
        for name, what in _REFUSED.items()
        if config.get(name) not in (None, False, [], {})
    ]
    if config.get("bias", "none") not in ("none", None):
        refusals.append(f"bias: trained biases are not read by this onebase, got {config['bias']!r}. {_MERGE}")
    start = config.get("init_lora_weights", True)
    word = _word(start)
    if word.startswith(_CHANGES_BASE):
        refusals.append(f"init_lora_weights: {start!r} belongs to a base that it changed when it began. {_CONVERT}")
    elif not isinstance(start, bool) and start is not None and word not in ("gaussian", *_OTHER_STARTS):
        refusals.append(f"init_lora_weights: {start!r} is not known, so it may have changed the base. {_MERGE}")
    return refusals


def _mentions(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the notes on a config that is read: what is set and has no effect here."""
    notes = [
        f"{path}: {name} is not known to onebase and has no effect, got {config[name]!r}."
        for name in sorted(set(config) - _HANDLED)
        if config[name] not in (None, False, 0, "", [], {})
    ]
    if _word(config.get("init_lora_weights")) in _OTHER_STARTS:
        start = config["init_lora_weights"]
        notes.append(f"{path}: init_lora_weights {start!r} only says how the weights began; read as true.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        notes.append(f"{path}: task_type {config['task_type']!r}: the file holds the adapter, not the task's head.")
    return notes


def _word(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


def _whole(value: float) -> float:
    """Return a number as an int if it is whole: PEFT writes 32, not 32.0."""
    return int(value) if float(value).is_integer() else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
