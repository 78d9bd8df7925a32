"""Take the picture of the page in `sparsex_jax/serving/README.md`: SmolLM2 answers the page's example of documents.

Needs Chromium on the PATH.

uv run python scripts/screenshot_page.py
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from sparsex_jax import Engine
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.sockets import free_port
from sparsex_jax.serving.worker import Worker

MODEL = "smollm2-135m-instruct"
PICTURE = Path(__file__).parent / "results" / "page.png"
SECONDS = 120


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("there is no Chromium on the PATH")
    server, thread, url = start_server()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 860})
        try:
            take(page, url)
        finally:
            chromium.close()
            server.should_exit = True
            thread.join()
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} KiB")


def start_server() -> tuple[Server, threading.Thread, str]:
    engine = Engine.from_pretrained(MODEL, dtype="float32", store_tokens=8192, company_tokens=1024, choose="always")
    app = create_app(Worker(engine), model=MODEL)
    port = free_port()
    server = Server(app, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    return server, thread, f"http://127.0.0.1:{port}"


def take(page: Page, url: str) -> None:
    """Run the example twice, because the first time includes compiling, and take the picture."""
    expect.set_options(timeout=SECONDS * 1000)
    page.set_default_timeout(SECONDS * 1000)
    page.goto(url)
    run_example(page)
    start_anew(page, url)
    run_example(page)
    page.locator("#saving").get_by_text("\N{MULTIPLICATION SIGN}").wait_for()
    page.screenshot(path=PICTURE)
    Image.open(PICTURE).convert("RGB").quantize(128).save(PICTURE, optimize=True)


def run_example(page: Page) -> None:
    page.locator("#example-documents").click()
    expect(page.locator(".rows > li.done")).to_have_count(4)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def start_anew(page: Page, url: str) -> None:
    """Start a new chat under another salt, so that it does not find the first chat's prompt as its prefix."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Cache salt").fill("picture")
    page.get_by_label("Cache salt").blur()
    page.keyboard.press("Escape")
    with httpx.Client(base_url=url) as http:
        for entry in http.get("/v1/knowledge").json()["data"]:
            http.delete(f"/v1/knowledge/{entry['handle']}")
    page.get_by_role("button", name="New chat").click()


if __name__ == "__main__":
    main()
