"""What a verb is about: an adapter or run folder with its base, or a base alone, and how it was asked in training.

What the command line does not say of the base's number format and device is taken from the run that the adapter lies
in. Whether the base's own Python code may run is never: a run may be a stranger's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.adapters.bank import Bank
    from onebase.base.model import Base
    from onebase.config.settings import DataSettings
    from onebase.measure.prompts import Asking
    from onebase.ops.objective import Objective

_SOURCES = ("train", "valid", "test")


@dataclass(frozen=True)
class BaseOptions:
    """How the base is to be opened, as the command line says; None where it leaves that to the run, or to `auto`."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    allow_base_mismatch: bool = False
    quantize: str | None = None

    def how(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `load` is told, for the base of a run with these settings (empty: of no run).

        Raises:
            ConfigError: this machine has no such device.
        """
        from onebase.base.device import resolve_device

        device = str(self.device or run.get("device") or "auto")
        try:
            resolve_device(device)
        except ConfigError as error:
            raise ConfigError(f"{error} On the command line: --device auto") from error
        dtype = str(self.dtype or run.get("dtype") or "auto")
        quantize = str(self.quantize or run.get("quantize") or "none")
        return {"dtype": dtype, "device": device, "trust_remote_code": self.trust_remote_code, "quantize": quantize}


AS_THE_RUN = BaseOptions()


@dataclass(frozen=True)
class Opened:
    """A bank, the adapter in it that is meant (None: the base alone), and what its run says of its data.

    `data` are the run's data settings as plain values, without the sources; `sources` are these. `batch_tokens` is the
    run's eval.batch_tokens where that is a number, `slices` its eval.slices, `objective` its train.loss.
    """

    label: str
    bank: "Bank"
    adapter: str | None
    task: str
    data: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None
    slices: tuple[str, ...] = ()
    objective: "Objective | None" = None

    @property
    def base_line(self) -> str:
        """The base, its number format and where it computes."""
        base = self.bank.base
        return f"{base.name}, {base.format} on {base.device}"

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


def open_adapter_or_model(target: str, on: BaseOptions = AS_THE_RUN) -> Opened:
    """Open an adapter or run folder on its base (or on another), or else a model by name, without any adapter.

    Raises:
        FileFormatError, ModelError: see train.opening and base.model.
    """
    if not _is_adapter(Path(target).expanduser()):
        from onebase.adapters.bank import Bank
        from onebase.base.model import load

        if on.model is not None:
            raise ConfigError(
                f"--model names the base of an adapter, but '{target}' is no adapter's folder and no run's."
            )
        base = load(target, **on.how({}))
        chats = base.tokenizer is not None and base.tokenizer.chat_template
        return Opened(target, Bank(base), None, _task_of_head(base) or ("chat" if chats else "text"))
    return open_adapter(target, on)


def open_adapter(target: str, on: BaseOptions = AS_THE_RUN) -> Opened:
    """Open an adapter or run folder on its base, or on another, with the CPU threads that its run asked for.

    The chat template that was saved with the adapter takes the place of the base's own.
    """
    from onebase.base.device import use_threads
    from onebase.files.peft_format import find_adapter
    from onebase.train.opening import open_adapter as open_on_base

    folder = find_adapter(Path(target).expanduser())
    run = run_settings(folder)
    use_threads(_number(run, "train", "threads"))
    opened = open_on_base(
        folder, model=on.model, allow_base_mismatch=on.allow_base_mismatch, note=terminal.say, **on.how(run)
    )
    bank = opened.bank
    template = folder / "chat_template.jinja"
    if bank.base.tokenizer is not None and template.is_file():
        bank.base.tokenizer.chat_template = template.read_text(encoding="utf-8")
    record = opened.stored.record
    data = run.get("data") or (record.extras.get("data") if record is not None else None) or {}
    chats = bank.base.tokenizer is not None and bank.base.tokenizer.chat_template
    usual = "chat" if chats else "text"
    if bank.base.own_heads:
        usual = _task_of_head(bank.base) or usual
    task = record.task if record is not None else run.get("task") or usual
    return Opened(
        label=target,
        bank=bank,
        adapter=opened.adapter.name,
        task=str(task),
        # The template is the tokenizer's by now, and its file may be gone.
        data={name: value for name, value in data.items() if name not in (*_SOURCES, "template")},
        sources={name: data[name] for name in _SOURCES if name in data},
        batch_tokens=_number(run, "eval", "batch_tokens"),
        slices=tuple((run.get("eval") or {}).get("slices") or ()),
        objective=(run.get("train") or {}).get("loss"),
    )


def _task_of_head(base: "Base") -> str | None:
    """Return what a base is for whose own head is one for whole examples; None where it predicts tokens."""
    if base.labels is None:
        return None
    return "classify" if base.labels.names else "regress"


def _is_adapter(path: Path) -> bool:
    """Return whether a path is an adapter's folder or a run's, also one that has not got its adapter yet."""
    return any((path / name).exists() for name in ("adapter_config.json", "config.yaml", "adapter"))


def run_settings(adapter_folder: Path) -> dict[str, Any]:
    """Return the settings of the run that an adapter lies in, as plain values; empty where it lies in none.

    They are not checked again: the training data, which nothing here needs, may be gone.
    """
    from onebase.config.strict_yaml import parse_yaml

    path = adapter_folder.parent / "config.yaml"
    if adapter_folder.name != "adapter" or not path.is_file():
        return {}
    value = parse_yaml(path.read_text(encoding="utf-8")).value
    return value if isinstance(value, dict) else {}


def _number(run: Mapping[str, Any], section: str, name: str) -> int | None:
    """Return a whole number above 0 that a run's settings hold; None where they hold anything else."""
    part = run.get(section)
    value = part.get(name) if isinstance(part, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None
