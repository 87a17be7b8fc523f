"""A config survives the way through YAML, and a file that means nothing is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.presets import PRESETS, preset
from finetune.config.schema import OPTION_NAMES, TrainConfig
from finetune.config.yaml_io import from_yaml, option_docs, to_yaml
from finetune.errors import ConfigError

plain_text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"], include_characters=" "), max_size=30)
file = st.none() | plain_text.filter(lambda text: text.strip(" ./") != "").map(Path)
positive = st.floats(min_value=1e-12, max_value=1e12)
rate = positive | st.just("auto")
count = st.integers(min_value=1, max_value=10**6)
options = st.fixed_dictionaries(
    {},
    optional={
        "data": plain_text,
        "output": file,
        "overwrite": st.booleans(),
        "seed": st.integers(min_value=0, max_value=2**31 - 1),
        "label_names": file,
        "valid_fraction": st.floats(min_value=1e-9, max_value=0.5),
        "model": plain_text,
        "image_size": count | st.just("auto"),
        "scenario": st.sampled_from(["auto", "small-similar"]),
        "feature_extract": st.booleans(),
        "epochs": count | st.just("auto"),
        "optimizer": st.sampled_from(["adamw", "adam", "sgd"]),
        "learning_rate": rate,
        "trunk_learning_rate": rate,
        "weight_decay": positive,
        "step_factor": st.floats(min_value=1e-9, max_value=0.999),
        "label_smoothing": st.floats(min_value=0, max_value=0.99),
        "imbalance": st.sampled_from(["none", "class-weights", "balanced-sampling"]),
        "workers": count | st.just("auto"),
    },
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def read(path: Path, text: str, base: TrainConfig | None = None) -> TrainConfig:
    path.write_text(text, encoding="utf-8")
    return from_yaml(path, base=base or TrainConfig())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=options)
def test_every_config_comes_back(path: Path, values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    assert read(path, to_yaml(config)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_over_any_base(path: Path, name: str) -> None:
    other = TrainConfig(data="x", head="log_softmax", epochs=3, seed=5, output=Path("run"), learning_rate=0.5)
    assert read(path, to_yaml(preset(name)), base=other) == preset(name)


@pytest.mark.parametrize("data", ["photos\u3000", "photos\xa0", "\xa0"])
def test_folder_name_that_ends_in_a_wide_space_comes_back(path: Path, data: str) -> None:
    assert read(path, to_yaml(TrainConfig(data=data))).data == data


def test_every_option_stands_under_its_docstring() -> None:
    assert tuple(option_docs()) == OPTION_NAMES
    text = to_yaml(TrainConfig())
    blocks = text.rstrip("\n").split("\n\n")
    assert len(blocks) == len(OPTION_NAMES)
    for name, block in zip(OPTION_NAMES, blocks, strict=True):
        *comments, option = block.split("\n")
        assert _letters("".join(line.removeprefix("# ") for line in comments)) == _letters(option_docs()[name])
        assert len(option_docs()[name]) > 10
        assert option.startswith(f"{name}:")
    assert max(map(len, text.splitlines())) <= 100


def _letters(text: str) -> str:
    return text.replace(" ", "")


def test_no_word_of_a_comment_is_broken_at_a_hyphen() -> None:
    assert not [line for line in to_yaml(TrainConfig()).splitlines() if line.startswith("#") and line.endswith("-")]


def test_absent_options_keep_the_value_of_the_base(path: Path) -> None:
    assert read(path, "epochs: 3\n", base=TrainConfig(seed=9)) == TrainConfig(seed=9, epochs=3)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_empty_file_changes_nothing(path: Path, text: str) -> None:
    assert read(path, text, base=TrainConfig(seed=9)) == TrainConfig(seed=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 0.1", "unknown options: learning_rte"),
        ("3: 0.1", "unknown options: 3"),
        ("seed: 1\nepochs: 2\nseed: 3\n", "key 'seed' stands twice"),
        ("epochs: many", "epochs must be int or 'auto', got 'many'"),
        ("overwrite: 1", "overwrite must be bool, got 1"),
        ("label_names: [a, b]", "label_names must be Path or NoneType"),
        ("batch_size: 0", "--batch-size must be 1 or more, got 0"),
        ("- epochs\n- 3\n", "must map option names to values, got list"),
        ("epochs", "must map option names to values, got str"),
        ("epochs: [1", "is not valid YAML"),
        ("? [a, b]\n: 3", "is not valid YAML"),
        ("data: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_file_that_means_nothing_is_refused_by_name(path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(path, text)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_unknown_key_names_the_nearest(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(path, "learning_rte: 0.1")
    assert caught.value.hint.startswith("the nearest are: learning_rate")


def test_unreadable_files(tmp_path: Path, path: Path) -> None:
    path.write_bytes(b"data: caf\xe9")
    for unreadable in (path, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            from_yaml(unreadable, base=TrainConfig())
        assert str(unreadable) in caught.value.message


@pytest.mark.parametrize(("text", "value"), [("0.001", 0.001), ("1.0e-3", 0.001), ("1", 1.0)])
def test_numbers_as_people_write_them(path: Path, text: str, value: float) -> None:
    assert read(path, f"learning_rate: {text}").learning_rate == value


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1e-03"])
def test_exponent_without_a_point_is_a_number(path: Path, text: str) -> None:
    assert read(path, f"learning_rate: {text}").learning_rate == 0.001


@pytest.mark.parametrize("text", ["data: 2024-13-45", "seed: 0b_", "data: " + "[" * 5000])
def test_value_that_yaml_cannot_build_is_a_config_error(path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read(path, text)


def test_written_text_is_plain_yaml() -> None:
    values = yaml.safe_load(to_yaml(TrainConfig(output=Path("runs/a"), data="花 & co: #1")))
    assert tuple(values) == OPTION_NAMES
    assert (values["output"], values["data"], values["label_names"]) == ("runs/a", "花 & co: #1", None)
