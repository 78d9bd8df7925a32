"""The page at / in a real Chromium: it chats, compares methods, shows reports, survives a reload, and escapes texts."""

import json
import re
import shutil
import urllib.parse

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from live import MODEL, ScriptedLoop, live_server, make_engine
from playwright.sync_api import expect, sync_playwright

from sparsex_jax import Engine
from sparsex_jax.reuse.report import KINDS
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import PAGE

expect.set_options(timeout=30_000)  # the first request of a size compiles
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; there is none on the PATH")
# Short answers, unless a test has kept others.
SHORT = """try { localStorage["sparsex.page"] ??= '{"settings": {"tokens": 24}}'; } catch {}"""
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


@pytest.fixture(scope="module")
def live(engine):
    with live_server(engine) as live:
        yield live


@pytest.fixture
def page(browser):
    """A new tab. An error on its console fails the test, except refused requests."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, complaints = context.new_page(), []
    page.set_default_timeout(30_000)
    page.add_init_script(SHORT)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    yield page
    context.close()
    assert [complaint for complaint in complaints if "Failed to load resource" not in complaint] == []


def send(page, text, number=1):
    """Send a message, and wait for the answer."""
    message(page).fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn.assistant .facts")).to_have_count(number)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def remember(page, text):
    """Store a document for the next question."""
    page.locator("#open-documents").click()
    page.get_by_label("A text to remember").fill(text)
    page.get_by_role("button", name="Remember").click()
    expect(page.get_by_label("A text to remember")).to_have_value("")
    page.keyboard.press("Escape")


def open_settings(page):
    page.get_by_role("button", name="Settings").click()


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


@pytest.fixture(scope="module")
def scripted(engine):
    """A server without a model, for all tests."""
    with live_server(engine, loop=ScriptedLoop(lambda prompt: [])) as live:
        yield live


@pytest.fixture
def stage(scripted):
    """The server without a model, whose answers stop in the middle until a test says otherwise."""
    scripted.worker.loop.script = lambda prompt: [Event("half an ", (1,)), None]
    return scripted


def serve_once(page, path, status, body, headers=None):
    """Have the browser get this answer in place of the server's, once."""
    answer = {"status": status, "headers": headers or {}, "body": body}
    page.route(f"**{path}", lambda route: route.fulfill(**answer), times=1)


@in_a_browser
def test_a_chat_has_the_colours_of_its_report(page, live):
    page.goto(live.url)
    expect(page.locator("#model")).to_have_text(MODEL)
    remember(page, NOTE)
    expect(page.locator("#attached .chip")).to_contain_text("tokens")
    send(page, "When does it open?")
    [report] = reports(page)
    counts = painted(page)
    assert counts == {kind: report[f"{kind}_tokens"] for kind in KINDS}
    assert counts["reused"] > 10
    assert NOTE in page.locator("#prompt").text_content()
    expect(page.locator("#computed")).to_have_text(f"{round(report['computed_fraction'] * 100)} %")
    expect(page.locator("#segments tbody tr").first).to_contain_text("document 1")
    expect(page.locator(".turn.user")).to_have_text("When does it open?")  # the document is a chip
    expect(page.locator(".exchange .chip")).to_contain_text("The harbour opens")
    assert page.locator("#layers .cell").count() >= 2
    assert page.locator("#layers").get_attribute("aria-label").startswith("Layer")
    expect(page.locator("#versus")).to_be_visible()  # full recompute was measured without a click
    expect(page.locator("#saving")).to_contain_text("\N{MULTIPLICATION SIGN}")
    expect(page.locator("#store-text")).to_contain_text("of 64 pages")

    send(page, "And when does it close?", 2)  # the chat so far is a prefix now
    counts, second = painted(page), reports(page)[1]
    assert counts == {kind: second[f"{kind}_tokens"] for kind in KINDS}
    assert counts["prefix"] + counts["approximate_prefix"] > report["prompt_tokens"] - 16


@in_a_browser
def test_a_reload_changes_nothing(page, live):
    page.goto(live.url)
    send(page, "Is anybody there?")
    answer, counts = page.locator(".turn.assistant .text").text_content(), painted(page)
    page.reload()
    expect(page.locator(".turn.assistant .text")).to_have_text(answer)
    assert painted(page) == counts
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Is anybody there?", exact=True).click()
    expect(page.locator(".turn.assistant .text")).to_have_text(answer)


