"""Writing an adapter: PEFT's two files, our record, the tokenizer, the chat template and a model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onebase
from onebase.adapters.bank import Adapter
from onebase.adapters.experts import ExpertsPart
from onebase.adapters.ia3 import Ia3Input
from onebase.adapters.layer import frozen_module
from onebase.adapters.lora import settings_in_file
from onebase.adapters.matching import matches
from onebase.base import pretrained
from onebase.base.model import Base
from onebase.config.methods import AdapterSettings, Lora
from onebase.config.settings import INSTEAD_OF, DataSettings, Settings, TrainSettings
from onebase.data.building import read_template
from onebase.files.atomic import write_synced
from onebase.files.method_format import Placement
from onebase.files.model_card import CARD_NAME, CardFacts, DataFacts, TrainingFacts, model_card
from onebase.files.peft_config import targets_of
from onebase.files.peft_format import TENSORS_NAME, write_adapter
from onebase.files.record import AdapterRecord
from onebase.files.run_folder import ADAPTER_NAME
from onebase.files.target_names import name_endings, name_feedforward, name_targets
from onebase.measure.naming import METRICS, shown
from onebase.train.data import Prepared, TrainingData
from onebase.train.member import Member

_TEMPLATE_NAME = "chat_template.jinja"
_TASKS_WITH_HEADS = {
    "ForSequenceClassification": ("SEQ_CLS", {"classifier", "score"}),
    "ForTokenClassification": ("TOKEN_CLS", {"classifier", "score"}),
    "ForQuestionAnswering": ("QUESTION_ANS", {"qa_outputs"}),
}
"""How transformers calls a model with a head for a task: PEFT's task_type, and the modules that PEFT then trains whole."""


@dataclass(frozen=True)
class Learned:
    """What a card says of the training of an adapter: by which settings, and what it came to."""

    facts: TrainingFacts
    settings: TrainSettings


def learned_by(member: Member, data: TrainingData) -> Learned:
    """Return what a card says of the training of a finished member."""
    books, (valid_loss, scores) = member.books, member.kept_scores
    parts = {"train": data.train, "valid": data.valid}
    facts = TrainingFacts(
        data=[_data_facts(role, part) for role, part in parts.items() if part is not None],
        steps=books.step,
        examples=books.examples,
        tokens=books.tokens,
        train_loss=books.loss_sum / books.labels,
        valid_loss_before=books.valid_loss_before,
        valid_loss=valid_loss,
        scores=[
            (name, _shown(key, books.scores_before), _shown(key, scores))
            for key, name in METRICS.items()
            if key in books.scores_before or key in scores
        ],
    )
    return Learned(facts, member.settings)


def _shown(key: str, values: Mapping[str, float]) -> str:
    return shown(key, values[key]) if key in values else "-"


def save_run_adapter(folder: Path, member: Member, settings: Settings, data: TrainingData) -> int:
    """Write a run's adapter with all that belongs to it and return the bytes of its tensor file."""
    learned = learned_by(member, data)
    return save_whole(
        folder, member.adapter, member.bank.base, settings.data, settings.task, learned, settings.revision
    )


def save_whole(
    folder: Path,
    adapter: Adapter,
    base: Base,
    reading: DataSettings,
    task: str,
    learned: Learned | None,
    revision: str | None = None,
) -> int:
    """Write an adapter with its tokenizer and a model card and return the bytes of its tensor file."""
    card = model_card(_facts(folder, adapter, base, task, learned, revision))

    def fill(new: Path) -> None:
        save_tokenizer(base, new, reading.template)
        write_synced(new / CARD_NAME, card)

    return write(folder, base, adapter, task=task, revision=revision, extras={"data": reading_of(reading)}, fill=fill)


def write(
    folder: Path,
    base: Base,
    adapter: Adapter,
    *,
    task: str,
    revision: str | None = None,
    extras: Mapping[str, Any] | None = None,
    fill: Callable[[Path], None] | None = None,
) -> int:
    """Write an adapter in PEFT's format with our record beside it and return the bytes of its tensor file.

    Of `extras` what is not empty is kept: `data`, how its rows were read (`reading_of`), so that whoever asks it later
    asks as in training; `combined`, what it was combined from.
    """
    labels = base.labels if base.own_heads else None

    def fill_all(new: Path) -> None:
        if labels is not None:  # transformers' own way to know the classes: AutoConfig.from_pretrained(folder)
            write_synced(new / "config.json", pretrained.config_text(base.model))
        if fill is not None:
            fill(new)

    write_adapter(
        folder,
        settings_in_file(adapter.settings) if isinstance(adapter.settings, Lora) else adapter.settings,
        {name: tensor.cpu() for name, tensor in adapter.file_tensors.items()},
        placement=placement_of(base, adapter),
        base_path=str(base.folder or base.name),
        record=AdapterRecord(
            base=base.name,
            base_fingerprint=base.fingerprint,
            base_revision=revision,
            dtype=str(base.dtype).removeprefix("torch."),
            quantize=base.quantize,
            method=adapter.settings.method,
            task=task,
            seed=adapter.seed,
            labels=None if labels is None else {"problem": labels.problem, "names": list(labels.names)},
            extras={name: value for name, value in (extras or {}).items() if value},
        ),
        fill=fill_all,
    )
    return (folder / TENSORS_NAME).stat().st_size


