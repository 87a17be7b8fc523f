"""Every command has help, a line in the table, and a verb of the API."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from finetune import api
from finetune.cli.main import COMMANDS

TWINS = {"data": "write_data", "models": "list_models", "cache": "list_cache", "watch": "watch_server", "config": None}
"""Verbs of another name than their command; options are data, Python has TrainConfig for them."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_with_an_explanation(finetune: Callable[..., Any], command: str) -> None:
    result = finetune(command, "--help")
    assert result.code == 0
    assert f"usage: finetune {command}" in result.out
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_verb(command: str) -> None:
    twin = TWINS.get(command, command)
    if twin is not None:
        assert inspect.getdoc(getattr(api, twin))


def test_the_table_is_the_help(finetune: Callable[..., Any]) -> None:
    result = finetune("--help")
    assert result.code == 0
    for command, text in COMMANDS.items():
        assert command in result.out
        assert text in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_no_command_shows_the_help_and_is_a_usage_error(finetune: Callable[..., Any]) -> None:
    assert finetune().code == 2
    assert "usage:" in finetune().out


def test_a_wrong_command_names_the_nearest(finetune: Callable[..., Any]) -> None:
    result = finetune("trian")
    assert result.code == 2
    assert "train" in result.err
    assert len(result.err.splitlines()) == 2


def test_the_version_is_the_changelogs(finetune: Callable[..., Any]) -> None:
    assert finetune("--version").out.strip() == f"finetune {__import__('finetune').__version__}"
