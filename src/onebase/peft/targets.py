"""What a PEFT configuration means on a model: the modules it is on, by PEFT's own rules, as settings of ours.

PEFT says nothing where one name of several matches no module; here that is a warning. Names that match nothing at all
are an error there and here. As in PEFT the configuration is completed in place: default targets, all-linear resolved,
a task's head in modules_to_save, fan_in_fan_out as the layers have it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from onebase.adapters.matching import pattern_matches
from onebase.adapters.places import Places
from onebase.adapters.prefix import key_shape
from onebase.config.methods import AdapterSettings
from onebase.errors import TargetError
from onebase.files.target_names import TargetNames, name_targets
from onebase.peft.config import (
    HEADS,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptLearningConfig,
    TaskType,
)
from onebase.peft.defaults import IA3_FEEDFORWARD, IA3_TARGETS, LN_TARGETS, LORA_TARGETS

_MANY = 20  # from so many names on PEFT looks for fewer that mean the same


def complete(places: Places, config: Any, task: str | None) -> AdapterSettings:
    """Return the settings that a configuration means on a base, after completing it as PEFT does.

    Args:
        task: what the first adapter is for: the head of that task is trained with every later one too.

    Raises:
        TargetError: it names no module of the base, or the base is none of those that have defaults.
        ConfigError: a value that the settings do not allow.
    """
    heads = HEADS.get(task or "", ())
    config.modules_to_save = [*(config.modules_to_save or ()), *heads] or None
    if isinstance(config, PromptLearningConfig):
        _complete_shapes(places, config)
        return config.settings("", modules_to_save=_saved(places, config) or None)
    _complete_targets(places, config)
    saved = _saved(places, config)
    paths = _paths(places, config)
    others: dict[str, Any] = {"modules_to_save": saved or None}
    kinds = {type(places.module(path)).__name__ for path in paths}
    if isinstance(config, LoraConfig | IA3Config):
        config.fan_in_fan_out = "Conv1D" in kinds
    if isinstance(config, IA3Config):
        names = config.feedforward_modules
        others["feedforward_modules"] = [path for path in paths if _ends_with(names, path)]
    if isinstance(config, LoraConfig):
        every = [*paths, *(config.target_parameters or ())]
        others |= {name: _in_use(config, name, every) for name in ("rank_pattern", "alpha_pattern")}
    settings: AdapterSettings = config.settings(paths, **others)
    return settings


def _ends_with(names: Any, path: str) -> bool:
    """Return PEFT's answer whether a target of IA3 is feed-forward."""
    return re.fullmatch(names, path) is not None if isinstance(names, str) else path.endswith(tuple(names))


def _complete_shapes(places: Places, config: PromptLearningConfig) -> None:
    """Fill in the shapes that the model has."""
    text = places.base.model.config.get_text_config()
    if isinstance(config, PrefixTuningConfig):
        shape = key_shape(places.base)
        found = {"num_layers": shape.layers, "token_dim": shape.layer_numbers, "num_attention_heads": shape.kv_heads}
    else:
        found = {
            "num_layers": text.num_hidden_layers,
            "token_dim": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
        }
    config.num_transformer_submodules = 1
    for name, number in found.items():
        given = getattr(config, name)
        if given not in (None, number):
            raise TargetError(
                f"{type(config).__name__}: {name} is {number} in {places.base.name}, got {given}. Leave it out: it is "
                "the model's."
            )
        setattr(config, name, int(number))
    if isinstance(config, PrefixTuningConfig):
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim


def _complete_targets(places: Places, config: Any) -> None:
    """Put what is not named, or named by a preset, as names."""
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        model_type = getattr(getattr(places.base.model, "config", None), "model_type", None)
        config.target_modules = _default(config, LORA_TARGETS, IA3_TARGETS, LN_TARGETS, model_type=model_type)
        if isinstance(config, IA3Config) and config.feedforward_modules is None:
            feedforward = IA3_FEEDFORWARD[str(model_type)]
            config.feedforward_modules = feedforward if isinstance(feedforward, str) else set(feedforward)
    if isinstance(config, IA3Config) and config.feedforward_modules is None:
        config.feedforward_modules = set()
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        chosen = _all_linear(places, config)
        if len(chosen) >= _MANY and not isinstance(config, IA3Config):
            chosen = list(name_targets(chosen, [*places.modules], TargetNames(())).target_modules)
        config.target_modules = set(chosen)


