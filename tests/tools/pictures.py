"""The pictures of the panel: the real panel, driven in a real browser, on the shipped adapters.

    python tests/tools/pictures.py   writes images/app-screen.png and images/adapter-swap.gif

Serves the panel as `make app` does, chooses the SQL task, lets base model and adapter answer, then swaps.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from helpers import tasks  # noqa: E402

WAIT = 300_000  # ms
SIZE = {"width": 1100, "height": 900}


def save(name: str, content: bytes) -> None:
    temporary = ROOT / "images" / f".{name}.{os.getpid()}.tmp"
    temporary.write_bytes(content)
    os.replace(temporary, ROOT / "images" / name)
    print(f"images/{name}: {len(content):,} bytes")


def gif(frames: list[bytes], seconds: list[float]) -> bytes:
    """An animated picture of screenshots; equal neighbours are joined."""
    from PIL import Image

    pictures, durations = [], []
    for frame, duration in zip(frames, seconds, strict=True):
        picture = Image.open(io.BytesIO(frame)).convert("RGB")
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS)
        if pictures and picture.tobytes() == pictures[-1].tobytes():
            durations[-1] += duration
        else:
            pictures.append(picture)
            durations.append(duration)
    reduced = [picture.quantize(64, dither=Image.Dither.NONE) for picture in pictures]
    buffer = io.BytesIO()
    reduced[0].save(buffer, "GIF", save_all=True, append_images=reduced[1:], duration=[int(1000 * d) for d in durations], loop=0,
                    optimize=True)
    return buffer.getvalue()


def main() -> int:
    from conftest import executable
    from playwright.sync_api import sync_playwright
    from test_browser import Page, app_command, free_port

    if (path := executable()) is None:
        print("error: no Chromium was found: run `make browser`.", file=sys.stderr)
        return 1
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        environment = {**os.environ, "CUSTOM_LORA_ADAPTERS_DIR": folder, "JUPYTER_TOKEN": "pictures"}
        server = subprocess.Popen(app_command(port), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            shown = Page(browser.new_page(viewport=SIZE), server)
            deadline = time.monotonic() + WAIT / 1000
            while True:
                try:
                    shown.page.goto(f"http://127.0.0.1:{port}/?token=pictures", timeout=WAIT)
                    break
                except playwright_error():
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise
                    time.sleep(1)
            shown.page.locator(".lora-panel").wait_for(timeout=WAIT)
            shown.wait("idle")
            film(shown)
        finally:
            server.terminate()
            server.wait(60)
    return 0


def playwright_error():
    from playwright.sync_api import Error

    return Error


def film(shown) -> None:
    """The screenshot of a finished comparison, and the frames of two answers with a swap between them."""
    frames, seconds = [], []

    def shoot(duration: float) -> None:
        frames.append(shown.page.screenshot())
        seconds.append(duration)

    def film_run() -> None:
        before = shown.answers()
        shown.press("Generate")
        while shown.answers() <= before:
            shoot(0.12)
        assert "error" not in shown.status(), shown.status()

    shown.choose("Task", tasks.get_task("sql").title)
    time.sleep(1)
    shoot(1.5)
    film_run()
    shoot(2.5)
    save("app-screen.png", shown.page.screenshot())
    shown.press("Adapter alone")
    label = next(name for name in shown.option_names("Adapter") if re.match("instruct", name))
    shown.choose("Task", tasks.get_task("instruct").title)
    shown.choose("Sample", tasks.get_task("instruct").samples[2]["instruction"])
    assert label in shown.option_names("Adapter")
    time.sleep(0.5)
    shoot(2.0)
    film_run()
    shoot(3.0)
    keep = max(1, len(frames) // 60)  # a slow machine takes more frames of the same answer
    chosen = sorted({*range(0, len(frames), keep), len(frames) - 1, 0})
    save("adapter-swap.gif", gif([frames[i] for i in chosen], [max(seconds[i], 0.12) for i in chosen]))


if __name__ == "__main__":
    sys.exit(main())
