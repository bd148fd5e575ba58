"""The console where the server is large, away or broken: before a stand-in of its API; and its parts alone."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

pytest.importorskip("prometheus_client", reason="the server's packages are not installed")
from console_support import console, need_a_browser, qaa_serve

need_a_browser()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

from console_standin import CLIENT_KEY, REJECTION, StandIn
from playwright.sync_api import expect
from server_process import ADMIN_KEY, free_port


@pytest.fixture(scope="module")
def stand_in():
    stand_in = StandIn(10_000)
    yield stand_in
    stand_in.stop()


@pytest.fixture(scope="module")
def url(stand_in, tmp_path_factory):
    with console(stand_in.url, tmp_path_factory.mktemp("console") / "console.log") as url:
        yield url


@pytest.fixture
def keys() -> tuple[str, str]:
    return CLIENT_KEY, ADMIN_KEY


def test_ten_thousand_adapters_are_paged_and_searched_by_the_server(page):
    page.get_by_role("tab", name="Adapters").click()
    names = page.locator("tbody a")
    expect(page.get_by_text("10,000 adapters")).to_be_visible()
    expect(names).to_have_count(50)
    expect(names.first).to_have_text("a-00000")
    page.get_by_role("button", name="Next").click()
    expect(names.first).to_have_text("a-00050")
    page.get_by_role("button", name="Next").click()
    expect(names.first).to_have_text("a-00100")
    page.get_by_role("button", name="Previous").click()
    expect(names.first).to_have_text("a-00050")
    page.get_by_label("Part of the name").fill("0999")
    expect(names.first).to_have_text("a-00999")
    expect(names).to_have_count(11)
    expect(page.get_by_role("button", name="Next")).to_be_disabled()


def test_few_names_are_suggested_of_ten_thousand(page):
    page.get_by_label("Model 3").fill("a-0")
    suggested = page.locator("datalist").nth(2).locator("option")
    expect(suggested).to_have_count(20)
    page.get_by_label("Model 3").fill("a-051")
    expect(suggested).to_have_count(1)
    assert suggested.first.get_attribute("value") == "a-05100"


def test_a_server_that_goes_away_is_said_and_the_page_goes_on_when_it_is_back(page, stand_in):
    page.get_by_role("tab", name="Adapters").click()
    expect(page.locator("tbody a")).to_have_count(50)
    stand_in.stop()
    away = page.get_by_role("alert").filter(has_text="is away")
    expect(away).to_be_visible()
    page.get_by_role("tab", name="Try").click()
    page.get_by_label("Prompt", exact=True).fill("Are you there?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".qaa-card .qaa-bad").first).to_contain_text("does not answer")
    stand_in.start()
    expect(away).to_be_hidden()
    page.get_by_role("tab", name="Adapters").click()
    expect(page.locator("tbody a")).to_have_count(50)


def test_an_answer_that_breaks_off_stays_with_the_reason(page):
    page.get_by_label("Model 2").fill("")
    page.get_by_label("Prompt", exact=True).fill("What now?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".qaa-answer")).to_have_text("It begins")
    expect(page.locator(".qaa-card .qaa-bad")).to_have_text("the engine is gone")


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_who_stops_or_leaves_ends_the_request(page, stand_in, how):
    page.get_by_label("Model 2").fill("")
    page.get_by_label("Prompt", exact=True).fill("Talk for ever")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".qaa-answer")).to_have_text("It begins")
    assert "gone" not in stand_in.bodies[-1]
    if how == "stop":
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".qaa-card .qaa-bad")).to_have_text("stopped")
    else:
        page.close()
    deadline = time.monotonic() + 90
    while "gone" not in stand_in.bodies[-1]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_markup_in_an_answer_a_name_or_a_table_is_text(page):
    page.get_by_role("tab", name="Adapters").click()
    expect(page.get_by_role("cell", name=REJECTION["reason"], exact=True)).to_be_visible()
    page.get_by_role("tab", name="Try").click()
    page.get_by_label("Model 1").fill("<img src=x onerror=alert(1)>")
    page.get_by_label("Model 2").fill("")
    page.get_by_label("Prompt", exact=True).fill("<b>bold</b>")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".qaa-card").get_by_text("<img src=x onerror=alert(1)>")).to_be_visible()
    page.get_by_role("button", name="History").click()
    expect(page.get_by_role("dialog").get_by_text("<b>bold</b>").first).to_be_visible()


def test_it_ends_with_the_process_that_it_is_told_and_leaves_nothing(stand_in, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with console(stand_in.url, tmp_path / "log", "--end-with", str(other.pid)) as url:
        port = int(url.rpartition(":")[2])
        (served,) = (one for one in psutil.process_iter(["cmdline"]) if str(port) in (one.info["cmdline"] or []))
        assert [*(tmp_path / "tmp").iterdir()]
        other.communicate(b"\n")
        served.wait(60)
    with console(stand_in.url, tmp_path / "log"):
        pass
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_what_cannot_be_done_is_said(stand_in, tmp_path):
    taken = qaa_serve("console", "--port", str(stand_in.port))
    assert (taken.returncode, taken.stdout) == (2, "")
    assert "choose another --port" in taken.stderr
    missing = qaa_serve("console", "--port", str(free_port()), "--adapters", str(tmp_path / "none"))
    assert (missing.returncode, "no such directory" in missing.stderr) == (2, True)
