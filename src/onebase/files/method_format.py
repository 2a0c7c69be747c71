"""`Format`: what adapter_config.json holds for one method, and which tensors lie beside it. The fields all methods share.

A format is a table: the fields that are read with what they must hold, those that are refused because they would change
the result, those without effect, and two functions between fields and settings. The formats themselves are in
lora_format.py and other_formats.py; peft_config.py and tensor_names.py go through them. No torch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onebase.config.methods import AdapterSettings
from onebase.files.json_file import Fits, is_int
from onebase.files.target_names import Names, TargetNames

if TYPE_CHECKING:
    from torch import Tensor

Rules = Mapping[str, tuple[Fits, str]]


@dataclass(frozen=True)
class Placement:
    """Where an adapter is on its model, in the words of adapter_config.json.

    `targets` are the fields that choose `paths`, the targets; `parameters` are bare parameters beside them;
    `modules_to_save` and `feedforward_modules` are names as
    those fields hold them; `transposed` says that the targets store their weight (in, out), as GPT-2's. `task_type`
    is the class that PEFT puts around the model: one that generates must be able to.
    """

    targets: TargetNames = field(default_factory=lambda: TargetNames(()))
    paths: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    feedforward_modules: Names = ()
    transposed: bool = False
    task_type: str | None = "CAUSAL_LM"
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """What a file's tensors say of the adapter: the modules that they lie on, and those that are saved whole."""

    tensors: "Mapping[str, Tensor]"
    paths: tuple[str, ...]
    saved: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """One method's format.

    Attributes:
        endings: what stands behind a module's path in the names of its tensors, as regular expressions.
        single: the name of the only tensor of a method that is on no module.
        prefix: what stands before the names of modules.
        write: settings and placement -> fields.
        read: checked fields and content -> the values of settings.
        problems: tensors and checked fields -> what keeps them from being such an adapter.
    """

    peft_type: str
    settings: type[AdapterSettings]
    rules: Rules
    write: Callable[[Any, Placement], dict[str, Any]]
    read: Callable[[Mapping[str, Any], Content], dict[str, Any]]
    endings: tuple[str, ...] = ()
    single: str | None = None
    prefix: str = "base_model.model."
    needed: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    refuse: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    problems: "Callable[[Mapping[str, Tensor], Mapping[str, Any]], list[str]]" = lambda tensors, config: []

    def module_of(self, name: str) -> str | None:
        """Return the module that a tensor of this method lies on, by its name; None for any other name."""
        found = re.fullmatch(rf"(?P<module>.+?)\.(?:{'|'.join(self.endings)})", name) if self.endings else None
        return found["module"] if found else None


def is_layers(value: Any) -> bool:
    """Return whether a value is a layer's number or a list of them."""
    return is_int(value) or (isinstance(value, list) and all(is_int(one) for one in value))


def is_regular(pattern: object) -> bool:
    """Return whether a value is a regular expression."""
    try:
        return isinstance(pattern, str) and re.compile(pattern) is not None
    except re.error:
        return False


def is_patterns(fits: Fits) -> Fits:
    """Return the test for an object whose keys are regular expressions and whose values fit."""
    return lambda value: isinstance(value, dict) and all(is_regular(key) and fits(value[key]) for key in value)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 1."""
    return is_int(value) and value >= 1


def is_flag(value: Any) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def or_null(fits: Fits) -> Fits:
    """Return a test that null passes too."""
    return lambda value: value is None or fits(value)


def is_list_of_names(value: Any) -> bool:
    """Return whether a value is a list of names."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def is_choice(value: Any) -> bool:
    """Return whether a value is a list of names or a regular expression."""
    return is_list_of_names(value) or is_regular(value)


TARGETED: Rules = {
    "exclude_modules": (or_null(is_choice), "a list of names, a regular expression or null"),
    "modules_to_save": (or_null(is_list_of_names), "a list of names or null"),
    "target_modules": (or_null(is_choice), "a list of names or a regular expression"),
}
"""The fields of every method that acts on modules."""


def chosen_modules(names: Names | Sequence[str] | None) -> list[str] | str | None:
    """Return names as JSON holds them."""
    return names if names is None or isinstance(names, str) else list(names)


def targeted_fields(placement: Placement) -> dict[str, Any]:
    """Return the fields of every method that acts on modules."""
    return {
        "exclude_modules": chosen_modules(placement.targets.exclude_modules),
        "modules_to_save": list(placement.modules_to_save) or None,
        "target_modules": chosen_modules(placement.targets.target_modules),
    }


def targeted_values(content: Content) -> dict[str, Any]:
    """Return what the settings say of modules.

    The file's tensors say exactly which modules the adapter is on. Its names may not: PEFT says nothing when one of
    them matches no module, and a preset of ours would be a regular expression there.
    """
    return {"target_modules": list(content.paths), "modules_to_save": list(content.saved) or None}
