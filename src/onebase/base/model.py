"""The base: one frozen pretrained model, its tokenizer, and the ways to run a batch through it.

`Base.hidden` takes the tokens of a layout end to end and returns one hidden row a token, in the same order, whether
the model runs flat (one row, no padding) or padded (BLOOM and others whose attention is their own). What is no decoder
or encoder of tokens - encoder-decoders, vision models, any `nn.Module` - is native: `Base.native` runs it as it is,
and its inputs are its own. `load` opens a model by name; `Base` itself takes any module, so tests build tiny ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onebase.base import check, nf4, pretrained
from onebase.base.blocks import fuse_
from onebase.base.classifier import TaskHead
from onebase.base.device import resolve_device, resolve_dtype
from onebase.base.fingerprint import fingerprint, fingerprint_of_state
from onebase.base.flat import flat_attention_of, memory_attention_of
from onebase.base.kernels import use_kernels
from onebase.base.quantise import Quantize, quantise_
from onebase.base.route import Route, RowSpace, Slot
from onebase.base.stored_head import fit_stored_head_
from onebase.config.labels import Labels
from onebase.errors import ConfigError, ModelError
from onebase.ops.layout import NO_PARENT, Layout
from onebase.ops.loss import HeadRecord
from onebase.ops.segments import NO_OWNER, Segments

LayoutKind = Literal["flat", "padded", "native"]


class Base:
    """A frozen model. Nothing here is trained; adapters are put on by a bank.

    Attributes:
        model: the module, in evaluation mode, no parameter requires a gradient.
        tokenizer: its tokenizer; None for a model built in memory without one.
        name: what the user called it; `folder`: where its files lie (None: in memory).
        fingerprint: sha256 of the weights as stored, independent of dtype and device.
        layout_kind: "flat", "padded" or "native", decided by a self-check when the base is made.
        why_native: why a native base is one; empty otherwise. Who gives a reason gets a native base of any model.
        shares_prefixes: whether a layout's node may have children (causal models), decided by the same check.
        token_axes: which dimension of a module's input are the tokens, by path, as the same check saw it.
        task_head: what gives numbers for a whole example (classes, a value), or why there is none.
        own_heads: the modules that every adapter here brings copies of, because the task is not the base's own.
        head_note: what became of the head in the base's files, where who trains one should know.
        slot: where the current route lies.
        quantize: how the trunk's linear layers are held.
        why_not_fused: why elementwise work runs as torch does it where compiled kernels would do (base/kernels.py).
        input_embedding: what turns token ids into vectors, as it was before any adapter; None in a model that embeds no
            tokens, or does not say.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, name: str = "in-memory", folder: Path | None = None,
        fingerprint: str | None = None, fresh: tuple[str, ...] = (), why_native: str = "",
    ) -> None:  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.folder = name, folder
        self.fingerprint = fingerprint or fingerprint_of_state(model)
        self.slot = Slot()
        embedding = _ask(model, "get_input_embeddings")
        self.input_embedding: nn.Embedding | None = (
            embedding if isinstance(getattr(embedding, "num_embeddings", None), int) else None
        )
        self.head: HeadRecord | None = None
        self.token_axes: dict[str, int] = {}
        self.position_offset, self.shares_prefixes = 0, False
        self._own_attention = self._current_attention = self._flat_attention = self._memory_attention = ""
        self.layout_kind: LayoutKind = "native"
        self.why_native = why_native or check.why_native(model)
        self.task_head: TaskHead | str = f"it runs as it is: {self.why_native}"
        if not self.why_native:
            self._choose_layout(fresh)
        self.own_heads: tuple[str, ...] = ()
        self.head_note = ""
        self.quantize: Quantize = "none"
        self.why_not_fused = ""

    def fuse(self) -> None:
        """Let elementwise work run as one pass, the same but for rounding; `why_not_fused` says why where it does not."""
        if self.device.type == "cpu" and self.dtype is torch.float32 and self.layout_kind != "native":
            self.why_not_fused = use_kernels()
            if not self.why_not_fused:
                fuse_(self.model)

    def open_for_task(self, head_note: str = "") -> None:
        """Let every adapter bring the head for whole examples with it: it is trained whole.

        `head_note` is what who trains it should know of the head that it begins with.

        Raises:
            ModelError: the model has no such head, or none that can be computed here.
        """
        if isinstance(self.task_head, str):
            raise ModelError(
                f"{self.name}: {self.task_head}. The tasks classify and regress need one: choose an encoder or a decoder "
                "that transformers has a ...ForSequenceClassification for."
            )
        self.head_note = head_note
        paths = (*self.task_head.fresh, *self.task_head.paths)
        self.own_heads = tuple(
            p for p in dict.fromkeys(paths) if not any(p != q and p.startswith(f"{q}.") for q in paths)
        )

    def _choose_layout(self, fresh: tuple[str, ...]) -> None:
        """Let the model's attention be flat attention where it is asked for, and find the layout that fits the model."""
        self._own_attention = self._current_attention = self.model.config._attn_implementation
        if self._own_attention == "sdpa" and getattr(
            self.model.config.get_text_config(), "attn_logit_softcapping", None
        ):
            self._own_attention = "eager"  # as later versions do: transformers 5.17 lets sdpa drop the cap
            self._use_attention(self._own_attention)
        self._flat_attention = f"onebase-{id(self.slot)}"
        self._memory_attention = f"{self._flat_attention}-memory"
        pretrained.register_attention(self._flat_attention, flat_attention_of(self.slot))
        pretrained.register_attention(self._memory_attention, memory_attention_of(self.slot), masked=True)
        for name in (self._flat_attention, self._memory_attention):
            weakref.finalize(self, pretrained.unregister_attention, name)
        self.head = check.head_of(self.model)
        try:
            self.layout_kind = check.choose_layout(self)
        except check.NotOfTokensError as error:
            self._use_attention(self._own_attention)
            self.head, self.shares_prefixes, self.layout_kind, self.why_native = None, False, "native", str(error)
            self.task_head = f"it runs as it is: {error}"
        else:
            self.task_head = check.find_task_head(self, fresh)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def format(self) -> str:
        """The base's number format in words: 'float32', or 'float32 with int8 layers'."""
        held = "" if self.quantize == "none" else f" with {self.quantize} layers"
        return f"{str(self.dtype).removeprefix('torch.')}{held}"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def trunk(self) -> nn.Module:
        """The model without its output head; the whole model where it knows none."""
        trunk: nn.Module = getattr(self.model, "base_model", self.model)
        return trunk

    @property
    def head_module(self) -> nn.Module | None:
        """The output head as a module, where the model says which one it is."""
        head: nn.Module | None = _ask(self.model, "get_output_embeddings")
        return head

    @property
    def labels(self) -> Labels | None:
        """What the head for whole examples predicts; None without one."""
        return None if isinstance(self.task_head, str) else self.task_head.labels

    @property
    def parameter_count(self) -> int:
        """Number of the base's own parameters, tied ones counted once."""
        return nf4.weight_count(self.model)

    @property
    def max_length(self) -> int | None:
        """The most tokens an example may have, where the model says."""
        config = _ask(getattr(self.model, "config", None), "get_text_config")
        length = getattr(config, "max_position_embeddings", None)
        return None if length is None else int(length) - self.position_offset

    @property
    def embedding_rows(self) -> int | None:
        """How many token ids the model knows (often more than its tokenizer has); None if it embeds no tokens."""
        return None if self.input_embedding is None else self.input_embedding.num_embeddings

    def hidden(self, token_ids: Tensor, route: Route) -> Tensor:
        """Return the last hidden state of every token of `route.layout`, (tokens, hidden), in the layout's order.

        Args:
            token_ids: (tokens,) the nodes' tokens end to end.

        Raises:
            ConfigError: the base is native.
        """
        if self.layout_kind == "native":
            raise ConfigError(
                f"{self.name}: {self.why_native}, so it has no hidden state for each token of a flat batch. Run it on its own "
                "inputs: with base.native(bank.batch_route([name, ...])) as model: model(...)"
            )
        layout = route.layout
        if layout is None or token_ids.shape != (layout.token_count,):
            raise ValueError(f"{tuple(token_ids.shape)} token ids for a layout of {layout and layout.token_count}")
        if not self.shares_prefixes and any(node.parent != NO_PARENT for node in layout.nodes):
            raise ValueError(f"{self.name} is bidirectional: a prefix depends on what follows, repeat it instead")
        token_ids = token_ids.to(self.device)
        with self._mixed_precision():
            if self.layout_kind == "padded":
                return self._hidden_padded(token_ids, layout, route)
            positions = (layout.position_ids + self.position_offset).to(self.device)
            self._use_attention(self._flat_attention)
            # a pooler at the trunk's end gets the first token alone: nobody's row, and not used
            rows = {**route.rows, RowSpace.EXAMPLE: Segments.of([1], [NO_OWNER])}
            with self.slot.use(replace(route, rows=rows)):
                out = self.trunk(input_ids=token_ids[None], position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _hidden_padded(self, token_ids: Tensor, layout: Layout, route: Route) -> Tensor:
        rows, mask, place = padded_rows(layout)
        self._use_attention(self._own_attention)
        with self.slot.use(route):
            out = self.trunk(
                input_ids=token_ids[rows.to(self.device)], attention_mask=mask.to(self.device), use_cache=False
            )
        hidden: Tensor = out.last_hidden_state.flatten(0, 1).index_select(0, place.to(self.device))
        return hidden

    def task_logits(self, hidden: Tensor, route: Route) -> Tensor:
        """Return what the head for whole examples gives, (examples, outputs), for the hidden states of a route's layout.

        Learned keys and values stand in the place of virtual tokens, whose rows then mean nothing and are not pooled.

        Raises:
            ModelError: the base has no such head.
        """
        if isinstance(self.task_head, str):
            raise ModelError(f"{self.name}: {self.task_head}.")
        assert route.layout is not None, "hidden states have a layout"
        rows = route.layout.example_rows({start for memory in route.memories for _, start in memory.places or ()})
        with self._mixed_precision():
            return self.task_head.logits(self.task_head.pool(hidden, rows), self.slot, route)

    @contextmanager
    def native(self, route: Route) -> Iterator[Any]:
        """Yield the model as it runs by itself (generation, padded batches, images), under a route without a layout.

        Its attention is its own, unless the route has learned keys and values for it. The attention of before comes
        back afterwards: a flat forward may still be waiting to be recomputed.
        """
        before = self._current_attention
        self._use_attention(self._memory_attention if route.memories else self._own_attention)
        try:
            with self.slot.use(route), self._mixed_precision():
                yield self.model
        finally:
            self._use_attention(before)

    def rest(self) -> None:
        """Let the model attend by its own means until the next flat forward, for who calls it without the base."""
        self._use_attention(self._own_attention)

    def _use_attention(self, name: str) -> None:
        if name != self._current_attention:
            self.model.set_attn_implementation(name)
            self._current_attention = name

    def _mixed_precision(self) -> Any:
        """Autocast where the base is stored in half precision, so that norms and softmax keep theirs."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    @contextmanager
    def activation_checkpointing(self, enabled: bool = True) -> Iterator[None]:
        """Recompute each block in the backward instead of keeping its activations, under the route it ran with.

        `training` is set on the blocks alone (transformers checkpoints only then) and only until they run, so the
        base's own dropout stays off, also where a block drops by itself (OPT).
        """
        if not enabled:
            yield
            return
        blocks: list[Any] = []

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            forward, again = self.slot.for_recompute()
            return _InEvaluation(blocks, forward), _InEvaluation(blocks, again)

        blocks += pretrained.enable_checkpointing(self.model, contexts)
        _set_training(blocks, True)
        try:
            yield
        finally:
            _set_training(blocks, False)
            pretrained.disable_checkpointing(self.model)


class _InEvaluation(AbstractContextManager[None]):
    """Another context with the blocks in evaluation mode; may be entered again and again."""

    def __init__(self, blocks: list[Any], inner: AbstractContextManager[None]) -> None:
        self._blocks, self._inner = blocks, inner
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(self._blocks[0].training)
        _set_training(self._blocks, False)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        _set_training(self._blocks, self._before.pop())


def _set_training(blocks: list[Any], training: bool) -> None:
    for block in blocks:
        block.training = training


def _ask(thing: Any, method: str) -> Any:
    """Return what a method returns, None where there is no such method or it has no answer for this model."""
    try:
        return getattr(thing, method)() if callable(getattr(thing, method, None)) else None
    except (AttributeError, NotImplementedError):
        return None


def padded_rows(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return how a layout is laid out padded: flat row of each cell and mask, (examples, longest), and each token's cell.

    An example is a node that is nobody's parent, with its ancestors' tokens before it. Padding repeats the example's
    own first token; a shared token is read at the first example that has it.
    """
    lines = [rows.tolist() for rows in layout.example_rows()]
    longest = max(map(len, lines))
    rows = torch.tensor([line + [line[0]] * (longest - len(line)) for line in lines])
    mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in lines])
    place = torch.full((layout.token_count,), -1)
    for number, line in reversed(list(enumerate(lines))):
        place[torch.tensor(line)] = torch.arange(len(line)) + number * longest
    return rows, mask, place


