"""The names of `import finetune` are these, all of them resolve, and their homes are where the table says."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import finetune

PINNED = [
    "Anatomy",
    "CacheEntry",
    "Classifier",
    "ConfigError",
    "DataError",
    "DivergedError",
    "FinetuneError",
    "History",
    "ImageError",
    "InputSpec",
    "LabelMap",
    "MissingExtraError",
    "ModelError",
    "Prediction",
    "PredictionInputError",
    "Run",
    "RunError",
    "StorageError",
    "TrainConfig",
    "advise",
    "check",
    "clear_cache",
    "count_parameters",
    "evaluate",
    "explain",
    "find_learning_rate",
    "initialize_model",
    "inspect",
    "inspect_network",
    "list_cache",
    "list_models",
    "load",
    "output_size",
    "predict",
    "prune_cache",
    "receptive_field",
    "to_dense",
    "train",
    "train_model",
    "tune",
    "watch_server",
    "write_data",
]


def test_all_is_pinned() -> None:
    assert sorted(finetune.__all__) == PINNED
    assert set(finetune.__all__) < set(dir(finetune))


@pytest.mark.parametrize("name", PINNED)
def test_every_name_resolves_to_its_home(name: str) -> None:
    value = getattr(finetune, name)
    assert value is getattr(import_module(finetune._HOMES[name]), name)
    assert value.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(finetune.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(finetune.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="trian"):
        finetune.trian  # noqa: B018
