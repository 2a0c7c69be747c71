"""Before and after transformers loads a model: what it is told of labels, and its account held against what there was.

Called by pretrained.py. Imports no torch.
"""

from typing import Any

from onebase.base.cache import Say
from onebase.base.place import ModelPlace, unloaded_weights
from onebase.config.labels import Labels
from onebase.errors import ModelError, list_problems


def prepare_for_labels_(config: Any, labels: Labels, tokenizer: Any) -> None:
    """Write what a model predicts into its configuration, and what pads its batches where nothing says so."""
    for name, value in labels.config.items():
        setattr(config, name, value)
    if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def without_new_heads_(model: Any, loading: dict[str, Any]) -> tuple[str, ...]:
    """Take a head's modules that found no weights of their shape out of what was loaded, and return their paths."""
    trunk = {id(parameter) for parameter in model.base_model.parameters()}
    pooler = getattr(model.base_model, "pooler", None)
    trunk -= set() if pooler is None else {id(parameter) for parameter in pooler.parameters()}
    new = {name for name, parameter in model.named_parameters() if id(parameter) not in trunk}
    gone = {name for name, *_ in loading["mismatched_keys"]} | set(loading["missing_keys"])
    loading["missing_keys"] = {name for name in loading["missing_keys"] if name not in new}
    loading["mismatched_keys"] = [told for told in loading["mismatched_keys"] if told[0] not in new]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters() if name in gone & new))


def check_loaded(place: ModelPlace, model: Any, loading: dict[str, Any], say: Say) -> None:
    """Hold transformers' account of what it loaded against what there was: all of it, and nothing invented.

    Raises:
        ModelError: weights that are missing, left over or of another shape.
    """
    problems, parts = unloaded_weights(
        (name for name, _ in model.named_modules()),
        loading["missing_keys"],
        loading["unexpected_keys"],
        (f"{name}: {tuple(stored)} in the file, but {tuple(needed)} in the model"
         for name, stored, needed in loading["mismatched_keys"]),
    )  # fmt: skip
    if problems:
        kind = type(model).__name__
        told = list_problems(f"the weights in {place.folder} for a {kind}", problems, shown=10)
        raise ModelError(f"{place.name}: {told}\nDo config.json and the weights belong together? Get both again.")
    if parts:
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        say(f"{place.name}: a {type(model).__name__} does not use {', '.join(parts[:3])}{more}")
