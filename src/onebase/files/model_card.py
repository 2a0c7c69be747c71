"""README.md of an adapter: a model card from plain facts, as the hub shows it. No torch.

The same facts give the same text: no time, no path of this machine. What is not known is left out; a licence is never
guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml

from onebase.base.packages import PACKAGES
from onebase.config.labels import Labels

CARD_NAME = "README.md"
_OURS_ALONE = ("bitfit", "bottleneck", "full")  # methods that PEFT has no format for
_WHERE = "  # a name on the hub, or its folder"
_SHOWN_CLASSES = 20
_PIPELINES = {  # onebase's task: the hub's pipeline
    "chat": "text-generation",
    "text": "text-generation",
    "classify": "text-classification",
    "regress": "text-classification",
}


@dataclass(frozen=True)
class DataFacts:
    """One data file of a run: its role (train, valid, test), its name, and what was used of it."""

    role: str
    file: str
    rows: int
    examples: int
    labelled_tokens: int


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a training came to. `scores` are names and values, before it and of this adapter, beside the losses."""

    data: Sequence[DataFacts] = ()
    steps: int
    examples: int
    tokens: int
    train_loss: float
    valid_loss_before: float | None = None
    valid_loss: float | None = None
    scores: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. `settings` are the dotted names and values worth showing, in order.

    An adapter was trained (`training` is None where nobody knows of it), or it is `combined_from` others, each with its
    weight. `labels` are what its own head predicts; None without one.
    """

    name: str
    base: str
    base_revision: str | None = None
    base_fingerprint: str | None = None
    method: str = "lora"
    title: str = "LoRA"
    task: str = "chat"
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Labels | None = None
    training: TrainingFacts | None = None
    combined_from: Sequence[tuple[str, float]] = ()
    trainable_parameters: int
    total_parameters: int
    onebase_version: str


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [_front_matter(facts), f"# {facts.name}", _opening(facts)]
    if facts.training is not None:
        whole = facts.labels is not None
        parts += [_training(facts.training, whole=whole)]
        parts += [_data_table(facts.training.data, whole=whole)] if facts.training.data else []
    parts += [_sources_table(facts.combined_from)] if facts.combined_from else []
    parts += [_settings_table(facts.settings)] if facts.settings else []
    parts += [_how_to_load(facts)]
    return "\n\n".join(parts) + "\n"


def public_name(base: str) -> str:
    """Return a base's name as others may read it: a folder or a file of this machine by its last part."""
    path = PurePath(base)
    is_local = path.is_absolute() or base.startswith((".", "~")) or path.suffix == ".gguf" or "\\" in base
    return path.name if is_local else base


def _front_matter(facts: CardFacts) -> str:
    package = PACKAGES.get(facts.base)
    base = package.hub_id if package else public_name(facts.base)  # what the hub can link to
    content = {
        "base_model": base,
        "library_name": "onebase" if facts.method in _OURS_ALONE else "peft",
        "pipeline_tag": _PIPELINES[facts.task],
        "tags": [f"base_model:adapter:{base}", facts.method, "onebase", "transformers"],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=True, allow_unicode=True)}---"


def _opening(facts: CardFacts) -> str:
    share = facts.trainable_parameters / facts.total_parameters
    made, what = ("combined from others", "Parameters") if facts.combined_from else ("trained", "Trained parameters")
    lines = [
        f"An adapter ({facts.title}) for `{public_name(facts.base)}`, {made} with onebase {facts.onebase_version}.",
        "",
        f"- {what}: {facts.trainable_parameters:,} of {facts.total_parameters:,} ({share:.2%})",
    ]
    lines += [f"- Predicts: {_predicted(facts.labels)}"] if facts.labels else []
    lines += [f"- Revision of the base: `{facts.base_revision}`"] if facts.base_revision else []
    lines += [f"- Fingerprint of the base's weights: `{facts.base_fingerprint}`"] if facts.base_fingerprint else []
    return "\n".join(lines)


