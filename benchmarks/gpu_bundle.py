"""What benchmarks/gpu_check.py needs on a GPU machine without a network, in pieces of at most 60 MiB.

    python benchmarks/gpu_bundle.py make circuits            writes build/bundles/circuits-*.zip.1-of-1, ...
    python benchmarks/gpu_bundle.py make serving --have FILE FILE: what `pip freeze` says on that machine
    python benchmarks/gpu_bundle.py receive PIECE ...        there; the last piece unpacks all to build/gpu/site

`make` prints the command for each piece and, with the last of them, that of the check. It runs on any machine with
a package index and, for serving, uv; wheels are those for Linux on x86-64 with Python 3.12.

circuits   cuStateVec and the part of its bindings that is used, PEFT and pydantic; for the parts 1 to 4, and 6
serving    this project as a wheel, so that vLLM finds the plugin; vLLM 0.26.0, which takes the torch 2.11 of the
           machine met so far, without what a Llama in bfloat16 can do without; and of what they ask for all that
           FILE does not have. For part 5, on top of circuits. That vLLM runs so was never tried

The repository itself comes along anyhow, with a small trained model and its adapters (examples/assistant).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "cuda.txt"
PIECE_BYTES = 60 << 20
PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_31"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PIP_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "manylinux_2_31_x86_64")


@dataclass(frozen=True)
class Bundle:
    """What is in one.

    Attributes:
        wheels: what is fetched without its dependencies; where no version is named, that of requirements/cuda.txt.
        left_out: of the wheels' files.
        empty: packages of which an empty `__init__.py` is enough.
        resolved: whether the dependencies come along that the machine lacks.
        parts: of gpu_check.py, once it is there.
    """

    wheels: tuple[str, ...]
    left_out: tuple[str, ...]
    empty: tuple[str, ...]
    resolved: bool
    parts: str


BUNDLES = {
    "circuits": Bundle(
        # PEFT's tuner registers itself in tables of one version.
        (
            *("custatevec-cu13", "cuquantum-python-cu13", "cuda-pathfinder", "peft"),
            *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
        ),
        (
            "cuquantum/*.py",  # imports every library of cuQuantum
            "cuquantum/include/*",
            *(
                f"cuquantum/{name}/*"
                for name in ("_internal", "densitymat", "pauliprop", "stabilizer", "tensornet")
            ),
            "cuquantum/bindings/*.py",
            *(f"cuquantum/bindings/*cu{name}*" for name in ("densitymat", "pauliprop", "stabilizer", "tensornet")),
            "cuquantum/bindings/*custatevecEx*",
        ),
        ("cuquantum", "cuquantum/bindings"),
        False,
        "1 2 3 4 6",
    ),
    "serving": Bundle(
        ("vllm==0.26.0",),
        (
            "vllm/vllm_flash_attn/*.so",
            "vllm/_moe_C*.so",
            "vllm/vllm-rs*",
            "vllm/third_party/deep_gemm/*",
            "vllm/_flashmla*",
        ),
        (),
        True,
        "5",
    ),
}

#: What is not brought along though vLLM asks for it: nothing here calls it, or it comes with the machine's torch.
NOT_NEEDED = (
    *("nvidia-*", "cuda-*", "torch*", "triton", "flashinfer*", "tilelang", "z3-solver", "quack*", "humming*"),
    *("tokenspeed*", "pynvvideocodec", "opencv*", "ray"),
)


def wanted(name: str, left_out: tuple[str, ...]) -> bool:
    """Whether a wheel's file comes along."""
    return not name.endswith("/") and ".data/" not in name and not any(fnmatch(name, each) for each in left_out)