def reading_of(settings: DataSettings) -> dict[str, Any]:
    """Return the data settings that decide how a row becomes tokens, where they are not the defaults; no paths."""
    kept = {"columns", "labels", "max_length", "system"}
    return settings.model_dump(include=kept, exclude_defaults=True, exclude_none=True)


def placement_of(base: Base, adapter: Adapter) -> Placement:
    """Return where an adapter is on its base, in the words of adapter_config.json."""
    settings, paths = adapter.settings, adapter.target_paths
    names = module_paths([name for name, _ in base.model.named_modules()])
    wanted = targets_of(settings)
    if not isinstance(settings, Lora):  # the others' formats have no layers
        wanted = replace(wanted, layers_to_transform=None, layers_pattern=None)
    targets = name_targets(paths, names, wanted)
    feedforward = {part.path for part in adapter.parts if isinstance(part, Ia3Input)}
    kept = settings.modules_to_save or ()
    saved = [part.path for part in adapter.parts if any(matches(name, part.path) for name in kept)]
    experts = (part for part in adapter.parts if isinstance(part, ExpertsPart))
    kinds = {type(frozen_module(base.model, path)).__name__ for path in paths}
    return Placement(
        targets,
        paths,
        name_endings(saved, names),
        name_feedforward(targets, paths, feedforward),
        "Conv1D" in kinds,
        _task_type(base, saved, virtual=adapter.virtual_tokens > 0),
        tuple(f"{part.path}.{pair.name}" for part in experts for pair in part.pairs),
    )


def _task_type(base: Base, saved: Sequence[str], *, virtual: bool) -> str | None:
    """Return the task_type whose class of PEFT's fits the model, None for its plain one, which fits every model.

    A task's own head is trained whole by that class of itself; it stands in the file only where it was trained here. An
    encoder's hidden states are features; where virtual tokens stand before a sequence the plain class does not do.
    """
    model, heads = base.model, {path.rpartition(".")[2] for path in saved}
    for ending, (task, names) in _TASKS_WITH_HEADS.items():
        if type(model).__name__.endswith(ending) and heads & names:
            return task
    if hasattr(model, "prepare_inputs_for_generation"):
        return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    is_encoder = base.layout_kind != "native" and base.trunk is model
    return "FEATURE_EXTRACTION" if virtual or is_encoder else None


def module_paths(names: list[str]) -> list[str]:
    """Return the paths of the model's own modules: wrapped ones under their own name, as PEFT sees the plain model."""
    return list(dict.fromkeys(name.replace(".base_layer", "") for name in names if name))


def save_tokenizer(base: Base, folder: Path, template: Path | None) -> None:
    """Write the tokenizer, and the chat template that was trained with, where that is not the model's own."""
    if base.tokenizer is None:
        return
    base.tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / _TEMPLATE_NAME).write_text(read_template(template), encoding="utf-8")


def own_template(base: Base, folder: Path) -> Path | None:
    """Return the chat template that lies with an adapter, None where it is the base's own."""
    path = folder / _TEMPLATE_NAME
    if base.tokenizer is None or not path.is_file() or read_template(path) == base.tokenizer.chat_template:
        return None
    return path


def _facts(
    folder: Path, adapter: Adapter, base: Base, task: str, learned: Learned | None, revision: str | None
) -> CardFacts:
    path = folder.absolute()
    return CardFacts(
        name=path.parent.name if path.name == ADAPTER_NAME else path.name,
        base=base.name,
        base_revision=revision,
        base_fingerprint=base.fingerprint,
        method=adapter.settings.method,
        title=adapter.settings.title,
        task=task,
        settings=_worth_showing(adapter.settings, None if learned is None else learned.settings),
        labels=base.labels if base.own_heads else None,
        training=None if learned is None else learned.facts,
        trainable_parameters=adapter.parameter_count,
        total_parameters=base.parameter_count + adapter.parameter_count,
        onebase_version=onebase.__version__,
    )


def _data_facts(role: str, part: Prepared) -> DataFacts:
    report = part.report
    return DataFacts(role, ", ".join(part.files), report.rows, report.examples, report.labelled_tokens)


def _worth_showing(adapter: AdapterSettings, train: TrainSettings | None) -> Mapping[str, Any]:
    """Return the adapter's and the training's settings that were given, and the learning rate; no paths."""
    shown_settings: dict[str, Any] = {}
    replaced = {other for name, other in INSTEAD_OF.items() if train is not None and getattr(train, name) is not None}
    for section, values in (("adapter", adapter), ("train", train)):
        given = {} if values is None else values.model_dump(exclude_none=True, exclude=replaced)
        for name, value in given.items():
            if not isinstance(value, Path) and value not in ({}, []):
                shown_settings[f"{section}.{name}"] = value
    return shown_settings
