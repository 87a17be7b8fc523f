"""The frozen records the rooms hand to each other. No torch here: reading a run folder must stay quick."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetune.errors import ConfigError, DataError, ImageFault

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a network expects of an image: size, resampling and normalisation.

    An image is resized so that its short side is `resize_px`, cut to the central `image_size_px` square, scaled to
    0..1 and normalised with `mean` and `std`, one number a channel. It always comes from the weights' own entry in
    their model zoo, or from a model file.

    With a `pixel_permutation_seed` the pixels of the square are then put into another order, the same for all images
    and channels: an experiment that takes from a convolution what it relies on, and leaves a linear layer all it had.
    """

    image_size_px: int
    resize_px: int
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_permutation_seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.image_size_px <= self.resize_px:
            raise ConfigError(
                f"image size {self.image_size_px} px must be positive and at most the resize of {self.resize_px} px"
            )
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ConfigError(
                f"mean and std need one number for each of 1 or 3 channels, got {self.mean} and {self.std}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or not all(value > 0 for value in self.std):
            raise ConfigError(f"mean must be finite and std positive, got {self.mean} and {self.std}")

    @property
    def channels(self) -> Literal[1, 3]:
        """1 for grey images, 3 for RGB."""
        return 1 if len(self.mean) == 1 else 3

    def at_size(self, image_size_px: int) -> "InputSpec":
        """Return the same preprocessing for another image size, the margin around the crop kept in proportion."""
        resize_px = max(image_size_px, round(self.resize_px * image_size_px / self.image_size_px))
        return replace(self, image_size_px=image_size_px, resize_px=resize_px)

    def with_channels(self, channels: int) -> "InputSpec":
        """Return the same preprocessing for grey (1) or RGB (3) images; a new channel gets the mean of the old ones."""
        if channels == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * channels, std=(std,) * channels)


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """The classes in the order of a model's outputs, with the names shown to people.

    `class_names` are the folder names sorted as text, torchvision's rule: "10" comes before "2". A display name is
    looked up by folder name, never by index.
    """

    class_names: tuple[str, ...]
    display_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.class_names) != len(self.display_names):
            raise DataError(f"{len(self.class_names)} classes but {len(self.display_names)} display names")
        if len(set(self.class_names)) != len(self.class_names):
            raise DataError("a class name stands twice in the label map")

    @classmethod
    def from_names(cls, class_names: Sequence[str], shown: Mapping[str, str]) -> "LabelMap":
        """Sort `class_names` as text and show each by its entry in `shown`, or by its own name where there is none."""
        ordered = tuple(sorted(class_names))
        return cls(class_names=ordered, display_names=tuple(shown.get(name, name) for name in ordered))

    def __len__(self) -> int:
        return len(self.class_names)

    def index(self, class_name: str) -> int:
        """Return the class index of `class_name`, its place in the model's outputs."""
        return self.class_names.index(class_name)

    def indices(self, class_names: Iterable[str]) -> list[int]:
        """Return the class index of each of many class names."""
        place = {name: index for index, name in enumerate(self.class_names)}
        return [place[name] for name in class_names]


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """One class with its probability, in 0..1."""

    class_name: str
    display_name: str
    class_index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image; `top` holds the most probable classes, best first.

    `abstained` says that the best probability lies under the model's threshold: none of these.
    """

    image: str
    abstained: bool
    top: tuple[ClassProbability, ...]

    @property
    def class_name(self) -> str:
        """Folder name of the most probable class."""
        return self.top[0].class_name

    @property
    def display_name(self) -> str:
        """Name shown of the most probable class."""
        return self.top[0].display_name

    @property
    def probability(self) -> float:
        """Probability of the most probable class, in 0..1."""
        return self.top[0].probability


@dataclass(frozen=True, kw_only=True)
class FailedPrediction:
    """An image that could not be read: the reason from the closed list, and a sentence."""

    image: str
    code: ImageFault
    message: str
