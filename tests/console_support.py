"""A console in a process of its own, and a real browser before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from server_process import BIN, free_port

CHROMIUM = Path("/usr/bin/chromium")


def need_a_browser() -> None:
    """Skip the module where there is none, or what the console is made of is missing."""
    pytest.importorskip("nicegui", reason="the extra `console` is not installed")
    pytest.importorskip("playwright", reason="playwright, which drives the browser, is not installed")
    if not CHROMIUM.exists():
        pytest.skip("Debian's chromium is not installed", allow_module_level=True)


@contextmanager
def console(url: str, log: Path, *more: str) -> Iterator[str]:
    """`qaa-serve console` for a server; gives the page's address."""
    port = free_port()
    # NiceGUI serves nobody where it believes to be in a test of its own.
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [BIN / "qaa-serve", "console", "--url", url, "--port", str(port), *more],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
            env=environment,
        )
    try:
        deadline = time.monotonic() + 120
        while "Console on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def browser():
    """Chromium without a window."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # its five seconds are too few on a busy machine
    with sync_playwright() as driver:
        # Without its sandbox, which a container's root cannot have; it is shown our own pages only.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def tab(chromium, url: str, path: str = "/", **context):
    """A new tab on the console; at its end, nothing was asked of anybody else, and no script has failed."""
    with chromium.new_context(**context) as private:
        page = private.new_page()
        page.set_default_timeout(60_000)
        elsewhere: list[str] = []
        failed: list[str] = []
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "data:", "blob:")) else elsewhere.append(request.url)
            ),
        )
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(url + path)
        yield page
        assert elsewhere == []
        assert failed == []


def type_keys(page, client: str = "", admin: str = "") -> None:
    """Give the page its keys, as somebody does who has them."""
    page.get_by_role("button", name="Keys").click()
    page.get_by_label("Client key").fill(client)
    page.get_by_label("Admin key").fill(admin)
    page.get_by_role("button", name="Use", exact=True).click()
    page.get_by_label("Admin key").wait_for(state="hidden")


def qaa_serve(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "qaa_serve.cli", *arguments], capture_output=True, text=True, timeout=120, **options
    )
