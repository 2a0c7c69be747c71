"""PEFT's configurations: its names, fields and defaults, and what they mean as settings of ours.

A field that PEFT has and onebase does not compute is refused when it is set, and one that PEFT does not have always: PEFT
would train something else than what is written. `to_dict` is what adapter_config.json holds. No torch. Which modules of
a model a configuration means: targets.py.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from onebase.config.methods import AdapterSettings, Ia3, LnTuning, Lora, PrefixTuning, PromptTuning
from onebase.config.paths import checked_path
from onebase.errors import ConfigError, FileFormatError, list_problems
from onebase.files.atomic import write_file
from onebase.files.json_file import to_json
from onebase.files.lora_format import LORA
from onebase.files.method_format import is_choice
from onebase.files.peft_config import CONFIG_NAME, read_config
from onebase.files.peft_format import find_adapter

FORMAT_VERSION = "0.21.2"
"""The PEFT whose fields and files these are."""

Names = list[str] | tuple[str, ...] | set[str] | str


class TaskType(StrEnum):
    """What a model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """PEFT's methods that onebase has."""

    LORA = "LORA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


class PromptTuningInit(StrEnum):
    """What virtual tokens start as."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


HEADS: Mapping[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""The modules that are trained and saved with an adapter for a task without being asked for."""


