"""Laws of the house: what imports what, what is light, and what the metadata promises."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "onebase"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BANNED = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
# Where each heavy library may be imported. Libraries that are banned and not named here have no door: they stay out.
DOORS = {
    "transformers": "base/pretrained.py",
    "huggingface_hub": "base/hub.py",
    "gguf": "base/gguf_file.py",
    "bitsandbytes": "base/nf4.py",
    "datasets": "data/reading.py",
}
HEAVY = sorted({name.split(".")[0] for name in BANNED} - {"pickle"} | {"torch"})


def _run_python(code: str) -> None:
    """Run code in a fresh interpreter; show what it printed if it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def _imports(tree: ast.AST, *, inside_functions: bool) -> Iterator[tuple[str, int]]:
    """Yield (top-level package, line) of every absolute import; those in functions only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0], node.lineno
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(node, inside_functions=inside_functions)


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {_normal(package): Version(version) for package, version in pins.items()}


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _requirements(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


@pytest.mark.parametrize("module", ["onebase", "onebase.errors", "onebase.config"])
def test_importing_what_holds_no_tensors_imports_no_heavy_library(module: str) -> None:
    _run_python(
        f"import sys, {module}; found = {set(HEAVY)} & set(sys.modules); sys.exit(f'{{found}}' if found else 0)"
    )


def test_the_help_of_every_command_imports_no_heavy_library() -> None:
    _run_python(f"""
import sys
from typer.testing import CliRunner
from onebase.cli.app import app
verbs = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
for arguments in ([], *([verb] for verb in verbs)):
    result = CliRunner().invoke(app, [*arguments, "--help"])
    found = {set(HEAVY)} & set(sys.modules)
    if result.exit_code or found:
        sys.exit(f"onebase {{arguments}} --help: exit code {{result.exit_code}}, imported {{found}}")
""")


def test_each_heavy_library_comes_in_through_its_one_door() -> None:
    wrong = [
        f"{place}:{line} imports {name}"
        for place, tree in _sources()
        for name, line in _imports(tree, inside_functions=True)
        if name in BANNED and DOORS.get(name) != place
    ]
    assert not wrong


def test_doors_open_only_when_a_function_is_called() -> None:
    wrong = [
        f"{place}:{line} imports {name} as soon as it is imported itself"
        for place, tree in _sources()
        for name, line in _imports(tree, inside_functions=False)
        if name in BANNED
    ]
    assert not wrong


def test_every_door_that_ruff_opens_is_one_of_the_table() -> None:
    ignores = PROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]
    opened = {place for place, rules in ignores.items() if "TID251" in rules and place.startswith("src/")}
    assert opened == {f"src/onebase/{door}" for door in DOORS.values()}
    assert set(DOORS) <= set(BANNED)


def test_every_room_has_its_place_among_the_layers() -> None:
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    assert contract["exhaustive"] is True
    placed = {room.strip(" ()") for layer in contract["layers"] for room in re.split(r"[|:]", layer)}
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == placed


def test_every_folder_of_tests_mirrors_a_room() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= {path.name for path in SOURCE.iterdir() if path.is_dir()} | {"laws", "examples", "bench"}


def test_the_source_is_plain_ascii() -> None:
    paths = [*SOURCE.rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    assert not [f"{path.relative_to(ROOT)}" for path in paths if not path.read_bytes().isascii()]


def test_the_pinned_versions_lie_within_the_ranges_of_the_metadata() -> None:
    pins = _pins("constraints.txt")
    for requirement in _requirements("dev", "docs"):
        assert pins[_normal(requirement.name)] in requirement.specifier, requirement


def test_the_lowest_versions_are_the_lower_bounds_of_the_metadata() -> None:
    pins = _pins("constraints-lowest.txt")
    for requirement in _requirements("dev"):
        (bound,) = (Version(s.version).release for s in requirement.specifier if s.operator == ">=")
        if requirement.name != "torch":  # chosen by the Makefile
            release = pins[_normal(requirement.name)].release
            rest = release[len(bound) :] if requirement.name.startswith("types-") else ()
            assert release[: len(bound)] == bound, requirement
            assert rest or not any(release[len(bound) :]), requirement


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_the_pins_name_no_index_and_no_build(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
