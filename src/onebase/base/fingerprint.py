"""The fingerprint of a base: SHA-256 over its weights as they are stored, so that an adapter knows its base.

    fingerprint = sha256( for each weight file, by name:  name, sha256(its bytes) )

Neither dtype nor quantisation on loading changes it. A file's hash is remembered in `ONEBASE_HOME/fingerprints.json` by
path, size and time of change, because hashing takes about a second for each gigabyte; a cache that cannot be read or
written costs that second again, never an error.

Called by model.py (the base's own), pretrained.py (which GGUF file this is), and by whoever checks that tensors are the
same. Imports torch only for tensors in memory.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.base.cache import home, write_atomically
from onebase.base.place import weight_files
from onebase.errors import ModelError, OnebaseError

if TYPE_CHECKING:
    from torch import Tensor, nn


def fingerprint(folder: str | Path) -> str:
    """Return the fingerprint of the model in a folder, as 64 hexadecimal digits.

    Raises:
        ModelError: the folder holds no weights.
    """
    files = weight_files(Path(folder))
    if not files:
        raise ModelError(f"{folder}: holds no model.safetensors and no model.safetensors.index.json to fingerprint.")
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name}\n{file_sha256(path)}\n".encode())
    return whole.hexdigest()


def fingerprint_of_state(model: "nn.Module") -> str:
    """Return a fingerprint of a model that was built in memory: over names, formats, shapes and bytes of its tensors."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(_bytes_of(tensor))
    return whole.hexdigest()


def tensor_sha256(tensor: "Tensor") -> str:
    """Return the SHA-256 of a tensor's bytes, as they lie in memory."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: "Tensor") -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, from the cache if neither its size nor its time has changed."""
    resolved = path.resolve()
    status = resolved.stat()
    key = [status.st_size, status.st_mtime_ns]
    known = _known()
    entry = known.get(str(resolved))
    if isinstance(entry, list) and entry[:2] == key and len(entry) == 3 and isinstance(entry[2], str):
        return entry[2]
    with resolved.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(str(resolved), [*key, sha256])
    return sha256


def _cache_path() -> Path:
    return home() / "fingerprints.json"


def _known() -> dict[str, object]:
    try:
        known = json.loads(_cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: str, entry: list[object]) -> None:
    """Add one entry; entries of files that are gone leave. Two processes at once may lose one: it is computed again."""
    known = {other: value for other, value in _known().items() if Path(other).exists()}
    known[path] = entry
    try:
        write_atomically(_cache_path(), json.dumps(known, indent=1, sort_keys=True) + "\n")
    except (OSError, OnebaseError):
        return
