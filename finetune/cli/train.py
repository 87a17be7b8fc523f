"""`finetune train`: from a folder of labelled images to a run folder."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from finetune.cli.console import ConsoleReporter, print_table
from finetune.cli.parsing import parse
from finetune.config import OPTION_NAMES, OptionalFile, PresetName, TrainConfig, from_yaml, preset, starting_point
from finetune.errors import ConfigError
from finetune.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """Train a classifier on labelled images. Whatever is "auto" is resolved from the data and the machine, once."""

    preset: PresetName | None = None
    """Named set of options to start from; by default the one that bears the name of the model, if there is one."""
    config: OptionalFile = None
    """YAML file of options to start from, such as the config.yaml of another run; the flags given change it."""
    find_learning_rate: bool = False
    """Do not train: try rising rates for a hundred steps, draw the loss over the rate and suggest one."""


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Train and print the scores."""
    began = time.monotonic()
    start = TrainOptions(**vars(starting_config(words)))
    options = parse(TrainOptions, words, command="train", default=start)
    config = TrainConfig(**{name: getattr(options, name) for name in OPTION_NAMES})
    if not config.data and not config.resume:
        raise ConfigError("no DATA to train on", "name a folder or CSV of labelled images: finetune train DATA")

    if options.find_learning_rate:
        return _find_learning_rate(config, reporter)

    from finetune.api import train

    finished = train(config=config, reporter=reporter, began=began)
    scores = finished.metrics
    print_table(
        ["split", "images", "accuracy", "95 % interval", "balanced accuracy", "macro F1"],
        [
            (
                split,
                found.images,
                f"{found.accuracy:.1%}",
                "{:.1%} to {:.1%}".format(*found.accuracy_interval),
                f"{found.balanced_accuracy:.1%}",
                f"{found.macro_f1:.3f}",
            )
            for split, found in scores.items()
        ],
    )
    print(finished.folder)
    reporter.say(f"Now try: finetune predict {finished.folder} IMAGE")
    return 0


def _find_learning_rate(config: TrainConfig, reporter: ConsoleReporter) -> int:
    from finetune.api import find_learning_rate

    sweep = find_learning_rate(config=config, reporter=reporter)
    if sweep.suggestion is None:
        reporter.warn("the loss falls at no rate: there is nothing to suggest; a solved head has nothing to learn.")
        return 0
    print(f"{sweep.suggestion:g}")
    reporter.say(f"The loss falls fastest there. Now try --learning-rate {sweep.suggestion:g}")
    return 0


def starting_config(words: list[str]) -> TrainConfig:
    """Return the config that the flags in `words` change: class < preset < YAML < flag.

    Where no preset is named, the model's name may bring one along.

    With --resume it is the config that the run was started with.
    """
    parser = argparse.ArgumentParser("finetune train", add_help=False, allow_abbrev=False)
    for option in ("--preset", "--config", "--output", "--model"):
        parser.add_argument(option)
    parser.add_argument("--resume", action="store_true")
    chosen, _ = parser.parse_known_args(words)
    base = preset(chosen.preset) if chosen.preset else None
    if base is None and chosen.model:
        base = starting_point(chosen.model)
    if chosen.resume and chosen.output and RunFolder(Path(chosen.output)).config.exists():
        return from_yaml(RunFolder(Path(chosen.output)).config, base=base)
    return from_yaml(Path(chosen.config), base=base) if chosen.config else base or TrainConfig()
