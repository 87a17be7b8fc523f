"""`finetune models`: which networks there are."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter, print_error
from finetune.cli.parsing import parse
from finetune.errors import ModelError
from finetune.runs import strict_json


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List networks: name, parameters, input size, where the weights come from, and whether they are here already."""

    pattern: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATTERN")]] = "*"
    """Part of a name, or a pattern such as 'timm/convnext*'; without one, every network is listed."""
    format: Literal["table", "json"] = "table"
    """Form of the list."""


def run(words: list[str], reporter: ConsoleReporter) -> int:  # noqa: ARG001
    """Print a line a network, as each is looked up."""
    options = parse(ModelsOptions, words, command="models")

    from finetune.api import list_models

    found = list_models(options.pattern)
    if options.format == "json":
        print(strict_json.dump([asdict(model) for model in found], indent=1))
        return 0
    count = 0
    for count, model in enumerate(found, start=1):  # noqa: B007
        here = " (here)" if model.is_local else " (not here)" * (model.weights != "none")
        size = "–" if model.image_size_px is None else f"{model.image_size_px} px"
        print(
            f"{model.name:<44} {model.parameters:>13,} {size:>7}  {model.weights}{here}",
            flush=True,
        )
    if not count:
        print_error(f"no model matches {options.pattern!r}", "`finetune models` lists all")
        return ModelError.exit_code
    return 0
