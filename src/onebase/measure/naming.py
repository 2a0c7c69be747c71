"""The metrics of whole examples as people read them: their names, in the order that they are shown in. Imports nothing."""

METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "ece": "ECE",
    "brier": "Brier",
    "mse": "MSE",
    "mae": "MAE",
    "r2": "R2",
}
_SHARES = ("accuracy",)


def shown(metric: str, value: float) -> str:
    """Return a metric's value as text."""
    return f"{100 * value:.2f} %" if metric in _SHARES else f"{value:.4f}"
