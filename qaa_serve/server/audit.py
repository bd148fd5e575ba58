"""One JSON line for every change of what is served: when, who, from where, what, from which revision to which."""

from __future__ import annotations

import json
import logging
from collections import deque
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from qaa_serve.server.context import current_request

#: Lines that are kept for `GET /v1/audit`.
_KEPT_LINES = 200


class AuditLog:
    """Writes the lines into the server's log, and into a file if there is one to be; keeps the last ones."""

    def __init__(self, logger: logging.Logger, path: Path | None = None):
        """Open the file.

        Args:
            logger: the server's.
            path: a file to append to; it may be moved away while the server runs (logrotate does).

        Raises:
            OSError: if the file cannot be written.
        """
        self._log = logger
        self._kept: deque[dict[str, Any]] = deque(maxlen=_KEPT_LINES)
        self._file = None if path is None else WatchedFileHandler(path, encoding="utf-8")

    def changed(
        self, action: str, adapter: str, before: str | None, after: str | None, result: str = "ok"
    ) -> None:
        """A change was made or refused.

        Args:
            action: what was asked for: put, delete, rollback, pin or unpin; publish, reject or forget where the
                adapters directory changed by itself.
            adapter: its public name.
            before: the revision that the name stood for.
            after: the one that it stands for now.
            result: "ok", or why it was refused.
        """
        request = current_request.get()
        facts = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": None if request is None or request.key is None else request.key.name,
            "from": "adapters directory" if request is None else request.address,
            "action": action,
            "adapter": adapter,
            "before": before,
            "after": after,
            "result": result,
        }
        self._kept.append(facts)
        line = json.dumps(facts)
        self._log.info("audit %s", line)
        if self._file is not None:
            self._file.emit(logging.makeLogRecord({"msg": line}))

    def last(self, adapter: str | None = None) -> list[dict[str, Any]]:
        """The last lines, of one adapter or alias or of all, the newest first."""
        return [facts for facts in reversed(self._kept) if adapter in (None, facts["adapter"])]

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()
