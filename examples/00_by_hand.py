"""LoRA by hand: the whole method in plain torch, without onebase.

A frozen linear layer W gets a trained product of two thin matrices beside it (arXiv:2106.09685 sec. 4.1):

    y = W x + (lora_alpha / r) B A x        A is (r, in) and random, B is (out, r) and zero

With B = 0 a fresh adapter changes nothing; only A and B get gradients and optimiser state, r * (in + out) numbers
instead of in * out. Batches are padded here, (batch, tokens, in). onebase computes the same from flat batches without
padding: tests/examples/test_by_hand.py trains a language model both ways and finds the same losses and weights.

Run it: python examples/00_by_hand.py (a few seconds).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Token ids and labels, both (batch, tokens); a label is the token itself, or -100 where nothing is learned."""


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained update beside it."""

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        bound = 1 / math.sqrt(base_layer.in_features)
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.scaling = lora_alpha / r

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + scaling * B A x for every token: (batch, tokens, in) to (batch, tokens, out)."""
        return self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def add_lora(model: nn.Module, r: int, lora_alpha: float, skip: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Freeze a model, wrap its linear layers but those in `skip`, and return what is trained, by name."""
    model.requires_grad_(False)
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    trained = {}
    for path, layer in linear.items():
        if path not in skip:
            parent, _, name = path.rpartition(".")
            adapted = LoraLinear(layer, r, lora_alpha)
            setattr(model.get_submodule(parent), name, adapted)
            trained |= {f"{path}.lora_A.weight": adapted.lora_A, f"{path}.lora_B.weight": adapted.lora_B}
    return trained


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labelled tokens, each predicted from the ones before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def rate_at(step: int, steps: int, learning_rate: float) -> float:
    """Return the learning rate of a step, from 0: warm-up over the first 3 %, then a cosine to zero."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    predict: Callable[[Tensor], Tensor], trained: Iterable[nn.Parameter], batches: Sequence[Batch], learning_rate: float
) -> list[float]:
    """Train on one batch a step and return the loss of each; `predict` gives logits (batch, tokens, vocabulary)."""
    parameters, losses = list(trained), []
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, (token_ids, labels) in enumerate(batches):
        loss = loss_of(predict(token_ids), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate_at(step, len(batches), learning_rate)
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------- a task of seconds

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def counting(stride: int, steps: int) -> list[Batch]:
    """Return batches of rows that go through the alphabet: stride 1 forwards, -1 backwards."""
    draws = torch.Generator().manual_seed(stride + 1)
    starts = torch.randint(26, (steps, 16, 1), generator=draws)
    return [(rows, rows) for rows in (starts + stride * torch.arange(10)) % 26]


def continued(model: nn.Module, letter: str) -> str:
    """Return what the model writes after a letter."""
    text = letter
    while len(text) < 10:
        logits = model(torch.tensor([[LETTERS.index(text[-1])]]))
        text += LETTERS[int(logits[0, -1].argmax())]
    return text


def main() -> None:
    """Train a base to say the alphabet, then an adapter on it to say it backwards."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(26, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 26))
    losses = train(base, base.parameters(), counting(stride=1, steps=100), learning_rate=1e-2)
    print(
        f"base:     {sum(p.numel() for p in base.parameters()):5} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    print(f"          after 'm' it writes {continued(base, 'm')!r}")
    before = [weight.clone() for weight in base.parameters()]
    frozen = list(base.parameters())
    adapter = add_lora(base, r=4, lora_alpha=8)
    print(f"          with a fresh adapter {continued(base, 'm')!r}: nothing has changed")
    losses = train(base, adapter.values(), counting(stride=-1, steps=200), learning_rate=1e-2)
    print(
        f"adapter:  {sum(p.numel() for p in adapter.values()):5} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    print(f"          after 'm' it writes {continued(base, 'm')!r}")
    same = all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
    print(f"the base's own weights: {'not a bit has changed' if same else 'CHANGED'}")


if __name__ == "__main__":
    main()
