"""Where and in which number format a base computes: the settings `device`, `dtype` and `threads` on this machine.

Called by model.py, and by those who train. Knows torch alone; what a model's own code needs is not its business.
"""

import torch

from onebase.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> str:
    """Return the device that a setting means here: for `auto` the first of cuda, mps, cpu that there is.

    Raises:
        ConfigError: this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: must be auto, cpu, cuda, cuda:N or mps, got '{name}'.") from error
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        _check_cuda(device.index or 0, name)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(
                f"device: '{name}' is not there: torch {torch.__version__} sees no Apple GPU. Set device: auto"
            )
    else:
        raise ConfigError(f"device: must be auto, cpu, cuda, cuda:N or mps, got '{name}'.")
    return name


def resolve_dtype(name: str = "auto", device: str = "cpu") -> torch.dtype:
    """Return the number format that a setting means on a device: for `auto` bfloat16 on CUDA that has it, else float32.

    Raises:
        ConfigError: there is no such format.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype: must be one of auto, {', '.join(DTYPES)}, got '{name}'.")
        return DTYPES[name]
    if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def use_threads(count: int | None) -> None:
    """Let torch compute with so many CPU threads from now on; None leaves it its own choice."""
    if count is not None:
        torch.set_num_threads(count)


def _check_cuda(index: int, name: str) -> None:
    if not torch.cuda.is_available():
        build = "is built without CUDA" if torch.version.cuda is None else "finds no GPU that it can use"
        raise ConfigError(f"device: '{name}' is not there: torch {torch.__version__} {build}. Set device: auto")
    if index >= (count := torch.cuda.device_count()):
        there = ", ".join(f"cuda:{n}" for n in range(count))
        raise ConfigError(f"device: '{name}' is not there; this machine has {there}.")
