"""What `qaa-serve inspect` says of an adapter's directory, asked in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: It reads the adapter and its base's layers, and draws: seconds. One at a time, so that a server beside it has
#: its cores.
_TIMEOUT_S = 120.0
_one_at_a_time = asyncio.Semaphore(1)


@dataclass(frozen=True)
class Inspected:
    """What was found.

    Attributes:
        facts: as `qaa-serve inspect --json` prints them; None if there are none.
        drawing: the circuit as an SVG image; None if there is none.
        problem: what could not be done, and why.
        card: the adapter's README.md, if it has one.
    """

    facts: dict[str, Any] | None
    drawing: bytes | None
    problem: str | None
    card: str | None


async def inspect(directory: Path, module: str | None = None) -> Inspected:
    """Inspect an adapter.

    Args:
        directory: its own.
        module: whose circuit is drawn; the first one's, left out.
    """
    card = directory / "README.md"
    text = card.read_text(errors="replace")[:200_000] if card.is_file() else None
    with tempfile.TemporaryDirectory(prefix="qaa-console-") as scratch:
        picture = Path(scratch) / "circuit.svg"
        drawing = ["--draw", str(picture), *(["--module", module] if module else [])]
        async with _one_at_a_time:
            facts, problem = await _run(directory, drawing)
            if facts is None:  # a LoRA adapter has no circuit; or what draws it is not installed
                facts, worse = await _run(directory, [])
                is_lora = facts is not None and facts.get("kind") == "LORA"
                problem = worse or (None if is_lora else problem)
        return Inspected(facts, picture.read_bytes() if picture.is_file() else None, problem, text)


async def _run(directory: Path, more: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qaa_serve.inspection.cli", str(directory), "--json", *more,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # a base that is not here is not fetched
    )  # fmt: skip
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    except TimeoutError:
        return None, f"it took longer than {_TIMEOUT_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        facts = json.loads(output)
    except ValueError:
        facts = None
    told = errors.decode(errors="replace").strip().splitlines()
    return facts, None if process.returncode == 0 else (told[-1] if told else "no reason was given")
