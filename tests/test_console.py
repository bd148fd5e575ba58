"""The console in a real browser, before a real server of the bundled example: each thing it offers, done once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
from console_support import console, need_a_browser, tab, type_keys

need_a_browser()
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

from playwright.sync_api import Page, expect
from server_process import ADMIN_KEY, ServerProcess, serve_command

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "assistant"
ALL_KEY, TEAM_KEY = "key-for-all-models", "key-for-one-model"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A copy of the example, whose adapters are changed."""
    root = tmp_path_factory.mktemp("console")
    for part in ("base", "adapters"):
        shutil.copytree(EXAMPLE / part, root / part)
    (root / "keys").write_text(f"all: {ALL_KEY}\nteam: {TEAM_KEY} json\n")
    return root


@pytest.fixture(scope="module")
def server(place):
    command = [
        word.replace(str(EXAMPLE / "adapters"), str(place / "adapters")) for word in serve_command("assistant")
    ]
    command += ["--api-key-file", str(place / "keys"), "--state-dir", str(place / "state")]
    server = ServerProcess(command, place / "server.log", forked=True)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def url(server, place):
    with console(server.url, place / "console.log", "--adapters", str(place / "adapters")) as url:
        yield url


@pytest.fixture
def keys() -> tuple[str, str]:
    return ALL_KEY, ADMIN_KEY


def ask(page: Page, prompt: str, *models: str) -> None:
    """Fill the form, ask, and wait for all answers."""
    for number in range(4):
        page.get_by_label(f"Model {number + 1}").fill(models[number] if number < len(models) else "")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask").click()
    for model in models:
        expect(card(page, model).locator(".qaa-facts")).to_contain_text("token")


def card(page: Page, model: str):
    return page.locator(f"section[aria-label='{model}']")


def answer(page: Page, model: str):
    return card(page, model).locator(".qaa-answer")


def open_adapter(page: Page, name: str) -> None:
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_text("History", exact=True)).to_be_visible()


def change(page: Page, button, confirm: str) -> dict:
    """Press a button, confirm, and give the audit line that is shown."""
    shown = page.get_by_label("Audit line")
    before = shown.text_content() if shown.is_visible() else ""
    button.click()
    page.get_by_role("dialog").get_by_role("button", name=confirm, exact=True).click()
    expect(shown).not_to_have_text(before or "-")  # it may be empty for a moment
    expect(shown).to_contain_text('"action"')
    return json.loads(shown.text_content())


def upload(page: Page, name: str, directory: Path) -> dict:
    """Drop the files of a directory onto the page, and put them under a name."""
    page.get_by_role("tab", name="Adapters").click()
    if not page.get_by_label("Adapter's name").is_visible():
        page.get_by_text("Upload an adapter").click()
    files = {
        file: list((directory / file).read_bytes())
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    dropped = page.evaluate_handle(
        """files => {
            const dropped = new DataTransfer();
            for (const [name, bytes] of Object.entries(files))
                dropped.items.add(new File([new Uint8Array(bytes)], name));
            return dropped;
        }""",
        files,
    )
    page.dispatch_event(".q-uploader", "dragover", {"dataTransfer": dropped})
    page.dispatch_event(".q-uploader__dnd", "drop", {"dataTransfer": dropped})
    expect(page.get_by_text(re.compile("adapter_config.json: .*adapter_model.safetensors: "))).to_be_visible()
    page.get_by_label("Adapter's name").fill(name)
    return change(page, page.get_by_role("button", name="Upload", exact=True), "Upload")


# ------------------------------------------------------------------------------------------------------------- try


def test_models_answer_side_by_side_with_their_times_and_differences(page):
    ask(page, QUESTION, "assistant", "json", "pirate")
    expect(answer(page, "assistant")).to_have_text("The capital of France is Paris.")
    expect(answer(page, "json")).to_have_text('{"answer": "Paris"}')
    expect(answer(page, "pirate")).to_have_text("Ahoy, the capital of France be Paris, matey!")
    facts = card(page, "json").locator(".qaa-facts")
    expect(facts).to_have_text(
        re.compile(r"first token after \S+ m?s · [\d.e+]+ tokens/s · \d+ tokens · json@[0-9a-f]{12}")
    )
    assert {"Ahoy", "be", "matey"} <= {*answer(page, "pirate").locator("mark").all_text_contents()}
    assert "Paris" not in answer(page, "pirate").locator("mark").all_text_contents()
    page.get_by_role("switch", name="Mark differences").click()
    expect(answer(page, "pirate").locator("mark")).to_have_count(0)


def test_system_prompt_sampling_and_structure_reach_the_server(page):
    page.get_by_text("System prompt, sampling").click()
    page.get_by_label("Most tokens").fill("3")
    ask(page, QUESTION, "assistant")
    expect(card(page, "assistant").locator(".qaa-facts")).to_contain_text("· 3 tokens")
    page.get_by_label("Most tokens").fill("64")
    page.get_by_label("The answer is").click()
    page.get_by_role("option", name="One of these lines").click()
    page.get_by_label("Schema, expression or lines").fill("certainly\nnever")
    ask(page, QUESTION, "assistant", "pirate")
    for model in ("assistant", "pirate"):
        expect(answer(page, model)).to_have_text(re.compile("^(certainly|never)$"))
    page.get_by_label("The answer is").click()
    page.get_by_role("option", name="JSON of a schema").click()
    page.get_by_label("Schema, expression or lines").fill('{"type": ')
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("the schema is no JSON")).to_be_visible()


