"""The factory: from the name of a backbone to a network with a new head, its preprocessing and its stages."""

import ssl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import nn
from torch.func import functional_call

from finetune.errors import ConfigError, ModelError, first_ten
from finetune.models import catalog
from finetune.models.catalog import ModelEntry
from finetune.models.freezing import freeze_stages
from finetune.models.heads import append_log_softmax, replace_head
from finetune.models.stages import Stage, find_stages
from finetune.models.weights import bundled_state, in_model_names, load_exact, load_weights_file
from finetune.runs.model_file import HeadKind
from finetune.runs.records import InputSpec

_CONNECT_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network ready to be adapted: its new head learns, and nothing is frozen yet.

    `name` is the canonical name that builds it again, `weights` says in words where its weights came from.
    """

    name: str
    module: nn.Module
    input_spec: InputSpec
    stages: tuple[Stage, ...]
    head: HeadKind
    weights: str
    is_pretrained: bool


def initialize_model(
    model_name: str,
    num_classes: int,
    feature_extract: bool,
    use_pretrained: bool = True,
    *,
    weights: Path | str | None = None,
    head: HeadKind = "logits",
) -> tuple[nn.Module, int]:
    """Build a pretrained network for `num_classes` and return it with the image size it expects.

    The plain-loop door to the toolkit: the model is an ordinary module in train mode. With `feature_extract` all but
    the new output layers is frozen and stays in eval mode under `model.train()`; `inception` also returns its
    auxiliary logits while training, to be weighted 0.4 in the loss.

    Args:
        model_name: A family (resnet, alexnet, vgg, squeezenet, densenet, inception) or any name of the catalog.
        num_classes: K ≥ 2, the outputs of the new head.
        feature_extract: Freeze everything but the new head.
        use_pretrained: Start from the zoo's ImageNet weights; otherwise from random ones, as the classic networks
            always do, for which nobody publishes any.
        weights: A weight file to start from instead.
        head: What the network puts out, logits or log-softmax.

    Returns:
        The network, (N, C, H, W) → (N, K), and the side in pixels of its square images. C is 3, or 1 for the classic
        networks that take grey images.

    Raises:
        ModelError: the name is unknown, or the weights cannot be had or do not fit.
        ConfigError: `num_classes` or `head` is out of range.
    """
    if head == "knn":
        raise ConfigError("neighbours are found among training images", "finetune.train(…, head='knn') does that")
    backbone = build_backbone(
        model_name, num_classes=num_classes, use_pretrained=use_pretrained, weights=weights, head=head
    )
    if feature_extract:
        freeze_stages(backbone.module, backbone.stages, len(backbone.stages) - 1)
    return backbone.module, backbone.input_spec.image_size_px


def build_backbone(
    name: str,
    *,
    num_classes: int,
    use_pretrained: bool = True,
    weights: Path | str | None = None,
    head: HeadKind = "logits",
    image_size: int | None = None,
    channels: int | None = None,
) -> Backbone:
    """Build the backbone called `name` with a fresh head, its preprocessing and its stages.

    Args:
        name: Any name of the catalog.
        num_classes: K ≥ 2, the outputs of the new head.
        use_pretrained: Load the pretrained weights of the zoo, if `weights` gives no file.
        weights: A weight file for this architecture; its head is dropped.
        head: What the network puts out; "knn" is a head of logits that `attach_neighbours` will replace.
        image_size: Side in pixels, if not the one the weights were trained with; position embeddings are resampled.
        channels: 1 for grey images, 3 for colour, if not the network's own; the classic networks have the choice.

    Raises:
        ModelError: the name is unknown, the weights cannot be had or do not fit, or the image size or the number of
            channels is impossible.
        ConfigError: `num_classes` or `head` is out of range.
    """
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}, but a classifier needs at least 2")
    if head not in get_args(HeadKind):
        raise ConfigError(f"head is {head!r}", f"choose one of {', '.join(get_args(HeadKind))}")
    entry = catalog.resolve(name)
    input_spec = _input_spec(entry, channels)
    if entry.source == "classic":
        module = catalog.classic(entry).build(num_classes, channels=input_spec.channels)
        weights_text = _fill_from_file(module, Path(weights)) if weights else "none"
        if head == "log_softmax":
            append_log_softmax(module)
    else:
        module, weights_text = (
            _load_from_file(entry, Path(weights)) if weights else _load_from_zoo(entry, use_pretrained)
        )
        # Only now: the zoo's weights bring the zoo's 1000-class head with them.
        replace_head(module, num_classes, head=head)
    if image_size is not None and image_size != input_spec.image_size_px:
        input_spec = input_spec.at_size(image_size)
        _resize(entry, module, input_spec)
    return Backbone(
        name=entry.name,
        module=module,
        input_spec=input_spec,
        stages=find_stages(module),
        head=head,
        weights=weights_text,
        is_pretrained=weights_text != "none",
    )


def build_as_published(name: str, *, image_size: int | None = None) -> tuple[nn.Module, InputSpec]:
    """Build the network called `name` with its zoo's own head, without weights and without memory for them.

    Its parameters are on torch's meta device: they have shapes and no values, so that the largest network is looked at
    in no time. It is in eval mode.

    Args:
        name: Any name of the catalog.
        image_size: Side in pixels, if not the one the weights were trained with.

    Raises:
        ModelError: the name is unknown, or the image size is impossible.
    """
    entry = catalog.resolve(name)
    input_spec = catalog.input_spec(entry)
    try:
        with torch.device("meta"):
            module = _build(entry).eval()
    except NotImplementedError:  # torchvision's RegNets calculate their widths with tensors, which takes values
        module = _build(entry).eval().to("meta")
    if image_size is not None and image_size != input_spec.image_size_px:
        input_spec = input_spec.at_size(image_size)
        _resize(entry, module, input_spec)
    return module, input_spec


def _input_spec(entry: ModelEntry, channels: int | None) -> InputSpec:
    input_spec = catalog.input_spec(entry)
    if channels is None or channels == input_spec.channels:
        return input_spec
    if entry.source != "classic":
        raise ModelError(
            f"{entry.name} takes images of {input_spec.channels} channels, not {channels}",
            "its weights were trained so; grey images are given to all of them",
        )
    return input_spec.with_channels(channels)


def _load_from_file(entry: ModelEntry, path: Path) -> tuple[nn.Module, str]:
    module = _build(entry)
    return module, _fill_from_file(module, path)


def _fill_from_file(module: nn.Module, path: Path) -> str:
    """Load all weights of `path` but the head's into `module`, and say so in words."""
    report = load_weights_file(module, path, ignore_head=True)
    dropped = f", dropped {first_ten(report.dropped)}" if report.dropped else ""
    return f"file {path} ({report.loaded} tensors{dropped})"


