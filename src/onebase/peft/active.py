"""Which adapter a call of the user's model runs with: the active one, none, one for each row, or what is in the weights.

A route that gives every row to the active adapter rests in the base's slot, so that whoever calls the model itself runs
with it. Virtual tokens rest nowhere: they come in with the call (virtual.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from onebase.adapters.bank import Bank
from onebase.adapters.merging import Merged
from onebase.base.route import Route
from onebase.errors import ConfigError


class Active:
    """The adapter of a bank that is active, by its `name` ("" for none), and what rests in the base's slot for it."""

    def __init__(self, bank: Bank, *, virtual: bool) -> None:
        self.name = ""
        self._bank, self._virtual = bank, virtual
        self.disabled = False
        self._merged: Merged | None = None
        self._resting: Route | None = None
        self._hook: RemovableHandle | None = None

    @property
    def brings_tokens(self) -> bool:
        """Whether a call must bring virtual tokens with it."""
        return self._virtual and not self.disabled and bool(self.name)

    @property
    def settings(self) -> Any:
        """The active adapter's settings; None where there is none."""
        return self._bank.adapters[self.name].settings if self.name else None

    # --------------------------------------------------------------------------------------------------------- route

    def settle(self, dropout_key: int | None = None) -> None:
        """Let the route rest that gives every row to the active adapter; to the base where that is in its weights."""
        alone = self.disabled or self._virtual or self._merged is not None or not self.name
        route = self._bank.sole_route(None if alone else self.name)
        self._resting = replace(route, dropout_key=dropout_key)
        self._bank.base.slot.route = self._resting
        self._hook = self._hook or self._bank.base.model.register_forward_pre_hook(self.renew)

    def renew(self, model: nn.Module, given: Any) -> None:
        """Draw what keys the dropout of a forward in training; from torch's global generator, as PEFT draws masks."""
        if self._bank.base.slot.route is not self._resting or not self.name:
            return
        drops = model.training and self._bank.adapters[self.name].drops_out
        key = int(torch.randint(2**62, ())) if drops else None
        if key is not None or (self._resting is not None and self._resting.dropout_key is not None):
            self.settle(key)

    def each_with(self, owners: Sequence[str | None], *, training: bool) -> AbstractContextManager[object]:
        """Run the entries of a batch each with its own adapter, None for the base alone.

        Raises:
            ConfigError: now they cannot.
        """
        if training or self._virtual or self._merged:
            state = "in training" if training else "merged" if self._merged else "with virtual tokens"
            raise ConfigError(
                f"adapter_names: rows of several adapters cannot be run {state}. Call eval() or set_adapter."
            )
        return self._bank.base.slot.use(self._bank.batch_route(owners))

    def disable(self, disabled: bool) -> None:
        """Run the base alone from now on, or the active adapter again."""
        self.disabled = disabled
        self.settle()

    def leave(self) -> None:
        """Let nothing rest, and no hook stay on the model; what is in its weights stays."""
        if self._hook is not None:
            self._hook.remove()
        self.name, self._hook, self._bank.base.slot.route = "", None, None

    # ------------------------------------------------------------------------------------------------------- merging

    def merge(self, names: Sequence[str], *, safe: bool) -> None:
        """Write adapters into the model's weights, beside those that are in them already; what fails leaves these.

        Args:
            safe: refuse what would leave a weight that is not finite.

        Raises:
            ConfigError: an adapter that no weight can hold, or with `safe` a broken one.
        """
        before = () if self._merged is None else self._merged.names
        self.unmerge()
        try:
            self._merged = Merged(self._bank, [*dict.fromkeys([*before, *names])])
            if safe:
                self._check_finite()
        except ConfigError:
            self.unmerge()
            if before:
                self._merged = Merged(self._bank, before)
            raise
        finally:
            self.settle()

    def unmerge(self) -> None:
        """Put the model's own weights back."""
        if self._merged is not None:
            self._merged.unmerge()
            self._merged = None
        self.settle()

    def unmerge_first(self) -> None:
        """Put the model's own weights back before something that needs them, and warn."""
        if self._merged is not None:
            warnings.warn(f"{', '.join(self._merged.names)} is merged; it is unmerged first", stacklevel=3)
            self.unmerge()

    def _check_finite(self) -> None:
        """Raise where a merged weight is not finite."""
        assert self._merged is not None
        names, changed = self._merged.names, self._merged.changed
        broken = [key for key, tensor in changed.items() if not tensor.isfinite().all()]
        if broken:
            raise ConfigError(
                f"safe_merge: {', '.join(names)} would leave numbers in {broken[0]} that are not finite. The adapter is "
                "broken: train it again, or load an earlier one."
            )
