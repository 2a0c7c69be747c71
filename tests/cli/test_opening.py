"""Laws of what a verb is about."""

import shutil

from onebase.cli.opening import open_adapter
from tests.cli.world import invoke, settings_in


def test_an_adapter_taken_out_of_its_run_is_asked_as_in_training(world):
    config = settings_in(world, train="steps: 3, batch_size: 4", data=", system: Be brief., max_length: 120")
    assert invoke("train", config, "--out", "run").exit_code == 0
    shutil.copytree("run/adapter", "elsewhere")
    in_run, alone = open_adapter("run"), open_adapter("elsewhere")
    assert alone.data["system"] == "Be brief."
    assert alone.data["max_length"] == 120
    chat = [{"role": "user", "content": "Define the noun dog."}]
    assert alone.asking().of_messages(chat) == in_run.asking().of_messages(chat)