def _load_from_zoo(entry: ModelEntry, use_pretrained: bool) -> tuple[nn.Module, str]:
    """Build `entry` with the weights of its zoo, or with random ones."""
    if not use_pretrained:
        return _build(entry), "none"
    if entry.source == "bundled":
        module = _build(entry)
        load_exact(module, bundled_state(module), catalog.weights_source(entry))
    else:
        _require_weights(entry)
        with _as_model_error(entry):
            _require_network(entry)
            module = _download_torchvision(entry) if entry.source == "torchvision" else _download_timm(entry)
    return module, catalog.weights_source(entry)


def _download_torchvision(entry: ModelEntry) -> nn.Module:
    module = _build(entry)
    # Not by torchvision's builder, which reads the file as an unrestricted pickle.
    state = catalog.torchvision_weights(entry).get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    module.load_state_dict(in_model_names(module, state))
    return module


def _download_timm(entry: ModelEntry) -> nn.Module:
    import timm

    file = catalog.local_weights(entry)
    # By its path: for a file known by its repository the hub is asked first, even if it is in the cache.
    is_cached = file is not None and file.suffix == ".safetensors"
    overlay = {"file": str(file), "custom_load": False} if is_cached else {}
    model = timm.create_model(entry.architecture, pretrained=True, pretrained_cfg_overlay=overlay)
    return cast(nn.Module, model)


