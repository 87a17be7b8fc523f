"""Phases as text."""

import pytest

from finetune.config import TrainConfig
from finetune.config.phases import Phase, parse_phases
from finetune.errors import ConfigError


def test_phases_are_read_in_order() -> None:
    assert parse_phases("head:5, top2:3:0.5,all:10:1e-1") == (
        Phase(learning="head", epochs=5, rate_share=1.0),
        Phase(learning=2, epochs=3, rate_share=0.5),
        Phase(learning="all", epochs=10, rate_share=0.1),
    )
    assert parse_phases("gradual:2") == (Phase(learning="gradual", epochs=2, rate_share=1.0),)
    assert parse_phases("") == ()


@pytest.mark.parametrize(
    "text",
    [
        *("head", "head:", "head:x", "head:0", "heads:3", "top0:3", "top:3"),
        *("all:3:0", "all:3:-1", "all:3:e", "all:3:1:2", "all:3:1e999"),
        *("head:5,,all:3", ",", "head:5;all:3"),
    ],
)
def test_what_is_no_phase_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--phases: .*head:5,all:10:0\.1"):
        TrainConfig(data="x", phases=text)


@pytest.mark.parametrize("options", [{"epochs": 3}, {"feature_extract": True}, {"head": "knn"}])
def test_phases_exclude_what_they_say_themselves(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="leave out --epochs"):
        TrainConfig(data="x", phases="head:5", **options)  # type: ignore[arg-type]
