"""What an adapter can go on: the modules of a model, grouped by the pattern that names them, and what the presets mean.

Nothing here knows a model by name. A module's role follows from where it lies in the tree: under something called
attention, under something called MLP, feed-forward or experts, or straight in a block beside an attention; the
output head is what the model says it is. "Blocks" are the entries of the outermost module lists.

A listed pattern selects exactly the modules of its row, by PEFT's rules: a name in a list matches a module whose path
is that name or ends with "." and that name; where no ending is exact (BERT's `output.dense` also ends
`attention.output.dense`), the pattern is a regular expression for the whole path.

Called by adapters/bank.py (the modules, by path, kind and role) and `onebase targets` (rows and presets). Cost: a walk
over the modules, and a forward of a few tokens in encoder-decoders.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from onebase.base.int8 import Int8Linear
from onebase.base.nf4 import Nf4Linear
from onebase.config.targeting import in_preset
from onebase.errors import TargetError

Kind = Literal[
    "linear", "transposed-linear", "quantised-linear", "conv1d", "conv2d", "conv3d", "embedding", "experts", "norm"
]
Role = Literal["attention", "mlp", "head", "router", "pooler", "embedding", "other"]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|dense_?relu|experts?\b|\bmoe|sparse_moe|intermediate|\bfc\d", re.IGNORECASE)
_POOLER = re.compile(r"pooler|pooling", re.IGNORECASE)
_ROUTER = re.compile(r"gate|router", re.IGNORECASE)
_MLP_OUTPUT = {"output", "intermediate"}  # BERT's family: the second half of the block has no name of its own
_TASK_HEADS = {"score", "classifier", "qa_outputs", "classification_head", "lm_head", "embed_out"}


@dataclass(frozen=True)
class Module:
    """One module that could carry an adapter, if not now then later."""

    path: str
    kind: Kind
    shape: tuple[int, ...]
    """(out, in) for linear layers; the weight's own shape for others."""
    block: tuple[str, int] | None
    """The module list it lies in, and where in that list; None outside of blocks."""
    role: Role
    available: bool
    """Whether an adapter can go on it now."""


@dataclass(frozen=True)
class Target:
    """Modules that one pattern selects: alike in kind, role and shape, one in each of `blocks` of `of` blocks (or more)."""

    pattern: str
    kind: Kind
    role: Role
    shape: tuple[int, ...]
    blocks: int
    of: int
    paths: tuple[str, ...]
    available: bool


def list_targets(model: nn.Module) -> list[Target]:
    """Return the model's modules grouped into rows, in the model's order."""
    modules = list_modules(model)
    return _grouped(modules, [module.path for module in modules], _block_count(model))


def list_norms(model: nn.Module) -> list[Target]:
    """Return the model's norms that have parameters, grouped into rows: what methods that copy modules can go on."""
    tree = dict(model.named_modules())
    owners = {path: m for path, m in tree.items() if path and any(True for _ in m.parameters(recurse=False))}
    norms = [
        Module(path, "norm", tuple(next(m.parameters(recurse=False)).shape), _block(path, tree), "other", True)
        for path, m in owners.items()
        if is_norm(m)
    ]
    return _grouped(norms, list(owners), _block_count(model))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, by the name of its class: models bring their own (LlamaRMSNorm, T5LayerNorm)."""
    return re.search(r"Norm(\d+d)?$", type(module).__name__) is not None


def _grouped(modules: Sequence[Module], every_path: Sequence[str], of: int) -> list[Target]:
    """Return modules in rows, each with the pattern that selects it among all paths that a pattern could mean."""
    rows: dict[tuple[Any, ...], list[Module]] = {}
    for module in modules:
        name = module.path.rsplit(".", 1)[-1]
        place = _in_block(module) if _is_mixed(name, modules) else name
        key = (module.kind, module.role, module.shape, module.available, place)
        rows.setdefault(key, []).append(module)
    return [
        Target(
            pattern=_exact_pattern([module.path for module in row], every_path),
            kind=row[0].kind,
            role=row[0].role,
            shape=row[0].shape,
            blocks=len({module.block for module in row if module.block is not None}),
            of=of,
            paths=tuple(module.path for module in row),
            available=row[0].available,
        )
        for row in rows.values()
    ]


def list_modules(model: nn.Module) -> list[Module]:
    """Return every module that could carry an adapter, in the model's order; a shared one once."""
    modules = []
    tree = dict(model.named_modules())
    heads, lent = _head_paths(model, tree), lenders(model)
    for path, module in tree.items():
        kind = _kind(module)
        if not path or kind is None or _inside_own_kind(path, tree):
            continue
        block = _block(path, tree)
        role = _role(path, kind, block, tree, heads)
        available = path not in lent and _is_available(kind, module, tree[path.rpartition(".")[0]], block)
        modules.append(Module(path, kind, _shape(module), block, role, available))
    return modules


