"""`finetune tune`: a search for better options."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from finetune.cli.console import ConsoleReporter, print_table
from finetune.cli.parsing import parse
from finetune.cli.train import starting_config
from finetune.config import OPTION_NAMES, OptionalFile, PresetName, TrainConfig
from finetune.config.durations import parse_seconds
from finetune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TrainConfig):
    """Search for better options by training again and again on labelled images; all others are those of train.

    --output is the folder of the study, with a run folder for each training; --resume goes on with it.
    """

    trials: int = 20
    """How many trainings there are to be in all; 1 or more."""
    timeout: Annotated[str, tyro.conf.arg(metavar="TIME")] = ""
    """Time after which no training begins, such as 30m or 8h."""
    search: Annotated[tuple[str, ...], tyro.conf.arg(metavar="OPTION...")] = ()
    """Names of the options to search; by default scenario, trunk-learning-rate, depth-ratio, weight-decay and
    augmentation, as far as they are not given."""
    preset: PresetName | None = None
    """Named set of options to start from; by default the one that bears the name of the model, if there is one."""
    config: OptionalFile = None
    """YAML file of options to start from; the flags given change it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        if self.trials < 1:
            raise ConfigError(f"--trials must be 1 or more, got {self.trials}")
        if self.timeout:
            parse_seconds(self.timeout)


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Search and print the best options, and the run that has them."""
    start = TuneOptions(**vars(starting_config(words)))
    options = parse(TuneOptions, words, command="tune", default=start)
    config = TrainConfig(**{name: getattr(options, name) for name in OPTION_NAMES})
    if not config.data and not config.resume:
        raise ConfigError("no DATA to train on", "name a folder or CSV of labelled images: finetune tune DATA")

    from finetune.api import tune

    found = tune(
        config=config, search=options.search, trials=options.trials, timeout=options.timeout, reporter=reporter
    )
    rows = [
        (name.replace("_", "-"), f"{value:.3g}" if isinstance(value, float) else value)
        for name, value in found.options.items()
    ]
    print_table(["option", "best"], rows)
    print(found.best)
    reporter.say(
        f"Validation accuracy {found.accuracy:.1%}, the best of {found.trials} trainings ({found.pruned} ended early). "
        "It was chosen among them and so is too good: score it on images of a test split."
    )
    return 0
