"""The one door to huggingface_hub: a model of the hub brought into the hub's own cache, and what that cache holds.

The hub is asked once, for a few seconds at most, before anything else: so a machine without a network says so soon,
a model without safetensors is refused before gigabytes move, and a copy in the cache is used where the hub is out of
reach. Called by pretrained.py (`locate`) and `onebase models`. Imports no torch.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from onebase.base.cache import Say, explained_write_errors, say_on_stderr
from onebase.base.packages import PACKAGES, is_fetched, package_folder
from onebase.base.place import ModelPlace, check_model_folder, first_line, how_to_convert, not_found
from onebase.errors import CapacityError, ModelError

T = TypeVar("T")

DEADLINE_S = 8.0
"""How long the hub may take to answer at all; a name server or a firewall that drops packets stalls far longer."""
_WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
_UNWANTED_FILES = ["*/*.safetensors", "consolidated*", "onnx/*", "openvino/*", "original/*", "runs/*"]


def is_off() -> bool:
    """Return whether the environment says that the hub must not be asked (HF_HUB_OFFLINE)."""
    import huggingface_hub

    named = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return named or huggingface_hub.is_offline_mode()


def locate_on_hub(name: str, *, revision: str | None, offline: bool, say: Say = say_on_stderr) -> ModelPlace:
    """Return the folder of a hub model: downloaded, or, where the hub is out of reach, as its cache holds it.

    Raises:
        ModelError: the hub has no such model or none that can be opened, or is out of reach and the cache has none.
        CapacityError: the disk is full.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    kept_back = "the hub was not asked: this is offline" if offline else _ask(name, revision, cache, say)
    if kept_back is None:
        folder = _download(name, revision, cache)
    else:
        folder = _cached(name, revision, cache, kept_back)
        if not offline:
            say(f"{name}: {kept_back}; using the copy in its cache: {folder}")
    check_model_folder(folder, name)
    return ModelPlace(name, folder, "hub", folder.name)


def _download(name: str, revision: str | None, cache: Path) -> Path:
    import huggingface_hub

    try:
        with _quiet(), explained_write_errors(cache, "HF_HOME"):
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES
            )
    except (CapacityError, ModelError):
        raise
    except Exception as error:  # the hub's client raises its transport's own errors
        raise ModelError(
            f"{name}: the download from the hub broke off ({type(error).__name__}: {first_line(error)}). "
            "Run it again: what is there already is kept."
        ) from error
    return Path(folder)


def _cached(name: str, revision: str | None, cache: Path, kept_back: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=True,
            allow_patterns=_WANTED_FILES,
            ignore_patterns=_UNWANTED_FILES,
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise not_found(name, PACKAGES, revision=revision, hub=kept_back, cache=cache) from error
    return Path(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's progress bars for terminals."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _ask(name: str, revision: str | None, cache: Path, say: Say) -> str | None:
    """Return None when the hub has a model that can be opened, or why it could not be asked.

    Raises:
        ModelError: it answered that there is none, or none that can be opened.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        info = _within(
            DEADLINE_S,
            lambda: hub.HfApi().model_info(name, revision=revision, timeout=DEADLINE_S / 2, files_metadata=True),
        )
    except errors.HFValidationError as error:
        raise not_found(name, PACKAGES, revision=revision, hub=f"it cannot be a hub id: {first_line(error)}") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name}: its owner asks for consent first. Give it on its page, then: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name}: the hub has this model, but no revision '{revision}'.") from error
    except errors.RepositoryNotFoundError as error:
        answer = "the hub has no such model, or shows it only to its owner (then: hf auth login)"
        raise not_found(name, PACKAGES, revision=revision, hub=answer, cache=cache) from error
    except Exception as error:  # noqa: BLE001 (whatever the transport raises: the hub could not be asked)
        return f"the hub did not answer ({type(error).__name__}: {first_line(error)})"
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    weights = {file: size for file, size in files.items() if file.endswith(".safetensors") and "/" not in file}
    if not weights:
        raise ModelError(f"{name}: {_why_no_weights(name, files)}")
    commit = info.sha or ""
    if not (cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit).is_dir():
        say(f"fetching {name} from the hub ({sum(weights.values()) / 1e6:.0f} MB) into {cache}")
    return None


def _why_no_weights(name: str, files: Iterable[str]) -> str:
    if ggufs := sorted(file for file in files if file.endswith(".gguf")):
        return f"holds only GGUF files. Download one (hf download {name} {ggufs[0]} --local-dir .) and name that file."
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return f"holds weights only as pickle (.bin), which can run code when read.\n{how_to_convert(name, name)}"
    return "the hub has it, but it holds no safetensors weights."


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what `ask` returns, or raise TimeoutError: name servers and dropped packets know no timeout of their own."""
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(ask())
        except BaseException as error:  # noqa: BLE001 (raised again by the caller's thread)
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return answer[0]


@dataclass(frozen=True)
class ModelAtHand:
    """A model that can be named: packaged (fetched or not), or in the hub's cache."""

    name: str
    kind: Literal["packaged", "hub"]
    at_hand: bool
    size_bytes: int
    licence: str | None
    folder: Path
    summary: str


def list_models() -> list[ModelAtHand]:
    """Return the packaged models, then the models in the hub's cache that have safetensors weights, by name."""
    import huggingface_hub as hub

    models = [
        ModelAtHand(
            p.name, "packaged", is_fetched(p.name), p.folder_bytes, p.licence, package_folder(p.name), p.summary
        )
        for p in PACKAGES.values()
    ]
    try:
        repositories = hub.scan_cache_dir(hub.constants.HF_HUB_CACHE).repos
    except hub.CacheNotFound:
        return models
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        for revision in repository.revisions:
            weights = [file for file in revision.files if file.file_name.endswith(".safetensors")]
            if repository.repo_type == "model" and weights and (revision.snapshot_path / "config.json").is_file():
                called = ", ".join(sorted(revision.refs)) or revision.commit_hash
                models.append(
                    ModelAtHand(
                        repository.repo_id, "hub", True, revision.size_on_disk, None, revision.snapshot_path, called
                    )
                )
    return models
