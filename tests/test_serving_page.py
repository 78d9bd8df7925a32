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

expect.set_options(timeout=30_000)  # the first request of a size compiles
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
    page.set_default_timeout(30_000)
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


def message(page):
    return page.get_by_label("Message", exact=True)


def kept(page):
    """What the page keeps for a reload."""
    return json.loads(page.evaluate("localStorage.getItem('sparsex.page')"))


def reports(page):
    """The reports that the page keeps, newest last."""
    return [turn["report"] for turn in kept(page)["turns"] if turn.get("report")]


def prompts(loop):
    """Have a scripted loop answer everything with `ok`, and give the prompts that it gets."""
    seen = []

    def script(prompt):
        seen.append(prompt)
        return [Event("ok", (1,), finish_reason="stop")]

    loop.script = script
    return seen


@pytest.fixture
def stage(engine):
    """A server whose answers stop in the middle until a test says otherwise."""
    with live_server(engine, loop=ScriptedLoop(lambda prompt: [Event("half an ", (1,)), None])) as live:
        yield live


def serve_once(page, path, status, body, headers=None):
    """Have the browser get this answer in place of the server's, once."""
    answer = {"status": status, "headers": headers or {}, "body": body}
    page.route(f"**{path}", lambda route: route.fulfill(**answer), times=1)


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
    expect(page.locator("#store-text")).to_contain_text("of 64 pages")

    send(page, "And when does it close?", 2)  # the chat so far is a prefix now
    counts, second = painted(page), reports(page)[1]
    assert counts == {kind: second[f"{kind}_tokens"] for kind in KINDS}
    assert counts["prefix"] + counts["approximate_prefix"] > report["prompt_tokens"] - 16


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
    expect(page.get_by_role("alert")).to_contain_text("maximum context length is 2048 tokens")


@in_a_browser
def test_the_keys_field_comes_when_it_is_needed(page, engine, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkey = "sk-alice"\n')
    with live_server(engine, access=Access.load(keys, Limits())) as live:
        page.goto(live.url)
        expect(page.get_by_role("alert")).to_contain_text("an API key is needed")
        expect(page.get_by_label("API key")).to_be_focused()
        message(page).fill("Is anybody there?")
        message(page).press("Enter")
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.locator(".turn")).to_have_count(0)
        expect(message(page)).to_have_value("Is anybody there?")
        page.get_by_label("API key").fill("sk-alice")
        page.get_by_label("API key").blur()
        expect(page.locator("#model")).to_have_text(MODEL)
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.get_by_label("API key")).to_be_hidden()  # it is among the settings again
        page.get_by_text("Settings").click()
        expect(page.get_by_label("API key")).to_have_value("sk-alice")
        assert "sk-alice" not in page.evaluate("localStorage.getItem('sparsex.page')")
        message(page).press("Enter")
        expect(page.locator(".turn.assistant .facts")).to_have_count(1)
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        assert [turn["role"] for turn in kept(page)["turns"]] == ["user", "assistant"]
        page.goto("about:blank")


# What can go wrong ------------------------------------------------------------------------------------------


BUSY = json.dumps({"error": {"message": "12 requests wait already"}})


