"""The one config, from which the command line, the YAML and the Python arguments derive."""

from finetune.config.presets import PRESETS, PresetName, preset, starting_point
from finetune.config.schema import OPTION_NAMES, OptionalFile, TrainConfig, with_options
from finetune.config.yaml_io import from_yaml, to_yaml

__all__ = [
    "OPTION_NAMES",
    "PRESETS",
    "OptionalFile",
    "PresetName",
    "TrainConfig",
    "from_yaml",
    "preset",
    "starting_point",
    "to_yaml",
    "with_options",
]
