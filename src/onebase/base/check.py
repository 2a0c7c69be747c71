"""The self-check of a base: does it run flat, and is its output head one that the fused loss can express?

Two random examples with one prefix, one of them longer than a sliding window, are run flat and compared with the
model's own forward on each alone, hidden states, logits and loss: first with the prefix computed once, then with each
example by itself (what is bidirectional cannot share one). Where they differ the base runs padded, and the same
comparison is made there; a model for which nothing holds is refused. What does not turn one sequence of token ids
into one hidden state each is native: it runs as it is. Nothing is decided by a model's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.base.classifier import POOLINGS, TaskHead
from onebase.base.flat import NotFlatError
from onebase.base.route import Route, RowSpace
from onebase.config.labels import labels_of
from onebase.errors import ModelError
from onebase.ops.layout import Layout, Node
from onebase.ops.loss import HeadRecord
from onebase.ops.memory import Memory
from onebase.ops.segments import NO_OWNER, Segments

if TYPE_CHECKING:
    from onebase.base.model import Base

# Relative to the largest logit: rounding in another order, at most; a wrong mask or position is off by far more.
# (fp64: models take softmax and rotary angles in fp32.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_UNFIT = (TypeError, ValueError, AttributeError, LookupError, NotImplementedError)
"""What models raise that want more than token ids."""
_LONGEST_WINDOW = 1024
_PREFIX = 5


class NotOfTokensError(Exception):
    """The model does not run on token ids alone; the message says what it said."""


def why_native(model: Any) -> str:
    """Return why a model is no decoder or encoder of tokens, by its own word; empty for one that may be."""
    kind = f"a {type(model).__name__}"
    config = getattr(model, "config", None)
    if not callable(getattr(config, "get_text_config", None)) or not callable(
        getattr(model, "get_input_embeddings", None)
    ):
        return f"{kind} is no model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder"
    if (takes := getattr(model, "main_input_name", "input_ids")) != "input_ids":
        return f"{kind} takes {takes}"
    return ""


def head_of(model: Any) -> HeadRecord | None:
    """Return the model's output head as a record, or None for a model without one (an encoder).

    Raises:
        ModelError: the head is no plain linear layer.
    """
    module = model.get_output_embeddings()
    if module is None:
        return None
    if getattr(module, "weight", None) is None or module.weight.dim() != 2:
        raise ModelError(
            f"the output head of {type(model).__name__} is a {type(module).__name__}, not a linear layer: its loss "
            f"cannot be computed in chunks. Use a model with a linear head."
        )
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    return HeadRecord(
        weight=module.weight,
        bias=getattr(module, "bias", None),
        scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def choose_layout(base: Base) -> Literal["flat", "padded"]:
    """Return the layout in which the base equals its own model; set `position_offset`, `shares_prefixes`, `token_axes`.

    Raises:
        ModelError: the base equals its model in none.
        NotOfTokensError: the model's own forward wants more than token ids, or returns no hidden state for each.
    """
    try:
        examples = _probe(base)
        with _inputs_seen(base.model) as shapes:
            expected = _own_results(base, examples)
    except _UNFIT as error:
        said = " ".join(str(error).split())
        raise NotOfTokensError(f"a {type(base.model).__name__} does not run on token ids alone ({said})") from error
    if not all(bool(own.isfinite().all()) for own, _ in expected):
        raise ModelError(
            f"{base.name}: the model's own results are not finite in {str(base.dtype).removeprefix('torch.')}: its weights "
            "are damaged (NaN or infinity in them), or too large for this dtype. Get them again, or set dtype: float32."
        )
    base.token_axes = {
        path: axis for path, seen in shapes.items() if (axis := _differing(seen[0], seen[-1])) is not None
    }
    padding = getattr(base.model.config, "pad_token_id", None)
    found = []
    for kind, offset in (("flat", 0), ("flat", (padding or 0) + 1), ("padded", 0)):
        for shared in (True, False):
            base.layout_kind, base.position_offset, base.shares_prefixes = kind, offset, shared  # type: ignore[assignment]
            how = f"{kind}, positions from {offset}, prefixes {'shared' if shared else 'repeated'}"
            try:
                difference = _difference(base, examples, expected)
            except (NotFlatError, TypeError, ValueError, KeyError, IndexError) as error:
                found.append(f"{how}: {error}")
                continue
            if difference <= TOLERANCE[base.dtype]:
                return kind  # type: ignore[return-value]
            found.append(f"{how}: differs by {difference:.1e} of the largest logit")
    raise ModelError(
        f"{base.name}: the logits and loss computed by onebase do not equal the model's own ({'; '.join(found)}). "
        f"This architecture ({type(base.model).__name__}) is not supported."
    )


def _probe(base: Base) -> list[Tensor]:
    """Return two examples of random tokens that begin alike, one of them longer than the window."""
    config = base.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longest = window + 9 if 0 < window <= _LONGEST_WINDOW else 21
    longest = min(longest, (base.max_length or longest + 8) - 8)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (_PREFIX + max(longest - _PREFIX, 2) + 3,), generator=draws)
    return [ids[:-3], torch.cat([ids[:_PREFIX], ids[-3:]])]


def _lay_out(examples: list[Tensor], shared: bool) -> tuple[Layout, Tensor]:
    """Return the layout and tokens of the probe's two examples, their prefix computed once or for each."""
    first, second = examples
    if not shared:
        return Layout([Node(len(first)), Node(len(second))]), torch.cat(examples)
    nodes = [Node(_PREFIX), Node(len(first) - _PREFIX, parent=0), Node(len(second) - _PREFIX, parent=0)]
    return Layout(nodes), torch.cat([first, second[_PREFIX:]])