@dataclass
class PeftConfig:
    """What every configuration holds; `from_pretrained` reads a folder's, of whatever method."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    is_prompt_learning: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields that onebase does not compute, with what they are."""

    def __new__(cls, *args: Any, **named: Any) -> PeftConfig:
        """Check the names before dataclass's own error, which knows no better answer."""
        known = [one.name for one in fields(cls)]
        problems = []
        for name in named.keys() - set(known):
            close = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"closest is {close[0]!r}" if close else f"there are {', '.join(known)}"
            problems.append(f"{name}: no field of {cls.__name__}; {hint}.")
        if problems:
            raise ConfigError(list_problems(cls.__name__, sorted(problems)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.task_type is not None and self.task_type not in [*TaskType]:
            raise ConfigError(
                f"{type(self).__name__}: task_type must be one of {', '.join(TaskType)}, got {self.task_type!r}."
            )
        self.task_type = None if self.task_type is None else TaskType(self.task_type)
        self.peft_version = self.peft_version or FORMAT_VERSION
        problems = [
            f"{name}: {what} is not in this onebase, got {getattr(self, name)!r}. Remove it, or use peft for this adapter."
            for name, what in self.refused.items()
            if getattr(self, name) not in (None, False, [], {})
        ]
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name, None)
            if not is_choice([*names] if isinstance(names, tuple | set) else names) and names is not None:
                problems.append(f"{name}: must be a list of names or a regular expression, got {names!r}.")
        if problems:
            raise ConfigError(list_problems(type(self).__name__, problems))

    def settings(self, targets: list[str] | str, **others: Any) -> AdapterSettings:
        """Return the settings of an adapter on these modules.

        Args:
            others: what depends on the model: modules_to_save, feedforward_modules, rank_pattern, alpha_pattern.

        Raises:
            ConfigError: a value is wrong, or the class is no method's.
        """
        raise ConfigError(
            f"{type(self).__name__} is no method's configuration. Use LoraConfig, IA3Config, LNTuningConfig, "
            "PromptTuningConfig or PrefixTuningConfig."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as adapter_config.json has them."""
        return {one.name: copy.deepcopy(getattr(self, one.name)) for one in fields(self)}

    def save_pretrained(self, save_directory: str | Path, auto_mapping_dict: dict[str, Any] | None = None) -> None:
        """Write adapter_config.json into a folder."""
        content = {name: sorted(value) if isinstance(value, set) else value for name, value in self.to_dict().items()}
        if auto_mapping_dict is not None:
            content["auto_mapping"] = auto_mapping_dict
        write_file(checked_path(save_directory) / CONFIG_NAME, to_json(content), writing="the adapter's configuration")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None) -> PeftConfig:
        """Return the configuration in a folder.

        Raises:
            FileFormatError: there is none, or it uses what onebase does not compute.
        """
        folder = checked_path(pretrained_model_name_or_path)
        folder = find_adapter(folder if subfolder is None else folder / subfolder)
        content, form, notes = read_config(folder)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        kind = CONFIGS.get(form.peft_type)
        if kind is None:
            raise FileFormatError(
                f"{folder}: a {form.settings.title} adapter, which PEFT has not. Open it with ob.Bank.load."
            )
        known = {one.name for one in fields(kind)}
        return kind(**{name: value for name, value in content.items() if name in known})


def _as_set(names: Names | None) -> Any:
    """Return names as PEFT keeps them: a list as a set, an expression as it is."""
    return set(names) if isinstance(names, list | tuple) else names


@dataclass
class LoraConfig(PeftConfig):
    """LoRA, with PEFT's defaults."""

    r: int = 8
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    refused: ClassVar[Mapping[str, str]] = dict(LORA.refused) | {
        "corda_config": "CorDA's start",
        "eva_config": "EVA's start",
        "loftq_config": "LoftQ's start",
        "lora_ga_config": "LoRA-GA's start",
        "velora_config": "VeLoRA",
    }

    def __post_init__(self) -> None:
        """Check the fields with each other, and every value."""
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self.target_modules, self.exclude_modules = _as_set(self.target_modules), _as_set(self.exclude_modules)
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        if isinstance(self.target_modules, str):
            given = [name for name in ("layers_to_transform", "layers_pattern") if getattr(self, name) is not None]
            if given:
                raise ConfigError(
                    f"LoraConfig: {given[0]} chooses among names, and target_modules is one expression or preset, got "
                    f"{self.target_modules!r}. Write the blocks into the expression."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("LoraConfig: layers_pattern needs layers_to_transform, which is not given. Add it.")
        self.settings("all-linear")

    def settings(self, targets: list[str] | str, **others: Any) -> AdapterSettings:
        """Return LoRA's settings."""
        init = self.init_lora_weights
        same = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        beside = ("trainable_token_indices", "target_parameters", "ensure_weight_tying")
        values = {name: getattr(self, name) for name in (*same, *beside)}
        values["init_lora_weights"] = init.lower() if isinstance(init, str) else init
        return Lora(target_modules=targets, **{**values, **others})


@dataclass
class IA3Config(PeftConfig):
    """IA3, with PEFT's defaults."""

    target_modules: Names | None = None
    exclude_modules: Names | None = None
    feedforward_modules: Names | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        """Check that what is feed-forward is a target."""
        super().__post_init__()
        self.peft_type = PeftType.IA3
        self.target_modules, self.exclude_modules = _as_set(self.target_modules), _as_set(self.exclude_modules)
        self.feedforward_modules = _as_set(self.feedforward_modules)
        if isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set):
            outside = sorted(self.feedforward_modules - self.target_modules)
            if outside:
                raise ConfigError(
                    f"IA3Config: feedforward_modules must be among target_modules, got {', '.join(outside)} beside them. "
                    "Add them to target_modules."
                )
        self.settings("all-linear")

    def settings(self, targets: list[str] | str, **others: Any) -> AdapterSettings:
        """Return IA3's settings."""
        return Ia3(target_modules=targets, init_ia3_weights=self.init_ia3_weights, **others)


@dataclass
class LNTuningConfig(PeftConfig):
    """LayerNorm tuning, with PEFT's defaults."""

    target_modules: Names | None = None
    exclude_modules: Names | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Keep names as PEFT does."""
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING

    def settings(self, targets: list[str] | str, **others: Any) -> AdapterSettings:
        """Return LayerNorm tuning's settings."""
        return LnTuning(target_modules=targets, **others)


@dataclass
class PromptLearningConfig(PeftConfig):
    """What prompt and prefix tuning share; the shapes are the model's where they are None."""

    num_virtual_tokens: Any = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: ClassVar[bool] = True
    tasks_refused: ClassVar[tuple[TaskType, ...]] = (TaskType.QUESTION_ANS,)

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        if self.num_virtual_tokens is None:
            raise ConfigError(f"{type(self).__name__}: num_virtual_tokens is not given. Set it, 20 for example.")
        if self.task_type in self.tasks_refused:
            raise ConfigError(
                f"{type(self).__name__}: task_type {self.task_type} is not in this onebase with these virtual tokens. Use "
                "LoraConfig, or peft for this adapter."
            )
        if self.num_transformer_submodules not in (None, 1):
            raise ConfigError(
                f"{type(self).__name__}: num_transformer_submodules must be 1 or None (virtual tokens in one stack), got "
                f"{self.num_transformer_submodules}. Use peft for this adapter."
            )
        self.settings("")


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning, with PEFT's defaults."""

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    refused: ClassVar[Mapping[str, str]] = {"tokenizer_kwargs": "a tokenizer with settings of its own"}

    def __post_init__(self) -> None:
        """Check that a text to start from comes with a tokenizer."""
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            missing = [n for n in ("tokenizer_name_or_path", "prompt_tuning_init_text") if not getattr(self, n)]
            if missing:
                raise ConfigError(f"PromptTuningConfig: prompt_tuning_init TEXT needs {' and '.join(missing)}. Add it.")

    def settings(self, targets: list[str] | str, **others: Any) -> AdapterSettings:
        """Return prompt tuning's settings; the first values are start.py's."""
        if self.prompt_tuning_init not in [*PromptTuningInit]:
            raise ConfigError(
                f"PromptTuningConfig: prompt_tuning_init must be one of {', '.join(PromptTuningInit)}, got "
                f"{self.prompt_tuning_init!r}."
            )
        return PromptTuning(num_virtual_tokens=self.num_virtual_tokens, prompt_tuning_init="RANDOM", **others)


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning, with PEFT's defaults."""

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    tasks_refused: ClassVar[tuple[TaskType, ...]] = ()

    def __post_init__(self) -> None:
        """Check the first values."""
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"PrefixTuningConfig: init_weights must be None or 'zero', got {self.init_weights!r}.")

    def settings(self, targets: list[str] | str, **others: Any) -> AdapterSettings:
        """Return prefix tuning's settings."""
        hidden = self.encoder_hidden_size if self.prefix_projection else None
        return PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=hidden,
            **others,
        )


CONFIGS: Mapping[str, type[PeftConfig]] = {
    PeftType.LORA: LoraConfig,
    PeftType.IA3: IA3Config,
    PeftType.LN_TUNING: LNTuningConfig,
    PeftType.PROMPT_TUNING: PromptTuningConfig,
    PeftType.PREFIX_TUNING: PrefixTuningConfig,
}
"""Every method's configuration by its peft_type."""
