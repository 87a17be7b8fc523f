"""Named starting points: each function returns a full config, which flags and YAML may then change."""

from collections.abc import Callable

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


PRESETS: dict[str, Callable[[], TrainConfig]] = {"default": default, "tutorial": tutorial}


def preset(name: str) -> TrainConfig:
    """Return the full config of the preset `name`.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}", nearest(name, list(PRESETS)))
    return PRESETS[name]()
