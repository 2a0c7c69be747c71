"""Cross-entropy against squared error for one classifier: what each teaches, and why, as two curves and a plot.

The same adapter learns the same rows twice, once by each loss. Squared error on probabilities has a gradient with the
factor p (1 - p): where the model is sure, it says nothing, also where it is sure and wrong.
Run it: python examples/02_losses.py
Another model, fewer steps, another place for the plot: python examples/02_losses.py MODEL STEPS FILE.svg
It needs matplotlib: pip install matplotlib
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from onebase.config.reading import read_settings
from onebase.ops.objective import logit_gradient
from onebase.train.run import train_run

LOSSES = ("cross_entropy", "squared_error")
given = [*sys.argv[1:], *("minilm-l6-v2", "240", "losses.svg")[len(sys.argv) - 1 :]]
model, steps, out = given[0], int(given[1]), Path(given[2])


def accuracies(loss: str, folder: Path) -> list[tuple[int, float]]:
    """Train by one loss and return (step, accuracy on the validation rows)."""
    words = [f"model={model}", f"train.loss={loss}", f"train.steps={steps}", f"train.eval_every={max(steps // 8, 1)}"]
    train_run(read_settings(Path(__file__).with_name("classify.yaml"), words), folder / loss)
    records = map(json.loads, (folder / loss / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["valid_accuracy"]) for record in records if "valid_accuracy" in record]


def gradients(loss: str) -> list[tuple[float, float]]:
    """Return (probability of the right class, size of the gradient on its logit) for two classes."""
    logits = torch.linspace(-8, 8, 81)[:, None] * torch.tensor([1.0, 0.0])
    right = torch.zeros(81, dtype=torch.int64)
    found = logit_gradient(loss, "single_label_classification", logits, right)[:, 0].abs()
    return list(zip(logits.softmax(1)[:, 0].tolist(), found.tolist(), strict=True))


with tempfile.TemporaryDirectory() as folder:
    learned = {loss: accuracies(loss, Path(folder)) for loss in LOSSES}
figure = Figure((9, 3.6), layout="constrained")
learning, teaching = figure.subplots(1, 2)
for loss in LOSSES:
    learning.plot(*zip(*learned[loss], strict=True), "o-", label=loss)
    teaching.plot(*zip(*gradients(loss), strict=True), label=loss)
learning.set(title="Accuracy on the validation rows", xlabel="step")
teaching.set(title="Gradient on the right class's logit", xlabel="its probability")
learning.legend()
figure.savefig(out)

print("step   " + "   ".join(LOSSES))
for (step, first), (_, second) in zip(*learned.values(), strict=True):
    print(f"{step:>4}   {100 * first:>11.1f} %   {100 * second:>11.1f} %")
print("gradient on the right class's logit, of two, where its probability is")
for (likely, first), (_, second) in zip(*(gradients(loss)[::20] for loss in LOSSES), strict=True):
    print(f"{likely:>6.4f}   {first:>11.4f}     {second:>11.4f}")
print(f"the plot is in {out}")
