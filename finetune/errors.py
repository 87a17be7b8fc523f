"""Every error a caller may have to handle, and the exit code each one becomes.

    FinetuneError                        message, hint            exit 1
    ├── ConfigError        (ValueError)  options that conflict         2
    ├── DataError          (ValueError)  images, labels, splits        3
    │   └── ImageError                   one image, with its reason    3
    ├── PredictionInputError (ValueError) what was given to predict    3
    ├── ModelError                       names, weights, checkpoints   4
    ├── RunError      (FileNotFoundError) run folders                   4
    ├── DivergedError                    a loss that is not finite     5
    ├── StorageError       (OSError)     a disk that refuses           6
    └── MissingExtraError  (ImportError) an optional package           2

A foreign exception is translated at the one seam where it enters; whatever else escapes is a bug with its traceback.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Literal

ImageFault = Literal[
    "empty",
    "truncated",
    "corrupt",
    "not_an_image",
    "format_not_allowed",
    "too_many_pixels",
    "too_large",
    "too_small",
    "aspect",
    "unsupported_depth",
    "missing",
    "permission",
    "not_a_file",
]
"""The closed list of reasons for which an image is refused."""


class FinetuneError(Exception):
    """An expected failure: what happened and where (`message`), and what to do about it (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(FinetuneError, ValueError):
    """Options that are unknown, out of range or in conflict."""

    exit_code = 2


class DataError(FinetuneError, ValueError):
    """Images, labels or splits that cannot be learned from."""

    exit_code = 3


class ImageError(DataError):
    """One image that was refused, with its reason from the closed list `ImageFault`."""

    def __init__(self, reason: ImageFault, detail: str, source: str = "image") -> None:
        super().__init__(f"{source}: {reason}: {detail}")
        self.reason: ImageFault = reason
        self.detail = detail
        self.source = source

    def __reduce__(self) -> tuple[type["ImageError"], tuple[ImageFault, str, str]]:
        """Let the error travel from a worker process to the one that reports it."""
        return type(self), (self.reason, self.detail, self.source)


class PredictionInputError(FinetuneError, ValueError):
    """Something given to `predict` that is no image, no folder of images and no pattern that matches any."""

    exit_code = 3


class ModelError(FinetuneError):
    """A model name, a weight file or a model file that cannot be used."""

    exit_code = 4


class RunError(FinetuneError, FileNotFoundError):
    """A run folder that is absent, incomplete, in use, or would be overwritten."""

    exit_code = 4


class DivergedError(FinetuneError):
    """A loss or gradient that is no longer finite; the last good state is kept."""

    exit_code = 5


class StorageError(FinetuneError, OSError):
    """A disk that is full or refuses to write."""

    exit_code = 6


class MissingExtraError(FinetuneError, ImportError):
    """An optional package that a feature needs and that is not installed."""

    exit_code = 2


def first_ten(items: Iterable[object]) -> str:
    """Join the first ten `items` for a message and say how many more there are."""
    texts = [str(item) for item in items]
    more = f", … and {len(texts) - 10} more" if len(texts) > 10 else ""
    return ", ".join(texts[:10]) + more


def nearest(name: str, names: Sequence[str], *, count: int = 3) -> str:
    """Return the hint that lists the `count` names most like `name`, for a misspelt option, class or model."""
    matches = get_close_matches(name, names, n=count, cutoff=0.0)
    return f"the nearest are: {', '.join(matches)}" if matches else ""
