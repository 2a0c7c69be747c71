"""Where a new head for numbers begins: at the mean of the targets, as a regression's intercept would.

From zero, a head has to learn the mean first, and gradients of targets far from zero are large. Only a head that is new
and has a bias (encoders' have one, decoders' `score` has none) is moved, and only before its first step.
"""

from __future__ import annotations

import torch

from onebase.adapters.bank import Adapter
from onebase.adapters.matching import lies_in
from onebase.base.model import Base
from onebase.data.examples import Examples


@torch.no_grad()
def centre_regression_(base: Base, adapter: Adapter, examples: Examples) -> None:
    """Set the bias of an adapter's new head for numbers, where it is still zero, to the mean of the targets."""
    head, targets = base.task_head, examples.targets
    if isinstance(head, str) or targets is None or head.labels.problem != "regression":
        return
    for name, parameter in adapter.parameters():
        new = any(lies_in(name.rpartition(".")[0], path) for path in head.fresh)
        if new and name.endswith(".bias") and parameter.shape == (1,) and not parameter.any():
            parameter.fill_(float(targets.mean()))
