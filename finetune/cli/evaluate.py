"""`finetune evaluate`: how good a trained model is on labelled images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter, print_table
from finetune.cli.parsing import parse
from finetune.errors import ConfigError
from finetune.runs import strict_json


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score the model of a run on labelled images."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder or model.safetensors."""
    data: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATA")]]
    """Folder or CSV of labelled images."""
    split: Literal["auto", "train", "valid", "test", "all"] = "auto"
    """Which images; auto takes test, else valid, else all. In a folder without splits, valid are those that RUN held
    out."""
    format: Literal["table", "json"] = "table"
    """Form of the scores."""
    batch_size: int = 32
    """Images computed at once; 1 or more."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    allow_bad_images: bool = False
    """Leave out images that cannot be read instead of refusing them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.batch_size < 1:
            raise ConfigError("--batch-size must be 1 or more")


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Print the scores."""
    options = parse(EvaluateOptions, words, command="evaluate")

    from finetune.api import evaluate

    found = evaluate(
        options.run,
        options.data,
        split=options.split,
        batch_size=options.batch_size,
        device=options.device,
        allow_bad_images=options.allow_bad_images,
        reporter=reporter,
    )
    scores = found.scores
    if options.format == "json":
        print(strict_json.dump({"split": found.split, **scores.to_json()}, indent=1))
        return 0
    low, high = scores.accuracy_interval
    rows = [("images", f"{scores.images}"), ("accuracy", f"{scores.accuracy:.1%}  ({low:.1%} to {high:.1%})")]
    rows += [
        (name.replace("_", " "), f"{value:.3f}") for name, value in scores.headline().items() if name != "accuracy"
    ]
    print_table(["score", found.split], rows)
    print_table(
        ["class", "images", "precision", "recall", "F1"],
        [
            (row.class_name, row.support, f"{row.precision:.2f}", f"{row.recall:.2f}", f"{row.f1:.2f}")
            for row in scores.per_class
        ],
    )
    return 0
