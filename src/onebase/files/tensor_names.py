"""The names of an adapter file's tensors: PEFT's keys to the bank's names, and what each of them belongs to.

The bank's names are PEFT's keys without "base_model.model." in front ("base_model." for virtual tokens). A file may also hold modules that are trained
whole (modules_to_save) under their plain names, and, where PEFT saw an embedding among the targets or a resized
vocabulary, copies of the base's own weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onebase.files.method_format import Content, Format

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTER_IN_KEY = re.compile(r"(.+\.lora_[AB])\.(?P<adapter>[^.]+)(\.weight)")


@dataclass(frozen=True)
class NamedTensors:
    """A file's tensors, sorted by what they are; `base_copies` are weights of the base by their names in the model."""

    content: Content
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def name_tensors(form: Format, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> NamedTensors:
    """Return the tensors of a file under the bank's names, without an adapter's name in the key, sorted."""
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    paths, saved, adapters, problems = set(), set(), set(), []
    for key, tensor in stored.items():
        name, adapter = _plain(key, form.prefix)
        adapters.add(adapter)
        whole = saved_module(name, config.get("modules_to_save") or ())
        module = form.module_of(name)
        if name == form.single or (whole is None and module is None and is_base_bias(name, config)):
            own[name] = tensor
        elif name in own or name in copies:
            problems.append(f"{key}: a second tensor for {name}.")
        elif module is not None and (whole is None or not _is_plain(name, form)):
            own[name] = tensor
            paths.add(module)
        elif whole is not None:
            own[name] = tensor
            saved.add(whole)
        elif name.endswith(".weight") and ".lora_" not in name:
            copies[name.replace(".base_layer.", ".")] = tensor
        else:
            problems.append(f"{key}: no tensor of {form.settings.title} as {form.peft_type} has them.")
    if config.get("ensure_weight_tying"):
        own |= _tied_again(own, copies, saved)
    if config.get("modules_to_save") and not saved:
        problems.append(f"there is no tensor of modules_to_save, {config['modules_to_save']}.")
    if len(adapters) > 1:
        problems.append(f"the keys name more than one adapter: {sorted(adapters)}.")
    content = Content({name: own[name] for name in sorted(own)}, tuple(sorted(paths)), tuple(sorted(saved)))
    return NamedTensors(content, copies, problems)


def tensor_problems(form: Format, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps tensors from being an adapter of this format with finite weights."""
    if not tensors:
        return ["there is no tensor: the adapter would change nothing."]
    problems = [problem for name, tensor in sorted(tensors.items()) for problem in _weight_problems(name, tensor)]
    return problems + form.problems(tensors, config)


def saved_module(name: str, modules_to_save: Iterable[str]) -> str | None:
    """Return the module that PEFT trained whole and that this tensor is of: the outermost whose path ends so."""
    endings = tuple(modules_to_save)
    parts = name.split(".")
    owners = (".".join(parts[:size]) for size in range(1, len(parts)))
    return next((owner for owner in owners if endings and owner.endswith(endings)), None)


def is_base_bias(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a tensor is a bias of the base that LoRA's `bias` trains."""
    return config.get("bias") in ("all", "lora_only") and name.endswith(".bias")


def _tied_again(own: Mapping[str, Tensor], copies: dict[str, Tensor], saved: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights that a file holds a second time because they are tied to one that is trained whole."""
    trained = [own[name] for path in saved if (name := f"{path}.weight") in own]
    twice = [name for name, tensor in copies.items() if any(tensor is one or tensor.equal(one) for one in trained)]
    return {name: copies.pop(name) for name in twice}


def _plain(key: str, prefix: str) -> tuple[str, str]:
    """Return the bank's name of a key, and the adapter's name that old files have in it."""
    name = key.removeprefix(prefix)
    found = _ADAPTER_IN_KEY.fullmatch(name)
    if found:
        return found[1] + found[3], found["adapter"]
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"), ""


def _is_plain(name: str, form: Format) -> bool:
    """Return whether a method's tensor has no name of its own: a bias, or any parameter of a module."""
    return form.peft_type in ("ONEBASE_BITFIT", "ONEBASE_FULL")


def _weight_problems(name: str, tensor: Tensor) -> list[str]:
    """Return what is wrong with one tensor by itself: its dtype, a value that is not finite."""
    import torch

    if name.endswith(".num_batches_tracked"):  # of a batch norm that is saved whole
        return []
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return [f"{name}: must be float32, bfloat16, float16 or float64, got {tensor.dtype}."]
    bad = int((~torch.isfinite(tensor)).sum())
    return [f"{name}: {bad} of {tensor.numel()} values are NaN or infinite."] if bad else []
