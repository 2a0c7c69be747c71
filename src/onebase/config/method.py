"""`Method`: what the settings of every adapter method have, and what to say of a name that belongs to another method.

The methods themselves are in methods.py; this file is apart because their groups (targeting.py) build on it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from onebase.config.section import Section


class Method(Section):
    """The settings of one adapter method."""

    title: ClassVar[str]
    """The method's name in a sentence."""
    default_learning_rate: ClassVar[float]
    """The learning rate where none is given, by measurement."""
    other_learning_rates: ClassVar[Mapping[str, float]] = {}
    """Settings that want another one: where `name` is set, or where the value of `name=text` begins with that text."""

    method: str = Field(description="The adapter method.")
    init_from: Path | None = Field(
        default=None, strict=False, description="An adapter or run folder whose weights training starts from."
    )
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="Other modules that are trained whole and saved with the adapter: names or suffixes."
    )

    @property
    def usual_learning_rate(self) -> float:
        """The learning rate of these settings where none is given."""
        others = (rate for wanted, rate in self.other_learning_rates.items() if self._has(wanted))
        return next(others, self.default_learning_rate)

    def _has(self, wanted: str) -> bool:
        name, equals, text = wanted.partition("=")
        value = getattr(self, name)
        return str(value).startswith(text) if equals else bool(value)

    @classmethod
    def rates(cls) -> str:
        """Return the learning rates in words."""
        others = (f"{rate:g} with {wanted.replace('=', ' ')}" for wanted, rate in cls.other_learning_rates.items())
        return ", ".join([f"{cls.default_learning_rate:g}", *others])

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        """Return what to say of a setting that this method lacks and another one has."""
        owners = [kind.model_fields["method"].default for kind in _methods(Method) if name in kind.model_fields]
        if not owners:
            return None
        own = cls.model_fields["method"].default
        return f"unknown setting of {own}; it belongs to {_listed(owners)}. Remove it, or change the method."


def _methods(kind: type[Method]) -> Iterator[type[Method]]:
    """Yield the classes of whole methods, in the order of their definition."""
    for inner in kind.__subclasses__():
        yield from _methods(inner) if inner.__subclasses__() else [inner]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
