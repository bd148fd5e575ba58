"""benchmarks/gpu_bundle.py: what was packed is what is unpacked, in pieces that may travel."""

from __future__ import annotations

import os
from pathlib import Path

import gpu_bundle
import pytest


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "from"
    for name, size in (("vllm/big.so", 5000), ("vllm/__init__.py", 10), ("empty/__init__.py", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    return folder


def test_pieces_are_small_and_arrive_in_any_order(site: Path, tmp_path: Path) -> None:
    pieces = gpu_bundle.pack("serving", site, tmp_path / "bundles", piece_bytes=2000)
    assert len(pieces) > 2
    assert max(piece.stat().st_size for piece in pieces) <= 2000
    there = tmp_path / "there"
    assert [gpu_bundle.receive(piece, there) for piece in reversed(pieces)] == [False] * (len(pieces) - 1) + [True]
    files = [path.relative_to(site) for path in site.rglob("*") if path.is_file()]
    assert {path.relative_to(there / "site") for path in there.rglob("*") if path.is_file()} == {*files}
    assert all((there / "site" / file).read_bytes() == (site / file).read_bytes() for file in files)


def test_a_damaged_piece_is_noticed(site: Path, tmp_path: Path) -> None:
    first, *others = gpu_bundle.pack("serving", site, tmp_path / "bundles", piece_bytes=2000)
    first.write_bytes(os.urandom(2000))
    for piece in others:
        assert not gpu_bundle.receive(piece, tmp_path / "there")
    with pytest.raises(ValueError, match="damaged on the way"):
        gpu_bundle.receive(first, tmp_path / "there")
    assert not (tmp_path / "there" / "site").exists()


def test_what_is_no_piece_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no piece"):
        gpu_bundle.receive(tmp_path / "circuits.zip", tmp_path)


@pytest.mark.parametrize(
    ("bundle", "name", "comes"),
    [
        ("circuits", "cuquantum/__init__.py", False),
        ("circuits", "cuquantum/bindings/custatevec.cpython-312-x86_64-linux-gnu.so", True),
        ("circuits", "cuquantum/bindings/cycustatevec.cpython-312-x86_64-linux-gnu.so", True),
        ("circuits", "cuquantum/bindings/_internal/custatevec.cpython-312-x86_64-linux-gnu.so", True),
        ("circuits", "cuquantum/bindings/_utils.cpython-312-x86_64-linux-gnu.so", True),
        ("circuits", "cuquantum/bindings/cutensornet.cpython-312-x86_64-linux-gnu.so", False),
        ("circuits", "cuquantum/lib/libcustatevec.so.1", True),
        ("circuits", "cuda/pathfinder/__init__.py", True),
        ("serving", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", False),
        ("serving", "vllm/vllm_flash_attn/__init__.py", True),
        ("serving", "vllm/_C.abi3.so", True),
        ("serving", "vllm-0.26.0.dist-info/METADATA", True),
    ],
)
def test_which_files_come_along(bundle: str, name: str, comes: bool) -> None:
    assert gpu_bundle.wanted(name, gpu_bundle.BUNDLES[bundle].left_out) is comes


def test_the_last_command_checks(tmp_path: Path) -> None:
    first, last = gpu_bundle.commands("circuits", [Path("a.zip.1-of-2"), Path("a.zip.2-of-2")])
    assert first == "python3 benchmarks/gpu_bundle.py receive a.zip.1-of-2"
    assert last.endswith("gpu_check.py --parts 1 2 3 4 6 --json ${OUT:-.}/circuits.json")


def test_wheels_have_the_locks_versions() -> None:
    pins = gpu_bundle.LOCK.read_text().splitlines()
    circuits = gpu_bundle.locked(gpu_bundle.BUNDLES["circuits"].wheels)
    assert {name.partition("==")[0] for name in circuits} == {*gpu_bundle.BUNDLES["circuits"].wheels}
    assert all(wheel in pins for wheel in circuits)
    assert gpu_bundle.locked(("vllm==0.26.0",)) == ["vllm==0.26.0"]
