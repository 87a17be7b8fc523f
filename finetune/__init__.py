"""finetune: turn a folder of labelled images into a classifier you can trust.

The public names are loaded when they are first used, so that importing the package takes no time and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from finetune.api import (
        Run,
        advise,
        check,
        evaluate,
        explain,
        find_learning_rate,
        inspect,
        list_models,
        load,
        predict,
        train,
        tune,
        write_data,
    )
    from finetune.config.schema import TrainConfig
    from finetune.errors import (
        ConfigError,
        DataError,
        DivergedError,
        FinetuneError,
        ImageError,
        MissingExtraError,
        ModelError,
        PredictionInputError,
        RunError,
        StorageError,
    )
    from finetune.models.anatomy import Anatomy, count_parameters, inspect_network, output_size, receptive_field
    from finetune.models.dense import to_dense
    from finetune.models.initialize import initialize_model
    from finetune.prediction.classifier import Classifier
    from finetune.runs.cache_folder import CacheEntry, clear_cache, list_cache, prune_cache
    from finetune.runs.records import InputSpec, LabelMap, Prediction
    from finetune.server.watch import watch_server
    from finetune.training.loop import train_model
    from finetune.training.progress import History

_HOMES = {
    "Anatomy": "finetune.models.anatomy",
    "CacheEntry": "finetune.runs.cache_folder",
    "Classifier": "finetune.prediction.classifier",
    "ConfigError": "finetune.errors",
    "DataError": "finetune.errors",
    "DivergedError": "finetune.errors",
    "FinetuneError": "finetune.errors",
    "History": "finetune.training.progress",
    "ImageError": "finetune.errors",
    "InputSpec": "finetune.runs.records",
    "LabelMap": "finetune.runs.records",
    "MissingExtraError": "finetune.errors",
    "ModelError": "finetune.errors",
    "Prediction": "finetune.runs.records",
    "PredictionInputError": "finetune.errors",
    "Run": "finetune.api",
    "RunError": "finetune.errors",
    "StorageError": "finetune.errors",
    "TrainConfig": "finetune.config.schema",
    "advise": "finetune.api",
    "check": "finetune.api",
    "clear_cache": "finetune.runs.cache_folder",
    "count_parameters": "finetune.models.anatomy",
    "evaluate": "finetune.api",
    "explain": "finetune.api",
    "find_learning_rate": "finetune.api",
    "initialize_model": "finetune.models.initialize",
    "inspect": "finetune.api",
    "inspect_network": "finetune.models.anatomy",
    "list_cache": "finetune.runs.cache_folder",
    "list_models": "finetune.api",
    "load": "finetune.api",
    "output_size": "finetune.models.anatomy",
    "predict": "finetune.api",
    "prune_cache": "finetune.runs.cache_folder",
    "receptive_field": "finetune.models.anatomy",
    "to_dense": "finetune.models.dense",
    "train": "finetune.api",
    "train_model": "finetune.training.loop",
    "tune": "finetune.api",
    "watch_server": "finetune.server.watch",
    "write_data": "finetune.api",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
