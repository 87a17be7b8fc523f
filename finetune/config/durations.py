"""Durations as people write them: 90s, 10m, 1.5h."""

import re

from finetune.errors import ConfigError

SECONDS = {"s": 1, "m": 60, "h": 3600}


def parse_seconds(text: str) -> float:
    """Return the seconds that `text` means.

    Raises:
        ConfigError: It is no duration above zero.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", text.strip())
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ConfigError(f"{text!r} is no duration", 'write "90s", "10m" or "1.5h"')
    return seconds
