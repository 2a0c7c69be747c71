"""Cross-entropy against squared error for one classifier: what each teaches, and why, as two curves and a plot.

The same adapter learns the same rows twice, once by each loss. Squared error on probabilities has a gradient with the
factor p (1 - p): where the model is sure, it says nothing, also where it is sure and wrong.
Run it: python examples/02_losses.py
Another model, fewer steps, another place for the plot: python examples/02_losses.py MODEL STEPS FILE.svg
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from onebase.config.reading import read_settings
from onebase.ops.objective import logit_gradient
from onebase.train.run import train_run

LOSSES = ("cross_entropy", "squared_error")
COLOURS = dict(zip(LOSSES, ("#1f6feb", "#d1242f"), strict=True))
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


def panel(left: float, title: str, across: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Return one panel of the plot as SVG: a line for each loss."""
    points = [point for curve in curves.values() for point in curve]
    widest, highest = (max(point[axis] for point in points) for axis in (0, 1))
    parts = [f'<text x="{left + 160}" y="28" text-anchor="middle" font-size="14">{title}</text>']
    for share in (0, 0.5, 1):
        y = 260 - 200 * share
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + 320}" y2="{y}" stroke="#eaeef2"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share * highest:.2f}</text>')
        parts.append(f'<text x="{left + 320 * share}" y="280" text-anchor="middle">{share * widest:.3g}</text>')
    for number, (loss, curve) in enumerate(curves.items()):
        line = " ".join(f"{left + 320 * x / widest:.1f},{260 - 200 * y / highest:.1f}" for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[loss]}" stroke-width="2"/>')
        words = loss.replace("_", " ")
        parts.append(
            f'<text x="{left + 160}" y="{322 + 16 * number}" text-anchor="middle" fill="{COLOURS[loss]}">{words}</text>'
        )
    return "\n".join([*parts, f'<text x="{left + 160}" y="300" text-anchor="middle">{across}</text>'])


with tempfile.TemporaryDirectory() as folder:
    learned = {loss: accuracies(loss, Path(folder)) for loss in LOSSES}
panels = [
    panel(70, "Accuracy on the validation rows", "step", learned),
    panel(470, "Gradient on the right class's logit", "its probability", {loss: gradients(loss) for loss in LOSSES}),
]
head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 350" font-family="sans-serif" font-size="12">'
out.write_text("\n".join([head, '<rect width="820" height="350" fill="white"/>', *panels, "</svg>\n"]))

print("step   " + "   ".join(LOSSES))
for (step, first), (_, second) in zip(*learned.values(), strict=True):
    print(f"{step:>4}   {100 * first:>11.1f} %   {100 * second:>11.1f} %")
print(f"the plot is in {out}")
