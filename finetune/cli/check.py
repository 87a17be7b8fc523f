"""`finetune check`: the data doctor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter
from finetune.cli.parsing import parse
from finetune.errors import DataError
from finetune.runs import strict_json


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Examine a folder or CSV of labelled images as training would, and write nothing to it."""

    data: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATA")]]
    """Folder or CSV of labelled images."""
    label_names: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON that maps folder names to the names shown; by default cat_to_name.json in DATA or beside it."""
    strict: bool = False
    """Take warnings for errors."""
    format: Literal["table", "json"] = "table"
    """Form of the findings."""


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Print the findings; exit code 3 if they stop a training."""
    options = parse(CheckOptions, words, command="check")

    from finetune.data.read import read_images

    diagnosis = read_images(options.data, label_names=options.label_names, reporter=reporter).diagnosis
    if options.format == "json":
        print(strict_json.dump(diagnosis.to_json(), indent=1))
    else:
        splits = ", ".join(f"{count} {split}" for split, count in diagnosis.images_per_split.items())
        low, middle, high = diagnosis.images_per_class
        print(f"{diagnosis.image_count} images ({splits}) of {diagnosis.class_count} classes")
        print(f"images a class: {low} to {high}, median {middle:g}")
        for finding in diagnosis.findings:
            print(f"{finding.severity}: {finding.message}")
        if not diagnosis.findings:
            print("nothing found that would trouble a training")
    stopping = [*diagnosis.of_severity("error"), *(diagnosis.of_severity("warning") if options.strict else ())]
    return DataError.exit_code if stopping else 0