@in_a_browser
def test_methods_side_by_side(page, live):
    page.goto(live.url)
    remember(page, NOTE)
    page.get_by_role("button", name="Side by side").click()
    message(page).fill("When does it open?")
    message(page).press("Enter")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    rows = page.locator(".rows > li")
    names = ["Full recompute", "Prefix cache", "Paste", "This server's method"]
    expect(rows.locator(".row-name b")).to_have_text(names)
    expect(rows.first.locator(".work b")).to_have_text("100 %")
    expect(rows.locator(".verdict")).to_have_count(3)
    answer = kept(page)["turns"][1]
    assert [side["method"] for side in answer["sides"]] == ["full", "prefix", "naive"]
    assert answer["sides"][2]["report"]["computed_fraction"] < 1 == answer["sides"][0]["report"]["computed_fraction"]
    expect(page.locator("#computed")).to_have_text(f"{round(answer['report']['computed_fraction'] * 100)} %")
    rows.first.get_by_role("button").click()
    expect(page.locator("#report-of")).to_have_text("Full recompute")
    expect(page.locator("#computed")).to_have_text("100 %")
    expect(rows.first.get_by_role("button")).to_be_focused()


@in_a_browser
def test_texts_are_never_markup(page, stage):
    evil = "<img src=x onerror='document.title=1'><script>document.title=2</script>&amp;"
    stage.worker.loop.script = lambda prompt: [Event(evil, (1,), finish_reason="stop")]
    page.goto(stage.url)
    message(page).fill(evil)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn .text")).to_have_text([evil, evil])
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "sparsex"


MARKDOWN = {
    "# One\n\n*two* **three** `four`": "<h3>One</h3><p><em>two</em> <strong>three</strong> <code>four</code></p>",
    "a_b_c and 2 * 3 * 4 and **not": "<p>a_b_c and 2 * 3 * 4 and **not</p>",
    "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
    "3. a\n4. b\n\nc": '<ol start="3"><li>a</li><li>b</li></ol><p>c</p>',
    "> a\n> b": "<blockquote><p>a<br>b</p></blockquote>",
    "---": "<hr>",
    "<b>x</b> &lt;": "<p>&lt;b&gt;x&lt;/b&gt; &amp;lt;</p>",
    "[x](javascript:alert(1)) [y](JaVaScRiPt:1) [z](data:text/html,1) [w](/v1/store)":
        "<p>[x](javascript:alert(1)) [y](JaVaScRiPt:1) [z](data:text/html,1) [w](/v1/store)</p>",
    "\\*a\\*": "<p>*a*</p>",
}  # fmt: skip


@in_a_browser
def test_markdown_becomes_elements_and_links_only_lead_out(page, stage):
    page.goto(stage.url)

    def rendered(text):
        script = """async text => { const { render } = await import("/page/markdown.js");
            const box = document.createElement("div"); box.append(...render(text)); return box.innerHTML; }"""
        return page.evaluate(script, text)

    for text, html in MARKDOWN.items():
        assert rendered(text) == html
    link = 'target="_blank" rel="noopener noreferrer nofollow"'
    assert rendered("[a](https://b.org/c_(d)) ") == f'<p><a href="https://b.org/c_(d)" {link}>a</a></p>'
    assert rendered("See https://b.org/x.") == f'<p>See <a href="https://b.org/x" {link}>https://b.org/x</a>.</p>'
    code = rendered("```py\nx = '<i>'\n")  # its end has not come yet
    assert "<code>x = '&lt;i&gt;'\n</code>" in code
    assert ">py<" in code
    assert "<th>a</th>" in rendered("| a | b |\n|---|:-:|\n| 1 | 2 |")
    assert "<td>2</td>" in rendered("| a | b |\n|---|:-:|\n| 1 | 2 |")
    for nasty in ("*" * 30_000, "> " * 3000, "[" * 20_000, "`" * 20_000, "- " * 3000, "_a" * 9000):
        assert page.evaluate(  # soon, whatever a model repeats
            """async text => { const { render } = await import("/page/markdown.js");
               const start = performance.now(); render(text); return performance.now() - start; }""",
            nasty,
        ) < 2000  # fmt: skip


@in_a_browser
def test_thoughts_are_folded_and_sent_back_as_thoughts(page, stage):
    prompts(stage.worker.loop)
    deltas = [{"reasoning_content": "Hm. "}, {"reasoning_content": "Yes."}, {"content": "It **does**."}]
    chunks = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    page.goto(stage.url)
    serve_once(page, "/v1/chat/completions", 200, "".join(chunks) + "data: [DONE]\n\n")
    message(page).fill("Does it?")
    message(page).press("Enter")
    expect(page.locator(".turn.assistant .text strong")).to_have_text("does")
    expect(page.locator(".thought div")).to_be_hidden()
    page.get_by_text("Thought").click()
    expect(page.locator(".thought div")).to_have_text("Hm. Yes.")
    with page.expect_request("**/v1/chat/completions") as sent:
        message(page).fill("Why?")
        message(page).press("Enter")
    assert sent.value.post_data_json["messages"][1]["reasoning_content"] == "Hm. Yes."