def padded_segments(layout: Layout) -> tuple[list[int], list[int]]:
    """Return (rows of each example, node of each example) of the padded layout, in order."""
    longest = max(layout.depths[i] + layout.nodes[i].length for i in layout.leaves)
    return [longest] * len(layout.leaves), list(layout.leaves)


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    labels: Labels | None = None,
    quantize: Quantize = "none",
) -> Base:
    """Open a model by hub id, folder, GGUF file or packaged name, frozen and fingerprinted.

    With `labels` it has a head for them: what the files hold of one, or a new one, which each adapter brings its own of.
    `quantize` says how its linear layers are held.

    Raises:
        ModelError: no such model, or it cannot be opened; the message says what was looked for and where.
        MissingExtraError: what `quantize` needs is not installed.
    """
    if quantize == "nf4":
        nf4.check_installed()
    place = pretrained.locate(name, revision=revision)
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    model, tokenizer, fresh = pretrained.open_pretrained(
        place, dtype=chosen_dtype, device=chosen_device, labels=labels, trust_remote_code=trust_remote_code
    )
    note = ""
    if labels is not None:
        fresh, note = fit_stored_head_(model, labels, place.folder, fresh)
    base = Base(model, tokenizer, name=name, folder=place.folder, fingerprint=fingerprint(place.folder), fresh=fresh)
    if labels is not None:
        base.open_for_task(note)
    base.fuse()
    quantise_(base, quantize)
    return base
