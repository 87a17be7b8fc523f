"""The command line: the table of commands, and what an error becomes."""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from finetune.runs.processes import launched_rank

COMMANDS = {
    "train": "train a classifier on a folder of labelled images",
    "tune": "search for better options by training again and again",
    "watch": "show the curves of runs in a browser, while they train",
    "predict": "name what is on images",
    "evaluate": "score a trained model on labelled images",
    "explain": "draw where on a picture a model sees its class",
    "advise": "measure what to freeze, without training",
    "check": "examine a folder of labelled images before training on it",
    "inspect": "what is inside a network: shapes, parameters, receptive fields",
    "data": "write a well-known data set as an image folder",
    "models": "list networks, their sizes and where their weights come from",
    "config": "show, validate or write the options of a training",
    "cache": "list, prune or clear what is kept on disk to save work",
}

USAGE = """usage: finetune COMMAND ... [--quiet] [--debug]

Turn a folder of labelled images into a classifier you can trust.

commands:
{commands}

  finetune COMMAND --help    the options of a command
  finetune --version         the version

--quiet prints results and errors only; --debug shows the traceback of an error.
"""

MEMORY_EXIT_CODE = 7
COLLECT_AFTER = 20_000
"""New objects before Python looks for garbage among them; looking as often as by default is a quarter of importing."""


def run_process() -> NoReturn:
    """Be the process `finetune`: run the command of its arguments and end."""
    gc.set_threshold(COLLECT_AFTER)
    exit_code = main()
    # What an interpreter does at its end, but for taking every imported module apart, which takes longer than a second.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    os._exit(exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name, by default those of the process; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if launched_rank():  # the main process of the job speaks for all
        words.append("--quiet")
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (it stays open)
    is_quiet, is_debug = "--quiet" in words, "--debug" in words
    words = [word for word in words if word not in ("--quiet", "--debug")]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())))
        return 0 if words else 2
    if words[0] == "--version":
        from finetune import __version__

        print(f"finetune {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _unknown_command(words[0])
    return _run(words[0], words[1:], is_quiet=is_quiet, is_debug=is_debug)


def _run(command: str, words: list[str], *, is_quiet: bool, is_debug: bool) -> int:
    from finetune.cli.console import ConsoleReporter, print_error
    from finetune.errors import FinetuneError

    try:
        result = import_module(f"finetune.cli.{command}").run(words, ConsoleReporter(is_quiet=is_quiet))
        sys.stdout.flush()
        return int(result)
    except FinetuneError as error:
        if is_debug:
            traceback.print_exc()
        print_error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted", "")
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        sys.stdout = None
        return 0
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if is_debug:
            traceback.print_exc()
        print_error(f"out of memory: {error}", "use a smaller --batch-size or --image-size, or a smaller --model")
        return MEMORY_EXIT_CODE


def _is_out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def _unknown_command(word: str) -> int:
    from finetune.cli.console import print_error
    from finetune.errors import nearest

    print_error(f"no command is called {word!r}", nearest(word, list(COMMANDS)))
    return 2
