"""Tests the server's web page in headless Chromium and takes screenshots to look at.

    blocktune serve -m data/tiny --port 8137 --skip-check
    python eval/server/page.py --url http://127.0.0.1:8137 --output out/page

It needs `chromium` on the PATH and aiohttp. It fails if the page logs an error, an answer is
missing, or something is wider than the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import shutil
import subprocess
import tempfile
from pathlib import Path

import aiohttp

VIEWS = {
    "desktop-light": (1280, 900, "light", False),
    "desktop-dark": (1280, 900, "dark", False),
    "phone-light": (390, 844, "light", True),
    "phone-dark": (390, 844, "dark", True),
}
CODES = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowDown": 40}
DONE = "document.querySelectorAll('.bar').length"


class Browser:
    """A page of Chromium, controlled by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.count, self.errors = socket, 0, []

    async def send(self, method: str, **params):
        self.count += 1
        wanted = self.count
        await self.socket.send_json({"id": wanted, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json()
            name = message.get("method", "")
            entry = message.get("params", {}).get("entry", {})
            if name == "Runtime.exceptionThrown" or entry.get("level") == "error":
                self.errors.append(message["params"])
            if message.get("id") == wanted:
                return message.get("result", {})

    async def value(self, expression: str):
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def until(self, expression: str, wanted) -> None:
        for _ in range(300):
            if await self.value(expression) == wanted:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{expression} never became {wanted!r}")

    async def press(self, key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=CODES[key],
                modifiers=modifiers,
                **({"text": "\r"} if key == "Enter" and not modifiers else {}),
            )

    async def picture(self, path: Path, clip: dict | None = None) -> None:
        more = {} if clip is None else {"captureBeyondViewport": True, "clip": clip}
        shot = await self.send("Page.captureScreenshot", **more)
        path.write_bytes(base64.b64decode(shot["data"]))


async def look(browser: Browser, url: str, name: str, folder: Path) -> None:
    width, height, scheme, phone = VIEWS[name]
    await browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=2 if phone else 1,
        mobile=phone,
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    await browser.send("Emulation.setEmulatedMedia", features=[feature])
    await browser.send("Page.navigate", url=url)
    await browser.until("document.getElementById('a')?.value", "naive")
    await browser.value("document.getElementById('question').focus()")
    for _ in range(2):  # at the second time the documents are cached
        await browser.press("Enter", modifiers=2)
        await browser.until("document.getElementById('go').textContent", "Stop")
        await browser.until("document.getElementById('go').textContent", "Ask")
    assert await browser.value(DONE) == 4, "two methods, each beside full prefill"
    answers = "[...document.querySelectorAll('.answer')].map((a) => a.textContent.length)"
    assert min(await browser.value(answers)) > 0
    assert await browser.value("document.querySelectorAll('.relocated').length") > 1
    too_wide = "document.documentElement.scrollWidth - innerWidth"
    assert await browser.value(too_wide) <= 0, "something is wider than the screen"
    tall = await browser.value("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
    await browser.picture(folder / f"{name}.png", clip)
    assert not browser.errors, browser.errors
    print(f"{name}: passed, {folder / name}.png")


async def by_keyboard(browser: Browser, url: str, folder: Path) -> None:
    """Checks that the page can be used without a mouse and always shows where the focus is."""
    await browser.send("Page.navigate", url=url)
    await browser.until("document.getElementById('a')?.value", "naive")
    order, outlines = [], []
    for _ in range(6):
        await browser.press("Tab")
        order.append(await browser.value("document.activeElement.id"))
        style = "getComputedStyle(document.activeElement).outlineStyle"
        outlines.append(await browser.value(style))
    assert order == ["documents", "model", "a", "b", "question", "go"], order
    assert set(outlines) == {"solid"}, outlines
    unnamed = (
        "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels"
    )
    unnamed += ".length && !one.ariaLabel).map((one) => one.id).join()"
    assert await browser.value(unnamed) == ""
    await browser.picture(folder / "keyboard-focus.png")
    await browser.value("document.getElementById('b').focus()")
    await browser.press("ArrowDown")
    assert await browser.value("document.getElementById('b').value") != "cacheblend"
    assert await browser.value("document.getElementById('b-hint').textContent.length") > 0
    await browser.value("document.getElementById('question').focus()")
    await browser.press("Enter")
    await browser.until("document.getElementById('go').textContent", "Stop")
    await browser.press("Escape")
    await browser.until("document.getElementById('go').textContent", "Ask")
    assert not browser.errors, browser.errors
    await browser.picture(folder / "keyboard-stopped.png")
    await browser.value("document.getElementById('a').value = 'a composition \u2026'")
    await browser.value("document.getElementById('a').dispatchEvent(new Event('change'))")
    await browser.value("document.getElementById('a-text').value = 'nothing-of-that-name'")
    await browser.value("document.getElementById('question').focus()")
    await browser.press("Enter")
    await browser.until("document.querySelectorAll('.error').length > 0", True)
    await browser.until("document.getElementById('go').textContent", "Ask")
    await browser.picture(folder / "wrong-method.png")
    print(f"keyboard: passed, {folder}/keyboard-*.png")


async def run(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = shutil.which("chromium") or shutil.which("google-chrome")
    assert command, "no chromium on the PATH"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [command, *options, f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            while not port_file.exists():
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as response:
                    pages = await response.json()
                target = next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(target, max_msg_size=0) as socket:
                    browser = Browser(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await browser.send(f"{domain}.enable")
                    for name in VIEWS:
                        await look(browser, url, name, folder)
                    await browser.send("Emulation.clearDeviceMetricsOverride")
                    await by_keyboard(browser, url, folder)
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--output", type=Path, default=Path("out/page"))
    args = parser.parse_args()
    asyncio.run(run(args.url, args.output))
