"""What `qaa-serve inspect` says of an adapter's directory, asked in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

#: It reads the adapter and its base's layers, and draws: seconds. One at a time, so that a server beside it has
#: its cores.
_TIMEOUT_S = 120.0
_one_at_a_time = asyncio.Semaphore(1)


async def inspect(directory: Path, module: str | None = None) -> tuple[dict[str, Any], bytes, str]:
    """Inspect an adapter.

    Args:
        directory: its own.
        module: whose circuit is drawn; the first one's, left out.

    Returns:
        The facts, as `qaa-serve inspect --json` prints them; the circuit as an SVG image; and what could not be
        done, with the reason. Each is empty if there is none.
    """
    chosen = ["--module", module] if module else []
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "circuit.svg"
        async with _one_at_a_time:
            facts, problem = await _run(directory, "--draw", str(picture), *chosen)
            if not facts:  # a LoRA adapter has no circuit; or what draws it is not installed
                facts, other = await _run(directory)
                problem = other or ("" if facts.get("kind") == "LORA" else problem)
        return facts, picture.read_bytes() if picture.is_file() else b"", problem


async def _run(directory: Path, *options: str) -> tuple[dict[str, Any], str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qaa_serve.inspection.cli", str(directory), "--json", *options,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # a base that is not here is not fetched
    )  # fmt: skip
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    except TimeoutError:
        return {}, f"it took longer than {_TIMEOUT_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    reasons = errors.decode(errors="replace").strip().splitlines() or ["no reason was given"]
    return json.loads(output or "{}"), "" if process.returncode == 0 else reasons[-1]
