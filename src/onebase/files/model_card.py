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

CARD_NAME = "README.md"
_OURS_ALONE = ("bitfit", "bottleneck", "full")  # methods that PEFT has no format for
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
    """What a training took and reached."""

    data: Sequence[DataFacts] = ()
    steps: int
    examples: int
    tokens: int
    train_loss: float
    valid_loss_before: float | None = None
    valid_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. `settings` are the dotted names and values worth showing, in order.

    An adapter was trained, or it is `combined_from` others, each with its weight.
    """

    name: str
    base: str
    base_revision: str | None = None
    base_fingerprint: str | None = None
    method: str = "lora"
    title: str = "LoRA"
    task: str = "chat"
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingFacts | None = None
    combined_from: Sequence[tuple[str, float]] = ()
    trainable_parameters: int
    total_parameters: int
    onebase_version: str


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [_front_matter(facts), f"# {facts.name}", _opening(facts)]
    if facts.training is not None:
        parts += [_training(facts.training, facts.task)]
        parts += [_data_table(facts.training.data)] if facts.training.data else []
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
    lines += [f"- Revision of the base: `{facts.base_revision}`"] if facts.base_revision else []
    lines += [f"- Fingerprint of the base's weights: `{facts.base_fingerprint}`"] if facts.base_fingerprint else []
    return "\n".join(lines)


def _training(facts: TrainingFacts, task: str) -> str:
    lines = [
        "## Training",
        "",
        f"{facts.steps:,} steps on {facts.examples:,} examples ({facts.tokens:,} tokens).",
        "",
        f"| loss, mean over {'examples' if task in ('classify', 'regress') else 'labelled tokens'} | |",
        "|---|---|",
        f"| training, whole run | {facts.train_loss:.4f} |",
    ]
    if facts.valid_loss_before is not None:
        lines.append(f"| validation, before | {facts.valid_loss_before:.4f} |")
    if facts.valid_loss is not None:
        lines.append(f"| validation, this adapter | {facts.valid_loss:.4f} |")
    return "\n".join(lines)


def _data_table(data: Sequence[DataFacts]) -> str:
    lines = ["## Data", "", "| | file | rows | examples | labelled tokens |", "|---|---|---|---|---|"]
    for one in data:
        name = _cell(one.file if one.file.startswith("hub:") else PurePath(one.file).name)
        lines.append(f"| {one.role} | {name} | {one.rows:,} | {one.examples:,} | {one.labelled_tokens:,} |")
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
    base = public_name(facts.base)
    opening = f'from_pretrained("{base}")  # a name on the hub, or its folder'
    if facts.base in PACKAGES:  # a name of onebase's own, which transformers does not know
        opening = f'from_pretrained(onebase.model_path("{base}"))'
    labelled = facts.task in ("classify", "regress")
    kind = "AutoModelForSequenceClassification" if labelled else "AutoModelForCausalLM"
    if labelled:  # the folder's config.json names the classes
        opening = (
            opening.replace('")', '", config=config)', 1)
            if opening.startswith('from_pretrained("')
            else (f'from_pretrained(onebase.model_path("{base}"), config=config)')
        )
    with_peft = [
        "",
        "With peft:",
        "",
        "```python",
        *(["import onebase"] if facts.base in PACKAGES else []),
        "from peft import PeftModel",
        f"from transformers import {'AutoConfig, ' if labelled else ''}{kind}, AutoTokenizer",
        "",
        *(['config = AutoConfig.from_pretrained("ADAPTER")  # the names of the classes'] if labelled else []),
        f"base = {kind}.{opening}",
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
        'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
        "```",
    ]
    return "\n".join(
        [
            "## Use",
            "",
            "With onebase, in the terminal; `ADAPTER` is this folder:",
            "",
            "```",
            "onebase predict ADAPTER --data FILE" if labelled else "onebase chat ADAPTER",
            "```",
            *(["", "Other tools do not know this method."] if facts.method in _OURS_ALONE else with_peft),
        ]
    )