def test_a_request_is_copied_as_a_command_and_as_a_program_that_work(page):
    ask(page, QUESTION, "json", "pirate")
    environment = os.environ | {"QAA_KEY": ALL_KEY}
    for button, how in (
        ("Copy as curl", ["bash", "-c"]),
        ("Copy as Python", [sys.executable, "-c"]),
    ):
        page.get_by_role("button", name=button).click()
        page.get_by_role("dialog").get_by_role("button", name="Close").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert ALL_KEY not in copied
        ran = subprocess.run([*how, copied], capture_output=True, text=True, env=environment, timeout=120)
        assert "Paris" in ran.stdout, ran.stderr
        assert "matey" in ran.stdout, ran.stderr


def test_the_history_is_the_browsers_and_brings_an_answer_back(page, chromium, url):
    ask(page, QUESTION, "pirate")
    expect(answer(page, "pirate")).to_contain_text("matey")
    page.reload()
    page.get_by_role("button", name="History").click()
    page.get_by_role("dialog").get_by_text(QUESTION).click()
    expect(answer(page, "pirate")).to_contain_text("matey")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(QUESTION)
    stored = page.evaluate("JSON.stringify(localStorage)")
    assert QUESTION in stored
    assert ALL_KEY not in stored
    assert ADMIN_KEY not in stored
    with tab(chromium, url) as other:
        other.get_by_role("button", name="History").click()
        expect(other.get_by_text("Nothing was asked in this browser yet.")).to_be_visible()
    page.get_by_role("button", name="History").click()
    page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    page.wait_for_function("localStorage.getItem('qaa-history') === null")


def test_an_error_is_shown_beside_the_other_answers(page):
    page.get_by_label("Model 1").fill("assistant")
    page.get_by_label("Model 2").fill("nobody")
    page.get_by_label("Prompt", exact=True).fill(QUESTION)
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(answer(page, "assistant")).to_contain_text("Paris")
    expect(card(page, "nobody").locator(".qaa-bad")).to_contain_text("nobody")


# -------------------------------------------------------------------------------------------------------- adapters


def test_the_list_says_what_is_served_and_how_it_was_used(page, server):
    ask(page, QUESTION, "brief-lora")
    page.get_by_role("tab", name="Adapters").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="brief-lora", exact=True))
    for text in ("served", "LORA", server.adapter("brief-lora")["revision"].partition("@")[2]):
        expect(row).to_contain_text(text)
    page.get_by_role("button", name="Refresh").click()  # it does so every ten seconds too, with newer /metrics
    expect(row.get_by_role("cell").nth(7)).to_have_text(re.compile("[1-9]"))
    expect(row.get_by_role("cell").nth(8)).to_have_text(re.compile("s$"))
    page.get_by_label("Part of the name").fill("pira")
    expect(page.get_by_role("link", name="brief-lora", exact=True)).to_have_count(0)
    expect(page.get_by_role("link", name="pirate", exact=True)).to_be_visible()