def _is_available(kind: Kind, module: nn.Module, parent: nn.Module, block: tuple[str, int] | None) -> bool:
    """Return whether an adapter can go on a module: it is called, and on what its kind is called on."""
    if kind == "linear":
        return not isinstance(parent, nn.MultiheadAttention)  # which reads out_proj.weight itself
    if kind == "embedding":  # not one of distances in an attention (T5), nor one that counts its positions itself (OPT)
        first = next(iter(inspect.signature(module.forward).parameters), "")
        return block is None and first in ("input", "input_ids")
    return kind != "quantised-linear"


def lenders(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the embeddings that only lend their weight, each with the paths of those that have it and are called.

    transformers 5 builds encoder-decoders so: `shared` stands beside an encoder and a decoder with embeddings of their
    own. Suspected is an embedding whose weight embeddings further inside its parent have too; a forward on the model's
    own dummy inputs acquits it. A model that does not run on them has none.
    """
    embeddings = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    suspects = {}
    for path, module in embeddings.items():
        parent = path.rpartition(".")[0]
        inside = [p for p in embeddings if p != path and _lies_in(p, parent) and p.rpartition(".")[0] != parent]
        if twins := tuple(p for p in inside if embeddings[p].weight is module.weight):
            suspects[path] = twins
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, module in (embeddings.items() if suspects else ())
    ]
    try:
        if suspects:
            inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
            if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                inputs.setdefault("decoder_input_ids", inputs["input_ids"])
            with torch.no_grad():
                model(**inputs)
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return {path: twins for path, twins in suspects.items() if path not in called and called.intersection(twins)}


def preset_paths(model: nn.Module, preset: str) -> list[str]:
    """Return the paths of the modules that a preset means.

    `all-linear` is PEFT's: every linear layer but the output head (nor a router); `attention` and `mlp` are the
    linear layers of that role.

    Raises:
        TargetError: the model has none.
    """
    modules = list_modules(model)
    meant = [module for module in modules if in_preset(module.role, preset)]
    chosen = [module.path for module in meant if module.available and module.kind in ("linear", "transposed-linear")]
    if not chosen:
        kinds = ", ".join(sorted({module.kind for module in meant})) or "nothing at all"
        raise TargetError(
            f"target_modules: '{preset}' means linear layers, but a {type(model).__name__} has none there: it has {kinds}. "
            "List its modules: onebase targets MODEL"
        )
    return chosen


def plain_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the shortest names that, by PEFT's rule for lists, select exactly `paths`: what a settings file keeps."""
    every_path = [module.path for module in list_modules(model)]
    wanted, names, covered = set(paths), [], set()
    for path in paths:
        if path not in covered:
            name = next(name for name in _endings(path) if {p for p in every_path if ends_with(p, name)} <= wanted)
            names.append(name)
            covered |= {p for p in wanted if ends_with(p, name)}
    return names


def ends_with(path: str, name: str) -> bool:
    """Return whether a name in a list of target modules selects a path: PEFT's rule."""
    return path == name or path.endswith("." + name)


def _endings(path: str) -> list[str]:
    """Return the endings of a path from its last name to the whole."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _exact_pattern(paths: Sequence[str], every_path: Iterable[str]) -> str:
    """Return the shortest ending, or else a regular expression, that selects exactly `paths`."""
    wanted, every_path = set(paths), list(every_path)
    for name in _endings(paths[0]):
        if {path for path in every_path if ends_with(path, name)} == wanted:
            return name
    shapes = dict.fromkeys(_with_any_number(path) for path in paths)
    pattern = "|".join(shapes)
    if {path for path in every_path if re.fullmatch(pattern, path)} == wanted:
        return pattern
    return "|".join(re.escape(path) for path in paths)


def _with_any_number(path: str) -> str:
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in path.split("."))


def _is_mixed(name: str, modules: Iterable[Module]) -> bool:
    """Return whether modules that end in this name differ, so that the name alone makes no good row."""
    alike = {(m.kind, m.role, m.shape, m.available) for m in modules if m.path.rsplit(".", 1)[-1] == name}
    return len(alike) > 1


def _in_block(module: Module) -> str:
    """Return a module's path inside its block, numbers left open."""
    inside = module.path if module.block is None else module.path.removeprefix(_root(module.block) + ".")
    return _with_any_number(inside)


def _root(block: tuple[str, int]) -> str:
    return f"{block[0]}.{block[1]}".removeprefix(".")  # the model itself may be the list


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, (nn.Linear, Int8Linear, Nf4Linear)):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d):
        return "conv1d"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if isinstance(module, nn.Conv3d):
        return "conv3d"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2: a linear layer, transposed
        return "transposed-linear"
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return "quantised-linear"
    own = list(module.parameters(recurse=False))
    if own and any(parameter.ndim == 3 for parameter in own) and "expert" in type(module).__name__.lower():
        return "experts"
    return None


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(getattr(module, "out_features", None), int):
        return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        weight = next(parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3)
    shape = tuple(weight.shape)
    return shape[::-1] if type(module).__name__ == "Conv1D" else shape


