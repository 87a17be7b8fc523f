"""`finetune advise`: what to freeze, with the evidence, before any training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter, print_table
from finetune.cli.parsing import parse
from finetune.runs import strict_json


@dataclass(frozen=True, kw_only=True)
class AdviseOptions:
    """Measure which scenario the images ask for, in one pass of the pretrained network over them."""

    data: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATA")]]
    """Folder or CSV of labelled images."""
    model: str = "efficientnet_lite0"
    """Name of the network, see `finetune models`."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weight file of the network, where the zoo's are not to be used."""
    seed: int = 0
    """Seed of the split and of the folds."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    format: Literal["table", "json"] = "table"
    """Form of the advice."""


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Print the advice."""
    options = parse(AdviseOptions, words, command="advise")

    from finetune.api import advise

    advice = advise(
        options.data,
        model=options.model,
        weights=options.weights,
        seed=options.seed,
        device=options.device,
        reporter=reporter,
    )
    if options.format == "json":
        print(strict_json.dump(advice.to_json(), indent=1))
        return 0
    evidence = advice.evidence
    probe = "–" if evidence.probe_accuracy is None else f"{evidence.probe_accuracy:.1%} ± {evidence.probe_spread:.1%}"
    print_table(
        ["evidence", "value"],
        [
            ("training images", evidence.images),
            ("classes", evidence.classes),
            ("images a class", f"{evidence.images_per_class:.1f} (fewest {evidence.smallest_class})"),
            ("majority baseline", f"{evidence.majority_accuracy:.1%}"),
            ("nearest neighbours", f"{evidence.knn_accuracy:.1%}"),
            ("linear probe", probe),
            ("similarity", f"{evidence.similarity:.2f}"),
        ],
    )
    print(f"scenario: {advice.scenario} (runner-up: {advice.runner_up or 'none'})")
    print(advice.reason)
    return 0