@contextmanager
def _inputs_seen(model: nn.Module) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Yield the shapes of what each module is given first, by path, in the order of its calls."""
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def note(path: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next(iter((*given, *named.values())), None)
        if isinstance(x, Tensor):
            shapes.setdefault(path, []).append(tuple(x.shape))

    hooks = [
        module.register_forward_pre_hook(lambda _, given, named, path=path: note(path, given, named), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def _differing(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """Return the only dimension in which two shapes differ: that of the tokens, for examples of different lengths."""
    places = [place for place, lengths in enumerate(zip(one, other, strict=False)) if lengths[0] != lengths[1]]
    return places[0] if len(places) == 1 and len(one) == len(other) else None


@torch.no_grad()
def _own_results(base: Base, examples: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Return, for each example alone, the model's own logits (hidden states without a head) and its loss."""
    results: list[tuple[Tensor, Tensor | None]] = []
    with base.native(Route(batch_owners=(NO_OWNER,))) as model:
        for ids in examples:
            line = ids[None].to(base.device)
            if base.head is None:
                results.append((base.trunk(input_ids=line).last_hidden_state[0], None))
            else:
                out = model(input_ids=line, labels=line, use_cache=False)
                results.append((out.logits[0], out.loss))
    return results


@torch.no_grad()
def _difference(base: Base, examples: list[Tensor], expected: list[tuple[Tensor, Tensor | None]]) -> float:
    """Return the largest difference of logits and losses, relative to the largest logit."""
    layout, ids = _lay_out(examples, base.shares_prefixes)
    hidden = base.hidden(ids, probe_route(base, layout))
    found = [0.0]
    for rows, (own, own_loss) in zip(layout.example_rows(), expected, strict=True):
        ours = hidden[rows.to(hidden.device)]
        largest = float(own.abs().max())
        if base.head is not None and own_loss is not None:
            logits = base.head.logits(ours, Segments.of([len(rows)], [NO_OWNER]))
            labels = ids[rows][1:].to(ours.device)
            loss = F.cross_entropy(logits[:-1].float(), labels)
            found.append(float((loss - own_loss).abs()) / max(float(own_loss), 1e-6))
            ours = logits
        found.append(float((ours.to(own.dtype) - own).abs().max()) / max(largest, 1e-6))
    return float(torch.tensor(found, dtype=torch.float64).max())  # unlike Python's max, NaN if any is


def probe_route(base: Base, layout: Layout, memories: tuple[Memory, ...] = ()) -> Route:
    """Return the route of a layout without any adapter, with learned keys and values where they are to be tried."""
    return Route(
        layout=layout,
        rows={RowSpace.TOKEN: Segments.of([layout.token_count], [NO_OWNER])},
        batch_owners=(NO_OWNER,),
        memories=memories,
    )


@torch.no_grad()
def find_task_head(base: Base, fresh: tuple[str, ...]) -> TaskHead | str:
    """Return the head of a model that gives numbers for a whole example, or why it has none that can be used.

    `fresh` are the modules that no file held weights for. What is tried stands in `base.task_head`.
    """
    kind = f"a {type(base.model).__name__}"
    if base.head is not None or base.trunk is base.model:
        return f"{kind} has no head that gives numbers for a whole example"
    try:
        return _fitting_head(base, kind, fresh)
    except torch.OutOfMemoryError:
        raise
    except (*_UNFIT, RuntimeError) as error:
        return f"the head of {kind} does not run on token ids alone ({' '.join(str(error).split())})"


def _fitting_head(base: Base, kind: str, fresh: tuple[str, ...]) -> TaskHead | str:
    """Return the head that reads of each example what makes it the model's own, or why there is none."""
    model, examples = base.model, _probe(base)
    with base.native(Route(batch_owners=(NO_OWNER,))):
        lines = [ids[None].to(base.device) for ids in examples]
        found = [getattr(model(input_ids=x, attention_mask=torch.ones_like(x)), "logits", None) for x in lines]
    if any(logits is None or logits.dim() != 2 for logits in found):
        return f"{kind} has no head that gives numbers for a whole example"
    if getattr(model.config, "pad_token_id", None) is None:
        return f"the configuration of {kind} names no pad_token_id, without which it takes one example at a time"
    own = torch.cat([logits for logits in found if logits is not None])
    layout, ids = _lay_out(examples, shared=False)
    route = probe_route(base, layout)
    hidden, tried = base.hidden(ids, route), []
    for pooling in POOLINGS:
        head = TaskHead(model, labels_of(model.config), pooling, _head_paths(base), fresh)
        base.task_head = head
        ours = base.task_logits(hidden, route)
        difference = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
        if difference <= TOLERANCE[base.dtype]:
            return head
        tried.append(f"the {pooling} of its rows: differs by {difference:.1e} of the largest number")
    return f"nothing that a head could read of an example gives what {kind} gives by itself ({'; '.join(tried)})"


def _head_paths(base: Base) -> tuple[str, ...]:
    """Return the outermost modules with weights that lie outside the trunk."""
    trunk = {id(module) for module in base.trunk.modules()}
    around = {path for path, module in base.model.named_modules() if base.trunk in module.modules()}
    outside = [
        path
        for path, module in base.model.named_modules()
        if id(module) not in trunk and path not in around and any(True for _ in module.parameters())
    ]
    return tuple(path for path in outside if path.rpartition(".")[0] not in outside)
