"""A config as a YAML text that explains itself, and back."""

import ast
import inspect
import re
import textwrap
import typing
from functools import cache
from pathlib import Path

import yaml

from finetune.config.presets import starting_point
from finetune.config.schema import OPTION_NAMES, TrainConfig, with_options
from finetune.errors import ConfigError


@cache
def option_docs() -> dict[str, str]:
    """Return the docstring under each field of `TrainConfig`, on one line each."""
    class_body = ast.parse(inspect.getsource(TrainConfig)).body[0]
    assert isinstance(class_body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(class_body.body, class_body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return docs


def to_yaml(config: TrainConfig) -> str:
    """Write `config` as YAML, each option under its explanation."""
    docs = option_docs()
    lines: list[str] = []
    for name in OPTION_NAMES:
        value = getattr(config, name)
        plain = str(value) if isinstance(value, Path) else value
        lines += textwrap.wrap(docs[name], 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        lines.append(yaml.safe_dump({name: plain}, allow_unicode=True, width=1000).removesuffix("\n"))
        lines.append("")
    return "\n".join(lines)


def from_yaml(path: Path, *, base: TrainConfig | None = None) -> TrainConfig:
    """Read the YAML file at `path` onto `base`: options it does not name keep their value.

    Without a `base` it is the starting point of the network that the file names.

    Raises:
        ConfigError: The file is absent, is no YAML mapping, names an unknown option, or a value has the wrong type.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a safe loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}", "check --config") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must map option names to values, got {type(values).__name__}")
    try:
        return with_options(
            base or starting_point(values.get("model")), {str(name): value for name, value in values.items()}
        )
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error.message}", error.hint) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without the silent "last one wins" of keys that stand twice, and with 1e-3 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, typing.Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 asks for a dot before the exponent, people do not.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
