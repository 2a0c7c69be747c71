"""`Settings`: everything that a settings file can say, one field for each setting.

A field holds the setting's default, its limits, its unit and its help; tables, `onebase schema` and the errors are made
from it. Everything here has an effect in this version; what is planned is refused by name (foreign.py). Optional
settings default to None, and None is never written to a file.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from onebase.config.labels import Task
from onebase.config.methods import METHODS, AdapterSettings, Lora
from onebase.config.section import Means, Section, advice, given, phrase, show, take
from onebase.errors import ConfigError, Problem

_HUB = re.compile(r"hub:[\w.-]+(/[\w.-]+){1,2}:\S+")


def _data_path(path: str) -> str:
    if path.startswith("hub:") and not _HUB.fullmatch(path):
        raise ValueError(f"must be written hub:org/name:split, got {show(path)}.")
    return path


class DataPart(Section):
    """A file, a folder, or a data set of the hub, and how much it counts."""

    path: Annotated[str, AfterValidator(_data_path)] = Field(
        min_length=1, description="A .jsonl, .csv or .parquet file, a folder of them, or hub:org/name[/config]:split."
    )
    weight: float = Field(default=1.0, gt=0, description="How often each row is drawn in an epoch, on average.")

    @property
    def on_hub(self) -> bool:
        """Whether the rows come from the hub and not from a disk."""
        return self.path.startswith("hub:")


def _parts(value: object) -> object:
    """Return a path, a {path, weight} or a list of both as a tuple of parts; anything else as it is."""
    if isinstance(value, str | Mapping | DataPart):
        value = [value]
    if isinstance(value, list | tuple):
        return tuple({"path": part} if isinstance(part, str) else part for part in value)
    return value


def _at_least_one(parts: tuple[DataPart, ...]) -> tuple[DataPart, ...]:
    if not parts:
        raise ValueError("must name at least one file, got [].")
    return parts


_PATH = {"type": "string", "minLength": 1}
_PART = {
    "type": "object",
    "properties": {"path": _PATH, "weight": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["path"],
    "additionalProperties": False,
}
_SOURCE_SCHEMA = {"anyOf": [_PATH, _PART, {"type": "array", "minItems": 1, "items": {"anyOf": [_PATH, _PART]}}]}

DataSource = Annotated[
    tuple[DataPart, ...],
    BeforeValidator(_parts),
    AfterValidator(_at_least_one),
    WithJsonSchema(_SOURCE_SCHEMA),
    Means("a path, hub:org/name:split, or a list of paths and {path, weight}"),
]
Fraction = Annotated[float, Field(gt=0, lt=1), Means("a fraction")]


DEFAULT_MAX_LENGTH = 2048
"""The most tokens of an example where neither the settings nor the model say less."""
SHORTEST_MAX_LENGTH = 4
"""The least that `max_length` may be: fewer tokens hold nothing to learn beside what marks a turn or a text."""


class DataSettings(Section):
    """Where the rows come from and how they become tokens and labels."""

    train: DataSource = Field(description="The rows to learn from.", examples=["train.jsonl"])
    valid: DataSource | Fraction | None = Field(
        default=None,
        description="The rows to evaluate on during training; a fraction such as 0.05 splits them off data.train by "
        "the hash of each row.",
    )
    test: DataSource | None = Field(default=None, description="The rows that `onebase eval RUN` measures on.")
    max_length: int | None = Field(
        default=None,
        ge=SHORTEST_MAX_LENGTH,
        description=f"The most tokens an example may have. Default: the model's limit, at most {DEFAULT_MAX_LENGTH}.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Role -> column, where the columns have other names: {prompt: question, completion: answer}.",
    )
    labels: Literal["all", "last"] = Field(default="all", description="Which assistant turns of a chat are learned.")
    label_names: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = Field(
        default=None,
        description="With task classify: the classes in the order of their numbers. Default: those of data.train, sorted.",
    )
    system: str | None = Field(default=None, description="The system message of chats that have none.")
    template: Path | None = Field(
        default=None, strict=False, description="A Jinja chat template to use instead of the model's own."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="Stop on a row that cannot be used, or leave it out and count it."
    )
    shuffle: bool = Field(default=True, description="Draw the rows in a new order every epoch, by train.seed.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        for name in ("valid", "test"):
            parts = _parts(values.get(name))
            weights = [take(part, "weight") for part in parts] if isinstance(parts, tuple) else []
            if any(weight not in (None, 1) for weight in weights):
                yield Problem((name,), "takes no 'weight', every row is measured once; got one. Remove it.")


_RATES = "; ".join(f"{name} {kind.rates()}" for name, kind in METHODS.items())


class TrainSettings(Section):
    """How the adapter learns: steps, batches, the optimiser, evaluation and checkpoints."""

    epochs: float = Field(default=1.0, gt=0, description="How often all rows are seen.")
    steps: int | None = Field(default=None, ge=1, description="Optimiser steps, instead of epochs.")
    batch_size: int = Field(default=16, ge=1, description="Rows per optimiser step.")
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="Tokens per forward and backward; a step is cut into such pieces, which changes memory and speed, "
        "never the result.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description=f"The highest learning rate. Default: the adapter method's ({_RATES}).",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "step"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up: to 0, constant, or in steps."
    )
    lr_step_size: int | None = Field(
        default=None, ge=1, description="With lr_scheduler_type step: optimiser steps from one reduction to the next."
    )
    lr_step_gamma: float = Field(
        default=0.1, gt=0, le=1, description="With lr_scheduler_type step: what each reduction multiplies the rate by."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="The share of all steps that warm up.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps that warm up, instead of warmup_ratio.")
    loss: Literal["cross_entropy", "binary_cross_entropy", "squared_error"] | None = Field(
        default=None,
        description="The loss of classify and regress. Default: what follows from the labels: cross_entropy for one class, "
        "binary_cross_entropy for several, squared_error for numbers.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay on the adapter.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0 is off.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the mean squared gradient.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's addend to the denominator.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Decides initial weights, row order and dropout.")
    eval_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps from one evaluation on data.valid to the next. Default: only before the first step and "
        "after the last.",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations without a lower loss."
    )
    keep_best: bool = Field(
        default=True, description="Keep the weights with the lowest loss on data.valid instead of the last."
    )
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps from one checkpoint to the next. Default: every 5 minutes, and when interrupted.",
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="How many checkpoints stay on disk, the newest.")
    activation_checkpointing: bool = Field(
        default=False, description="Compute activations again in backward: less memory, about a third slower."
    )
    batch_invariant: bool = Field(
        default=False,
        description="On a CPU, let no bit of a row's result depend on the other rows of its batch: about 5 % slower. "
        "`onebase train` alone asks; from Python it is so wherever onebase is imported before torch.",
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads. Default: torch's choice.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        for name, other in INSTEAD_OF.items():
            if given(values, name) and given(values, other):
                yield Problem(
                    (name,),
                    f"stands instead of '{other}', but both are given ({show(values[name])} and "
                    f"{show(values[other])}). Remove one.",
                )
        steps, warmup = values.get("steps"), values.get("warmup_steps")
        if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps:
            yield Problem(("warmup_steps",), f"must be at most 'steps', {steps}, got {warmup}.")
        stepwise = values.get("lr_scheduler_type") == "step"
        if stepwise and not given(values, "lr_step_size"):
            yield Problem(("lr_scheduler_type",), "'step' needs 'lr_step_size', which is not given. Add it.")
        for name in ("lr_step_size", "lr_step_gamma"):
            if given(values, name) and not stepwise:
                scheduler = show(values.get("lr_scheduler_type", "cosine"))
                yield Problem((name,), f"needs lr_scheduler_type 'step', got {scheduler}. Change that or remove this.")
        if given(values, "early_stopping_patience") and not given(values, "eval_every"):
            yield Problem(("early_stopping_patience",), "counts evaluations and needs 'eval_every'. Add it.")


INSTEAD_OF = {"steps": "epochs", "warmup_steps": "warmup_ratio"}
"""Training settings that stand instead of another, which then has no effect."""


class EvalSettings(Section):
    """How an adapter is measured."""

    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="Tokens per forward in evaluation; changes memory and speed, never the result."
    )
    slices: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Columns of the rows by whose values classify and regress are measured, too."
    )


def _of_its_method(value: object) -> object:
    """Return a mapping as the settings of the method that it names, of LoRA where it names none.

    Raises:
        ConfigError: with every fault of that method's settings, or there is no such method.
    """
    if not isinstance(value, Mapping):
        return value
    name = value.get("method", Lora.model_fields["method"].default)
    if not isinstance(name, str) or name not in METHODS:
        rule = phrase(Literal[tuple(METHODS)])
        problem = Problem(("method",), f"must be {rule}, got {show(name)}.{advice('method', rule, name)}")
        raise ConfigError(str(problem), [problem])
    return METHODS[name](**value)


_LOSSES = {
    "classify": ("cross_entropy", "binary_cross_entropy", "squared_error"),
    "regress": ("squared_error",),
}
_ROLES = {"classify": ("text", "label"), "regress": ("text", "target")}


def _of_other_tasks(task: object, data: object, train: object, evaluation: object) -> Iterator[Problem]:
    """Yield settings that mean something for another task than the one there is."""
    chats = ("labels", "system", "template") if task in ("text", *_LOSSES) else ()
    for name in chats:
        if given(data, name):
            yield Problem(("data", name), f"is for chats, but task is {show(task)}. Remove it, or write task: chat")
    yield from _of_other_rows(task, take(data, "columns"))
    names = take(data, "label_names")
    twice = [name for name, count in Counter(map(str, names if isinstance(names, list) else ())).items() if count > 1]
    if twice:
        yield Problem(("data", "label_names"), f"names {show(twice[0])} twice; every class has one name. Remove one.")
    if given(data, "label_names") and task != "classify":
        yield Problem(("data", "label_names"), f"is for task: classify, but task is {show(task)}. Remove it.")
    loss = take(train, "loss")
    if loss is not None and loss not in _LOSSES.get(str(task), ()):
        known = ", ".join(_LOSSES.get(str(task), ())) or "none; tokens are learned by cross-entropy"
        yield Problem(("train", "loss"), f"{show(loss)} is no loss of task {show(task)} ({known}). Remove it.")
    if take(evaluation, "slices") and task not in _LOSSES:
        yield Problem(("eval", "slices"), f"is for classify and regress, but task is {show(task)}. Remove it.")


def _of_other_rows(task: object, columns: object) -> Iterator[Problem]:
    """Yield the columns that are mapped to what rows of this task do not have."""
    roles = _ROLES.get(str(task), ())
    for role in columns if roles and isinstance(columns, Mapping) else ():
        if role not in roles:
            yield Problem(
                ("data", "columns", str(role)),
                f"task {show(task)} has no such role; its rows have {' and '.join(map(show, roles))}. Write, for example: "
                f"columns: {{{', '.join(f'{name}: COLUMN' for name in roles)}}}",
            )


class Settings(Section):
    """A whole settings file."""

    model: str = Field(
        min_length=1,
        description="The base: a hub id, a folder, a .gguf file, or the name of a packaged model.",
        examples=["smollm2-135m-instruct"],
    )
    revision: str | None = Field(default=None, min_length=1, description="A branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with a hub model.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="The number format of the base; auto: bfloat16 on CUDA devices that have it, float32 elsewhere.",
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="How the base's linear layers are held; int8: integers, with their products in integers too: faster, "
        "less memory, and rounded in the forward and in the backward; nf4: 4 bits a weight, as QLoRA (pip install "
        "'onebase[nf4]'): the least memory.",
    )
    device: Annotated[str, Means("'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")] = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="Where to compute: auto, cpu, cuda, mps."
    )
    task: Task = Field(
        default="chat",
        description="What a row is: a chat with turns to learn, plain text, a text with its class or classes, or a text "
        "with a number.",
    )
    data: DataSettings = Field(description="The rows.", examples=["{train: train.jsonl}"])
    adapter: Annotated[AdapterSettings, BeforeValidator(_of_its_method)] = Field(
        default_factory=Lora, description="What is learned.", examples=["{method: lora, r: 16}"]
    )
    train: TrainSettings = Field(default_factory=TrainSettings, description="How it is learned.")
    eval: EvalSettings = Field(default_factory=EvalSettings, description="How it is measured.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        data, train = values.get("data"), values.get("train")
        if data is not None and not given(data, "valid"):
            for name in ("eval_every", "early_stopping_patience", "keep_best"):
                if given(train, name) and take(train, name) is not False:
                    yield Problem(
                        ("train", name),
                        f"needs rows to evaluate on, but data.valid is not given; got {show(take(train, name))}. "
                        "Add, for example: data.valid: 0.05",
                    )
        yield from _of_other_tasks(values.get("task", "chat"), data, train, values.get("eval"))

    def resolved(self) -> "Settings":
        """Return equal settings in which what the adapter method decides is written down."""
        if self.train.learning_rate is not None:
            return self
        train = self.train.model_copy(update={"learning_rate": self.adapter.usual_learning_rate})
        return self.model_copy(update={"train": train})
