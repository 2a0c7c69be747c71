"""Whether an adapter's tensors are all there: each module that its config names on the base must have some.

The tensors say what a stored adapter is on, so a file that lost some would open as a smaller adapter. PEFT puts fresh
tensors, which change nothing, where it finds none, and warns. Asked of the formats whose targets are read from the
tensors (LoRA, IA3, LayerNorm tuning); the bank asks for each tensor of what is named otherwise. Names that mean nothing
on this base are not asked for, such as an expression for paths of before transformers 5. Cost: a match for each name
and module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onebase.adapters.matching import LINEAR_KINDS, lies_in, matches
from onebase.adapters.places import Places
from onebase.base import pretrained
from onebase.config.targeting import in_preset
from onebase.errors import FileFormatError, list_problems
from onebase.files.peft_config import CONFIG_NAME, FORMATS, stored_targets
from onebase.files.peft_format import TENSORS_NAME, StoredAdapter

_BY_TENSORS = ("LORA", "IA3", "LN_TUNING")
_BESIDE = (".base_layer.bias", ".trainable_tokens_delta")  # on modules that need not be targets
_SHOWN = 3


def check_complete(places: Places, stored: StoredAdapter) -> None:
    """Raise if the config of a stored adapter, its paths the present ones, names modules that no tensor lies on.

    Raises:
        FileFormatError: which, and how many of how many.
    """
    if stored.config["peft_type"] not in _BY_TENSORS:
        return
    form = FORMATS[stored.config["peft_type"]]
    own = (name for name in stored.tensors if not name.endswith(_BESIDE))
    trained = {path.replace(".base_layer", "") for name in own if (path := form.module_of(name))}
    saved = set(getattr(stored.settings, "modules_to_save", None) or ())
    if not places.modules.keys() >= trained | saved:
        return  # of another base, which the bank refuses
    tied = places.tied_with_embedding if stored.config.get("ensure_weight_tying") else []
    problems = []
    for setting, meant, there in (
        ("target_modules", [*_targets(places, stored)], trained),
        ("modules_to_save", [*_saved(places, stored)], saved),
    ):
        one = there.intersection(tied)  # is all of them
        lacking = [path for path in meant if path not in there and not (one and path in tied)]
        if lacking:
            more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
            problems.append(
                f"{setting} in {CONFIG_NAME} means {len(meant)} modules of {places.base.name}, but {len(lacking)} of "
                f"them have no tensors: {', '.join(lacking[:_SHOWN])}{more}. Get the file again, or save the adapter "
                f"again with the tool that made it. If it was never on them, name in {setting} those that it is on."
            )
    if problems:
        raise FileFormatError(list_problems(str(stored.folder / TENSORS_NAME), problems))


def _targets(places: Places, stored: StoredAdapter) -> Iterator[str]:
    """Yield the modules that PEFT puts this adapter on, among those that a method can be on."""
    fields = stored_targets(stored.config)
    names = fields.target_modules
    if stored.config["peft_type"] != "LORA":  # the others' formats have no layers
        fields = replace(fields, layers_to_transform=None, layers_pattern=None)
    preset = isinstance(names, str) and names.lower() == "all-linear"
    if not isinstance(names, str):
        fields = replace(fields, target_modules=_with_present(places, names))
    whole = stored.config.get("modules_to_save") or ()
    on_norms = stored.config["peft_type"] == "LN_TUNING"
    for candidate in places.owners if on_norms else places.candidates:
        path, kind = candidate.path, candidate.kind
        if kind == "experts" or any(matches(name, outer) for name in whole for outer in _around(path)):
            continue
        if preset:
            named = kind in LINEAR_KINDS and in_preset(candidate.role, "all-linear")
            excluded = not replace(fields, target_modules=(path,)).matches(path)
            if named and not excluded:
                yield path
        elif fields.matches(path):
            yield path


def _saved(places: Places, stored: StoredAdapter) -> Iterator[str]:
    """Yield the modules that PEFT trains whole: the outermost whose path ends so, and that has parameters."""
    names = _with_present(places, tuple(stored.config.get("modules_to_save") or ()))
    found: list[str] = []
    for path, module in places.modules.items():
        inside = any(lies_in(path, outer) for outer in found)
        if path and names and path.endswith(names) and not inside and any(True for _ in module.parameters()):
            found.append(path)
            yield path


def _with_present(places: Places, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names, and for each path that ends none the one that transformers gives it now."""
    gone = [name for name in names if "." in name and not any(matches(name, path) for path in places.modules)]
    present = (pretrained.renamed_path(places.base.model, name) for name in gone)
    return (*names, *(path for path in present if path in places.modules))


def _around(path: str) -> list[str]:
    """Return a module's path and those of the modules that it lies in."""
    parts = path.split(".")
    return [".".join(parts[:size]) for size in range(1, len(parts) + 1)]
