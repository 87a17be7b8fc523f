"""`finetune watch`: live curves of runs in a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from finetune.cli.console import ConsoleReporter
from finetune.cli.parsing import parse
from finetune.errors import ConfigError
from finetune.server.watch import watch_server


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Show the curves of runs, finished or still training, in a browser on this machine; Ctrl-C ends it."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN...")]]
    """Run folders; several are drawn into the same charts."""
    port: int = 6007
    """Port on 127.0.0.1; 0 takes any that is free."""


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Serve until interrupted."""
    options = parse(WatchOptions, words, command="watch")
    if not options.runs:
        raise ConfigError("no RUN to watch", "name one or more run folders: finetune watch RUN")
    with watch_server(options.runs, port=options.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        reporter.say("Open it in a browser; Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
