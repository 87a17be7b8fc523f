"""`finetune data`: a well-known data set as a folder to train on."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from finetune.cli.console import ConsoleReporter
from finetune.cli.parsing import parse


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Write a well-known data set as an image folder.

    Downloads are checked by their hash and kept in the cache.
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """digits (needs no network), mnist, fashion-mnist, cifar10, cifar100, flowers102, pets or food101."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write: new, empty, or begun by an earlier call, which is then gone on with."""
    source: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """For mnist: folder with the four IDX files, gzipped or not, to read in place of a download."""


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Write the images and say how many there are."""
    options = parse(DataOptions, words, command="data")

    from finetune.data.named import write_named

    written = write_named(options.name, options.output, source=options.source, reporter=reporter)
    counts = written.images_per_split
    splits = "" if "all" in counts else f" ({', '.join(f'{count:,} {split}' for split, count in counts.items())})"
    verb = "already in" if written.was_there else "in"
    print(f"{sum(counts.values()):,} images{splits} of {written.class_count} classes {verb} {written.folder}")
    reporter.say(f"Train on them with: finetune train {shlex.quote(str(written.folder))}")
    return 0