def _build(entry: ModelEntry) -> nn.Module:
    """Build the network as its zoo does, with random weights and the zoo's head."""
    if entry.source == "classic":
        network = catalog.classic(entry)
        return network.build(network.classes, channels=network.input_spec.channels)
    if entry.source != "torchvision":
        import timm

        return cast(nn.Module, timm.create_model(entry.architecture))
    from torchvision.models import get_model

    options: dict[str, Any] = {}
    if entry.architecture in ("inception_v3", "googlenet"):
        # Their weights were trained on inputs from -1 to 1, but their entry in the zoo asks for ImageNet normalisation,
        # and `transform_input` converts one to the other. It is set always, as a part of the architecture, so that a
        # network rebuilt without its download computes the same function.
        options = {"transform_input": True, "init_weights": False}  # the zoo's own initialisation is slow
    if entry.architecture == "googlenet":
        options["aux_logits"] = False  # the zoo's weights have none that are trained
    if entry.architecture.startswith("vit_"):
        options["image_size"] = catalog.input_spec(entry).image_size_px
    return cast(nn.Module, get_model(entry.architecture, **options))


def _resize(entry: ModelEntry, module: nn.Module, input_spec: InputSpec) -> None:
    """Make `module` take images of another size, and push shapes through it to be sure that it does."""
    from torchvision.models import VisionTransformer

    image_size = input_spec.image_size_px
    try:
        if hasattr(module, "set_input_size"):  # timm's transformers resample their position embeddings
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # advice to timm about its indexing, none of it ours
                cast(Any, module).set_input_size(img_size=image_size)
        elif isinstance(module, VisionTransformer):
            _resize_vit(module, image_size)
        push_shapes(module, input_spec)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = (
            "its linear layers fit its own size only" if entry.source == "classic" else str(error).partition("\n")[0]
        )
        raise ModelError(
            f"{entry.name} cannot take images of {image_size} px: {reason}",
            f"its own size is {catalog.input_spec(entry).image_size_px} px",
        ) from error


def _resize_vit(module: nn.Module, image_size: int) -> None:
    """Resample the position embeddings of a torchvision vision transformer, as torchvision's own helper does."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    vit = cast(Any, module)
    if image_size % vit.patch_size:
        raise ValueError(f"not a multiple of the patch size of {vit.patch_size} px")
    embedding = interpolate_embeddings(image_size, vit.patch_size, vit.state_dict())["encoder.pos_embedding"]
    vit.encoder.pos_embedding = nn.Parameter(embedding)
    vit.image_size, vit.seq_length = image_size, embedding.shape[1]


def push_shapes(module: nn.Module, input_spec: InputSpec) -> None:
    """Run two images through `module` with tensors that have shapes but no memory; its own are not touched."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    with torch.no_grad():
        size = input_spec.image_size_px
        functional_call(module, shapes, (torch.empty(2, input_spec.channels, size, size, device="meta"),))


def _require_weights(entry: ModelEntry) -> None:
    """Refuse an architecture for which the zoo has no weights, naming its tags that have some."""
    if catalog.weights_source(entry) != "none":
        return
    import timm

    tags = timm.list_models(f"{entry.architecture.partition('.')[0]}.*", pretrained=True)
    known = f"there are weights for {first_ten(f'timm/{tag}' for tag in tags)}; or use" if tags else "use"
    raise ModelError(
        f"there are no pretrained weights for {entry.name}", f"{known} --weights FILE or --no-use-pretrained"
    )


@contextmanager
def _as_model_error(entry: ModelEntry) -> Iterator[None]:
    """Translate what a download may raise: two zoos, three HTTP libraries, a disk and a checksum between them."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"cannot get the weights of {entry.name} ({catalog.weights_source(entry)}): {reason}",
            "use --weights FILE for a file you have, --model efficientnet_lite0 for the weights that are installed, "
            "or --no-use-pretrained for none",
        ) from error


def _require_network(entry: ModelEntry) -> None:
    """Fail within seconds where weights must be downloaded and cannot be.

    Left alone, huggingface_hub retries for most of a minute, and torch.hub waits for ever behind a silent firewall.
    """
    if catalog.local_weights(entry) is not None:
        return
    if catalog.is_offline():
        raise ConnectionError("they are not on this machine and HF_HUB_OFFLINE forbids downloads")
    try:
        urlopen(Request(catalog.weights_host(entry), method="HEAD"), timeout=_CONNECT_TIMEOUT_SECONDS).close()  # noqa: S310
    except HTTPError:
        return  # an answer, whatever it says
    except URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # certificates are for the downloader to judge
            raise
