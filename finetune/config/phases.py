"""The phases of a training, as they are written in one line of a config."""

import re
from dataclasses import dataclass
from typing import Literal

from finetune.errors import ConfigError

EXAMPLE = 'write "head:5,all:10:0.1", "top2:10,all:10:0.1" or "gradual:2"'
_PHASE = re.compile(r"(head|all|top[1-9]\d{0,3}|gradual):(\d{1,6})(?::([\d.eE+-]+))?")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What learns, for how many epochs and at which share of the rates.

    `learning` is "head", "all", the number of stages below the head that learn with it, or "gradual": one such phase
    for the head, then one for every stage that is freed.
    """

    learning: Literal["head", "all", "gradual"] | int
    epochs: int
    rate_share: float


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Read phases as "head:5,all:10:0.1"; an empty text has none.

    Raises:
        ConfigError: A part of the text is no phase, or its share of the rates is not above 0.
    """
    return tuple(_parse(part) for part in text.split(",")) if text else ()


def _parse(part: str) -> Phase:
    found = _PHASE.fullmatch(part.strip())
    if found is None:
        raise ConfigError(f"{part.strip()!r} is no phase", EXAMPLE)
    learning, epochs, share = found.groups(default="1")
    try:
        rate_share = float(share)
    except ValueError:
        rate_share = 0.0
    if not 0 < rate_share < float("inf") or int(epochs) == 0:
        raise ConfigError(f"{part.strip()!r} asks for no epochs or no rate", EXAMPLE)
    is_count = learning.startswith("top")
    return Phase(
        learning=int(learning.removeprefix("top")) if is_count else learning,  # type: ignore[arg-type]
        epochs=int(epochs),
        rate_share=rate_share,
    )
