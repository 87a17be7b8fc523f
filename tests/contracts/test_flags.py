"""The options of a training are these: growth is a decision."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune.config import OPTION_NAMES, PRESETS, TrainConfig, preset

PINNED = """
data output overwrite resume seed label_names valid_fraction folds allow_bad_images model use_pretrained weights head
image_size channels shuffle_pixels scenario feature_extract head_start head_stages boundary_cache views augmentation
random_erasing mixup cutmix phases epochs budget batch_size gradient_accumulation optimizer momentum learning_rate
trunk_learning_rate depth_ratio weight_decay schedule warmup_epochs step_epochs step_factor patience max_grad_norm
averaging ema_decay label_smoothing loss imbalance tracker device precision sync_batch_norm
deterministic workers
""".split()  # noqa: SIM905 (one line a name would be a page)


def test_options_are_pinned() -> None:
    assert list(OPTION_NAMES) == PINNED
    assert len(OPTION_NAMES) <= 60


def test_every_option_is_a_flag_of_train(finetune: Callable[..., Any]) -> None:
    text = finetune("train", "--help").out
    missing = [name for name in PINNED if name != "data" and f"--{name.replace('_', '-')}" not in text]
    assert not missing
    assert "DATA" in text
    assert "--config" in text
    assert "--preset" in text


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds(name: str) -> None:
    assert isinstance(preset(name), TrainConfig)
