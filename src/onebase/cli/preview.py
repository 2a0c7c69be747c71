"""`onebase preview`: rows as the tokens that the model will see, the labelled ones coloured, and what became of all rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from onebase.cli import options, terminal
from onebase.cli.rows_report import class_counts, class_table, counts_of, remarks_on, show_rows
from onebase.cli.token_text import TokenText

if TYPE_CHECKING:
    from onebase.config.labels import Labels
    from onebase.data.examples import Example, Examples

_SCHEMA_VERSION = 1
_MOST_TOKENS = 600
_LABELLED = ("bold green", "bold cyan")
_GIVEN = ("", "dim")


def preview(
    config: Annotated[Path, typer.Argument(help="A settings file.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 3,
    as_json: options.AsJson = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one setting: --set data.max_length=512")
    ] = None,
) -> None:
    """Show rows as tokens with labels, and counts of all rows."""
    from onebase.config.reading import read_settings

    settings = read_settings(config, overrides or ())  # first: a mistake in them is told without waiting for torch
    from onebase.base.pretrained import locate, open_tokenizer
    from onebase.config.methods import virtual_tokens_of
    from onebase.train.data import labels_in, load_data

    place = locate(settings.model, revision=settings.revision)
    tokenizer, max_length = open_tokenizer(place, trust_remote_code=settings.trust_remote_code)
    reader = _Reader(settings.model, tokenizer, max_length, labels_in(settings.data, settings.task))
    data = load_data(settings.data, settings.task, reader, virtual_tokens_of(settings.adapter), settings.eval.slices)
    classes = () if reader.labels is None else reader.labels.names
    if as_json:
        examples = data.train.examples
        shown = [example_fields(examples[number], tokenizer) for number in range(min(rows, len(examples)))]
        numbers: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, "model": settings.model, "task": settings.task}
        if classes:
            numbers["classes"] = class_counts(data, classes)
        terminal.print_json({**numbers, "counts": counts_of(data), "warnings": remarks_on(data), "rows": shown})
        return
    out = terminal.stdout()
    show_examples(out, data.train.examples, tokenizer, rows, reader.labels)
    show_rows(out, data)
    if classes:
        out.print()
        out.print(class_table(data, classes))


@dataclass(frozen=True)
class _Reader:
    """A base without its weights: what reading rows needs of it."""

    name: str
    tokenizer: Any
    max_length: int | None
    labels: "Labels | None"
    embedding_rows: int | None = None


def example_fields(example: "Example", tokenizer: Any) -> dict[str, Any]:
    """Return an example for scripts: its place, and id, piece of text and label flag of every token.

    Joined, the pieces are the whole text; a token that ends inside a character has an empty one.
    """
    texts = TokenText(tokenizer, skip_special=False)
    ids: list[int] = example.token_ids.tolist()
    pieces = [texts.push(token) for token in ids]
    pieces[-1] += texts.rest()
    fields = {"place": example.place, "token_ids": ids, "pieces": pieces, "labelled": example.labelled.tolist()}
    return fields if example.target is None else {**fields, "target": example.target.tolist()}


def _target(example: "Example", labels: "Labels | None") -> str:
    """Return what an example is labelled with, in words."""
    if labels is None or not labels.names:
        return f"target {float(example.target):g}"
    if labels.problem == "multi_label_classification":
        names = [name for name, has in zip(labels.names, example.target, strict=True) if has]
        return f"labels {', '.join(names) or 'none'}"
    return f"label {labels.names[int(example.target)]}"


def show_examples(
    out: Console, examples: "Examples", tokenizer: Any, count: int, labels: "Labels | None" = None
) -> None:
    """Print the first examples."""
    for number in range(min(count, len(examples))):
        example = examples[number]
        learned = f"{int(example.labelled.sum()):,} labelled" if example.target is None else _target(example, labels)
        head = f"{example.place}: {terminal.counted(len(example.token_ids), 'token')}, {learned}"
        out.print(Text(head, style="bold"), soft_wrap=True)
        out.print(example_text(example, tokenizer, out), soft_wrap=True)
        if len(example.token_ids) > _MOST_TOKENS:
            out.print(Text(f"... {len(example.token_ids) - _MOST_TOKENS:,} more tokens", style="dim"))
        out.print()
    if count and len(examples):
        if labels is not None:
            words = Text("neighbouring tokens differ in shade" if out.is_terminal else "tokens are parted by |")
        elif out.is_terminal:
            words = Text.assemble(
                "neighbouring tokens differ in shade; ", ("labelled", _LABELLED[0]), " ", ("tokens", _LABELLED[1])
            )
        else:
            words = Text("tokens are parted by |; [[labelled tokens]] are in brackets")
        out.print(words)
        out.print()


def example_text(example: "Example", tokenizer: Any, out: Console) -> Text:
    """Return an example's tokens: by colours on a terminal, and with marks elsewhere."""
    pieces = TokenText(tokenizer, skip_special=False)
    made, before = Text(), False
    for place, (token, labelled) in enumerate(
        zip(example.token_ids[:_MOST_TOKENS].tolist(), example.labelled[:_MOST_TOKENS].tolist(), strict=True)
    ):
        piece = pieces.push(token)
        if out.is_terminal:
            made.append(piece, style=(_LABELLED if labelled else _GIVEN)[place % 2])
            continue
        edge = "[[" if labelled and not before else "]]" if before and not labelled else "|" if place else ""
        made.append(edge + piece)
        before = labelled
    made.append(pieces.rest())
    if before and not out.is_terminal:
        made.append("]]")
    return made
