"""A model folder as transformers writes it, for weights that are not the live model's own: merged ones.

The folder holds a plain model of the same class (no wrapper, no attention of ours), its configuration, how it
generates, the tokenizer with its chat template, and what prepares images where the base has that. No path of this
machine is in it. Cost: nothing but the writing; the plain model's tensors are those of the state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase.base.model import Base
from onebase.base.pretrained import clean_json, generation_config_of, plain_config, silence
from onebase.errors import ConfigError, list_problems

GENERATION_NAME = "generation_config.json"
_BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_PARTS = (".json", ".safetensors", ".txt")  # never a pickle


def plain_model(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a model of the same class that holds `state`, whose names are those without wrappers.

    Weights that the class ties and the state has two values of are untied in the configuration.

    Raises:
        ConfigError: it is no model of transformers, or it ties them whatever its configuration says.
    """
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"a {type(model).__name__} is no model of transformers, so no folder can be written of it.")
    twin = _without_weights(model, untie=False)
    if _torn_ties(twin, state):
        twin = _without_weights(model, untie=True)
        if torn := _torn_ties(twin, state):
            what = f"Every {type(model).__name__} shares them. Ship it as an adapter, or train with ensure_weight_tying: true."
            raise ConfigError(list_problems("writing the merged model", [*torn, what], shown=4))
    twin.load_state_dict(dict(state), assign=True)
    twin.tie_weights()
    return twin.eval()


def write_model(model: Any, folder: Path, base: Base) -> None:
    """Fill a folder with a plain model, and with all that belongs to the base beside its weights."""
    own = generation_config_of(base.model)
    with silence():
        model.save_pretrained(folder)
        if (folder / GENERATION_NAME).is_file():
            own.to_json_file(folder / GENERATION_NAME, use_diff=True)  # as it is: saving would refuse some of the hub's
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors writes what its owner alone can read
        weights.chmod((folder / "config.json").stat().st_mode)
    clean_json(folder / "config.json", set())
    clean_json(folder / GENERATION_NAME, set())
    clean_json(folder / "tokenizer_config.json", {"is_local", "local_files_only", "name_or_path"})
    for name in (*_BESIDE, *sentence_files(base).taken):
        if base.folder is not None and (base.folder / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(base.folder / name, folder / name)


@dataclass(frozen=True)
class SentenceFiles:
    """The files with which sentence-transformers makes vectors of a base's results, as paths in its folder."""

    taken: tuple[str, ...] = ()
    said: str = ""
    """What to tell the user of them; empty where there are none."""


def sentence_files(base: Base) -> SentenceFiles:
    """Return which of these files belong to a model of the base's weights: all, or with a classifier's head none."""
    listed = None if base.folder is None else base.folder / _SENTENCES[0]
    if listed is None or not listed.is_file():
        return SentenceFiles()
    assert base.folder is not None, "the list is in it"
    left = f"without {_SENTENCES[0]} and what it names, so sentence-transformers opens it with a pooling of its own: "
    if "Classification" in type(base.model).__name__:
        return SentenceFiles((), f"{left}the model gives classes, not the vectors that they make")
    found = [name for name in _SENTENCES if (base.folder / name).is_file()]
    try:
        parts = [str(entry["path"]) for entry in json.loads(listed.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        return SentenceFiles((), f"{left}{listed.name} is damaged ({type(error).__name__})")
    for part in filter(None, parts):
        if part == ".." or Path(part).name != part:
            return SentenceFiles((), f"{left}{part!r} in it is no folder beside it")
        inside = sorted(path for path in (base.folder / part).glob("*") if path.is_file())
        weights = [path for path in inside if path.suffix in (".bin", ".pt", ".pkl")]
        if weights and not any(path.suffix == ".safetensors" for path in inside):
            return SentenceFiles((), f"{left}{part}/{weights[0].name} is a pickle, which is not written")
        found += [f"{part}/{path.name}" for path in inside if path.suffix in _PARTS]
    return SentenceFiles(tuple(found), f"with sentence-transformers' {', '.join(found)}")


def _without_weights(model: Any, *, untie: bool) -> Any:
    config = plain_config(model.config)
    if untie:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    with torch.device("meta"), silence():
        twin = type(model)(config)
    twin.tie_weights()
    return twin


def _torn_ties(twin: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Return which weights are one in a model and would be two that differ in a state."""
    names: dict[int, list[str]] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        f"{first} and {other} are one weight in the model, and would become two that differ."
        for first, *others in names.values()
        for other in others
        if not torch.equal(state[first], state[other])
    ]
