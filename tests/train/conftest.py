"""The tiny runs that tests of training share."""

from pathlib import Path

import pytest

from tests.train import runs
from tests.train.runs import FEW, Watching, Workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with runs.own_home(folder / "home"):
        yield runs.workshop(folder)


@pytest.fixture(scope="module")
def finished(shop: Workshop) -> tuple[Path, Watching]:
    """A run whose best weights are not its last, with what was said while it ran."""
    out, watching = shop.folder / "finished", Watching()
    other = [{"prompt": f"Define the noun {word}.", "completion": "Zebra!"} for word in ("dog", "cat", "away", "sat")]
    runs.write_rows(shop.valid, other)
    train = {"epochs": 5, "learning_rate": 0.05, "eval_every": 2, "micro_batch_tokens": 100, "weight_decay": 0.01}
    runs.run(shop.settings(adapter=FEW, train=train), out, watching=watching)
    return out, watching