def _predicted(labels: Labels) -> str:
    """Return what a head predicts, in words."""
    if not labels.names:
        return "a number"
    names = ", ".join(f"`{_cell(name)}`" for name in labels.names[:_SHOWN_CLASSES])
    left = len(labels.names) - _SHOWN_CLASSES
    some = f"{names} and {left} more (`config.json` names them)" if left > 0 else names
    return f"{'any of' if labels.problem == 'multi_label_classification' else 'one of'} {some}"


def _training(training: TrainingFacts, *, whole: bool) -> str:
    """Return what a training came to; `whole`: its examples are rows with one label each, not labelled tokens."""
    scores = [("loss", _loss(training.valid_loss_before), _loss(training.valid_loss)), *training.scores]
    lines = [
        "## Training",
        "",
        f"{training.steps:,} steps on {training.examples:,} {'rows' if whole else 'examples'} ({training.tokens:,} tokens). "
        f"The mean loss over the whole run, {'a row' if whole else 'a labelled token'}, was {training.train_loss:.4f}.",
    ]
    if training.valid_loss is not None or training.valid_loss_before is not None:
        lines += ["", "| on the validation rows | before | this adapter |", "|---|---|---|"]
        lines += [f"| {name} | {before} | {after} |" for name, before, after in scores]
    return "\n".join(lines)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _data_table(data: Sequence[DataFacts], *, whole: bool) -> str:
    head = ["", "file", "rows", *([] if whole else ["examples", "labelled tokens"])]
    lines = ["## Data", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in data:
        name = _cell(one.file if one.file.startswith("hub:") else PurePath(one.file).name)
        counts = [one.rows, one.examples, one.labelled_tokens][: len(head) - 2]
        lines.append(f"| {one.role} | {name} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)


def _sources_table(sources: Sequence[tuple[str, float]]) -> str:
    lines = ["## Combined from", "", "| adapter | weight |", "|---|---|"]
    lines += [f"| {_cell(name)} | {weight:g} |" for name, weight in sources]
    return "\n".join(lines)


def _settings_table(settings: Mapping[str, Any]) -> str:
    lines = ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(_shown(value))} |" for name, value in settings.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Return a setting's value as YAML would have it, with no path of this machine."""
    text = yaml.safe_dump(_public(value), default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    return public_name(value) if isinstance(value, str) else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _how_to_load(facts: CardFacts) -> str:
    asked = "onebase chat ADAPTER" if facts.labels is None else "onebase predict ADAPTER --data FILE"
    with_peft = ["", "With peft:", "", "```python", *_peft_script(facts), "```"]
    return "\n".join(
        [
            "## Use",
            "",
            "With onebase, in the terminal; `ADAPTER` is this folder:",
            "",
            "```",
            asked,
            "```",
            *(["", "Other tools do not know this method."] if facts.method in _OURS_ALONE else with_peft),
        ]
    )


def _peft_script(facts: CardFacts) -> list[str]:
    """Return the lines that open the adapter with peft; for whole examples, up to the answer."""
    packaged, base = facts.base in PACKAGES, public_name(facts.base)
    name = f'onebase.model_path("{base}")' if packaged else f'"{base}"'
    opening = [*(["import onebase"] if packaged else []), "from peft import PeftModel"]
    closing = [
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
        'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
    ]
    if facts.labels is None:
        return [
            *opening,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({name}){'' if packaged else _WHERE}",
            *closing,
        ]
    answers = {
        "single_label_classification": "print(config.id2label[logits.argmax().item()])",
        "multi_label_classification": "print([config.id2label[n] for n, p in enumerate(logits.sigmoid()) if p > 0.5])",
        "regression": "print(logits.item())",
    }
    return [
        *opening,
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'config = AutoConfig.from_pretrained("ADAPTER")  # what is predicted, by name',
        "base = AutoModelForSequenceClassification.from_pretrained(",
        f"    {name},{'' if packaged else _WHERE}",
        "    config=config,",
        "    ignore_mismatched_sizes=True,  # the adapter brings the head",
        ")",
        *closing,
        'inputs = tokenizer("A text.", return_tensors="pt")',
        "logits = model.eval()(**inputs).logits[0]",
        answers[facts.labels.problem],
    ]
