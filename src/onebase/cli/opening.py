"""What a verb is about: an adapter or run folder with its base, or a base alone, and how it was asked in training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.adapters.bank import Bank
    from onebase.config.settings import DataSettings
    from onebase.measure.prompts import Asking

_SOURCES = ("train", "valid", "test")


@dataclass(frozen=True)
class Opened:
    """A bank, the adapter in it that is meant (None: the base alone), and what its run says of its data.

    `data` are the run's data settings as plain values, without the sources; `sources` are these.
    """

    label: str
    bank: "Bank"
    adapter: str | None
    task: str
    data: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Any] = field(default_factory=dict)

    def data_settings(self, source: Any) -> "DataSettings":
        """Return the run's data settings, for other rows than its own."""
        from onebase.config.settings import DataSettings

        return DataSettings(**{**self.data, "train": source})

    def asking(self, system: str | None = None) -> "Asking":
        """Return how prompts are made, as in training."""
        from onebase.measure.prompts import Asking

        if self.bank.base.tokenizer is None:
            raise ConfigError(f"{self.bank.base.name} has no tokenizer, so it cannot be asked anything.")
        return Asking(self.bank.base.tokenizer, self.task, self.data.get("system") if system is None else system)


def open_adapter_or_model(target: str, *, model: str | None = None, allow_base_mismatch: bool = False) -> Opened:
    """Open an adapter or run folder on its base (or on `model`), or else a model by name, without any adapter.

    Raises:
        FileFormatError, ModelError: see train.opening and base.model.
    """
    if not _is_adapter(Path(target).expanduser()):
        from onebase.adapters.bank import Bank
        from onebase.base.model import load

        if model is not None:
            raise ConfigError(
                f"--model names the base of an adapter, but '{target}' is no adapter's folder and no run's."
            )
        base = load(target)
        chats = base.tokenizer is not None and base.tokenizer.chat_template
        return Opened(target, Bank(base), None, "chat" if chats else "text")
    return open_adapter(target, model=model, allow_base_mismatch=allow_base_mismatch)


def open_adapter(target: str, *, model: str | None = None, allow_base_mismatch: bool = False) -> Opened:
    """Open an adapter or run folder on its base, or on `model`.

    The chat template that was saved with the adapter takes the place of the base's own.
    """
    from onebase.train.opening import open_adapter as open_on_base

    path = Path(target).expanduser()
    opened = open_on_base(path, model=model, allow_base_mismatch=allow_base_mismatch, note=terminal.say)
    bank, folder = opened.bank, opened.stored.folder
    template = folder / "chat_template.jinja"
    if bank.base.tokenizer is not None and template.is_file():
        bank.base.tokenizer.chat_template = template.read_text(encoding="utf-8")
    run = _run_settings(folder)
    record = opened.stored.record
    data = run.get("data") or (record.extras.get("data") if record is not None else None) or {}
    chats = bank.base.tokenizer is not None and bank.base.tokenizer.chat_template
    task = record.task if record is not None else run.get("task") or ("chat" if chats else "text")
    return Opened(
        label=target,
        bank=bank,
        adapter=opened.adapter.name,
        task=str(task),
        # The template is the tokenizer's by now, and its file may be gone.
        data={name: value for name, value in data.items() if name not in (*_SOURCES, "template")},
        sources={name: data[name] for name in _SOURCES if name in data},
    )


def _is_adapter(path: Path) -> bool:
    """Return whether a path is an adapter's folder or a run's, also one that has not got its adapter yet."""
    return any((path / name).exists() for name in ("adapter_config.json", "config.yaml", "adapter"))


def _run_settings(adapter_folder: Path) -> dict[str, Any]:
    """Return the settings of the run that an adapter lies in, as plain values; empty where it lies in none.

    They are not checked again: the training data, which nothing here needs, may be gone.
    """
    from onebase.config.strict_yaml import parse_yaml

    path = adapter_folder.parent / "config.yaml"
    if adapter_folder.name != "adapter" or not path.is_file():
        return {}
    value = parse_yaml(path.read_text(encoding="utf-8")).value
    return value if isinstance(value, dict) else {}
