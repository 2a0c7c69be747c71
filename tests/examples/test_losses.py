"""examples/02_losses.py, on a tiny model: both losses are trained, and the plot shows what the formula says."""

import subprocess
import sys
import xml.etree.ElementTree

from tests.classifiers import encoder_folder
from tests.examples.tiny import EXAMPLES


def test_it_trains_by_both_losses_and_draws_curves_and_gradients(tmp_path) -> None:
    model = encoder_folder(tmp_path / "model")
    words = [sys.executable, str(EXAMPLES / "02_losses.py"), str(model), "4", "plot.svg"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == ["1", "2", "3", "4"]
    assert xml.etree.ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    taught = [[float(word) for word in line.split()] for line in done.stdout.splitlines()[6:11]]
    assert [likely for likely, _, _ in taught] == sorted(likely for likely, _, _ in taught)
    cross_entropy, squared_error = ([line[column] for line in taught] for column in (1, 2))
    assert cross_entropy[0] == max(cross_entropy) > 0.99  # sure and wrong is where it teaches most
    assert squared_error[0] < 0.01 < max(squared_error)