def test_a_change_asks_first_and_shows_the_audit_line_after(page, server):
    open_adapter(page, "brief")
    page.get_by_role("button", name="Pin", exact=True).first.click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert server.adapter("brief")["pinned"] is False
    line = change(page, page.get_by_role("button", name="Pin", exact=True).first, "Pin")
    assert (line["action"], line["adapter"], line["result"]) == ("pin", "brief", "ok")
    assert server.adapter("brief")["pinned"] is True
    line = change(page, page.get_by_role("button", name="Unpin", exact=True).first, "Unpin")
    assert line["action"] == "unpin"
    assert server.adapter("brief")["pinned"] is False


def test_upload_roll_back_load_delete_and_bring_back(page, server, place):
    """`swap` is put by drag and drop, replaced, rolled back, deleted and brought back."""
    json_, pirate = EXAMPLE / "adapters" / "json", EXAMPLE / "adapters" / "pirate"
    first = upload(page, "swap", json_)
    assert (first["action"], first["adapter"], first["before"], first["result"]) == ("put", "swap", None, "ok")
    second = upload(page, "swap", pirate)
    assert (second["before"], second["result"]) == (first["after"], "ok")
    ask_tab = page.get_by_role("tab", name="Try")
    ask_tab.click()
    ask(page, QUESTION, "swap")
    expect(answer(page, "swap")).to_contain_text("matey")

    open_adapter(page, "swap")
    line = change(page, page.get_by_role("button", name=f"Rollback {first['after']}"), "Rollback")
    assert (line["action"], line["after"]) == ("rollback", first["after"])
    expect(page.get_by_role("button", name=f"Rollback {second['after']}")).to_be_visible()
    ask_tab.click()
    ask(page, QUESTION, "swap")
    expect(answer(page, "swap")).to_contain_text('{"answer"')

    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("button", name=f"Load {second['after']}").click()
    page.get_by_role("dialog").get_by_role("button", name="Load").click()
    loaded = page.get_by_role("row").filter(has_text=second["after"])
    expect(loaded.get_by_role("cell").nth(2)).to_have_text("yes")

    line = change(page, page.get_by_role("button", name="Delete"), "Delete")
    assert (line["action"], line["after"]) == ("delete", None)
    assert "swap" not in server.adapters()
    line = change(page, page.get_by_role("button", name="Roll back"), "Roll back")
    assert line["after"] == first["after"] == server.adapter("swap")["revision"]


def test_what_cannot_be_served_is_refused_with_the_reason(page, server, place):
    damaged = place / "damaged"
    shutil.copytree(EXAMPLE / "adapters" / "json", damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = server.adapter("json")["revision"]
    line = upload(page, "json", damaged)
    assert line["result"].startswith("422")
    expect(page.get_by_role("alert").filter(has_text="adapter_model.safetensors")).to_be_visible()
    assert server.adapter("json")["revision"] == before


def test_the_shares_of_an_alias_are_set_with_sliders(page, server):
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_text("Aliases", exact=True).click()
    page.get_by_label("New alias").fill("chat")
    page.get_by_label("leads to").fill("json")
    line = change(page, page.get_by_role("button", name="Add", exact=True), "Save")
    assert (line["action"], line["adapter"]) == ("alias", "chat")
    page.get_by_label("Another target").fill("pirate")
    page.get_by_role("button", name="Add target").click()
    slider = page.get_by_role("slider", name="share of pirate")
    for share in range(1, 26):
        slider.locator("[tabindex='0']").press("ArrowRight")
        expect(slider).to_have_attribute("aria-valuenow", str(share))
    expect(page.get_by_text("20%", exact=True)).to_be_visible()
    change(page, page.get_by_role("button", name="Save"), "Save")
    with server.admin() as admin:
        assert admin.get("/v1/aliases/chat").json()["to"] == {"json": 100, "pirate": 25}
        change(page, page.get_by_role("button", name="End"), "End")
        assert admin.get("/v1/aliases/chat").status_code == 404


# ---------------------------------------------------------------------------------------------- look inside, now


def test_inside_an_adapter_are_its_circuit_norms_card_and_facts(page):
    open_adapter(page, "pirate")
    page.get_by_role("button", name="Look inside").click()
    picture = page.get_by_alt_text("the circuit with its trained angles")
    expect(picture).to_be_visible(timeout=120_000)
    assert picture.evaluate("image => image.naturalWidth") > 300
    for text in ("ryrz_ring_ry", "33,408", "../../base (fits)"):
        expect(page.get_by_text(text).first).to_be_visible()
    expect(page.get_by_label("Norms by layer")).to_have_count(2)
    expect(page.get_by_role("heading", name="pirate")).to_be_visible()
    first = picture.get_attribute("src")
    page.get_by_label("Circuit of").click()
    page.get_by_role("option", name="layers.1.self_attn.q_proj").click()
    expect(picture).not_to_have_attribute("src", first, timeout=120_000)


def test_now_shows_what_was_just_asked(page):
    page.get_by_role("tab", name="Now").click()
    running = page.locator(".qaa-card").filter(has_text="Running").locator(".qaa-number")
    expect(running).to_have_text(re.compile("[0-9]"))  # a look at /metrics before
    page.get_by_role("tab", name="Try").click()
    ask(page, QUESTION, "pirate")
    page.get_by_role("tab", name="Now").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("cell", name="pirate", exact=True))
    expect(row.get_by_role("cell").nth(1)).to_have_text(re.compile("[1-9]"))
    expect(row.get_by_role("cell").nth(3)).to_have_text(re.compile("s$"))
    memory = page.locator(".qaa-card").filter(has_text="Memory").locator(".qaa-number")
    expect(memory).to_have_text(re.compile("[MG]B$"))
    expect(page.locator(".qaa-chart canvas")).to_have_count(6)


