"""`finetune config`: the options of a training as YAML that explains itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter
from finetune.cli.parsing import parse
from finetune.config import PresetName, TrainConfig, from_yaml, preset, to_yaml
from finetune.errors import ConfigError
from finetune.runs.folder import write_whole


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Show the options of a training with their explanations, validate a file of them, or write one to start from."""

    action: tyro.conf.Positional[Literal["show", "validate", "write"]]
    """show prints to standard output, validate reads FILE and says whether it can be used, write creates FILE."""
    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="FILE")]] = None
    """YAML file; show prints its options over the defaults."""
    preset: PresetName = "default"
    """Named set of options to start from."""
    overwrite: bool = False
    """Let write replace a file that is there already."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.action != "show" and self.file is None:
            raise ConfigError(f"finetune config {self.action} needs a FILE")


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Do what the action says."""
    options = parse(ConfigOptions, words, command="config")
    base: TrainConfig = preset(options.preset)
    if options.action == "write":
        assert options.file is not None
        if options.file.exists() and not options.overwrite:
            raise ConfigError(f"{options.file} exists already", "pass --overwrite to replace it")
        write_whole(options.file, to_yaml(base))
        reporter.say(f"Wrote {options.file}; train with: finetune train --config {options.file}")
        return 0
    config = from_yaml(options.file, base=base) if options.file else base
    if options.action == "show":
        print(to_yaml(config), end="")
    else:
        reporter.say(f"{options.file} can be used.")
    return 0
