"""Whether the head for whole examples in a model's files is one for the labels that are to be learned.

transformers keeps a stored head of the right width, whatever its classes were called: a row that meant `negative` would
go on as `cat`. Here the names in config.json decide. Called by model.py when a model is opened with labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase.base import pretrained
from onebase.base.place import read_json
from onebase.config.labels import Labels
from onebase.errors import ModelError

_SHOWN_NAMES = 5


def fit_stored_head_(model: Any, labels: Labels, folder: Path, fresh: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Let each output of a model's head mean its label, and return (the modules whose weights are new, what to know).

    The same names in another order: the rows are put in the order of the labels. Other names: the last layer begins
    anew, as where the width differs. Where either side has no names but LABEL_0, LABEL_1, ..., the head is kept.

    Args:
        fresh: the modules that the files held no weights of this shape for; their weights are new already.
    """
    config = read_json(folder / "config.json")
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return fresh, ""  # what the files hold, if anything, says nothing of classes
    path, layer = _last_layer(model, labels.outputs)
    names, wanted = _names_in(config), _listed(labels.names) if labels.names else "a number"
    theirs = f"for {_listed(names)}" if names else "without names"
    if path in fresh:
        return fresh, f"the head in the model's files, {theirs}, has other outputs: one for {wanted} begins anew"
    if names == labels.names or not labels.names or _is_unnamed(labels.names):
        return fresh, ""
    if not names:
        return (
            fresh,
            f"the head in the model's files names no classes: its outputs are taken for {wanted}, in this order",
        )
    if set(names) != set(labels.names):
        for name, old in list(
            layer.named_parameters(recurse=False)
        ):  # new ones: transformers draws none that it loaded
            setattr(layer, name, nn.Parameter(torch.zeros_like(old), requires_grad=False))
        pretrained.draw_weights_(model, layer, 0)
        return (*fresh, path), f"the head in the model's files is {theirs}: one for {wanted} begins anew"
    rows = torch.tensor([names.index(name) for name in labels.names], device=layer.weight.device)
    for parameter in layer.parameters(recurse=False):
        parameter.data = parameter.data[rows]
    return fresh, f"the head in the model's files is {theirs}: its rows are used in the order {wanted}"


def _names_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a stored head's classes in the order of its outputs; empty where they are transformers' own."""
    named = config.get("id2label") or {}
    names = tuple(str(named[key]) for key in sorted(named, key=int))
    return () if _is_unnamed(names) else names


def _is_unnamed(names: tuple[str, ...]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def _last_layer(model: Any, outputs: int) -> tuple[str, nn.Linear]:
    """Return the path and the layer that gives a model's outputs: the last linear one outside the trunk.

    Raises:
        ModelError: there is none.
    """
    trunk = {id(module) for module in model.base_model.modules()}
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and id(module) not in trunk and module.weight.shape[0] == outputs:
            return path, module
    raise ModelError(
        f"a {type(model).__name__} has no linear layer with {outputs} outputs at its end, so nobody can tell which classes "
        "the head in its files is for. Choose another model, or its trunk alone."
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
