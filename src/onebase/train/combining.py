"""Stored adapters made ready for combining on one base: each checked to belong to it, under its present paths."""

from __future__ import annotations

from collections.abc import Sequence

from onebase.adapters.bank import Bank
from onebase.adapters.ingredients import Ingredient
from onebase.files.peft_format import StoredAdapter
from onebase.train.opening import fitted


def ingredients_on(
    bank: Bank, stored: Sequence[StoredAdapter], *, allow_base_mismatch: bool = False
) -> list[Ingredient]:
    """Return what `combine` takes, for adapters that were trained on the base of this bank.

    Raises:
        FileFormatError: one was trained on another base, unless `allow_base_mismatch`; or it lacks tensors.
    """
    fit = [fitted(bank, one, allow_base_mismatch=allow_base_mismatch) for one in stored]
    return [Ingredient(str(one.folder), one.settings, one.tensors) for one in fit]
