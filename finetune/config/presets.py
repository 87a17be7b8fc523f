"""Named starting points: each function returns a full config, which flags and YAML may then change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from finetune.config.schema import TrainConfig
from finetune.errors import ConfigError, nearest


def default() -> TrainConfig:
    """Measure the scenario, start from the solved head: right for most folders."""
    return TrainConfig()


def tutorial() -> TrainConfig:
    """Train as the classic transfer-learning tutorial does: a random LogSoftmax head under a frozen body, Adam 1e-2,
    a tenth of the rate every 7 epochs, rotations and colour jitter, 25 epochs.
    """
    return TrainConfig(
        feature_extract=True,
        head="log_softmax",
        head_start="random",
        augmentation="flowers",
        epochs=25,
        batch_size=8,
        optimizer="adam",
        learning_rate=1e-2,
        weight_decay=0.0,
        schedule="step",
        step_epochs=7,
        step_factor=0.1,
    )


def lenet5() -> TrainConfig:
    """Train LeNet-5 on digits, letters and other small signs: slight turns and shifts, AdamW, one cycle of the rate."""
    return TrainConfig(
        model="lenet5",
        augmentation="affine",
        epochs=60,
        batch_size=64,
        optimizer="adamw",
        learning_rate=3e-3,
        trunk_learning_rate=3e-3,
        weight_decay=0.1,
        schedule="one-cycle",
    )


def lenet5_1998() -> TrainConfig:
    """Train the LeNet-5 of the paper as `lenet5` is trained."""
    return replace(lenet5(), model="lenet5_1998")


def lenet5_relu() -> TrainConfig:
    """Train the modern LeNet-5 plainly: Adam 1e-3, batches of 64, 10 epochs, the images as they are."""
    return _plain("lenet5_relu")


def small_cnn() -> TrainConfig:
    """Train the small convolutional network as `lenet5_relu` is trained."""
    return _plain("small_cnn")


def mlp() -> TrainConfig:
    """Train the fully-connected network as `lenet5_relu` is trained."""
    return _plain("mlp")


def lenet5_sigmoid() -> TrainConfig:
    """Train the sigmoid LeNet as the textbook does: SGD 0.9 without momentum, batches of 256, 5 epochs."""
    return replace(
        _plain("lenet5_sigmoid"), **_sgd(0.9) | {"momentum": 0.0, "weight_decay": 0.0}, epochs=5, batch_size=256
    )


def alexnet2012() -> TrainConfig:
    """Train AlexNet as the paper does: SGD 0.01, batches of 128, 90 epochs, a tenth of the rate at each standstill."""
    return replace(
        _plain("alexnet2012"), augmentation="alexnet", epochs=90, batch_size=128, **_sgd(0.01), schedule="plateau"
    )


def vgg16_2014() -> TrainConfig:
    """Train VGG-16 as the paper does: as AlexNet, with batches of 256 and 74 epochs."""
    return replace(alexnet2012(), model="vgg16_2014", epochs=74, batch_size=256)


def vgg16_cifar() -> TrainConfig:
    """Train VGG-16 with batch norm on 32 × 32 images: crops and flips, SGD 0.1, 200 epochs along a cosine.

    Published trainings of this kind end at 93.9 to 94.2 % on CIFAR-10; this one has not been run to its end.
    """
    return replace(
        _plain("vgg16_cifar"),
        augmentation="crop-flip",
        epochs=200,
        batch_size=128,
        **_sgd(0.1),
        schedule="cosine",
        warmup_epochs=5.0,
    )


def vgg16_cifar_2048() -> TrainConfig:
    """Train the form without the last pooling as `vgg16_cifar` is trained."""
    return replace(vgg16_cifar(), model="vgg16_cifar_2048")


def linear() -> TrainConfig:
    """Solve a linear classifier on the pixels; with `--loss hinge` it is trained, as a support vector machine."""
    return TrainConfig(model="linear", augmentation="none", batch_size=64)


def knn() -> TrainConfig:
    """Keep the pixels of the training images and let the nearest vote."""
    return TrainConfig(model="knn", head="knn", augmentation="none", batch_size=64)


def _plain(model: str) -> TrainConfig:
    return TrainConfig(
        model=model,
        augmentation="none",
        epochs=10,
        batch_size=64,
        optimizer="adam",
        learning_rate=1e-3,
        trunk_learning_rate=1e-3,
        weight_decay=0.0,
        schedule="constant",
    )


def _sgd(rate: float) -> dict[str, Any]:
    return {"optimizer": "sgd", "learning_rate": rate, "trunk_learning_rate": rate, "weight_decay": 5e-4}


PresetName = Literal[
    "default",
    "tutorial",
    "lenet5",
    "lenet5_1998",
    "lenet5_relu",
    "lenet5_sigmoid",
    "alexnet2012",
    "vgg16_2014",
    "vgg16_cifar",
    "vgg16_cifar_2048",
    "small_cnn",
    "mlp",
    "linear",
    "knn",
]

PRESETS: dict[str, Callable[[], TrainConfig]] = {name: globals()[name] for name in get_args(PresetName)}


def preset(name: str) -> TrainConfig:
    """Return the full config of the preset `name`.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}", nearest(name, list(PRESETS)))
    return PRESETS[name]()


def starting_point(model: object) -> TrainConfig:
    """Return what the options given with `model` change: the preset of its name, else the default.

    A classic network is trained from scratch, each in its own way, so its name brings its preset along.
    """
    return PRESETS.get(str(model), default)()