@in_a_browser
def test_the_system_prompt_a_retry_and_a_copy(page, stage):
    prompts(stage.worker.loop)
    page.goto(stage.url)
    page.get_by_text("System prompt").click()
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_label("System prompt").blur()
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if "chat" in request.url else None)
    message(page).fill("Hi")
    message(page).press("Enter")
    expect(page.locator(".turn .text")).to_have_text(["Hi", "ok"])
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".turn .text")).to_have_text(["Hi", "ok"])
    assert [body["messages"][0] for body in bodies] == [{"role": "system", "content": "Be short."}] * 2
    assert [body["seed"] for body in bodies] == [0, 1]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy this answer").click()
    expect(page.get_by_text("Copied", exact=True)).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "ok"


@in_a_browser
def test_dropped_files_become_documents(page, live):
    page.goto(live.url)
    drop = """([name, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name));
        for (const type of ["dragover", "drop"]) {
            dispatchEvent(new DragEvent(type, { dataTransfer: data, cancelable: true }));
        }
    }"""
    page.evaluate(drop, ["harbour.txt", list((NOTE + " On Mondays too.").encode())])
    expect(page.locator("#attached .chip")).to_contain_text("harbour.txt")
    expect(page.locator("#attached .chip")).to_contain_text("tokens")
    page.evaluate(drop, ["photo.jpg", [255, 216, 255, 0]])
    expect(page.get_by_role("alert")).to_have_text("photo.jpg is not a text file. Files must be text in UTF-8.")
    page.get_by_role("button", name="Leave out harbour.txt").click()
    expect(page.locator("#attached .chip")).to_have_count(0)


@in_a_browser
def test_words_that_differ(page, stage):
    page.goto(stage.url)
    runs = page.evaluate(
        """async () => (await import("/page/diff.js")).diff("The code is 3615.", "The secret code is 4173. Yes")"""
    )
    assert "".join(run["text"] for run in runs if run["kind"] != "added") == "The code is 3615."
    assert "".join(run["text"] for run in runs if run["kind"] != "missing") == "The secret code is 4173. Yes"
    assert [run["text"].strip() for run in runs if run["kind"] == "same"] == ["The", "code is"]


@in_a_browser
def test_the_page_shows_why_the_server_refuses_a_request(page, live):
    page.goto(live.url)
    open_settings(page)
    page.get_by_role("spinbutton", name="New tokens").fill("4000")
    page.keyboard.press("Escape")
    message(page).fill("x")
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
        open_settings(page)
        expect(page.get_by_label("API key")).to_have_value("sk-alice")
        page.keyboard.press("Escape")
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
    expect(page.locator(".turn .text")).to_have_text(["What now?", "ok"])
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(seen) == 1


