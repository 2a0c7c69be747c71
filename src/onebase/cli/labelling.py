"""`onebase predict` for classes and numbers: what an adapter makes of every row, as JSONL."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.cli.counting import counting
from onebase.cli.opening import Opened

if TYPE_CHECKING:
    from onebase.config.labels import Labels
    from onebase.data.rows import Row

_LIKELY = 0.5
PROBABILITIES = "probabilities"


def label_rows(opened: Opened, rows: "Sequence[Row]", own: "Sequence[Row]", column: str, out: Path | None) -> None:
    """Write every row as it is (`own`) with the class, classes or number that the adapter gives it."""
    from onebase.data.labelled import examples_to_label
    from onebase.files.atomic import write_file
    from onebase.measure.evaluate import EVALUATION_TOKENS
    from onebase.measure.forward import labels_of
    from onebase.measure.judge import outputs_for
    from onebase.train.data import max_length_of

    bank = opened.bank
    labels, virtual = labels_of(bank.base), len(bank.virtual_ids(opened.adapter))
    limit = max_length_of(opened.data_settings("rows"), bank.base, virtual)
    examples, truncated = examples_to_label(rows, bank.base.tokenizer, labels, limit)
    if truncated:
        terminal.warn(f"{terminal.counted(truncated, 'row')} of {len(rows):,} truncated to {limit:,} tokens")
    with counting(f"labels by {opened.label}", len(rows), "rows") as advance:
        found = outputs_for(
            bank,
            opened.adapter,
            examples,
            batch_tokens=opened.batch_tokens or EVALUATION_TOKENS,
            on_progress=lambda done, _: advance(done),
        )
    lines = [
        json.dumps({**row.values, **_answer(labels, outputs, column)}, ensure_ascii=False, default=str)
        for row, outputs in zip(own, found.tolist(), strict=True)
    ]
    text = "".join(f"{line}\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text, writing="the answers")
        terminal.say(f"{terminal.counted(len(rows), 'answer')} in {out}")


def _answer(labels: "Labels", outputs: Any, column: str) -> dict[str, Any]:
    """Return what is written of one row: its number, or its class and the probabilities of all."""
    if labels.problem == "regression":
        return {column: outputs}
    likely = {name: round(one, 6) for name, one in zip(labels.names, outputs, strict=True)}
    if labels.problem == "multi_label_classification":
        chosen: Any = [name for name, one in zip(labels.names, outputs, strict=True) if one > _LIKELY]
    else:
        chosen = labels.names[max(range(len(outputs)), key=outputs.__getitem__)]
    return {column: chosen, PROBABILITIES: likely}