def _inside_own_kind(path: str, tree: dict[str, nn.Module]) -> bool:
    """Return whether a module is a part of another one that is listed itself."""
    parts = path.split(".")
    return any(_kind(tree[".".join(parts[:end])]) is not None for end in range(1, len(parts)))


def _block(path: str, tree: dict[str, nn.Module]) -> tuple[str, int] | None:
    parts = path.split(".")
    for end, part in enumerate(parts):
        parent = ".".join(parts[:end])
        if part.isdecimal() and isinstance(tree[parent], nn.ModuleList):
            return parent, int(part)
    return None


def _block_count(model: nn.Module) -> int:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [name for name in lists if not any(name != other and _lies_in(name, other) for other in lists)]
    return sum(len(lists[name]) for name in outermost)


def _lies_in(path: str, parent: str) -> bool:
    return parent == "" or path.startswith(parent + ".")


def _head_paths(model: nn.Module, tree: dict[str, nn.Module]) -> set[str]:
    """Return where the output head is: the model's own word for it, or a last layer with a task head's usual name."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is not None:
        return {path for path, module in tree.items() if module is head}
    tops = {path for path in tree if path in _TASK_HEADS}
    return {path for path in tree if any(path == top or path.startswith(top + ".") for top in tops)}


def _role(
    path: str, kind: Kind, block: tuple[str, int] | None, tree: dict[str, nn.Module], heads: set[str]
) -> Role:  # fmt: skip
    if path in heads:
        return "head"
    if kind == "embedding":
        return "embedding"
    if block is None:
        return "pooler" if any(_POOLER.search(part) for part in path.split(".")) else "other"
    parent, _, own = path.rpartition(".")
    siblings = dict(tree[parent].named_children())
    if _ROUTER.search(own) and "experts" in siblings and "proj" not in own:
        return "router"
    root = _root(block)
    inside = path.removeprefix(root + ".").split(".")
    if any(_ATTENTION.search(part) for part in inside):
        return "attention"
    if kind == "experts" or any(_MLP.search(part) for part in inside):
        return "mlp"
    beside_attention = any(_ATTENTION.search(name) for name, _ in tree[root].named_modules())
    if beside_attention and (len(inside) == 1 or inside[0] in _MLP_OUTPUT):
        return "mlp"
    return "other"
