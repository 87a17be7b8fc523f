"""Names to show for classes: the `cat_to_name.json` that maps folder names to words people know."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from finetune.errors import DataError, first_ten

LABEL_NAMES_FILE = "cat_to_name.json"
_FORM_HINT = (
    'it must be one JSON object from folder names to shown names: {"1": "pink primrose", "2": "hard-leaved orchid"}'
)


@dataclass(frozen=True, kw_only=True)
class LabelMatch:
    """How classes and label names fit: classes without an entry (shown by their own name), entries without a class."""

    unnamed_classes: tuple[str, ...]
    unused_entries: tuple[str, ...]


def find_label_names(data: Path) -> Path | None:
    """Return the `cat_to_name.json` in the folder `data`, or else beside it (or beside the CSV), or None."""
    data = data.absolute()
    return next((file for folder in (data, data.parent) if (file := folder / LABEL_NAMES_FILE).is_file()), None)


def read_label_names(path: Path) -> dict[str, str]:
    """Read the shown name of each class name from a JSON object.

    Raises:
        DataError: if the file is missing, no JSON object or empty, or has duplicate keys or values that are no text;
            the keys are named.
    """
    try:
        pairs = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_Pairs, parse_constant=_refuse_constant)
    except OSError as error:
        raise DataError(f"the label names {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the label names {path} are not JSON: {error}", hint=_FORM_HINT) from error
    if not isinstance(pairs, _Pairs):
        raise DataError(f"the label names {path} hold a {type(pairs).__name__}, not an object", hint=_FORM_HINT)
    if not pairs:
        raise DataError(f"the label names {path} are empty", hint=_FORM_HINT)
    faults = [f"{key!r} stands {count} times" for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    faults += [f"{key!r} has no text" for key, value in pairs if not isinstance(value, str) or not value.strip()]
    if faults:
        raise DataError(f"the label names {path} have {len(faults)} faults: {first_ten(faults)}", hint=_FORM_HINT)
    return dict(pairs)


def match_label_names(class_names: Iterable[str], shown: Mapping[str, str], *, source: str | Path) -> LabelMatch:
    """Compare the classes of a data set with its label names.

    Args:
        class_names: the folder names.
        shown: the shown name by folder name, as `read_label_names` gives it.
        source: where `shown` comes from, for the message.

    Raises:
        DataError: if no class has an entry, so that the names must belong to other data; both sides are listed.
    """
    classes = sorted(set(class_names))
    match = LabelMatch(
        unnamed_classes=tuple(name for name in classes if name not in shown),
        unused_entries=tuple(name for name in sorted(shown) if name not in set(classes)),
    )
    if classes and len(match.unnamed_classes) == len(classes):
        raise DataError(
            f"no class has an entry in the label names {source}: the classes are {first_ten(map(repr, classes))}; "
            f"the entries are {first_ten(map(repr, sorted(shown)))}",
            hint="give the names that belong to this data with --label-names",
        )
    return match


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object in order, duplicate keys kept."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
