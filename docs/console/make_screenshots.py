"""Make the pictures of docs/console.md: python docs/console/make_screenshots.py.

Serves a copy of the bundled example with a console before it, asks it, and takes the pictures with chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import httpx
from console_support import browser, console, tab, type_keys
from server_process import ADMIN_KEY, ServerProcess, serve_command

QUESTION = "What is the capital of France?"


def ask_in_turn(url: str, stop: threading.Event) -> None:
    """Give the server something to show until it is told to stop."""
    models = ("assistant", "json", "pirate", "pirate", "brief")
    number = 0
    with httpx.Client(timeout=60) as client:
        while not stop.wait(0.5):
            number += 1
            messages = [{"role": "user", "content": f"{QUESTION} ({number})"}]
            body = {"model": models[number % len(models)], "messages": messages, "max_tokens": 24}
            client.post(f"{url}/v1/chat/completions", json=body)


def main() -> None:
    """Make them all."""
    from playwright.sync_api import Page

    def keep(page: Page, name: str) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(1500)  # animations end
        page.screenshot(path=HERE / f"{name}.png")

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for part in ("base", "adapters"):
            shutil.copytree(ROOT / "examples" / "assistant" / part, place / part)
        example = str(ROOT / "examples" / "assistant")
        command = [word.replace(example, str(place)) for word in serve_command("assistant")]
        server = ServerProcess([*command, "--state-dir", str(place / "state")], place / "log", forked=True)
        stop = threading.Event()
        try:
            server.wait_ready()
            asking = threading.Thread(target=ask_in_turn, args=(server.url, stop), daemon=True)
            asking.start()
            with (
                console(server.url, place / "console.log", "--adapters", str(place / "adapters")) as url,
                browser() as chromium,
                tab(chromium, url, viewport={"width": 1100, "height": 640}) as page,
            ):
                type_keys(page, admin=ADMIN_KEY)
                for number, model in enumerate(("assistant", "json", "pirate"), 1):
                    page.get_by_label(f"Model {number}").fill(model)
                page.get_by_label("Prompt", exact=True).fill(QUESTION)
                page.get_by_role("button", name="Ask").click()
                page.locator("mark").first.wait_for()
                keep(page, "try")
                page.get_by_role("tab", name="Adapters").click()
                page.get_by_role("link", name="pirate", exact=True).wait_for()
                keep(page, "adapters")
                page.get_by_role("button", name="Dark or light").click()
                page.set_viewport_size({"width": 1100, "height": 900})
                page.get_by_role("tab", name="Now").click()
                page.wait_for_timeout(45_000)  # so that there is something to show
                keep(page, "now")
                stop.set()
                page.get_by_role("button", name="Dark or light").click()
                page.get_by_role("tab", name="Look inside").click()
                page.get_by_label("Adapter", exact=True).fill("pirate")
                page.get_by_role("button", name="Look", exact=True).click()
                page.get_by_alt_text("the circuit with its trained angles").wait_for(timeout=300_000)
                page.set_viewport_size({"width": 1100, "height": 1020})
                page.get_by_text("What qaa-serve inspect says").evaluate("heading => heading.scrollIntoView()")
                keep(page, "inside")
        finally:
            stop.set()
            server.stop()
    sizes = {picture.name: picture.stat().st_size for picture in sorted(HERE.glob("*.png"))}
    print(sizes, sum(sizes.values()))


if __name__ == "__main__":
    main()