def fetch(requirements: list[str], folder: Path) -> None:
    """Download wheels for the GPU machine, without dependencies."""
    platforms = [word for platform in PIP_PLATFORMS for word in ("--platform", platform)]
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", PYTHON, *platforms]
    subprocess.run([*PIP, "download", "--quiet", *options, "--dest", str(folder), *requirements], check=True)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(bundle: Bundle, have: Path) -> list[str]:
    """What the bundle and the server ask for and a machine lacks, by its `pip freeze`, as name==version.

    Raises:
        ValueError: if it cannot be resolved; uv says why.
    """
    lines = [line for line in have.read_text().splitlines() if re.fullmatch(r"[\w.-]+==\S+", line)]
    there = dict(line.partition("+")[0].split("==") for line in lines)  # without +cu130
    there = {canonical(name): version for name, version in there.items()}
    with tempfile.TemporaryDirectory() as temporary:
        asked, found = Path(temporary) / "asked.txt", Path(temporary) / "found.txt"
        # uv keeps the versions in the file it writes to, where it can: nothing is brought that need not be.
        found.write_text("".join(f"{name}=={version}\n" for name, version in there.items()))
        asked.write_text("\n".join([*bundle.wheels, f"qaa-serve[serve] @ file://{ROOT}"]) + "\n")
        command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--output-file", str(found)]
        target = ["--python-version", PYTHON, "--python-platform", PLATFORM]
        done = subprocess.run([*command, *target, str(asked)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{', '.join(bundle.wheels)} cannot be resolved: {done.stderr.strip()}")
        resolved = dict(line.split("==") for line in found.read_text().splitlines() if "==" in line)
    brought = {canonical(wheel.partition("==")[0]) for wheel in bundle.wheels}
    return [
        f"{name}=={version}"
        for name, version in resolved.items()
        if there.get(canonical(name)) != version
        and canonical(name) not in brought
        and not any(fnmatch(canonical(name), each) for each in NOT_NEEDED)
    ]


def locked(wheels: tuple[str, ...]) -> list[str]:
    """The same with a version each, of the lock where none is named."""
    pins = (line.split("==") for line in LOCK.read_text().splitlines() if "==" in line)
    versions = {canonical(name): version for name, version in pins}
    return [wheel if "==" in wheel else f"{wheel}=={versions[wheel]}" for wheel in wheels]


def gather(bundle: Bundle, have: Path | None, site: Path) -> None:
    """Unpack what a bundle holds, as it is to lie in site-packages."""
    with tempfile.TemporaryDirectory() as temporary:
        wheels = Path(temporary)
        extra = missing(bundle, have) if bundle.resolved and have is not None else []
        fetch([*locked(bundle.wheels), *extra], wheels)
        if bundle.resolved:
            command = [*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
            subprocess.run(command, check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site, [name for name in file.namelist() if wanted(name, bundle.left_out)])
    for package in bundle.empty:
        (site / package / "__init__.py").write_text("")


def pack(name: str, site: Path, into: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Write a folder as an archive in pieces; their names have its digest and how many they are."""
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob(f"{name}-*.zip.*"):
        old.unlink()
    with tempfile.NamedTemporaryFile(dir=into) as whole:
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_LZMA) as archive:
            for path in sorted(site.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(site))
        whole.seek(0)
        digest = hashlib.file_digest(whole, "sha256").hexdigest()[:16]
        count = -(-whole.tell() // piece_bytes)
        whole.seek(0)
        pieces = [into / f"{name}-{digest}.zip.{number}-of-{count}" for number in range(1, count + 1)]
        for piece in pieces:
            piece.write_bytes(whole.read(piece_bytes))
    return pieces


def receive(piece: Path, into: Path) -> bool:
    """Keep a piece; with the last one unpack all into `into`/site. Returns whether it was the last.

    Raises:
        ValueError: if the file is no piece, or the whole is damaged.
    """
    named = re.fullmatch(
        r"(?P<name>.+)-(?P<digest>[0-9a-f]{16})\.zip\.(?P<number>\d+)-of-(?P<count>\d+)", piece.name
    )
    if named is None:
        raise ValueError(f"{piece} is no piece of a bundle")
    into.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(piece, into / piece.name)
    stem, count = piece.name.rpartition(".")[0], int(named["count"])
    pieces = [into / f"{stem}.{number}-of-{count}" for number in range(1, count + 1)]
    if not all(each.exists() for each in pieces):
        return False
    whole = into / stem
    with whole.open("wb") as file:
        for each in pieces:
            file.write(each.read_bytes())
            each.unlink()
    with whole.open("rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(named["digest"]):
            raise ValueError(f"{stem} was damaged on the way: bring all pieces again")
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(into / "site")
    whole.unlink()
    return True


def commands(name: str, pieces: list[Path]) -> list[str]:
    """One command a piece, for the top of the repository on the GPU machine; the last one checks too.

    Results go to the folder OUT, where that is set.
    """
    found = [f"python3 benchmarks/gpu_bundle.py receive {piece}" for piece in pieces]
    site = "build/gpu/site"
    # What the machine has set stays: its driver may be found by it.
    paths = f"PYTHONPATH=$PWD/{site}:$PWD:$PWD/plugins:$PYTHONPATH"
    paths += f" LD_LIBRARY_PATH=$PWD/{site}/cuquantum/lib:$LD_LIBRARY_PATH"
    check = f"python3 benchmarks/gpu_check.py --parts {BUNDLES[name].parts} --json ${{OUT:-.}}/{name}.json"
    return [*found[:-1], f"{found[-1]} && {paths} {check}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make")
    making.add_argument("name", choices=BUNDLES)
    making.add_argument("--have", type=Path, help="what `pip freeze` says on the GPU machine")
    making.add_argument("--into", type=Path, default=Path("build/bundles"))
    receiving = actions.add_parser("receive")
    receiving.add_argument("pieces", type=Path, nargs="+")
    receiving.add_argument("--into", type=Path, default=Path("build/gpu"))
    args = parser.parse_args()
    if args.action == "receive":
        for piece in args.pieces:
            print(f"{piece.name}: {'all is unpacked' if receive(piece, args.into) else 'waiting for the others'}")
        return
    bundle = BUNDLES[args.name]
    if bundle.resolved and args.have is None:
        parser.error(f"{args.name} needs --have FILE, what `pip freeze` says on the GPU machine")
    if bundle.resolved and shutil.which("uv") is None:
        parser.error(f"{args.name} needs uv to find what is missing: pip install uv")
    with tempfile.TemporaryDirectory() as temporary:
        gather(bundle, args.have, Path(temporary))
        pieces = pack(args.name, Path(temporary), args.into)
    for piece, command in zip(pieces, commands(args.name, pieces), strict=True):
        print(f"{piece.stat().st_size / 2**20:.1f} MiB   {command}")


if __name__ == "__main__":
    main()