def _default(
    config: PeftConfig, lora: Mapping[str, Any], ia3: Mapping[str, Any], norms: Mapping[str, Any], *, model_type: Any
) -> Any:
    table = ia3 if isinstance(config, IA3Config) else norms if isinstance(config, LNTuningConfig) else lora
    if model_type not in table:
        raise TargetError(
            f"{type(config).__name__}: target_modules is not given, and PEFT has no default for model_type {model_type!r}. "
            "Name them, or target_modules='all-linear'."
        )
    names = table[model_type]
    return names if isinstance(names, str) else set(names)


def _all_linear(places: Places, config: PeftConfig) -> list[str]:
    """Return every linear layer but the output head, or a classifier's head where the task says that it is one."""
    model = places.base.model
    out = places.base.head_module
    if out is None and config.task_type == TaskType.SEQ_CLS:
        out = next((head for name in ("score", "classifier") if (head := getattr(model, name, None)) is not None), None)
    return [
        path
        for path, module in places.modules.items()
        if path and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not out
    ]


def _paths(places: Places, config: Any) -> list[str]:
    """Return the modules that PEFT puts an adapter on, in model order.

    Source: peft 0.21.2, tuners_utils.check_target_module_exists.
    """
    target, exclude = config.target_modules, config.exclude_modules
    if target is None:
        return []
    rule = TargetNames(
        target if isinstance(target, str) else tuple(target),
        exclude if exclude is None or isinstance(exclude, str) else tuple(exclude),
        _tuple(getattr(config, "layers_to_transform", None)),
        _tuple(getattr(config, "layers_pattern", None)),
    )
    whole = config.modules_to_save or ()
    paths = [
        path
        for path in places.modules
        if path and rule.matches(path) and not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in whole)
    ]
    if not paths:
        ends = sorted({candidate.path.rpartition(".")[2] for candidate in places.candidates})
        raise TargetError(
            f"{type(config).__name__}: target_modules {_shown(target)} matches no module of {places.base.name}; there are "
            f"{', '.join(ends)}."
        )
    if not isinstance(target, str):
        for name in sorted(target):
            if not any(TargetNames((name,)).matches(path) for path in places.modules):
                warnings.warn(f"target_modules: {name!r} matches no module of {places.base.name}", stacklevel=5)
    return paths


def _shown(names: Any) -> str:
    return repr(names) if isinstance(names, str) else ", ".join(map(repr, sorted(names)))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def saved_modules(places: Places, names: Sequence[str]) -> list[str]:
    """Return the modules that names in modules_to_save mean: every one whose path ends so, the outermost."""
    found: list[str] = []
    for path, module in places.modules.items():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path.endswith(tuple(names)) and not inside and any(True for _ in module.parameters()):
            found.append(path)
    return found


def _saved(places: Places, config: Any) -> list[str]:
    """Return the modules that modules_to_save means; one that means none, and is no task's head, is warned about."""
    ends = tuple(config.modules_to_save or ())
    found = saved_modules(places, ends)
    heads = {head for several in HEADS.values() for head in several}
    for name in ends:
        if name not in heads and not any(path.endswith(name) for path in found):
            warnings.warn(f"modules_to_save: {name!r} matches no module of {places.base.name}", stacklevel=5)
    return found


def _in_use(config: Any, name: str, paths: Sequence[str]) -> dict[str, Any]:
    """Return the patterns that mean a target; PEFT keeps the others, to no effect."""
    patterns: Mapping[str, Any] = getattr(config, name)
    kept = {key: value for key, value in patterns.items() if any(pattern_matches(key, path) for path in paths)}
    for key in patterns.keys() - kept.keys():
        warnings.warn(f"{name}: {key!r} matches no target", stacklevel=5)
    return kept
