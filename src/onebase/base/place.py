"""Where a model stands, and whether what stands there is one: checked before anything is loaded.

`check_model_folder` reads only the first bytes of the weight files, so that a truncated download, an adapter given in
place of its base, or weights in a format that runs code when read are named at once, not after seconds of loading.

Called by pretrained.py (before it opens a folder) and fingerprint.py (which files are the weights). Imports no torch.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onebase.errors import FileFormatError, ModelError

PlaceKind = Literal["packaged", "folder", "gguf", "hub"]


@dataclass(frozen=True)
class ModelPlace:
    """A model's folder on this machine: the name it was asked by, and how that name led here."""

    name: str
    folder: Path
    kind: PlaceKind
    revision: str | None = None
    """The commit, for a model from the hub."""


def looks_like_path(name: str) -> bool:
    """Return whether a name can only mean a place on this machine, so that the hub is never asked for it."""
    starts_like_one = name.startswith(("/", "./", "../", "~", ".\\", "..\\")) or name in {".", ".."}
    return starts_like_one or name.endswith(".gguf") or name.count("/") > 1 or "\\" in name or name == ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileFormatError: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: not valid JSON: {error}. Get the file again from where it came.") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model's weights, sorted by name; empty if there are none.

    Raises:
        FileFormatError: the index names a file that is not there.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FileFormatError(f"{index}: 'weight_map' must name a file for every weight.")
    shards = sorted({folder / name for name in weight_map.values()})
    if absent := [path.name for path in shards if not path.is_file()]:
        raise FileFormatError(
            f"{index}: names {len(shards)} files, but {len(absent)} of them are not there: {', '.join(absent[:10])}. "
            "Copy or download them again."
        )
    return shards


def check_model_folder(folder: Path, name: str) -> None:
    """Check that a folder holds a model that can be opened: configuration, and weights that are not damaged.

    Raises:
        ModelError: it holds something else; the message says what.
        FileFormatError: a file in it is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: {folder} {_what_it_is(folder)}")
    read_json(folder / "config.json")
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{name}: {folder} {_what_weights(folder, name)}")
    for path in files:
        _check_header(path)


def _what_it_is(folder: Path) -> str:
    """Return what a folder without a `config.json` seems to be, and what to name in its place."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return f"holds an adapter, not a model; name the base it belongs to: {base}"
    if (folder / "adapter" / "adapter_config.json").is_file():
        return "is a run folder, not a model. Go on from its adapter with: adapter.init_from: " + str(
            folder / "adapter"
        )
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        return f"holds no config.json, but GGUF files; name one of them: {folder / ggufs[0]}"
    inside = sorted(path.name for path in folder.iterdir())[:5]
    return f"holds no config.json (it holds: {', '.join(inside) or 'nothing'}). Name the folder that does."


def _what_weights(folder: Path, name: str) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"holds weights only as pickle (.bin), which can run code when read.\n{how_to_convert(str(folder), name)}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    extra = f" (it holds: {', '.join(others[:5])})" if others else ""
    return f"holds no model.safetensors and no model.safetensors.index.json{extra}."


def how_to_convert(source: str, name: str) -> str:
    """Return the lines that turn a model with pickled weights into a folder of safetensors."""
    target = name.rstrip("/").rsplit("/", 1)[-1] + "-safetensors"
    return (
        "If you trust where it came from, convert it once, and name the new folder:\n"
        f"  python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; p = '{source}'; "
        f"M.from_pretrained(p, dtype='auto').save_pretrained('{target}'); T.from_pretrained(p).save_pretrained('{target}')\""
    )


def weight_count(folder: Path) -> int:
    """Return how many numbers the weight files hold, from their headers alone."""
    import math

    from safetensors import safe_open

    count = 0
    for path in weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return count


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # reads the header, and holds it against the file's size
            names = file.keys()
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as opened:
            pointer = opened.read(24).startswith(b"version https://git-lfs")
        cause = "it is a git-lfs pointer, not the file itself: run `git lfs pull`" if pointer else str(error)
        raise FileFormatError(f"{path}: damaged or cut off ({cause}). Copy or download it again.") from error
    if not names:
        raise FileFormatError(f"{path}: holds no weights at all. Copy or download it again.")


def not_found(
    name: str,
    packaged: Iterable[str],
    *,
    revision: str | None = None,
    hub: str | None = None,
    cache: Path | None = None,
) -> ModelError:
    """Return the error for a name that leads to no model: what was looked for, where, and what was perhaps meant.

    `hub` says why the hub did not help; None: it is never asked for such a name.
    """
    packaged = list(packaged)
    path = Path(name).expanduser().absolute()
    lines = [f"'{name}' leads to no model."]
    close = closest(name, packaged)
    meant = f"; the closest is '{close[0]}'" if close else ""
    lines.append(f"packaged models: {', '.join(packaged)}{meant}")
    here = "there is a file, but no model" if path.is_file() else "there is no such folder or file"
    lines.append(f"on this machine: {path}: {here}")
    if hub is None:
        lines.append("on the hub: not asked, because the name is a path")
    else:
        lines.append(f"on the hub{f' (revision {revision})' if revision else ''}: {hub}")
    if cache is not None:
        lines.append(f"in the hub's cache: {cache}: not there, or not whole")
    return ModelError("\n  ".join(lines) + "\nSee what is at hand: onebase models")


def closest(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that look most like `name`, best first; one that begins like it counts as near."""
    names = list(names)
    lowered = {other.lower(): other for other in names}
    wanted = name.lower().rsplit("/", 1)[-1]
    near = [other for key, other in lowered.items() if wanted and (key.startswith(wanted) or wanted.startswith(key))]
    near += [lowered[key] for key in difflib.get_close_matches(wanted, lowered, n=3, cutoff=0.5)]
    return list(dict.fromkeys(near))


def unloaded_weights(
    model_modules: Iterable[str], missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Return (what makes a loaded model not the stored one, whole parts in the file that this model does not have).

    A stored weight is such a part when it lies outside the numbered blocks, in a module that the model lacks: the
    head of another task (`cls.seq_relationship.*` beside BERT's masked-language head). Any other weight that found no
    place, and any that was not there, means that other numbers would be computed.
    """
    modules = set(model_modules)
    problems = [f"{name}: needed by the model, but not in the file" for name in sorted(missing)]
    problems += [f"{line}" for line in sorted(misshapen)]
    parts = []
    for name in sorted(unexpected):
        parent = name.rpartition(".")[0]
        if parent not in modules and not any(part.isdecimal() for part in name.split(".")):
            parts.append(name)
        else:
            problems.append(f"{name}: in the file, but the model has no place for it")
    return problems, parts


def first_line(error: BaseException) -> str:
    """Return what another library's error says, shortened to its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
