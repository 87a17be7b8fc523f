"""The one config refuses what cannot be meant, and takes option values as people give them."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import OPTION_NAMES, TrainConfig, with_options
from finetune.errors import ConfigError

NAN, INFINITY = float("nan"), float("inf")
LABELS = Path("names.json")

FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, "--seed must be"),
    ({"seed": 2**31}, "--seed must be"),
    ({"valid_fraction": 0.0}, "--valid-fraction must be"),
    ({"valid_fraction": 0.51}, "--valid-fraction must be"),
    ({"valid_fraction": NAN}, "--valid-fraction must be"),
    ({"image_size": 0}, "--image-size must be"),
    ({"epochs": -1}, "--epochs must be"),
    ({"batch_size": 0}, "--batch-size must be"),
    ({"learning_rate": 0.0}, "--learning-rate must be"),
    ({"learning_rate": -1.0}, "--learning-rate must be"),
    ({"learning_rate": INFINITY}, "--learning-rate must be"),
    ({"learning_rate": NAN}, "--learning-rate must be"),
    ({"trunk_learning_rate": 0.0}, "--trunk-learning-rate must be"),
    ({"trunk_learning_rate": NAN}, "--trunk-learning-rate must be"),
    ({"weight_decay": -0.1}, "--weight-decay must be"),
    ({"weight_decay": INFINITY}, "--weight-decay must be"),
    ({"warmup_epochs": -1.0}, "--warmup-epochs must be"),
    ({"warmup_epochs": NAN}, "--warmup-epochs must be"),
    ({"step_epochs": 0}, "--step-epochs must be"),
    ({"step_factor": 0.0}, "--step-factor must be"),
    ({"step_factor": 1.0}, "--step-factor must be"),
    ({"patience": -1}, "--patience must be"),
    ({"max_grad_norm": -1.0}, "--max-grad-norm must be"),
    ({"max_grad_norm": INFINITY}, "--max-grad-norm must be"),
    ({"label_smoothing": -0.1}, "--label-smoothing must be"),
    ({"label_smoothing": 1.0}, "--label-smoothing must be"),
    ({"workers": -1}, "--workers must be"),
    ({"resume": True, "overwrite": True, "output": Path("run")}, "--resume and --overwrite exclude each other"),
    ({"head_stages": "all", "head_start": "random"}, "--head-stages all needs a solved head"),
    ({"head_stages": "all", "head": "knn"}, "--head-stages all needs a solved head"),
    ({"head_stages": "all", "loss": "hinge"}, "--head-stages all needs a solved head"),
    ({"head_stages": "all", "scenario": "large-different"}, "--head-stages all needs a solved head"),
    ({"label_smoothing": 0.1, "head": "log_softmax"}, "--label-smoothing needs --head logits"),
    ({"feature_extract": True, "scenario": "large-similar"}, "--feature-extract freezes all but the head"),
    ({"scenario": "large-different", "weights": Path("w.pt")}, "starts fresh and takes no --weights"),
    ({"resume": True}, "--resume needs --output"),
]

ON_THE_EDGE: list[dict[str, Any]] = [
    {"seed": 2**31 - 1},
    {"valid_fraction": 0.5},
    {"image_size": 1},
    {"epochs": 0},
    {"batch_size": 1},
    {"weight_decay": 0.0, "warmup_epochs": 0.0, "max_grad_norm": 0.0, "label_smoothing": 0.0},
    {"label_smoothing": 0.99},
    {"workers": 0, "patience": 0, "step_epochs": 1},
    {"feature_extract": True, "scenario": "small-similar"},
    {"resume": True, "output": Path("run")},
    {"scenario": "large-different"},
]


@pytest.mark.parametrize(("values", "message"), FAULTS, ids=lambda value: str(value)[:60])
def test_fault_is_refused_and_stands_alone(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert message in caught.value.message
    assert ";" not in caught.value.message
    assert "finetune train --help" in caught.value.hint


@pytest.mark.parametrize("values", ON_THE_EDGE, ids=str)
def test_edge_of_the_range_is_allowed(values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_every_fault_is_told_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(seed=-1, batch_size=0, learning_rate=0.0, resume=True, overwrite=True)
    parts = caught.value.message.split("; ")
    assert parts == [
        "--seed must be 0 to 2^31 − 1, got -1",
        "--batch-size must be 1 or more, got 0",
        "--learning-rate must be above 0, got 0.0",
        "--resume and --overwrite exclude each other",
        "--resume needs --output, the run folder to go on with",
    ]


def test_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainConfig().seed = 3  # type: ignore[misc]
    assert all(field.kw_only for field in fields(TrainConfig))
    assert len(OPTION_NAMES) <= 60


def test_constructor_refuses_an_unknown_choice() -> None:
    with pytest.raises(ConfigError, match="flower"):
        TrainConfig(augmentation="flower")  # type: ignore[arg-type]


def test_constructor_refuses_a_text_for_a_number() -> None:
    with pytest.raises(ConfigError, match="epochs"):
        TrainConfig(epochs="five")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("label_names", "names.json", LABELS),
        ("label_names", LABELS, LABELS),
        ("label_names", None, None),
        ("output", "runs/a", Path("runs/a")),
        ("data", Path("flowers"), "flowers"),
        ("learning_rate", 1, 1.0),
        ("learning_rate", "auto", "auto"),
        ("weight_decay", 0, 0.0),
        ("epochs", 3, 3),
        ("epochs", "auto", "auto"),
        ("overwrite", True, True),
        ("scenario", "small-similar", "small-similar"),
    ],
)
def test_option_value_becomes_its_type(name: str, given: object, taken: object) -> None:
    value = getattr(with_options(TrainConfig(), {name: given}), name)
    assert value == taken
    assert type(value) is type(taken) or isinstance(taken, Path)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("epochs", "five", "epochs must be int or 'auto', got 'five'"),
        ("epochs", 2.5, "epochs must be int or 'auto', got 2.5"),
        ("epochs", True, "epochs must be int or 'auto', got True"),
        ("epochs", None, "epochs must be int or 'auto', got None"),
        ("overwrite", 1, "overwrite must be bool, got 1"),
        ("overwrite", "yes", "overwrite must be bool, got 'yes'"),
        ("weight_decay", False, "weight_decay must be float or 'auto', got False"),
        ("learning_rate", [1.0], r"learning_rate must be float or 'auto', got \[1.0\]"),
        ("head", "softmax", "head must be 'logits' or 'log_softmax' or 'knn', got 'softmax'"),
        ("label_names", 3, "label_names must be Path or NoneType, got 3"),
        ("model", 18, "model must be str, got 18"),
    ],
)
def test_wrong_type_names_what_was_expected(name: str, given: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}\n"):
        with_options(TrainConfig(), {name: given})


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown options: learning_rat") as caught:
        with_options(TrainConfig(), {"learning_rat": 0.1})
    assert caught.value.hint.startswith("the nearest are: learning_rate")


def test_changed_options_are_checked_together_with_the_others() -> None:
    config = TrainConfig(label_smoothing=0.1)
    with pytest.raises(ConfigError, match="--label-smoothing needs --head logits"):
        with_options(config, {"head": "log_softmax"})
    changed = with_options(config, {"seed": 7})
    assert (changed.seed, changed.label_smoothing, config.seed) == (7, 0.1, 0)


def test_every_unknown_or_mistyped_option_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        with_options(TrainConfig(), {"epoch": 3, "batchsize": 8})
    assert all(name in caught.value.message for name in ("epoch", "batchsize"))
    with pytest.raises(ConfigError) as caught:
        with_options(TrainConfig(), {"seed": "x", "epochs": "y"})
    assert all(name in caught.value.message for name in ("seed", "epochs"))