@in_a_browser
@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (503, BUSY, {"Retry-After": "15"}, "12 requests wait already. Try again in 15 s."),
        (502, "<html>Bad gateway</html>", {}, "answered with status 502"),
        (200, "", {}, "broke off before the answer was complete"),
        (200, 'data: {"error": {"message": "it failed"}}\n\n', {}, "it failed"),
        (200, "data: <html>\n\n", {}, "broke off before the answer was complete"),
        (None, None, None, "The server cannot be reached"),
    ],
)
def test_a_failed_request_leaves_the_chat_as_it_was(page, stage, status, body, headers, words):
    seen = prompts(stage.worker.loop)
    page.goto(stage.url)
    page.get_by_text("Knowledge").click()
    if status is None:
        page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    else:
        serve_once(page, "/v1/chat/completions", status, body, headers)
    message(page).fill("What now?")
    message(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(page.locator(".turn")).to_have_count(0)
    expect(message(page)).to_have_value("What now?")
    message(page).press("Enter")
    expect(page.locator(".turn")).to_have_text(["What now?", "ok"])
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(seen) == 1


@in_a_browser
def test_notes_of_a_failed_request_stay_ticked(page, live):
    page.goto(live.url)
    page.get_by_text("Knowledge").click()
    page.get_by_label("A text to remember").fill("   ")
    page.get_by_role("button", name="Remember").click()
    expect(page.get_by_role("alert")).to_have_text("A note needs some text.")
    page.get_by_label("A text to remember").fill("The bells ring at noon, and at dawn, and when it rains.")
    page.get_by_role("button", name="Remember").dblclick()
    expect(page.get_by_role("checkbox")).to_have_count(1)
    expect(page.get_by_label("A text to remember")).to_have_value("")
    page.get_by_role("checkbox").check()
    serve_once(page, "/v1/chat/completions", 503, BUSY)
    message(page).fill("When?")
    message(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("12 requests wait")
    expect(page.get_by_role("checkbox")).to_be_checked()
    page.get_by_label("A text to remember").fill("a long note " * 3000)
    page.get_by_role("button", name="Remember").click()
    expect(page.get_by_role("alert")).to_contain_text("maximum context length is 2048 tokens")
    assert len(page.get_by_label("A text to remember").input_value()) == 36_000
    serve_once(page, "/v1/knowledge/*", 503, BUSY)
    page.get_by_role("button", name="Forget").click()
    expect(page.get_by_role("alert")).to_contain_text("12 requests wait")
    page.get_by_role("button", name="Forget").click()  # it is still there, since the server still has it
    expect(page.get_by_role("checkbox")).to_have_count(0)


@in_a_browser
def test_an_answer_that_is_stopped_or_cut_off_keeps_what_came(page, stage):
    page.goto(stage.url)
    message(page).fill("One")
    message(page).press("Enter")
    expect(page.locator(".turn.assistant")).to_contain_text("half an")
    message(page).fill("Two")
    message(page).press("Enter")  # nothing is sent meanwhile, and nothing is lost
    expect(message(page)).to_have_value("Two")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".turn")).to_have_text(["One", "half an stopped"])
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    message(page).press("Enter")
    expect(page.locator(".turn")).to_have_count(4)
    expect(page.locator(".turn.assistant").nth(1)).to_contain_text("half an")
    message(page).fill("Three")
    page.reload()  # in the middle of the answer
    expect(page.locator(".turn")).to_have_text(["One", "half an stopped", "Two", "half an broken off"])
    expect(message(page)).to_have_value("Three")
    stage.worker.loop.script = lambda prompt: [None]
    message(page).press("Enter")
    expect(page.locator(".turn")).to_have_count(6)
    page.reload()  # before the answer: the question is given back
    expect(page.locator(".turn")).to_have_count(4)
    expect(message(page)).to_have_value("Three")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


@in_a_browser
def test_stop_ends_the_example_while_its_notes_are_stored(page, stage):
    seen, held = prompts(stage.worker.loop), []

    def hold(route):
        held.append(route) if route.request.method == "POST" else route.continue_()

    page.route("**/v1/knowledge", hold)
    page.goto(stage.url)
    page.get_by_role("button", name="Try an example").click()
    message(page).fill("Hi")
    message(page).press("Enter")  # the notes are not stored yet
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(0)
    message(page).press("Enter")
    expect(page.locator(".turn")).to_have_text(["Hi", "ok"])
    held[0].fulfill(status=200, body=json.dumps({"handle": 1, "num_tokens": 20, "uses": 0}))
    page.get_by_text("Knowledge").click()
    expect(page.get_by_role("checkbox")).to_have_count(1)  # what the server stored all the same is in the list
    assert page.get_by_role("checkbox").bounding_box()["width"] >= 20
    assert (len(seen), len(held)) == (1, 1)


