"""The reporter of Python callers writes to the logger "finetune"."""

import logging

import pytest

from finetune.runs.reporting import LoggingReporter, Reporter


def test_messages_and_tables_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    reporter: Reporter = LoggingReporter()
    with caplog.at_level(logging.INFO, logger="finetune"):
        reporter.say("50 % done")
        reporter.table("Scores", ["split", "accuracy"], [("valid", 0.5)])
        with reporter.progress("Reading images", 3) as advance:
            advance(1, "one")
            advance(2, "")
    assert [record.name for record in caplog.records] == ["finetune"] * 3
    assert caplog.messages == ["50 % done", "Scores\nsplit\taccuracy\nvalid\t0.5", "Reading images: 3"]
