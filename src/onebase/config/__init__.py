"""Settings as data: what can be set (settings.py, methods.py), read strictly (reading.py) and written (writing.py).

Imports no torch. Only `train`, `serve`, `cli` and the bank's door see a settings object; functions below take plain
arguments.
"""

from onebase.config.methods import (
    METHODS,
    AdapterSettings,
    BitFit,
    Bottleneck,
    Full,
    Ia3,
    LnTuning,
    Lora,
    PrefixTuning,
    PromptTuning,
)
from onebase.config.reading import read_settings, settings_from
from onebase.config.settings import DataPart, DataSettings, EvalSettings, Settings, TrainSettings
from onebase.config.writing import SettingRow, describe_settings, diff_settings, dump_settings, settings_json_schema

__all__ = [
    "METHODS",
    "AdapterSettings",
    "BitFit",
    "Bottleneck",
    "DataPart",
    "DataSettings",
    "EvalSettings",
    "Full",
    "Ia3",
    "LnTuning",
    "Lora",
    "PrefixTuning",
    "PromptTuning",
    "SettingRow",
    "Settings",
    "TrainSettings",
    "describe_settings",
    "diff_settings",
    "dump_settings",
    "read_settings",
    "settings_from",
    "settings_json_schema",
]
