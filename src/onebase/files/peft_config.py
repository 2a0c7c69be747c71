"""adapter_config.json, both ways: what we write, and what we accept, refuse or only mention when reading.

Nothing that would change the result is ignored: a feature that onebase does not compute is refused by its name. A field
nobody here knows is mentioned unless it holds nothing (null, false, 0, "", [], {}), and kept. The fields of each method
are in its format (lora_format.py, other_formats.py); here is what they share. No torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onebase.config.methods import AdapterSettings
from onebase.errors import ConfigError, FileFormatError, list_problems
from onebase.files.json_file import read_json
from onebase.files.lora_format import LORA, MERGE, OTHER_STARTS, word
from onebase.files.method_format import Content, Format, Placement
from onebase.files.other_formats import OTHERS
from onebase.files.target_names import TargetNames

CONFIG_NAME = "adapter_config.json"
FORMATS: dict[str, Format] = {one.peft_type: one for one in (LORA, *OTHERS)}
"""Every format by its peft_type."""
FORMAT_OF: dict[type[AdapterSettings], Format] = {one.settings: one for one in FORMATS.values()}
"""Every format by its settings."""

_TODO = "Save the adapter again with peft's save_pretrained, or get an undamaged copy."
_SHARED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}  # without effect
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})


def config_for(
    settings: AdapterSettings, placement: Placement, *, base_path: str, revision: str | None
) -> dict[str, Any]:
    """Return the content of adapter_config.json for an adapter; patterns are kept, whole numbers stay whole."""
    form = FORMAT_OF[type(settings)]
    return form.write(settings, placement) | {
        "auto_mapping": None,
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "peft_type": form.peft_type,
        "revision": revision,
        "task_type": placement.task_type,
    }


def read_config(folder: Path) -> tuple[dict[str, Any], Format, list[str]]:
    """Return adapter_config.json as it stands, checked, its format, and what is worth mentioning about it.

    Raises:
        FileFormatError: the file is missing or damaged, another method, or uses what onebase does not compute.
    """
    path = folder / CONFIG_NAME
    config = read_json(path, todo=_TODO)
    kind = config.get("peft_type")
    form = FORMATS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise FileFormatError(
            f"{path}: peft_type must be one that onebase reads ({', '.join(FORMATS)}), got {kind!r}. "
            f"{MERGE if kind else _TODO}"
        )
    problems = [*_faults(form, config), *_refusals(form, config)]
    if problems:
        raise FileFormatError(list_problems(str(path), problems))
    return config, form, _mentions(path, form, config)


def settings_of(path: Path, form: Format, config: Mapping[str, Any], content: Content) -> AdapterSettings:
    """Return the settings in a checked adapter_config.json beside the tensors of `content`.

    Raises:
        FileFormatError: a value that the settings do not allow.
    """
    try:
        return form.settings(**form.read(config, content))
    except ConfigError as error:
        raise FileFormatError(f"{path}: {error}\n{_TODO}") from error


def targets_of(settings: AdapterSettings) -> TargetNames:
    """Return what the settings say about modules in the fields of adapter_config.json, unresolved."""
    return TargetNames(
        _fixed(getattr(settings, "target_modules", None)) or (),
        _fixed(getattr(settings, "exclude_modules", None)),
        _fixed(getattr(settings, "layers_to_transform", None)),
        _fixed(getattr(settings, "layers_pattern", None)),
    )


def stored_targets(config: Mapping[str, Any]) -> TargetNames:
    """Return the module names that a checked adapter_config.json holds."""
    return TargetNames(
        _fixed(config.get("target_modules")) or (),
        _fixed(config.get("exclude_modules")),
        _fixed(config.get("layers_to_transform")),
        _fixed(config.get("layers_pattern")),
    )


def beside_targets(config: Mapping[str, Any], paths: Iterable[str]) -> str | None:
    """Return what is wrong where pairs lie on modules that target_modules does not mean: PEFT leaves those out silently.

    Fields that mean more than the names say (target_parameters, tied weights, "all-linear") are believed.
    """
    names = config.get("target_modules")
    if (
        config.get("target_parameters")
        or config.get("ensure_weight_tying")
        or (isinstance(names, str) and names.lower() == "all-linear")
    ):
        return None
    fields, paths = stored_targets(config), sorted(paths)
    beside = [path for path in paths if not fields.matches(path)]
    if not beside:
        return None
    more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
    return (
        f"{len(beside)} of {len(paths)} pairs lie on modules that target_modules in {CONFIG_NAME} does not mean, so that peft "
        f"would leave them out: {beside[0]}{more}. Name in target_modules what the adapter was trained on."
    )


def _faults(form: Format, config: Mapping[str, Any]) -> list[str]:
    """Return what is missing or of the wrong type."""
    faults = [
        f"{name}: is missing; it must be {form.rules[name][1]}. {_TODO}" for name in sorted(form.needed - set(config))
    ]
    for name, (fits, rule) in form.rules.items():
        if name in config and not fits(config[name]):
            faults.append(f"{name}: must be {rule}, got {config[name]!r}. {_TODO}")
    return faults


def _refusals(form: Format, config: Mapping[str, Any]) -> list[str]:
    """Return what the adapter uses and onebase does not compute."""
    refusals = [
        f"{name}: {what} is not read by this onebase, got {config[name]!r}. {MERGE}"
        for name, what in form.refused.items()
        if config.get(name) not in (None, False, [], {})
    ]
    return refusals + form.refuse(config)


def _mentions(path: Path, form: Format, config: Mapping[str, Any]) -> list[str]:
    """Return the notes on a config that is read: what is set and has no effect here."""
    handled = {*form.rules, *form.refused, *form.without_effect, *_SHARED, "peft_type", "task_type"}
    notes = [
        f"{path}: {name} is not known to onebase and has no effect, got {config[name]!r}."
        for name in sorted(set(config) - handled)
        if config[name] not in _NOTHING
    ]
    if word(config.get("init_lora_weights")) in OTHER_STARTS:
        start = config["init_lora_weights"]
        notes.append(f"{path}: init_lora_weights {start!r} only says how the weights began; read as true.")
    if config.get("prefix_projection"):
        notes.append(f"{path}: prefix_projection: the file holds what the projection made; read as plain prefixes.")
    if config.get("task_type") in _WITH_HEADS and not config.get("modules_to_save"):
        notes.append(f"{path}: task_type {config['task_type']!r}: the file holds the adapter, not the task's head.")
    return notes


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
