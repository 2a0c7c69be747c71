"""The settings of each adapter method, under PEFT's names.

A method is one class here and one formula in `onebase.adapters`. What PEFT knows of a method keeps PEFT's name and
meaning, because users know it and adapter_config.json stores it; only defaults differ, and are said here.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from onebase.config.method import Method
from onebase.config.section import Means, given, show
from onebase.config.targeting import PatternsOrNone, Targeted
from onebase.errors import Problem

Rank = Annotated[int, Field(ge=1, le=2**16)]
Alpha = Annotated[int | float, Field(ge=1e-6, lt=1_000_000_000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _regular(patterns: dict[str, Any]) -> dict[str, Any]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} must be a name, a suffix or a regular expression ({error}).") from None
    return patterns


Iterations = Annotated[
    str, Field(pattern=r"^pissa_niter_[1-9]\d{0,3}$"), Means("'pissa_niter_16' (or another number up to 9999)")
]


class Lora(Targeted):
    """LoRA: a target's output gets lora_alpha / r * lora_B @ lora_A @ x added (arXiv:2106.09685)."""

    title: ClassVar[str] = "LoRA"
    default_learning_rate: ClassVar[float] = 1e-3
    other_learning_rates: ClassVar[Mapping[str, float]] = {
        "loraplus_lr_ratio": 2e-4,
        "init_lora_weights=pissa": 3e-4,
        "init_lora_weights=olora": 1e-4,
    }

    method: Literal["lora"] = Field(default="lora", description="The adapter method.")
    target_modules: PatternsOrNone = Field(
        default="all-linear",
        description="The modules that get an update: a preset (all-linear, attention, mlp), a list of names or "
        "suffixes, or a regular expression for the whole path; [] where only target_parameters are adapted.",
    )
    r: Rank = Field(default=16, description="The rank of the update: rows of lora_A, columns of lora_B.")
    lora_alpha: Alpha = Field(default=32, description="The update is scaled by lora_alpha / r, whatever the rank.")
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="The share of a target's inputs that the update does not see in training."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = Field(
        default=False, description="DoRA: train each output's magnitude beside its direction (arXiv:2402.09353)."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Train biases too: all of the base's, or those of the targets."
    )
    rank_pattern: Annotated[dict[str, Rank], AfterValidator(_regular)] = Field(
        default_factory=dict, description="Another r for some targets: a name, suffix or regular expression -> r."
    )
    alpha_pattern: Annotated[dict[str, Alpha], AfterValidator(_regular)] = Field(
        default_factory=dict, description="Another lora_alpha for some targets, as in rank_pattern."
    )
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "pissa", "olora"] | Iterations = Field(
        default=True,
        description="True: lora_A uniform (Kaiming), lora_B zero. gaussian: lora_A normal with deviation 1 / r, "
        "lora_B zero. orthogonal: orthogonal rows. pissa, pissa_niter_16: the base's largest singular directions "
        "(arXiv:2404.02948), exactly or by so many iterations. olora: its QR factors (arXiv:2406.01775). False: both "
        "random, so that the adapter changes the base from the start (for tests).",
    )
    target_parameters: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="Bare parameters that get an update, such as stacked experts: names or suffixes."
    )
    trainable_token_indices: TokenIds | Annotated[dict[str, TokenIds], Field(min_length=1)] | None = Field(
        default=None, description="Rows of the embedding that are trained: token ids, or embedding's name -> token ids."
    )
    ensure_weight_tying: bool = Field(
        default=False,
        description="Where embedding and head share one weight, what is trained of one is trained of the other too.",
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="LoRA+: lora_B learns at this multiple of the rate (arXiv:2402.12354).",
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        yield from super().conflicts(values)
        if values.get("target_modules") == [] and not given(values, "target_parameters"):
            yield Problem(
                ("target_modules",),
                "must name at least one module, got []. Write all-linear for every linear layer.",
            )


class Ia3(Targeted):
    """IA3: a target's output, or a feed-forward target's input, is scaled number by number (arXiv:2205.05638)."""

    title: ClassVar[str] = "IA3"
    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["ia3"] = Field(default="ia3", description="The adapter method.")
    feedforward_modules: PatternsOrNone | None = Field(
        default=None,
        description="The targets whose input is scaled, as in target_modules; [] for none. Default: those of the MLP.",
    )
    init_ia3_weights: bool = Field(
        default=True, description="True: ones, so that nothing changes at first. False: random (for tests)."
    )


class BitFit(Targeted):
    """BitFit: the base's biases are trained, nothing else (arXiv:2106.10199). Default targets: every module with a bias."""

    title: ClassVar[str] = "BitFit"
    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["bitfit"] = Field(default="bitfit", description="The adapter method.")


class LnTuning(Targeted):
    """LayerNorm tuning: the norms' weights and biases are trained (arXiv:2312.11420). Default targets: every norm."""

    title: ClassVar[str] = "LayerNorm tuning"
    default_learning_rate: ClassVar[float] = 3e-3

    method: Literal["ln-tuning"] = Field(default="ln-tuning", description="The adapter method.")


class Bottleneck(Targeted):
    """Bottleneck adapters: y + up(act(down(y))) after a sublayer (arXiv:1902.00751; pfeiffer: arXiv:2005.00247).

    Default targets: the last linear layer of every attention and MLP (houlsby), of every MLP (pfeiffer).
    """

    title: ClassVar[str] = "bottleneck adapters"
    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["bottleneck"] = Field(default="bottleneck", description="The adapter method.")
    placement: Literal["pfeiffer", "houlsby"] = Field(
        default="pfeiffer", description="After every MLP, or after every attention too."
    )
    reduction_factor: float = Field(
        default=16, ge=0.001, description="The output's width divided by the bottleneck's; at least 1 number is left."
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = Field(
        default="relu", description="What is applied between down and up."
    )


class PromptTuning(Method):
    """Prompt tuning: trained virtual tokens before every sequence (arXiv:2104.08691)."""

    title: ClassVar[str] = "prompt tuning"
    default_learning_rate: ClassVar[float] = 3e-2

    method: Literal["prompt-tuning"] = Field(default="prompt-tuning", description="The adapter method.")
    num_virtual_tokens: int = Field(default=20, ge=1, description="How many virtual tokens are trained.")
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] = Field(
        default="SAMPLE_VOCAB",
        description="Their first values: normal, the embeddings of a text, or of tokens drawn from the vocabulary.",
    )
    prompt_tuning_init_text: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="With prompt_tuning_init TEXT: the text, repeated or cut to num_virtual_tokens."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        start, text = values.get("prompt_tuning_init"), given(values, "prompt_tuning_init_text")
        if start == "TEXT" and not text:
            yield Problem(("prompt_tuning_init",), "TEXT needs 'prompt_tuning_init_text', which is not given. Add it.")
        if text and start != "TEXT":
            yield Problem(
                ("prompt_tuning_init_text",),
                f"needs prompt_tuning_init TEXT, got {show(start or 'SAMPLE_VOCAB')}. Change that or remove this.",
            )


class PrefixTuning(Method):
    """Prefix tuning: trained keys and values before every sequence, in every layer (arXiv:2101.00190)."""

    title: ClassVar[str] = "prefix tuning"
    default_learning_rate: ClassVar[float] = 1e-1
    other_learning_rates: ClassVar[Mapping[str, float]] = {"prefix_projection": 1e-3}

    method: Literal["prefix-tuning"] = Field(default="prefix-tuning", description="The adapter method.")
    num_virtual_tokens: int = Field(default=20, ge=1, description="How many keys and values each layer gets.")
    prefix_projection: bool = Field(
        default=False, description="Make them by a small network from trained embeddings (arXiv:2101.00190 sec. 4.3)."
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="With prefix_projection: the network's width. Default: that of the base's keys."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        if given(values, "encoder_hidden_size") and not values.get("prefix_projection"):
            yield Problem(("encoder_hidden_size",), "needs prefix_projection: true. Add that or remove this.")


class Full(Targeted):
    """Full fine-tuning of the target modules, as copies beside the base. Default targets: the whole model."""

    title: ClassVar[str] = "full fine-tuning"
    default_learning_rate: ClassVar[float] = 1e-4

    method: Literal["full"] = Field(default="full", description="The adapter method.")


AdapterSettings = Lora | Ia3 | BitFit | LnTuning | Bottleneck | PromptTuning | PrefixTuning | Full
"""The settings of any one adapter."""


def virtual_tokens_of(settings: AdapterSettings) -> int:
    """Return how many virtual tokens of its own an adapter puts before every sequence."""
    return settings.num_virtual_tokens if isinstance(settings, PromptTuning | PrefixTuning) else 0


METHODS: dict[str, type[AdapterSettings]] = {
    kind.model_fields["method"].default: kind
    for kind in (Lora, Ia3, BitFit, LnTuning, Bottleneck, PromptTuning, PrefixTuning, Full)
}
"""Every method by its name."""
