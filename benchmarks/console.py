"""How soon the console's page is ready, and whether it ever stands still while 10,000 adapters are listed.

    python benchmarks/console.py [--adapters 10000] [--loads 5]

A stand-in of the server's API, a console before it, and Debian's chromium, all on this machine. A task of the page
that wants to run every 5 ms notes the longest time that it had to wait. Beside it is the processor time that the
page's thread took in all, which hardly depends on what else runs here.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from console_standin import CLIENT_KEY, StandIn
from console_support import browser, console, tab, type_keys
from server_process import ADMIN_KEY

WATCH = """
() => {
    window.longest = 0;
    let last = performance.now();
    setInterval(() => {
        const now = performance.now();
        window.longest = Math.max(window.longest, now - last);
        last = now;
    }, 5);
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=5)
    args = parser.parse_args()
    stand_in = StandIn(args.adapters)
    with tempfile.TemporaryDirectory() as scratch, console(stand_in.url, Path(scratch) / "log") as url:
        ready, pauses, work = [], {}, {}
        with browser() as chromium:
            for _ in range(args.loads):
                start = time.perf_counter()
                with tab(chromium, url) as page:  # nothing is in the browser's cache
                    page.get_by_role("button", name="Ask").wait_for()
                    ready.append(time.perf_counter() - start)
            with tab(chromium, url) as page:
                type_keys(page, CLIENT_KEY, ADMIN_KEY)
                page.evaluate(WATCH)
                names = page.locator("tbody a")
                thread = page.context.new_cdp_session(page)
                thread.send("Performance.enable", {"timeDomain": "threadTicks"})

                def task_ms() -> float:
                    told = thread.send("Performance.getMetrics")["metrics"]
                    return 1000 * next(one["value"] for one in told if one["name"] == "TaskDuration")

                def measure(what: str, text: str) -> None:
                    names.filter(has_text=text).first.wait_for()
                    page.wait_for_timeout(300)
                    pauses[what] = page.evaluate("() => { const it = longest; longest = 0; return it; }")
                    work[what] = task_ms() - sum(work.values())

                work["before"] = task_ms()
                page.get_by_role("tab", name="Adapters").click()
                measure("first page", "a-00000")
                for number in range(1, 6):
                    page.get_by_role("button", name="Next").click()
                    measure(f"page {number + 1}", f"a-{50 * number:05}")
                page.get_by_label("Part of the name").fill("999")
                measure("search", "a-00999")
        print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
        print(f"page ready, s: median {median(ready):.2f}, most {max(ready):.2f} of {args.loads}")
        print(f"{args.adapters} adapters, longest pause, ms:", {what: round(ms) for what, ms in pauses.items()})
        print("processor time of the page's thread, ms:", {what: round(ms) for what, ms in work.items()})
    stand_in.stop()


if __name__ == "__main__":
    main()