@in_a_browser
def test_documents_of_a_failed_request_stay_ticked(page, live):
    page.goto(live.url)
    page.locator("#open-documents").click()
    page.get_by_label("A text to remember").fill("   ")
    page.get_by_role("button", name="Remember").click()
    expect(page.get_by_role("alert")).to_have_text("A document needs some text.")
    page.get_by_label("A text to remember").fill("The bells ring at noon, and at dawn, and when it rains.")
    page.get_by_role("button", name="Remember").dblclick()
    expect(page.get_by_role("checkbox")).to_have_count(1)
    expect(page.get_by_label("A text to remember")).to_have_value("")
    expect(page.get_by_role("checkbox")).to_be_checked()
    page.keyboard.press("Escape")
    serve_once(page, "/v1/chat/completions", 503, BUSY)
    message(page).fill("When?")
    message(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("12 requests wait")
    page.locator("#open-documents").click()
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
    expect(page.locator(".turn .text")).to_have_text(["One", "half an "])
    expect(page.locator(".facts")).to_have_text(["stopped"])
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    message(page).press("Enter")
    expect(page.locator(".turn")).to_have_count(4)
    expect(page.locator(".turn.assistant").nth(1)).to_contain_text("half an")
    message(page).fill("Three")
    page.reload()  # in the middle of the answer
    expect(page.locator(".turn .text")).to_have_text(["One", "half an ", "Two", "half an "])
    expect(page.locator(".facts")).to_have_text(["stopped", "broken off"])
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
    page.locator("#example-documents").click()
    message(page).fill("Hi")
    message(page).press("Enter")  # the notes are not stored yet
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(0)
    message(page).press("Enter")
    expect(page.locator(".turn .text")).to_have_text(["Hi", "ok"])
    held[0].fulfill(status=200, body=json.dumps({"handle": 1, "num_tokens": 20, "uses": 0}))
    page.locator("#open-documents").click()
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
    expect(page.locator(".turn .text")).to_have_text(["composing", "ok"])
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
    expect(page.locator(".turn .text")).to_have_text(["Hi", "ok"])


def faults(page):
    """What axe-core finds that is serious, each rule with its first element."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def chat_of_sides(browser, live):
    """What the page keeps of a chat with an answer and a comparison."""
    page = browser.new_context().new_page()
    page.add_init_script(SHORT)
    page.goto(live.url)
    remember(page, NOTE)
    send(page, "Is anybody there? " + "long" * 60)
    page.get_by_role("button", name="Side by side").click()
    message(page).fill("And now?")
    message(page).press("Enter")
    expect(page.locator(".rows > li.done")).to_have_count(4)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.evaluate("dispatchEvent(new Event('pagehide'))")
    chat = page.evaluate("localStorage.getItem('sparsex.page')")
    page.context.close()
    return chat


def open_at(browser, live, chat, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    if chat:
        page.add_init_script(f"localStorage.setItem('sparsex.page', {json.dumps(chat)})")
    page.goto(live.url)
    expect(page.locator("#model")).to_have_text(MODEL)
    return page


SIZES = [(width, scheme) for width in (360, 768, 1280) for scheme in ("light", "dark")]
QUICK = [(360, "dark"), (1280, "light")]


@in_a_browser
@pytest.mark.parametrize(
    ("width", "scheme"), [size if size in QUICK else pytest.param(*size, marks=pytest.mark.slow) for size in SIZES]
)
def test_every_size_fits_and_has_no_serious_fault(browser, live, chat_of_sides, width, scheme):
    for chat in (None, chat_of_sides):
        page = open_at(browser, live, chat, width, scheme)
        paper = "rgb(247, 246, 242)" if scheme == "light" else "rgb(18, 22, 28)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing to scroll sideways to
        wide = """width => [...document.querySelectorAll('body *')].filter((each) =>
            each.getBoundingClientRect().right > width + 1 && !each.closest('.wide, .prompt, .unseen, dialog, pre'))
            .map((each) => each.outerHTML.slice(0, 200))"""
        assert page.evaluate(wide, width) == []
        box = page.locator("#composer").bounding_box()  # it stays at the bottom
        assert abs(box["y"] + box["height"] - 800) <= 1
        assert faults(page) == []
        if chat:
            expect(page.locator(".exchange").last.locator(".turn.user")).to_contain_text("And now?")
            for name in ("documents", "settings"):
                page.locator(f"#open-{name}").click()
                assert faults(page) == []
                page.keyboard.press("Escape")
            page.locator("#store summary").click()
            expect(page.locator("#store-legend li")).to_have_count(5)
            assert faults(page) == []
        page.context.close()


@in_a_browser
def test_the_keyboard_reaches_everything(page, stage):
    prompts(stage.worker.loop)
    page.goto(stage.url)
    message(page).fill("Hi")
    message(page).press("Enter")
    expect(page.locator(".turn .text")).to_have_text(["Hi", "ok"])
    expect(page.locator("#announced")).to_have_text("ok")  # once, when it is complete
    message(page).focus()
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(document.activeElement.ariaLabel || document.activeElement.textContent).trim()"))
    assert {"Documents", "Side by side", "Send", "New chat", "Settings", "Copy this answer"} <= reached
    page.locator("#open-documents").press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#open-documents")).to_be_focused()


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize(("example", "words"), [("documents", "3615"), ("chat", "Blue Lantern"), ("agents", "75")])
def test_an_example_runs_with_one_click(page, embedded, example, words):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(embedded.url)
    page.locator(f"#example-{example}").click()
    expect(page.locator(".rows > li.done")).to_have_count(4, timeout=120_000)
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)
    answer = kept(page)["turns"][-1]
    assert words in answer["content"]
    assert words in answer["sides"][0]["content"]
    assert answer["report"]["computed_fraction"] < 0.8
    assert answer["sides"][1]["report"]["computed_fraction"] > 0.9  # a prefix cache finds next to nothing
    expect(page.locator("#saving")).to_contain_text("\N{MULTIPLICATION SIGN}")
    expect(page.locator(".turn.user").last).to_be_in_viewport()
    assert faults(page) == []


@pytest.fixture(scope="module")
def embedded():
    engine = Engine.from_pretrained(
        "smollm2-135m-instruct", dtype="float32", store_tokens=8192, company_tokens=1024, choose="always"
    )
    with live_server(engine, model="smollm2-135m-instruct") as live:
        yield live


def test_the_page_loads_nothing_from_other_hosts(live):
    answer = httpx.get(live.url)
    policy = answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    files = sorted(PAGE.iterdir())
    assert [httpx.get(f"{live.url}/page/{each.name}").status_code for each in files] == [200] * len(files)
    texts = "".join(each.read_text() for each in files)
    assert "innerHTML" not in texts
    assert {urllib.parse.urlsplit(url).hostname for url in re.findall(r"https?://[^\s\"']+", texts)} <= {"www.w3.org"}


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
