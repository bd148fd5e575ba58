"""The console's parts that need no page: what is read from /metrics, differences, and the help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="the server's packages are not installed")
pytest.importorskip("httpx", reason="the server's packages are not installed")

from qaa_serve.console.api import Api, connect
from qaa_serve.console.differences import mark
from qaa_serve.console.metrics import PERIOD_S, Observer, Use, read

ROOT = Path(__file__).parents[1]


def page(json: int, pirate: int, waits: dict[str, int] | None = None) -> str:
    """A page of /metrics: requests of two adapters; first tokens by upper bound."""
    lines = [
        "# HELP qaa_requests_total requests that ended",
        "# TYPE qaa_requests_total counter",
        f'qaa_requests_total{{adapter="json",endpoint="chat",outcome="success"}} {json}',
        f'qaa_requests_total{{adapter="pirate",endpoint="chat",outcome="server_error"}} {pirate}',
        "# TYPE qaa_device_memory_bytes gauge",
        'qaa_device_memory_bytes{device="0",kind="kv_cache"} 300',
        "# TYPE vllm:other_total counter",
        "vllm:other_total 1",
        "# TYPE qaa_time_to_first_token_seconds histogram",
    ]
    for endpoint in ("chat", "completions"):
        lines += [
            f'qaa_time_to_first_token_seconds_bucket{{adapter="json",endpoint="{endpoint}",le="{bound}"}} {count}'
            for bound, count in (waits or {}).items()
        ]
    return "\n".join([*lines, ""])


def test_series_are_summed_over_endpoints_for_each_adapter_and_for_all():
    look = read(page(3, 2, {"0.1": 1, "1.0": 4, "+Inf": 4}))
    assert look.total.total("qaa_requests_total") == 5
    assert look.total.errors == 2
    assert look.adapters["json"].total("qaa_requests_total", "success") == 3
    assert look.total.total("qaa_device_memory_bytes", "kv_cache") == 300
    assert look.adapters["json"].count("qaa_time_to_first_token_seconds") == 8


def waits(buckets: dict[str, float]) -> Use:
    """A histogram `w` by upper bound, as /metrics has it."""
    return Use({"w_bucket": buckets})


@pytest.mark.parametrize(("q", "seconds"), [(0.25, 0.1), (0.5, 0.4), (1.0, 1.0)])
def test_a_quantile_lies_between_the_bounds(q, seconds):
    assert waits({"0.1": 1, "1.0": 4, "+Inf": 4}).quantile("w", q) == pytest.approx(seconds)


def test_a_quantile_beyond_the_last_bound_is_that_bound_and_of_none_there_is_none():
    assert waits({"0.1": 0, "1.0": 1, "+Inf": 4}).quantile("w", 0.95) == 1.0
    assert waits({"0.1": 0, "+Inf": 0}).quantile("w", 0.5) is None
    assert Use().quantile("w", 0.5) is None


def test_what_was_added_is_told_also_over_a_restart_of_the_server():
    one, two, anew = (read(page(*counts)).total for counts in ((3, 2), (10, 2), (4, 0)))
    assert two.since(one).total("qaa_requests_total") == 7
    assert two.since(one).errors == 0
    assert two.since(one).total("qaa_device_memory_bytes", "kv_cache") == 300
    assert anew.since(two).total("qaa_requests_total") == 4


def test_the_last_minutes_are_kept_by_adapter_too():
    observer = Observer(Api(connect("http://127.0.0.1:9"), connect("http://127.0.0.1:9")))
    for number in range(1000):
        look = read(page(number, 0))
        look.time = 1e9 + number * PERIOD_S
        observer.keep(look)
    assert [step.added.total("qaa_requests_total") for step in observer.steps] == [1.0] * 300
    seconds, uses = observer.by_adapter(300)
    assert 200 < seconds <= 300
    assert uses["json"].total("qaa_requests_total") == pytest.approx(seconds / PERIOD_S)
    assert uses["pirate"].total("qaa_requests_total") == 0


def test_words_that_differ_are_marked_and_markup_is_text():
    first, second = mark(["The capital is Paris.", "The capital be <Paris>."])
    assert first == "The capital <mark>is</mark> Paris."
    assert second == "The capital <mark>be</mark> <mark>&lt;</mark>Paris<mark>&gt;</mark>."
    assert mark(["alone"]) == ["alone"]
    assert mark([]) == []


def test_the_help_needs_nothing_of_the_page():
    program = (
        "import sys; from qaa_serve.cli import main\n"
        "try: main(['console', '--help'])\n"
        "finally: assert not {'nicegui', 'fastapi', 'torch', 'httpx'} & {*sys.modules}, 'imported'"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "imported" not in ran.stderr, ran.stderr
    assert "--adapters DIR" in ran.stdout


def test_make_serve_starts_it_beside_the_server_which_goes_on_without_it(tmp_path):
    """The recipe of the Makefile, with a program that writes down how it was called in place of ours."""
    program = tmp_path / "bin" / "qaa-serve"
    program.parent.mkdir()
    log = tmp_path / "log"
    program.write_text(f'#!/bin/sh\necho "$$ $*" >> {log}\n[ $1 = serve ] && sleep 2 && exit 3\nexit 2\n')
    program.chmod(0o755)
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".installed-cpu").touch()
    made = subprocess.run(
        ["make", "serve", f"VENV={tmp_path}", "PORT=8123"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "--- Starting: " in made.stdout
    assert "Error 3" in made.stderr, "the server's status, not the console's"
    calls = {line.split()[1]: line.split() for line in log.read_text().splitlines()}
    asked = calls["console"]
    assert asked[asked.index("--end-with") + 1] == calls["serve"][0], "it ends with the server's process"
    assert asked[asked.index("--url") + 1] == "http://127.0.0.1:8123"


def test_another_python_is_refused_with_what_to_do(tmp_path):
    program = tmp_path / "python3.14"
    program.write_text(
        f"#!{sys.executable}\nimport sys\ncode = sys.argv[2]\n"
        "sys.version_info, sys.version = (3, 14, 0), '3.14.0 (main)'\nexec(code)\n"
    )
    program.chmod(0o755)
    made = subprocess.run(
        ["make", "venv", f"VENV={tmp_path / 'venv'}", f"PYTHON={program}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert made.returncode == 2
    assert "Python 3.11 to 3.13 is needed, found 3.14.0: PYTHON=" in made.stderr
    assert not (tmp_path / "venv").exists()


def test_set_up_says_what_it_does_before_each_long_stage_and_hides_no_error(tmp_path):
    """The recipe of the Makefile, with a stand-in of Python that fails to install the second time."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "ran $*"; echo >> {tmp_path}/calls\n'
        f'[ $(wc -l < {tmp_path}/calls) = 2 ] && echo "ERROR: no such package" >&2 && exit 1\nexit 0\n'
    )
    program.chmod(0o755)
    made = subprocess.run(
        ["make", "venv", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2
    assert "ERROR: no such package" in made.stderr
    said = [line for line in made.stdout.splitlines() if line.startswith(("--- ", "ran "))]
    assert [line.split()[0] for line in said] == ["---", "ran", "---", "ran"]
    assert ("torch" in said[0], "vLLM" in said[2]) == (True, True)
