"""The settings of each adapter method, under PEFT's names.

A method is one class here and one formula in `onebase.adapters`. What PEFT knows of a method keeps PEFT's name and
meaning, because users know it and adapter_config.json stores it; only defaults differ, and are said here.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from onebase.config.section import Section, given
from onebase.errors import Problem


def _patterns(value: str | list[str] | None) -> str | list[str] | None:
    if value in ("", []) or (isinstance(value, list) and "" in value):
        raise ValueError(f"must name at least one module, got {value!r}. Write all-linear for every linear layer.")
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"must be a preset, a module's name or a regular expression, got {value!r} ({error}). "
                "Several names are a list: [q_proj, v_proj]"
            ) from None
    return value


def _regular(patterns: dict[str, Any]) -> dict[str, Any]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} must be a name, a suffix or a regular expression ({error}).") from None
    return patterns


PRESETS = ("all-linear", "attention", "mlp")
"""What `target_modules` may say instead of names."""


def in_preset(role: str, preset: str) -> bool:
    """Return whether a linear layer of this role in its model belongs to a preset.

    all-linear is PEFT's: every linear layer but the output head, embeddings and routers.
    """
    if role in ("head", "router", "embedding"):
        return False
    return preset == "all-linear" or role == preset


Patterns = Annotated[str | list[str], AfterValidator(_patterns)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
Alpha = Annotated[int | float, Field(gt=0, lt=1_000_000_000)]


class Lora(Section):
    """LoRA: a target's output gets lora_alpha / r * lora_B @ lora_A @ x added (arXiv:2106.09685)."""

    default_learning_rate: ClassVar[float] = 1e-3
    """The learning rate where none is given, by measurement."""

    method: Literal["lora"] = Field(default="lora", description="The adapter method.")
    r: Rank = Field(default=16, description="The rank of the update: rows of lora_A, columns of lora_B.")
    lora_alpha: Alpha = Field(default=32, description="The update is scaled by lora_alpha / r, whatever the rank.")
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="The share of a target's inputs that the update does not see in training."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    target_modules: Patterns = Field(
        default="all-linear",
        description="The modules that get an update: a preset (all-linear, attention, mlp), a list of names or "
        "suffixes, or a regular expression for the whole path.",
    )
    exclude_modules: Patterns | None = Field(
        default=None, description="Modules taken out again: a list of names or suffixes, or a regular expression."
    )
    layers_to_transform: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="The blocks that get updates, by number from 0. Default: all."
    )
    layers_pattern: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="The name of the list of blocks, where it is not found by itself."
    )
    rank_pattern: Annotated[dict[str, Rank], AfterValidator(_regular)] = Field(
        default_factory=dict, description="Another r for some targets: a name, suffix or regular expression -> r."
    )
    alpha_pattern: Annotated[dict[str, Alpha], AfterValidator(_regular)] = Field(
        default_factory=dict, description="Another lora_alpha for some targets, as in rank_pattern."
    )
    init_lora_weights: Literal[True, False, "gaussian"] = Field(
        default=True,
        description="True: lora_A uniform (Kaiming), lora_B zero. gaussian: lora_A normal with deviation 1 / r, "
        "lora_B zero. False: both random, so that the adapter changes the base from the start (for tests).",
    )
    init_from: Path | None = Field(
        default=None, strict=False, description="An adapter or run folder whose weights training starts from."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        if given(values, "layers_pattern") and not given(values, "layers_to_transform"):
            yield Problem(
                ("layers_pattern",), "needs 'layers_to_transform', which is not given. Add it or remove layers_pattern."
            )
