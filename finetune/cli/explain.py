"""`finetune explain`: where on a picture a model sees its class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter, plain
from finetune.cli.parsing import parse


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Draw where on a picture a model sees a class: its class activation map, over the picture."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder or model.safetensors."""
    image: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="IMAGE")]]
    """Image file."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """PNG file to draw into; by default the image's name with -explained.png, in the current folder."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class to look for, by folder name or display name; by default the predicted one."""
    dense: bool = False
    """Look at the whole picture instead of the central square that predict sees."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Draw the map and say what it shows."""
    options = parse(ExplainOptions, words, command="explain")
    output = options.output or Path(f"{options.image.stem}-explained.png")

    from finetune.api import explain

    found = explain(
        options.run,
        options.image,
        output=output,
        class_name=options.class_name,
        dense=options.dense,
        device=options.device,
    )
    if found.map_HW.size == 1:
        why = "the picture is no larger than that" if options.dense else "--dense shows more"
        reporter.warn(f"this network gives its own input a single score, so the map is even; {why}")
    best = found.prediction
    name = "none of these; nearest: " * best.abstained + plain(best.display_name)
    print(f"predicted: {name} {best.probability:.1%}")
    places = " × ".join(map(str, found.map_HW.shape))
    print(f"drawn: {plain(found.display_name)} {found.probability:.1%} at {places} places: {plain(str(output))}")
    return 0
