"""`finetune inspect`: what is inside a network."""

import csv
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter, print_table
from finetune.cli.parsing import parse
from finetune.errors import ConfigError
from finetune.runs import strict_json
from finetune.runs.folder import write_whole

if TYPE_CHECKING:
    from finetune.models.anatomy import Anatomy, Layer

PICTURES = (".png", ".svg", ".pdf")
NOT_DRAWN = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WIDE = 200  # columns where there is no terminal, as a pipe has none


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show every layer of a network: output shape, parameters, multiply-adds, receptive field, frozen or learning.

    Nothing is downloaded or computed. A MODEL has its zoo's own head, a RUN what was trained. The field of a layer is
    what its widest unit sees of the image, in pixels, padding included; "image" is all of it, "?" cannot be told.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL|RUN")]]
    """Name of a network, see `finetune models`; or a run folder or model.safetensors, which wins."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Side of the square image in pixels; by default the one that the weights were trained at."""
    format: Literal["table", "json", "csv"] = "table"
    """Form of the list."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write to instead of standard output; one that ends with .png, .svg or .pdf becomes a picture."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"--image-size is {self.image_size}, but must be 1 or more")
        if self.output is not None and self.output.suffix.lower() in NOT_DRAWN:
            raise ConfigError(
                f"--output {self.output} is no kind of picture that is drawn", "name a .png, .svg or .pdf file"
            )
        if self.draws and self.format != "table":
            raise ConfigError(f"--output {self.output} is a picture, --format {self.format} is text", "drop one")

    @property
    def draws(self) -> bool:
        """Tell whether the output is a picture."""
        return self.output is not None and self.output.suffix.lower() in PICTURES


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Print the layers, or write or draw them."""
    options = parse(InspectOptions, words, command="inspect")

    from finetune.api import inspect

    anatomy = inspect(options.model, image_size=options.image_size)
    if options.output is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
        print(_text(anatomy, options, width=width), end="")
        return 0
    if options.draws:
        from finetune.report.anatomy_chart import draw_anatomy

        draw_anatomy(anatomy, options.output, title=options.model)
    else:
        write_whole(options.output, _text(anatomy, options, width=WIDE))
    reporter.say(f"wrote {options.output}")
    return 0


def _text(anatomy: "Anatomy", options: InspectOptions, *, width: int) -> str:
    if options.format == "json":
        return strict_json.dump({"model": options.model, **anatomy.to_json()}, indent=1) + "\n"
    return _csv(anatomy) if options.format == "csv" else _table(anatomy, width=width)


def _csv(anatomy: "Anatomy") -> str:
    """Return a row a layer, the sides of a shape joined by "x"."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [field.name for field in fields(anatomy.layers[0])]
    writer.writerow(names)
    for layer in anatomy.layers:
        values = (getattr(layer, name) for name in names)
        writer.writerow([_joined(value, "x") if isinstance(value, tuple) else value for value in values])
    return file.getvalue()


def _table(anatomy: "Anatomy", *, width: int) -> str:
    """Return the layers as a table for a terminal of `width` columns, a narrow one with fewer of them, and totals."""
    from rich.console import Console

    number = _short if width < 120 else "{:,}".format
    columns: list[tuple[str, int, Callable[[Layer], str]]] = [  # title, width of the terminal from which it shows, cell
        ("layer", 0, lambda layer: layer.name or "(itself)"),
        ("kind", 90, lambda layer: layer.kind),
        ("output", 0, lambda layer: _joined(layer.output_shape, "×")),
        ("parameters", 0, lambda layer: number(layer.parameters)),
        ("multiply-\nadds", 70, lambda layer: number(layer.multiply_adds)),
        ("field", 0, _field),
        ("stride", 80, lambda layer: _side(layer.stride)),
        ("first\ncentre", 120, lambda layer: _side(layer.centre)),
    ]
    has_frozen = anatomy.learning < anatomy.parameters
    columns.append(("state", 0 if has_frozen else 100, lambda layer: layer.state))
    shown = {title: cell for title, least, cell in columns if width >= least}
    rows = [[cell(layer) for cell in shown.values()] for layer in anatomy.layers]
    file = io.StringIO()
    print_table(list(shown), rows, console=Console(file=file, width=width))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    image = "×".join(map(str, anatomy.input_shape))
    totals = [
        f"input {image}: {anatomy.parameters:,} parameters, {anatomy.learning:,} of them learning, and "
        f"{anatomy.multiply_adds:,} multiply-adds an image",
        *(f"field ?: {note}" for note in anatomy.notes),
    ]
    return "\n".join([*lines, *(textwrap.fill(total, width) for total in totals)]) + "\n"


def _field(layer: "Layer") -> str:
    if layer.receptive_field is None:
        return "?" if layer.note else "–"
    return "image" if layer.receptive_field == "image" else _side(layer.receptive_field)


def _joined(values: Sequence[object] | None, separator: str) -> str:
    return separator.join(map(str, values)) if values else "–"


def _side(sides: Sequence[object] | None) -> str:
    """Write the sides of a rectangle, those of a square once."""
    return "–" if sides is None else str(sides[0]) if len(set(sides)) == 1 else _joined(sides, "×")


def _short(number: int) -> str:
    """Write 1792 as 1.8 k."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return str(number)
