"""Runs operations of a directory source that die on the way.

A process of its own that is warm: for each line of JSON that it reads it forks a child, which does the operation
and dies before its call of that number to the file system, as Python's audit hooks count them. The child's exit
status is written back.

{"root": PATH, "die_at": N, "exchange": BOOL, "call": [METHOD, ARGUMENTS...], "options": {...}}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from qaa_serve.sources import DirectorySource, disk
from qaa_serve.sources import directory as directory_module

DIED, DONE, FAILED = 70, 0, 71


def main() -> None:
    os.fsync = lambda descriptor: None  # dying leaves the system its memory
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(perform(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def perform(order: dict[str, Any]) -> int:
    if not order["exchange"]:
        directory_module.exchange = lambda one, other: False
    left = order["die_at"]

    def count(event: str, arguments: object) -> None:
        nonlocal left
        left -= event == "open" or event.startswith(("os.", "ctypes."))
        if left == 0:
            os._exit(DIED)

    source = DirectorySource(Path(order["root"]))
    method, *arguments = order["call"]
    if method in ("put", "keep"):  # (name, directory, digest) and (name, digest, directory)
        arguments = [Path(value) if "/" in value else value for value in arguments]
    if method == "write_settings":
        arguments[0] = arguments[0].encode()
    sys.addaudithook(count)
    try:
        getattr(source, method)(*arguments, **order["options"])
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        return FAILED
    return DONE


assert disk.exchange is directory_module.exchange

if __name__ == "__main__":
    main()
