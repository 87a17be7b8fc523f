"""JSON read strictly: no key twice, no NaN or infinity; what a file does not mean, it does not get."""

import json
import math
import re
from typing import Any


def parse(text: str | bytes) -> Any:
    """Parse `text` as JSON.

    Raises:
        ValueError: It is not JSON, names a key twice in one object, or holds NaN or infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def dump(value: object, *, indent: int | None = None) -> str:
    """Write `value` as JSON that `parse` accepts and that can be encoded, whatever bytes a file name was made of.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda surrogate: f"\\u{ord(surrogate[0]):04x}", text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"key {', '.join(map(repr, twice))} stands twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
