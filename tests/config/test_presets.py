"""Named starting points are whole configs."""

import pytest

from finetune.config.presets import PRESETS, preset
from finetune.config.schema import TrainConfig
from finetune.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_says_what_it_is_for(name: str) -> None:
    assert isinstance(preset(name), TrainConfig)
    assert len(PRESETS[name].__doc__ or "") > 20


def test_default_is_the_class() -> None:
    assert preset("default") == TrainConfig()


def test_tutorial_trains_as_the_tutorials_do() -> None:
    config = preset("tutorial")
    assert (config.feature_extract, config.head, config.head_start) == (True, "log_softmax", "random")
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-2, 0.0)
    assert (config.schedule, config.step_epochs, config.step_factor) == ("step", 7, 0.1)
    assert (config.augmentation, config.epochs) == ("flowers", 25)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no preset is called 'tutorail'") as caught:
        preset("tutorail")
    assert caught.value.hint.startswith("the nearest are: tutorial")
