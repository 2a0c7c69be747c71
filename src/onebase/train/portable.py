"""A LoRA adapter as plain as servers want it: `export_portable`. Every scale 1 and folded into B, one rank, plain names.

    scaling_i B_i A_i  =  1 * [scaling_i B_i | 0] [A_i ; 0]

Ranks are filled with zeros up to the largest; a layer that the plain names mean too and that has no pair gets one of
zeros. lora_alpha is r, so that the tools that divide by one rank, by the square root of it nowhere, or by nothing, all get
1. What is no pair (DoRA's magnitudes, biases, whole modules, token rows) is refused with what can hold it. The folder gets
its name only after it was read again, its updates found to be the adapter's, and the outputs the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.ingredients import StoredPair, beside_pairs, ingredient_of, pairs_of
from onebase.adapters.matching import matches
from onebase.adapters.merging import check_mergeable
from onebase.adapters.pair import matrix_shape
from onebase.config.methods import Lora
from onebase.errors import ConfigError, VerificationError, list_problems
from onebase.files.lint import lint
from onebase.files.peft_format import read_adapter
from onebase.files.serving import MERGE, TOOLS
from onebase.train import saving
from onebase.train.comparing import bounds_of, inputs_for, numbers_of
from onebase.train.merging import check_out
from onebase.train.updates import check_updates

_NAME = "portable"
_LINEAR = ("linear", "transposed-linear")
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Export:
    """What became of an export."""

    path: Path
    size_bytes: int
    r: int
    pairs: int
    zero_pairs: int
    """Pairs of zeros, on layers that the plain names mean too."""
    update_difference: float
    """The largest relative difference of a layer's update, as read again."""
    output_difference: float
    """The largest difference of an output, as a share of the largest output."""


def export_portable(bank: Bank, name: str, folder: Path, out: Path) -> Export:
    """Write adapter `name` of a bank, which lies in `folder`, as plain LoRA to the folder `out`; return what was found.

    Raises:
        ConfigError: `out` is there, or the adapter has what plain pairs cannot hold; the message says what can.
        VerificationError: what was written is not the adapter; nothing is left of it.
    """
    check_out(out)
    pairs = plain_pairs(bank.adapters[name], folder)
    settings, tensors, zeros = portable_form(bank, pairs)
    written = bank.add(_NAME, settings, tensors=tensors)
    found = {}

    def verify(new: Path) -> None:
        """Complete the new folder and compare it with the adapter."""
        saving.save_tokenizer(bank.base, new, None)
        wanted = {path: [(1.0, pair)] for path, pair in pairs.items()}
        found["updates"] = check_updates(new, wanted, "the portable adapter")
        found["outputs"] = _check_outputs(bank, name)

    record = read_adapter(folder).record
    try:
        saving.write(
            out,
            bank.base,
            written,
            task="chat" if record is None else record.task,
            revision=None if record is None else record.base_revision,
            extras=None if record is None else record.extras,
            fill=verify,
        )
    finally:
        bank.remove(_NAME)
    size = sum(path.stat().st_size for path in out.iterdir())
    return Export(out, size, settings.r, len(pairs), zeros, found["updates"], found["outputs"])


def plain_pairs(adapter: Adapter, folder: Path) -> dict[str, StoredPair]:
    """Return the pairs of an adapter, which lies in `folder`, by the path of their module.

    Raises:
        ConfigError: it has something else than pairs; the message says what can hold it.
    """
    settings = adapter.settings
    beside = beside_pairs(settings) if isinstance(settings, Lora) else []
    if beside or not isinstance(settings, Lora):
        what = f"has {', '.join(beside)}" if beside else f"is {settings.title}"
        raise ConfigError(
            f"{folder}: the adapter {what}, which plain LoRA pairs cannot hold. {_holders(folder, adapter)}"
        )
    problems: list[str] = []
    pairs = pairs_of(ingredient_of(adapter), problems)
    if problems:
        raise ConfigError(f"{list_problems(str(folder), problems)}\n{_holders(folder, adapter)}")
    return pairs


def _holders(folder: Path, adapter: Adapter) -> str:
    """Return what can hold an adapter: the tools that load it as it is, and a plain model."""
    tools = [
        one.tool for one in lint(folder, [tool for tool in TOOLS if tool != "diffusers"]) if one.verdict == "loads"
    ]
    as_it_is = f"As it is it loads in {', '.join(['onebase', *tools])}."
    try:
        check_mergeable(adapter)
    except ConfigError:
        return as_it_is
    return f"{as_it_is} A plain model can hold it, in every format: {MERGE.format(adapter=folder)}"


def portable_form(bank: Bank, pairs: Mapping[str, StoredPair]) -> tuple[Lora, dict[str, Tensor], int]:
    """Return settings and tensors with scale 1 and one rank, in fp32, and how many pairs of zeros are among them."""
    r = max(pair.r for pair in pairs.values())
    tensors: dict[str, Tensor] = {}
    for pair in pairs.values():
        A, B = pair.A.float(), (pair.B.double() * pair.scaling).float()
        more = r - pair.r
        tensors |= pair.tensors(nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more)))
    empty = _layers_of_the_same_names(bank, pairs)
    for path, (outputs, inputs) in empty.items():
        tensors[f"{path}.lora_A.weight"] = torch.zeros(r, inputs)
        tensors[f"{path}.lora_B.weight"] = torch.zeros(outputs, r)
    return Lora(r=r, lora_alpha=r, target_modules=sorted({*pairs, *empty})), tensors, len(empty)


def _layers_of_the_same_names(bank: Bank, pairs: Mapping[str, StoredPair]) -> dict[str, tuple[int, int]]:
    """Return the linear layers without a pair whose last name is that of one with a pair, with their sizes.

    None, where the name means another kind of layer too: then longer names are written.
    """
    names = {path.rpartition(".")[2] for path in pairs}
    every = saving.module_paths([name for name, _ in bank.base.model.named_modules()])
    others = [path for path in every if path not in pairs and any(matches(name, path) for name in names)]
    kinds = {one.path: one.kind for one in bank.places.candidates}
    if not all(kinds.get(path) in _LINEAR for path in others):
        return {}
    return {path: matrix_shape(bank.places.module(path)) for path in others}


@torch.no_grad()
def _check_outputs(bank: Bank, name: str) -> float:
    """Return the largest difference between the outputs of adapter `name` and of its portable form, as a share.

    Raises:
        VerificationError: more than rounding.
    """
    base = bank.base
    rows = base.embedding_rows or 1
    ids = [[(7 * start + 3 * i) % rows for i in range(_PROBE_TOKENS)] for start in (1, 2)]
    largest, distances = [1e-6], [0.0]
    for given in inputs_for(bank, ids):
        given = {key: value.to(base.device) for key, value in given.items()}
        outputs = []
        for adapter in (name, _NAME):
            with base.native(bank.sole_route(adapter)) as model:
                outputs.append(numbers_of(model(**given)).double())
        largest.append(float(outputs[0].abs().max()))
        distances.append(float((outputs[1] - outputs[0]).abs().max()))
    found = float(torch.tensor(distances, dtype=torch.float64).max()) / max(
        largest
    )  # unlike Python's max, NaN if any is
    bound = bounds_of(base.dtype, base.dtype).results
    if not found <= bound:
        raise VerificationError(
            f"the portable adapter gives other outputs than the adapter: they differ by {found:.1e} of the "
            f"largest (bound {bound:.0e}). Nothing was written. Merge it instead: {MERGE.format(adapter='ADAPTER')}"
        )
    return found
