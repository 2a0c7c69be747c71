"""Which modules an adapter is put on: the settings that every method with targets has, and what the presets mean."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from onebase.config.method import Method
from onebase.config.section import given
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


def _block_lists(value: str | list[str]) -> str | list[str]:
    for pattern in [value] if isinstance(value, str) else value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{pattern!r} must be the name of a list of blocks, or a regular expression ({error})."
            ) from None
    return value


def _some_blocks(value: int | list[int]) -> int | list[int]:
    if value == []:
        raise ValueError("must name at least one layer, got []. Remove it to adapt all.")
    return value


PRESETS = ("all-linear", "attention", "mlp")
"""What `target_modules` may say instead of names."""


def in_preset(role: str, preset: str) -> bool:
    """Return whether a linear layer of this role in its model belongs to a preset.

    all-linear is PEFT's: every linear layer but the output head, embeddings and routers.
    """
    if role in ("head", "router", "embedding"):
        return False
    return preset == "all-linear" or role == preset


def _patterns_or_none(value: str | list[str]) -> str | list[str]:
    return value if value == [] else _patterns(value) or value


Patterns = Annotated[str | list[str], AfterValidator(_patterns)]
PatternsOrNone = Annotated[str | list[str], AfterValidator(_patterns_or_none)]
"""Patterns, or [] for no module at all."""
BlockLists = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)], AfterValidator(_block_lists)
]
Block = Annotated[int, Field(ge=0)]


Blocks = Annotated[Block | list[Block], AfterValidator(_some_blocks)]


class Targeted(Method):
    """What the methods share that act on modules: which ones, and which others are trained whole beside them."""

    target_modules: Patterns | None = Field(
        default=None,
        description="The modules that are adapted: a preset (all-linear, attention, mlp), a list of names or suffixes, "
        "or a regular expression for the whole path. Default: the method's own choice.",
    )
    exclude_modules: Patterns | None = Field(
        default=None, description="Modules taken out again: a list of names or suffixes, or a regular expression."
    )
    layers_to_transform: Blocks | None = Field(
        default=None, description="The blocks that are adapted, by number from 0. Default: all."
    )
    layers_pattern: BlockLists | None = Field(
        default=None, description="The name of the list of blocks, where it is not found by itself."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings that are fine one by one."""
        if given(values, "layers_pattern") and not given(values, "layers_to_transform"):
            yield Problem(
                ("layers_pattern",), "needs 'layers_to_transform', which is not given. Add it or remove layers_pattern."
            )
