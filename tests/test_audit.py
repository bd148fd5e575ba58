"""The audit log: one line for each change, that a program can read, and that names no secret."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

pytest.importorskip("prometheus_client", reason="the server's packages are not installed")

from qaa_serve.server.audit import AuditLog
from qaa_serve.server.context import RequestContext, current_request
from qaa_serve.server.keys import make_key

logger = logging.getLogger("test")


@contextmanager
def during(key=None, address="10.0.0.9"):
    token = current_request.set(RequestContext(key, address))
    try:
        yield
    finally:
        current_request.reset(token)


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_when_who_from_where_what_and_from_what_to_what(tmp_path, caplog):
    file = tmp_path / "audit.log"
    audit = AuditLog(logger, file)
    with during(make_key("secret", "ops")), caplog.at_level(logging.INFO):
        audit.changed("rollback", "one", "one@bbbbbbbbbbbb", "one@aaaaaaaaaaaa")
    audit.close()
    (line,) = lines(file)
    when = datetime.fromisoformat(line.pop("time"))
    assert when.tzinfo is not None
    assert abs((datetime.now(UTC) - when).total_seconds()) < 600
    assert line == {
        "key": "ops", "from": "10.0.0.9", "action": "rollback", "adapter": "one", "before": "one@bbbbbbbbbbbb",
        "after": "one@aaaaaaaaaaaa", "result": "ok",
    }  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage() == f"audit {file.read_text().strip()}"
    assert "secret" not in caplog.text + file.read_text()


def test_a_change_by_nobodys_request_comes_from_the_adapters_directory(tmp_path):
    file = tmp_path / "audit.log"
    audit = AuditLog(logger, file)
    audit.changed("publish", "one", None, "one@aaaaaaaaaaaa")
    audit.changed("reject", "one", "one@aaaaaaaaaaaa", "one@aaaaaaaaaaaa", "broken")
    with during(None, "local"):
        audit.changed("put", "one", None, None, "422: broken")
    audit.close()
    written = lines(file)
    assert [line["from"] for line in written] == ["adapters directory", "adapters directory", "local"]
    assert [line["key"] for line in written] == [None] * 3
    assert [line["result"] for line in written] == ["ok", "broken", "422: broken"]


def test_without_a_file_the_servers_log_has_the_lines(caplog):
    audit = AuditLog(logger)
    with caplog.at_level(logging.INFO):
        audit.changed("put", "one", None, "one@aaaaaaaaaaaa")
    audit.close()
    assert json.loads(caplog.records[0].getMessage().removeprefix("audit "))["action"] == "put"


def test_the_last_lines_are_kept_for_the_api_the_newest_first():
    audit = AuditLog(logger)
    for number in range(300):
        audit.changed("put", f"n{number % 2}", None, f"n{number % 2}@{number:012x}")
    audit.close()
    assert [line["after"] for line in audit.last("n1")[:2]] == [f"n1@{299:012x}", f"n1@{297:012x}"]
    assert 100 <= len(audit.last()) < 300
    assert audit.last("unheard-of") == []


@pytest.mark.parametrize("text", ["two\nlines", "100 %s %d %(x)s", "\N{SNOWMAN}", "\udcff", '"quoted"', "\x1b[0m"])
def test_whatever_a_client_sends_is_one_line(tmp_path, caplog, text):
    file = tmp_path / "audit.log"
    audit = AuditLog(logger, file)
    with caplog.at_level(logging.INFO):
        audit.changed("put", text, None, None, text)
    audit.close()
    (line,) = lines(file)
    assert (line["adapter"], line["result"]) == (text, text)
    assert caplog.records[0].getMessage().isprintable()


def test_a_file_is_appended_to_and_may_be_moved_away(tmp_path):
    file, moved = tmp_path / "audit.log", tmp_path / "audit.log.1"
    file.write_text('{"action": "of an earlier server"}\n')
    audit = AuditLog(logger, file)
    audit.changed("put", "one", None, None)
    file.rename(moved)
    audit.changed("delete", "one", None, None)
    audit.close()
    assert [line["action"] for line in lines(moved)] == ["of an earlier server", "put"]
    assert [line["action"] for line in lines(file)] == ["delete"]


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        AuditLog(logger, tmp_path / "nowhere" / "audit.log")
