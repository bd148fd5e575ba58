"""Split E2E and the instructions into training, validation and test rows, by prompt.

    python docs/comparison/split.py E2E.jsonl INSTRUCTIONS.jsonl --output DIR

Of E2E a row has a "prompt" and a "completion", of the instructions "instruction", "input" and "output"; other keys
are dropped. No prompt is in two parts. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def split(
    rows: list[Row], prompt_keys: tuple[str, ...], test: int, validation: int, references: int
) -> dict[str, list[Row]]:
    """Rows of ``test`` prompts, at most ``references`` each, one row of ``validation`` prompts, and the rest."""
    by_prompt: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[tuple(row[key] for key in prompt_keys)].append(row)
    prompts = sorted(by_prompt)
    random.Random(0).shuffle(prompts)
    held, watched, trained = prompts[:test], prompts[test : test + validation], prompts[test + validation :]
    return {
        "test": [row for prompt in held for row in by_prompt[prompt][:references]],
        "validation": [by_prompt[prompt][0] for prompt in watched],
        "train": [row for prompt in trained for row in by_prompt[prompt]],
    }


def main() -> None:
    """Write six files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("e2e", type=Path)
    parser.add_argument("instructions", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name, path, keys, answer, test in (
        ("e2e", given.e2e, ("prompt",), "completion", 40),
        ("instructions", given.instructions, ("instruction", "input"), "output", 120),
    ):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [{key: row[key] for key in (*keys, answer)} for row in rows]
        for part, chosen in split(kept, keys, test, validation=32, references=3).items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
            (given.output / f"{name}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
