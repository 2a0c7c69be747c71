"""What can be a path at all, before anything is looked for there."""

import os
from pathlib import Path

from onebase.errors import ConfigError

_SHOWN = 60


def checked_path(value: object) -> Path:
    """Return a value that a file or folder could have as its path; whether one is there is for the caller to see.

    Raises:
        ConfigError: it is no text and no path, or one that this file system cannot hold.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ConfigError(f"a path must be text or a pathlib.Path, got {value!r}. Name a file or a folder.")
    path = Path(value)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise no_path(str(path), error) from error
    return path


def no_path(path: str, error: OSError | ValueError) -> ConfigError:
    """Return the error about a path that the file system refuses to look up."""
    shown = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}... ({len(path)} characters)"
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError(f"{shown}: cannot be a path here: {reason}. Name another one.")
