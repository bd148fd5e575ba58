"""A program that tells what happens in a directory, until its stdin is closed: `python -P watcher.py DIRECTORY`.

Each line of its output is a list of what a batch of events named, in JSON: a path, and whether something is there.
The first list may be empty, and says that the watch has begun. It is a process of its own since a watch begins
with a walk over everything there is, during which no other thread of its process runs.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from watchfiles import Change, watch


def main(directory: str) -> None:
    """Tell until nobody listens any more."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        begun = False
        for batch in watch(
            directory, watch_filter=None, step=50, rust_timeout=200, yield_on_timeout=True, raise_interrupt=False
        ):
            if batch or not begun:
                begun = True
                print(json.dumps(sorted({(path, change != Change.deleted) for change, path in batch})), flush=True)
    except BrokenPipeError:
        pass
    except Exception as error:
        sys.exit(str(error))


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
