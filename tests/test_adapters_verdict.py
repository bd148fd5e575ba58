"""One odd adapter is that adapter's rejection: it ends no start, no publishing and no `inspect`."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from registry_support import Place, eventually, make, make_lora, tree
from safetensors.torch import save_file

from qaa_serve.adapters import (
    CONFIG_FILE,
    MAX_RANK,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterError,
    ModuleWeights,
    digest_of,
    judge,
    load_adapter,
    save_adapter,
)
from qaa_serve.inspection.report import describe_refused
from qaa_serve.registry import Catalogue, check_name, read_revision, revisions

#: Fresh at each run; QAA_TEST_SEED=<what a failing test printed> runs the same mutants again.
SEED = int(os.environ.get("QAA_TEST_SEED") or random.SystemRandom().randrange(2**31))
ROOT = Path(__file__).parents[1]
MAKERS = {"QAA": make, "LORA": make_lora}


# --------------------------------------------------------------------------------------------- many mutants


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 7, 512, 513, 100_000, 10**30, 10**400, -(2**63), 0.0, -0.0, 0.5, 8.0, 1e300,
    1e-320, math.nan, math.inf, -math.inf, "", " ", "8", "none", "true", "LORA", "QAA", "pissa", "all-linear",
    "x" * 9000, "\ud800", "\udcff", "\u202eabc", "a\nb", "\x00", "\x1b[31m", "ä" * 300, "../" * 2000, "/", "(",
    "(a|a)*b", ".*", "q_proj", [], [[]], [None], ["q_proj", 3], ["q_proj"] * 9000, [1, 2], {}, {"q_proj": 4},
    {"q_proj": None}, {"(": 1}, {"": 1}, {"a\nb": 8}, {"\ud800": 8}, {"x" * 5000: 8}, {"q_proj": 10**40},
    {"q_proj": 1e300}, {"q_proj": True}, nested(30),
]  # fmt: skip
KEYS = [
    "alora_invocation_tokens", "alpha", "alpha_pattern", "ansatz", "arrow_config", "auto_mapping", "bias",
    "constant", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "heads", "init_lora_weights",
    "kasa_config", "layer_replication", "layers", "layers_to_transform", "length", "lora_alpha", "lora_bias",
    "modules_to_save", "peft_type", "qaa_format", "r", "rank_pattern", "readouts", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "use_rslora", "a\nb", "\ud800", "\u202e", "", "é", "k" * 5000,
]  # fmt: skip


def mutant_of(config: dict[str, Any], dice: random.Random) -> bytes:
    """A config with one to three odd changes, as the bytes of a file."""
    config = copy.deepcopy(config)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        kind = dice.randrange(8)
        if kind == 0 and config:
            config.pop(dice.choice(sorted(config)))
        elif kind == 1 and config:
            config[dice.choice(KEYS)] = config.pop(dice.choice(sorted(config)))
        elif kind == 2:
            config[dice.choice(KEYS)] = [dice.choice(ODD), dice.choice(ODD)]
        elif kind == 3:
            config[dice.choice(KEYS)] = {dice.choice(KEYS): dice.choice(ODD)}
        else:
            config[dice.choice([*config, *KEYS])] = dice.choice(ODD)
    raw = json.dumps(config, ensure_ascii=dice.random() < 0.7).encode(errors="surrogatepass")
    kind = dice.randrange(40)
    if kind == 0:
        at = dice.randrange(len(raw))
        return raw[:at] + dice.randbytes(3) + raw[at + dice.randrange(3) :]
    if kind == 1:
        return b'{"r": 1, ' + raw[1:] if dice.random() < 0.5 else b"\xef\xbb\xbf" + raw
    if kind == 2:
        depth = dice.choice((500, 990, 100_000))
        return b'{"x": ' + b"[" * depth + b"]" * depth + b", " + raw[1:]
    if kind == 3:
        return b'{"x": 1e999, ' + raw[1:]
    return raw


def verdict_of(directory: Path) -> str | None:
    """Why an adapter is refused; None if it is taken, and then what is told of it can be told as JSON."""
    try:
        revision = read_revision(directory, "a")
    except AdapterError as error:
        message = str(error)
        assert "\n" not in message
        assert message.isprintable()
        assert 20 < len(message) <= 1000
        assert CONFIG_FILE in message or WEIGHTS_FILE in message, message
        assert "Error:" not in message, f"nobody foresaw it: {message}"
        return message
    json.dumps([revision.details, revision.base, revision.rank], allow_nan=False, ensure_ascii=False).encode()
    assert 1 <= revision.rank <= MAX_RANK
    return None


@pytest.mark.parametrize("kind", MAKERS)
def test_mutants_of_a_config_are_refused_or_sound(tmp_path: Path, kind: str) -> None:
    print(f"QAA_TEST_SEED={SEED}")
    dice = random.Random(SEED)
    directory = MAKERS[kind](tmp_path / "a")
    config = json.loads((directory / CONFIG_FILE).read_text())
    if kind == "LORA":
        config |= json.loads((ROOT / "examples/assistant/adapters/brief-lora" / CONFIG_FILE).read_text()) | {
            "r": 4
        }
    assert verdict_of(directory) is None
    refused = 0
    for number in range(3000):
        raw = mutant_of(config, dice)
        (directory / CONFIG_FILE).write_bytes(raw)
        if (reason := verdict_of(directory)) is not None:
            refused += 1
            if number % 20 == 0:
                told = describe_refused(directory, AdapterError(reason)).to_json()
                json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    assert 300 < refused < 3000


@pytest.mark.slow
def test_what_is_taken_of_the_mutants_vllm_takes_too(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm_qaa.lora_check import check

    print(f"QAA_TEST_SEED={SEED}")
    dice = random.Random(SEED)
    directory = make_lora(tmp_path / "a")
    config = json.loads((directory / CONFIG_FILE).read_text())
    taken = 0
    for _ in range(2000):
        (directory / CONFIG_FILE).write_bytes(mutant_of(config, dice))
        if verdict_of(directory) is None:
            taken += 1
            check(directory, ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    assert taken > 100


def odd_header(raw: bytes, dice: random.Random) -> bytes:
    """Weights whose header claims other things."""
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = dice.choice(sorted(header.keys() - {"__metadata__"}))
    odd = dice.choice(
        [*ODD, "F32", "BF16", "I8", "F8_E4M3", "F4", [4, 16], [16, 4], [64], [2**40, 2**40], [0, 2**60]]
    )
    if dice.random() < 0.5:
        header[name][dice.choice(["dtype", "shape", "data_offsets", "more"])] = odd
    elif dice.random() < 0.5:
        header[str(dice.choice(KEYS))] = header.pop(name)
    else:
        header[dice.choice([name, "__metadata__", "x"])] = odd
    changed = json.dumps(header).encode()
    return struct.pack("<Q", dice.choice([len(changed)] * 9 + [2**63, 0, 10**9])) + changed + raw[8 + length :]


def damage(raw: bytes, dice: random.Random) -> bytes:
    """Weights that were cut, flipped or written over."""
    damaged = bytearray(raw)
    place = dice.randrange(len(damaged)) if dice.random() < 0.5 else dice.randrange(min(300, len(damaged)))
    kind = dice.randrange(3)
    if kind == 0:
        damaged[place] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del damaged[place:]
    else:
        damaged[place : place + dice.randrange(20)] = dice.randbytes(dice.randrange(20))
    return bytes(damaged)


@pytest.mark.parametrize("change", [odd_header, damage])
@pytest.mark.parametrize("kind", MAKERS)
def test_mutants_of_weights_are_refused_or_sound(
    tmp_path: Path, kind: str, change: Callable[[bytes, random.Random], bytes]
) -> None:
    print(f"QAA_TEST_SEED={SEED}")
    dice = random.Random(SEED)
    directory = MAKERS[kind](tmp_path / "a")
    sound = (directory / WEIGHTS_FILE).read_bytes()
    refused = 0
    for _ in range(1000):
        (directory / WEIGHTS_FILE).write_bytes(change(sound, dice))
        refused += verdict_of(directory) is not None
    assert refused > 200


# --------------------------------------------------------------------------------------- whatever goes wrong


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), RecursionError("deep"), KeyError("x")]
)
def test_what_nobody_foresaw_is_the_refusal_of_that_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(directory: Path) -> Any:
        raise error

    good, bad = make(tmp_path / "good"), make(tmp_path / "bad", 2)
    contents = Place(tmp_path).make_contents()
    with monkeypatch.context() as patch:
        patch.setattr("qaa_serve.adapters.verdict.read_config", fail)
        with pytest.raises(AdapterError, match=r"cannot be read .*; save the adapter again") as caught:
            asyncio.run(contents.admit("bad", bad))
    assert type(error).__name__ in str(caught.value) or "Input/output" in str(caught.value)
    assert tree(contents.state.directory / "objects") == []
    assert list(contents.state.directory.glob(".staging-*")) == []
    assert asyncio.run(contents.admit("good", good)).digest == digest_of(good)
    # Memory and disks recover; what else went wrong will do so again, and is not tried at each start.
    passes = isinstance(error, (MemoryError, OSError))
    assert (contents.index.verdict(digest_of(bad)) is None) == passes
    contents.close()


def test_ctrl_c_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a")
    monkeypatch.setattr(
        "qaa_serve.adapters.verdict.read_config", lambda directory: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        judge(tmp_path / "a")


def test_memory_that_is_not_there_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(raw: bytes) -> Any:
        raise MemoryError

    monkeypatch.setattr("qaa_serve.adapters.files.load_safetensors", fail)
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} cannot be read .MemoryError"):
        judge(make(tmp_path / "a"))


def test_odd_neighbours_do_not_keep_an_adapter_from_being_served(tmp_path: Path) -> None:
    place = Place(tmp_path)
    make(place.adapters / "good")
    odd: dict[str, dict[str, Any]] = {
        "r": {"r": 100_000},
        "list": {"rank_pattern": [1]},
        "base": {"base_model_name_or_path": 3},
        "x" * 200: {},
    }
    for name, changes in odd.items():
        make_lora(place.adapters / name)
        config = json.loads((place.adapters / name / CONFIG_FILE).read_text()) | changes
        (place.adapters / name / CONFIG_FILE).write_text(json.dumps(config))
    make(place.adapters / "other")
    (place.adapters / "loop").symlink_to("loop")
    (place.adapters / "gone").symlink_to("nowhere")
    (place.adapters / "a file").write_text("x")

    async def body(catalogue: Catalogue) -> None:
        await eventually(lambda: not catalogue.counts["known"], "all are checked")
        states = {name: entry.state for name, entry in catalogue.entries.items()}
        assert states == {"good": "served", **dict.fromkeys([*odd, "other"], "rejected")}
        rejections = [e.rejection for e in catalogue.entries.values() if e.rejection is not None]
        assert {rejection.name: rejection.kind for rejection in rejections} == {
            "r": "invalid", "list": "invalid", "base": "invalid", "x" * 200: "name", "other": "name",
        }  # fmt: skip

    place.serve(body, check=True)


def test_a_qaa_rank_that_vllm_has_no_room_for_is_refused(tmp_path: Path) -> None:
    config = AdapterConfig(base_model_name_or_path="x", target_modules=("q_proj",), heads=64)
    theta = torch.zeros(64, *config.circuit(9).theta_shape)
    save_adapter(tmp_path / "a", config, {"q_proj": ModuleWeights(theta, torch.zeros(2, 576))})
    assert load_adapter(tmp_path / "a").rank == 576
    with pytest.raises(
        AdapterError, match=r"rank 576 .heads x readouts. and vLLM takes up to 512: train with fewer"
    ):
        judge(tmp_path / "a")


@pytest.mark.parametrize("name", ["other", "unknown"])
def test_names_that_the_metrics_use_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match=f"'{name}' cannot be an adapter's name: in the metrics it stands for"):
        check_name(name)
    check_name(name + "-1")
    labels = pytest.importorskip("qaa_serve.server.metrics.labels")
    assert labels.RESERVED == revisions.RESERVED_NAMES


# ----------------------------------------------------------------------------------------------------- sizes


def bytes_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def sparse(directory: Path, size: int, header: dict[str, Any] | None = None) -> Path:
    """Weights of so many bytes that take no room on the disk."""
    with (directory / WEIGHTS_FILE).open("wb") as file:
        if header is not None:
            raw = json.dumps(header).encode()
            file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(size)
    return directory


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("way", ["judge", "check", "admit"])
def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, kind: str, way: str) -> None:
    place = Place(tmp_path)
    directory = sparse(MAKERS[kind](place.adapters / "a"), 3 << 30)
    contents = place.make_contents(max_bytes=1 << 30, state_bytes=8 << 30)
    ways: dict[str, Callable[[], Any]] = {
        "judge": lambda: judge(directory, max_bytes=1 << 30),
        "check": lambda: contents.check_now("a", contents.source.list().adapters["a"]),
        "admit": lambda: asyncio.run(contents.admit("a", directory)),
    }
    before = bytes_read()
    with pytest.raises(AdapterError) as caught:
        ways[way]()
    assert bytes_read() - before < 1 << 20
    assert str(caught.value) == f"{WEIGHTS_FILE} has 3,221,225,472 bytes; at most 1,073,741,824 are read"
    assert tree(contents.state.directory / "objects") == []
    contents.close()


NAME = "base_model.model.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, "of its 3,221,225,472 bytes 0 would be the header"),
        ({}, "its tensors take 0 bytes"),
        (
            {NAME: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}},
            "its tensors take 4,611,686",
        ),
        (
            {NAME: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}},
            "has 64 bytes, which are not those of",
        ),
        ({NAME: {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, "in its header"),
        (
            {
                NAME: {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]},
                NAME + "x": {"dtype": "F32", "shape": [2**28], "data_offsets": [4, 2**30 + 4]},
            },
            "its tensors overlap",
        ),
    ],
)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_header_that_does_not_fit_the_file_is_refused_before_the_rest_is_read(
    tmp_path: Path, kind: str, header: dict[str, Any] | None, part: str
) -> None:
    directory = sparse(MAKERS[kind](tmp_path / "a"), 3 << 30, header)
    before = bytes_read()
    with pytest.raises(AdapterError, match="damaged") as caught:
        judge(directory)
    assert part in str(caught.value)
    assert bytes_read() - before < 1 << 20


# ----------------------------------------------------------------------------------------------------- links


def hub(cache: Path, source: Path, repository: str = "models--org--support") -> Path:
    """A snapshot as the Hugging Face hub's cache keeps it: files are links into blobs/."""
    snapshot = cache / repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / repository / "blobs").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(source / name, cache / repository / "blobs" / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return snapshot


@pytest.mark.parametrize("kind", MAKERS)
def test_a_snapshot_of_the_hub_is_served(tmp_path: Path, kind: str) -> None:
    source = MAKERS[kind](tmp_path / "source")
    snapshot = hub(tmp_path / "cache", source)
    place = Place(tmp_path)
    (place.adapters / "support").symlink_to(snapshot)

    async def body(catalogue: Catalogue) -> None:
        async with catalogue.use("support") as revision:
            assert revision.digest == digest_of(source)

    place.serve(body)
    assert not any(path.is_symlink() for path in place.state.rglob("*"))


def test_an_adapter_in_a_folder_of_a_snapshot_is_served(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    folder = hub(tmp_path / "cache", source) / "adapter"
    folder.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).symlink_to(f"../../../blobs/blob-{name}")
    assert judge(folder).digest == digest_of(source)


@pytest.mark.parametrize("target", ["{cache}/secret", "../../../secret", "../../../models--org--b/blobs/blob-x"])
def test_a_link_out_of_the_hub_s_repository_is_refused(tmp_path: Path, target: str) -> None:
    source = make(tmp_path / "source")
    snapshot = hub(tmp_path / "cache", source)
    hub(tmp_path / "cache", source, "models--org--b")
    for place in ("secret", "models--org--b/blobs/blob-x"):
        shutil.copy(source / WEIGHTS_FILE, tmp_path / "cache" / place)
    (snapshot / WEIGHTS_FILE).unlink()
    (snapshot / WEIGHTS_FILE).symlink_to(target.format(cache=tmp_path / "cache"))
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is a link that leaves the adapter's directory"):
        judge(snapshot)


@pytest.mark.parametrize("repository", ["support", "datasets--org--x"])
def test_what_only_looks_like_the_hub_s_cache_is_no_exception(tmp_path: Path, repository: str) -> None:
    snapshot = hub(tmp_path / "cache", make(tmp_path / "source"), repository)
    with pytest.raises(AdapterError, match="is a link that leaves the adapter's directory"):
        judge(snapshot)


def test_without_blobs_it_is_not_the_hub_s_cache(tmp_path: Path) -> None:
    snapshot = hub(tmp_path / "cache", make(tmp_path / "source"))
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(blobs.with_name("files"))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(f"../../files/blob-{name}")
    with pytest.raises(AdapterError, match="is a link that leaves the adapter's directory"):
        judge(snapshot)


def test_an_adapter_of_the_largest_rank_is_taken(tmp_path: Path) -> None:
    directory = make_lora(tmp_path / "a", r=MAX_RANK)
    tensors = {"q_proj.lora_A.weight": torch.ones(MAX_RANK, 4), "q_proj.lora_B.weight": torch.ones(4, MAX_RANK)}
    save_file(tensors, directory / WEIGHTS_FILE)
    assert judge(directory).rank == MAX_RANK