# ------------------------------------------------------------------------------------------------- keys, keyboard


def test_a_clients_key_shows_what_that_client_may_see(chromium, url):
    with tab(chromium, url) as page:
        type_keys(page, client=TEAM_KEY)
        expect(page.get_by_label("Model 1")).to_have_value("json")
        ask(page, QUESTION, "json")
        page.get_by_role("tab", name="Adapters").click()
        expect(page.get_by_role("link")).to_have_text(["Skip to main content", "json"])
        expect(page.get_by_text("Upload an adapter")).to_be_hidden()
        page.get_by_role("tab", name="Now").click()
        expect(page.get_by_role("cell", name="json", exact=True)).to_be_visible()
        expect(page.get_by_role("cell", name="pirate", exact=True)).to_have_count(0)
        page.get_by_role("tab", name="Look inside").click()
        page.get_by_label("Adapter", exact=True).fill("pirate")
        page.get_by_role("button", name="Look", exact=True).click()
        expect(page.get_by_text("there is no adapter 'pirate'")).to_be_visible()


def test_a_wrong_key_is_said_and_right_ones_stay_for_the_tab_alone(chromium, url, place):
    with tab(chromium, url) as page:
        page.get_by_role("button", name="Keys").click()
        page.get_by_label("Admin key").fill("wrong-key")
        page.get_by_role("button", name="Use", exact=True).click()
        expect(page.get_by_text("this is none")).to_be_visible()
        page.get_by_label("Admin key").fill(ADMIN_KEY)
        page.get_by_role("button", name="Use", exact=True).click()
        page.get_by_label("Admin key").wait_for(state="hidden")
        page.goto(f"{url}/adapters/json")
        expect(page.get_by_text("History", exact=True)).to_be_visible()
        other = page.context.new_page()
        other.goto(f"{url}/adapters/json")
        expect(other.get_by_text("An admin key shows its state and history.")).to_be_visible()
    logs = (place / "console.log").read_text() + (place / "server.log").read_text()
    for key in (ADMIN_KEY, ALL_KEY, TEAM_KEY, "wrong-key"):
        assert key not in logs


def test_keyboard_dark_and_narrow(chromium, url):
    with tab(chromium, url, viewport={"width": 390, "height": 800}, color_scheme="dark") as page:
        type_keys(page, ALL_KEY, ADMIN_KEY)
        assert page.evaluate("document.body.classList.contains('body--dark')")
        page.get_by_role("button", name="Dark or light").click()
        page.wait_for_function("document.body.classList.contains('body--light')")
        for section in ("Adapters", "Look inside", "Now", "Try"):
            page.get_by_role("tab", name=section).click()
            page.wait_for_timeout(500)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), section
        page.goto(f"{url}/")
        expect(page.get_by_label("Model 1")).not_to_have_value("")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Model 1"


def test_the_page_asks_nobody_else_by_its_policy(url):
    policy = httpx.get(url, timeout=30).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
