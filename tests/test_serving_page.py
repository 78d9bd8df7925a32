"""The page at / in a real Chromium: it chats, shows the report in colours, survives a reload, and escapes texts."""

import json
import shutil

import httpx
import pytest
from live import MODEL, ScriptedLoop, live_server, make_engine
from playwright.sync_api import expect, sync_playwright

from sparsex_jax.reuse.report import KINDS
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Access, Limits

expect.set_options(timeout=60_000)  # the first request of a size compiles
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; there is none on the PATH")
NOTE = "The harbour opens at dawn and closes when the bells ring. Boats longer than ten metres need a pilot."


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def live(engine):
    with live_server(engine) as live:
        yield live


@pytest.fixture
def page(browser):
    """A new tab. An error on its console fails the test, except refused requests."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, complaints = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    yield page
    context.close()
    assert [complaint for complaint in complaints if "Failed to load resource" not in complaint] == []


def send(page, text, number=1):
    """Send a message, and wait for the answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn.assistant .facts")).to_have_count(number)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def painted(page):
    """The number of tokens that are shown in each colour."""
    return {kind: page.locator(f"#prompt .token.{kind}").count() for kind in KINDS}


def reports(page):
    """The reports that the page keeps, newest last."""
    kept = json.loads(page.evaluate("localStorage.getItem('sparsex.page')"))
    return [turn["report"] for turn in kept["turns"] if turn.get("report")]


@in_a_browser
def test_a_chat_has_the_colours_of_its_report(page, live):
    page.goto(live.url)
    expect(page.locator("#model")).to_have_text(MODEL)
    page.get_by_text("Knowledge").click()
    page.get_by_label("A text to remember").fill(NOTE)
    page.get_by_role("button", name="Remember").click()
    page.get_by_role("checkbox").check()
    send(page, "When does it open?")
    [report] = reports(page)
    counts = painted(page)
    assert counts == {kind: report[f"{kind}_tokens"] for kind in KINDS}
    assert counts["reused"] > 10
    assert NOTE in page.locator("#prompt").text_content()
    expect(page.locator("#computed")).to_have_text(f"{round(report['computed_fraction'] * 100)} %")
    expect(page.locator("#segments tbody tr").first).to_contain_text("knowledge 1")
    expect(page.locator("#store-text")).to_contain_text("of 512 pages")

    send(page, "And when does it close?", 2)  # the chat so far is a prefix now
    assert painted(page)["prefix"] == reports(page)[1]["prefix_tokens"] > report["prompt_tokens"] - 16


@in_a_browser
def test_a_reload_changes_nothing(page, live):
    page.goto(live.url)
    send(page, "Is anybody there?")
    answer, counts = page.locator(".turn.assistant").text_content(), painted(page)
    page.reload()
    expect(page.locator(".turn.assistant")).to_have_text(answer)
    assert painted(page) == counts
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


@in_a_browser
def test_the_comparison_with_full_recompute(page, live):
    page.goto(live.url)
    send(page, "Is anybody there?")
    send(page, "And now?", 2)
    page.get_by_role("button", name="Compare with full").click()
    expect(page.locator("#saving")).to_contain_text("\N{MULTIPLICATION SIGN}")
    expect(page.locator("#full-answer")).not_to_be_empty()
    expect(page.locator("#compare-text")).to_contain_text("Full recompute: first token after")


@in_a_browser
def test_texts_are_never_markup(page, engine):
    evil = "<img src=x onerror='document.title=1'><script>document.title=2</script>&amp;"

    def script(prompt):
        return [Event(evil, (1,), finish_reason="stop")]

    with live_server(engine, loop=ScriptedLoop(script)) as live:
        page.goto(live.url)
        page.get_by_label("Message", exact=True).fill(evil)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn")).to_have_text([evil, evil])
        assert page.locator("main img, main script").count() == 0
        assert page.title() == "sparsex"


@in_a_browser
def test_the_page_shows_why_the_server_refuses_a_request(page, live):
    page.goto(live.url)
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").fill("4000")
    page.get_by_label("Message", exact=True).fill("x")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("the limit is 2048")


@in_a_browser
def test_a_key_opens_the_server(browser, engine, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkey = "sk-alice"\n')
    with live_server(engine, access=Access.load(keys, Limits())) as live:
        page = browser.new_page()
        page.goto(live.url)
        expect(page.get_by_role("alert")).to_contain_text("an API key is needed")
        page.get_by_text("Settings").click()
        page.get_by_label("API key").fill("sk-alice")
        page.get_by_label("API key").blur()
        expect(page.locator("#model")).to_have_text(MODEL)
        assert "sk-alice" not in page.evaluate("localStorage.getItem('sparsex.page')")
        page.close()


@in_a_browser
def test_the_page_fits_a_phone_in_dark_mode(browser, live):
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(live.url)
    send(page, "Is anybody there? " + "long" * 60)
    assert page.evaluate("document.documentElement.scrollWidth") == 375  # nothing to scroll sideways to
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    expect(page.locator("#report")).to_be_visible()
    context.close()


def test_the_page_loads_nothing_from_other_hosts(live):
    answer = httpx.get(live.url)
    policy = answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("style.css", "app.js", "api.js", "keep.js", "show.js", "paint.js", "example.js", "icon.svg"):
        assert httpx.get(f"{live.url}/page/{name}").status_code == 200
