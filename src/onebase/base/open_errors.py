"""What goes wrong when a model is opened, in our words. Called by pretrained.py, around transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebase.base.place import ModelPlace, first_line, read_json
from onebase.errors import CapacityError, FileFormatError, MissingExtraError, ModelError, OnebaseError

HOW_TO_FIT = "Free some, choose a smaller model, or set dtype: bfloat16"


@contextmanager
def explained_open_errors(place: ModelPlace) -> Iterator[None]:
    """Turn what transformers and torch raise on opening into our errors."""
    from safetensors import SafetensorError

    try:
        yield
    except MemoryError as error:
        raise CapacityError(f"{place.name}: does not fit into memory. {HOW_TO_FIT}") from error
    except SafetensorError as error:
        raise FileFormatError(
            f"{place.folder}: a weight file is damaged ({error}). Copy or download it again."
        ) from error
    except ImportError as error:
        raise MissingExtraError(
            f"{place.name}: opening it needs a package that is not here: {first_line(error)}"
        ) from error
    except OnebaseError:
        raise
    except Exception as error:  # configurations are checked by whatever first trips over them
        text = str(error)
        if "out of memory" in text or "can't allocate memory" in text:
            raise CapacityError(
                f"{place.name}: does not fit into memory ({first_line(error)}). {HOW_TO_FIT}"
            ) from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"{place.name}: needs Python code that comes with it ({', '.join(own_code(place.folder)) or place.folder}). "
                "Read it; if you trust it, set trust_remote_code: true, or --trust-remote-code on the command line."
            ) from error
        raise ModelError(f"{place.name}: transformers cannot open {place.folder}: {first_line(error)}") from error


def own_code(folder: Path) -> list[str]:
    """Return the classes that a model brings as code of its own (`auto_map` in its files)."""
    brought: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        mapped = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        for value in mapped.values() if isinstance(mapped, dict) else []:
            brought.update(part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))
    return sorted(brought)