@in_a_browser
def test_enter_sends_once(page, stage):
    seen = prompts(stage.worker.loop)
    page.goto(stage.url)
    box = message(page)
    box.fill("composing")
    for init in ({"isComposing": True}, {"keyCode": 229}, {"repeat": True}, {"shiftKey": True}):
        box.dispatch_event("keydown", {"key": "Enter", "bubbles": True, "cancelable": True} | init)
    expect(page.locator(".turn")).to_have_count(0)
    page.evaluate("for (let i = 0; i < 3; i++) document.getElementById('composer').requestSubmit()")
    expect(page.locator(".turn")).to_have_text(["composing", "ok"])
    box.fill("  ")
    box.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    assert len(seen) == 1


@in_a_browser
def test_storage_that_is_full_blocked_or_of_another_version_stops_nothing(page, stage):
    prompts(stage.worker.loop)
    page.goto(stage.url)
    for stored in ('{"turns": [null, 7], "notes": 3, "chosen": 9, "settings": null}', "null", "[]", "{"):
        page.evaluate("text => localStorage.setItem('sparsex.page', text)", stored)
        page.add_init_script("addEventListener('pagehide', (event) => event.stopImmediatePropagation(), true)")
        page.reload()
        expect(page.locator("#model")).to_have_text(MODEL)
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        "Object.defineProperty(window, name, { get() { throw new Error('blocked'); } })"
    )
    page.reload()
    message(page).fill("Hi")
    message(page).press("Enter")
    expect(page.locator(".turn")).to_have_text(["Hi", "ok"])


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


@in_a_browser
def test_the_store_is_shown_by_tier(page, live):
    page.goto(live.url)
    expect(page.locator("#store-text")).to_contain_text("of 64 pages")
    expect(page.locator("#tiers")).to_be_hidden()  # there is the device's store alone
    sizes = [("device", 3 << 19, 3 << 20, 7), ("host", 1000, 64 << 30, 1200), ("disk", 0, 200 << 30, 0)]
    tiers = [dict(zip(("name", "bytes", "limit", "hit_tokens"), each, strict=True)) for each in sizes]
    pages = {"pages": 64, "free": 32, "active": 0, "frozen": 0, "cached": 32, "page_size": 64}
    serve_once(page, "/v1/store", 200, json.dumps(pages | {"object": "store", "tiers": tiers}))
    expect(page.locator("#tiers li")).to_have_text(
        [
            "device 1.5 MiB of 3 MiB, 7 tokens found",
            "host 1000 B of 64 GiB, 1200 tokens found",
            "disk 0 B of 200 GiB, 0 tokens found",
        ]
    )


@in_a_browser
def test_what_came_from_host_memory_is_told(page):
    engine = make_engine(store_tokens=1024, host_store_bytes=1 << 26)
    with live_server(engine) as live:
        page.goto(live.url)
        send(page, f"{NOTE * 4} When does it open?")
        for other in range(8):
            text = f"Number {other}: " + "one and two and three " * 20
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
            assert live.http().post("/v1/chat/completions", json=body).status_code == 200
        page.get_by_role("button", name="New chat").click()
        send(page, f"{NOTE * 4} And when does it close?")
        expect(page.locator("#prefix-tier")).to_have_text("The prefix came from host.")
        expect(page.locator("#tiers .host")).to_contain_text("of 64 MiB")
        store = live.http().get("/v1/store").json()
        assert [tier["name"] for tier in store["tiers"]] == ["device", "host"]
        assert store["tiers"][1]["hit_tokens"] > 0
        assert 0 < store["tiers"][1]["bytes"] <= store["tiers"][1]["limit"] == 1 << 26
        assert 'sparsex_tier_limit_bytes{tier="host"} 6.7108864e+07' in live.http().get("/metrics").text
