"""The panel in a real browser: Chromium drives JupyterLab and the web page as a person would, on a tiny base model.

Skipped, with the reason, where no Chromium is found: `make browser` installs one where it can.
"""

import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest

from helpers import adapters, tasks

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-of-the-tests"
PATIENCE = 180_000  # ms: a kernel that starts on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process with its own folders; `custom` is where its panel looks for the reader's adapters."""

    def __init__(self, command: list[str], folder: Path, port: int, **environment: str):
        self.port, self.custom, self.log = port, folder / "custom", folder / "server.log"
        environment |= {"CUSTOM_LORA_ADAPTERS_DIR": str(self.custom), "OMP_NUM_THREADS": "1", "JUPYTER_TOKEN": TOKEN,
                        "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data"),
                        "PYTHONPATH": str(ROOT)}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + PATIENCE / 1000
        while self.get("/api/status")[0] is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.3)

    def get(self, path: str, token: str | None = None):
        """(HTTP status or None, body) of a request that follows no redirect."""
        class Stay(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *_):
                return None

        headers = {"Authorization": f"token {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.build_opener(Stay).open(request, timeout=20) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except (urllib.error.URLError, ConnectionError):
            return None, ""

    def kernels(self) -> list[psutil.Process]:
        """The kernel processes that it runs."""
        children = [child for child in psutil.Process(self.process.pid).children(True) if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]

    def end(self, ctrl_c: bool = False):
        """End the server, by Ctrl-C as a terminal sends it (to all of its processes) or by SIGTERM; its kernels end with it."""
        kernels = self.kernels()
        if ctrl_c:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.terminate()
        try:
            self.process.wait(60)
            assert psutil.wait_procs(kernels, timeout=30)[1] == [], "a kernel outlives its server"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def lab(browser, tiny, shelf, tmp_path_factory):
    """JupyterLab with one notebook whose only cell shows the panel."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell(f"from helpers import panel\nexplorer = panel.show(base_name={str(tiny)!r}, "
                                     f"prebuilt={str(shelf)!r})\nexplorer")
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}})
    port = free_port()
    server = Server([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
                     f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder / 'notebooks'}",
                     "--expose-app-in-browser", "--LabApp.news_url=None"], folder, port)
    server.notebook, server.folder, server.opened = notebook, folder / "notebooks", 0
    yield server
    server.end()


def app_command(port: int, *arguments: str) -> list[str]:
    """`make app` with the Python of these tests."""
    return ["make", "-o", ".venv/.lab", "app", f"PY={sys.executable}", f"ARGS=--port={port}", *arguments]


@pytest.fixture(scope="session")
def web(browser, tiny, shelf, tmp_path_factory):
    """The web page as `make app` starts it."""
    folder, port = tmp_path_factory.mktemp("web"), free_port()
    server = Server(app_command(port, "KEEP=5"), folder, port, WORKBOOK_BASE=str(tiny), WORKBOOK_PREBUILT=str(shelf))
    yield server
    server.end(ctrl_c=True)


class Page:
    """The panel on a page, with what a person does to it."""

    def __init__(self, page, server: Server):
        self.page, self.server, self.errors = page, server, []
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def status(self) -> str:
        return self.page.locator(".lora-panel .status").inner_text()

    def wait(self, *parts: str) -> str:
        """Wait until the status holds one of these texts."""
        pattern = "|".join(map(re.escape, parts))
        look = "pattern => new RegExp(pattern).test(document.querySelector('.lora-panel .status')?.innerText)"
        self.page.wait_for_function(look, arg=pattern, timeout=PATIENCE)
        return self.status()

    def choose(self, label: str, option: str) -> None:
        deadline = time.monotonic() + PATIENCE / 1000
        while option not in self.option_names(label):  # the kernel may still be filling the list
            assert time.monotonic() < deadline, f"{label} offers {self.option_names(label)}, not {option}"
            time.sleep(0.05)
        self.page.get_by_label(label, exact=True).select_option(index=self.option_names(label).index(option))

    def option_names(self, label: str) -> list[str]:
        texts = self.page.get_by_label(label, exact=True).locator("option").all_inner_texts()
        return [text.replace("\xa0", " ") for text in texts]  # ipywidgets writes unbreakable spaces

    def press(self, name: str) -> None:
        self.page.locator(".lora-panel").get_by_role("button", name=name).click()

    def tokens(self, number: int) -> None:
        field = self.page.get_by_label("New tokens", exact=True)
        if not field.is_visible():
            self.page.get_by_text("Settings", exact=True).last.click()
        field.fill(str(number))
        field.press("Tab")

    def cards(self) -> list[str]:
        return self.page.locator(".lora-panel .card pre").all_inner_texts()

    def run(self) -> str:
        """Press Generate and wait for the end: a status that counts more answers than the one before."""
        before = self.answers()
        self.press("Generate")
        return self.wait_for_more(before)

    def answers(self) -> int:
        found = re.search(r"(\d+) answers so far", self.status())
        return int(found[1]) if found else 0

    def wait_for_more(self, before: int) -> str:
        deadline = time.monotonic() + PATIENCE / 1000
        while self.answers() <= before and "error" not in self.status():
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.05)
        return self.status()


def open_lab(browser, server) -> Page:
    """A notebook, and so a kernel, of its own: run its cell, wait for the panel."""
    server.opened += 1
    nbformat.write(server.notebook, server.folder / f"panel-{server.opened}.ipynb")
    shown = Page(browser.new_page(viewport={"width": 1280, "height": 1100}), server)
    shown.page.goto(f"http://127.0.0.1:{server.port}/lab/tree/panel-{server.opened}.ipynb?reset&token={TOKEN}")
    run_first_cell(shown.page)
    try:
        shown.page.locator(".lora-panel").wait_for()
    except Exception as error:
        cell = shown.page.locator(".jp-Notebook").inner_text()
        raise AssertionError(f"no panel; the notebook shows:\n{cell[-2000:]}\n{server.log.read_text()[-2000:]}") from error
    shown.wait("idle")
    return shown


CONNECTED = """() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel
    ?.connectionStatus === 'connected'"""


def run_first_cell(page) -> None:
    """Run it until it has an execution count.

    JupyterLab shows "idle" before there is a kernel. A cell that is run then asks which kernel to take, or is dropped.
    """
    page.wait_for_function(CONNECTED)
    prompt = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first
    deadline = time.monotonic() + PATIENCE / 1000
    while not re.search(r"\d", prompt.inner_text()):
        assert time.monotonic() < deadline, f"the cell was not run: {page.locator('body').inner_text()[-2000:]}"
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Control+Enter")
        time.sleep(2)
        running = time.monotonic() + 60
        while "*" in prompt.inner_text() and time.monotonic() < running:
            time.sleep(0.2)


def open_web(browser, server) -> Page:
    shown = Page(browser.new_page(viewport={"width": 1280, "height": 1100}), server)
    shown.page.goto(f"http://127.0.0.1:{server.port}/?token={TOKEN}", timeout=PATIENCE)
    shown.page.locator(".lora-panel").wait_for()
    shown.wait("idle")
    return shown


@pytest.fixture(scope="session", params=["lab", "web"])
def shown(request, browser):
    """One page for the tests of each place, so that a kernel starts once; each test leaves the panel idle."""
    server = request.getfixturevalue(request.param)
    page = (open_lab if request.param == "lab" else open_web)(browser, server)
    yield page
    page.page.close()


@pytest.mark.parametrize("task", [task for task in tasks.TASKS.values()], ids=lambda task: task.name)
def test_each_task_fills_in_its_sample_and_answers_with_base_and_adapter(shown, task):
    shown.choose("Task", task.title)
    shown.page.get_by_text(task.prompt(task.samples[0]).splitlines()[0]).first.wait_for()
    assert f"{task.name} · rank 4" in shown.option_names("Adapter")
    shown.tokens(12)
    done = shown.run()
    assert re.search(r"swaps took \d+\.\d{3} ms, \d+\.\d{3} ms", done)
    assert shown.page.locator(".lora-panel .card h4").all_inner_texts() == ["Base model", task.name]
    assert shown.page.locator(".lora-panel .card", has_text="tokens/s").count() == 2
    shown.choose("Sample", task.samples[1][[name for name in task.columns if name not in task.optional][-1]][:70])
    shown.page.get_by_text(task.prompt(task.samples[1]).splitlines()[0]).first.wait_for()
    assert shown.errors == []


def test_all_adapters_answer_in_one_batch(shown):
    shown.tokens(6)
    shown.press("All adapters in one batch")
    shown.run()
    assert shown.page.locator(".lora-panel .card h4").all_inner_texts() == ["Base model", "detox", "instruct", "sql"]
    assert len(set(shown.cards())) == 4
    shown.press("Base and adapter")


def test_tokens_appear_one_after_another_and_stop_ends_them(shown):
    shown.press("Adapter alone")
    shown.tokens(400)
    shown.press("Generate")
    shown.wait("generating")
    lengths = set()
    deadline = time.monotonic() + 60
    while len(lengths) < 4 and time.monotonic() < deadline:
        lengths.add(len((shown.cards() or [""])[0]))
    assert len(lengths) >= 4, "the answer did not grow on the screen"
    shown.press("Stop")
    assert "stopped" in shown.wait("stopped")
    tokens = int(re.search(r"(\d+) tokens, stopped", shown.page.locator(".lora-panel .card").inner_text())[1])
    assert 1 <= tokens < 400
    assert shown.page.get_by_role("button", name="Stop").is_disabled()


def test_a_swap_while_generating_happens_after_the_answer(shown):
    shown.press("Adapter alone")
    shown.choose("Adapter", "sql · rank 4")
    shown.tokens(300)
    shown.press("Generate")
    shown.wait("generating")
    shown.choose("Adapter", "detox · rank 4")
    shown.wait("swaps to detox", "swapped to detox")
    if "generating" in shown.status():
        shown.press("Stop")
    assert "swapped to detox" in shown.wait("swapped to detox")
    assert shown.page.locator(".lora-panel .card h4").all_inner_texts() == ["sql"]


def test_refresh_finds_a_new_adapter_and_a_broken_one_harms_nobody(shown, shelf):
    custom = shown.server.custom
    shutil.copytree(shelf / "sql", custom / "fresh")
    shown.press("Refresh adapters")
    shown.wait("4 adapters on one base model")
    assert "Custom: fresh · rank 4" in shown.option_names("Adapter")
    shown.press("Adapter alone")
    shown.choose("Adapter", "Custom: fresh · rank 4")
    shown.tokens(5)
    shown.run()
    fresh = shown.cards()
    shown.choose("Adapter", "sql · rank 4")
    shown.run()
    assert shown.cards() == fresh  # the same adapter under two names
    weights = custom / "fresh" / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    shown.press("Refresh adapters")
    assert "1 cannot be used" in shown.wait("cannot be used")
    assert "Custom: fresh · rank 4" not in shown.option_names("Adapter")
    shown.run()
    assert shown.cards() == fresh
    shutil.rmtree(custom / "fresh")
    shown.press("Refresh adapters")
    shown.wait("idle: 3 adapters on one base model")


def test_an_error_is_shown_and_the_next_run_works(shown):
    shown.choose("Task", tasks.get_task("detox").title)
    field = shown.page.get_by_label("Toxic", exact=True)
    field.fill("word " * 600)
    shown.press("Generate")
    assert "more than the 512" in shown.wait("error")
    field.fill("<img src=x onerror='window.hacked = 1'> this is a dull day")
    shown.tokens(5)
    shown.run()
    shown.page.get_by_text("<img src=x").first.wait_for()
    assert shown.page.evaluate("window.hacked") is None and shown.page.locator(".lora-panel img").count() == 0


def test_history_is_exported_as_csv(shown, tmp_path):
    shown.choose("Task", tasks.get_task("detox").title)
    shown.tokens(4)
    shown.run()
    title = shown.page.locator(".lora-panel").get_by_text("History", exact=True)
    if not shown.page.get_by_role("button", name="Export CSV").is_visible():
        title.click()
    shown.press("Export CSV")
    with shown.page.expect_download() as download:
        shown.page.get_by_text("Save history.csv").click()
    download.value.save_as(tmp_path / "history.csv")
    rows = list(csv.DictReader((tmp_path / "history.csv").open(newline="")))
    assert len(rows) >= 1 and rows[-1]["task"] == "detox" and float(rows[-1]["tokens_per_second"]) >= 0


def test_the_commands_that_take_the_adapter_home_are_shown(shown):
    shown.choose("Task", tasks.get_task("sql").title)
    shown.page.locator(".lora-panel").get_by_text("Take the adapter home", exact=True).click()
    shown.page.get_by_text(re.compile(r"export \S*sql --to gguf-lora")).wait_for()
    shown.page.locator(".lora-panel").get_by_text("Take the adapter home", exact=True).click()


def test_two_quick_clicks_make_one_run(shown):
    shown.press("Adapter alone")
    shown.tokens(40)
    shown.run()
    before = shown.answers()
    shown.page.get_by_role("button", name="Generate").dblclick()
    shown.wait_for_more(before)
    time.sleep(1)
    assert shown.answers() == before + 1


def test_the_keyboard_reaches_every_control_in_order(shown):
    shown.choose("Task", tasks.get_task("detox").title)
    shown.page.get_by_label("Toxic", exact=True).wait_for()
    shown.page.get_by_label("Task", exact=True).focus()
    reached = []
    for _ in range(16):
        shown.page.keyboard.press("Tab")
        reached.append(shown.page.evaluate("""() => { const e = document.activeElement;
            return e.labels?.length ? e.labels[0].innerText : e.innerText.trim() }"""))
    for name in ("Sample", "Adapter", "Refresh adapters", "Toxic", "Generate"):
        assert name in reached, f"Tab never reached {name}: {reached}"
    shown.tokens(3)
    before = shown.answers()
    shown.page.get_by_role("button", name="Generate").focus()
    shown.page.keyboard.press("Enter")
    assert "done" in shown.wait_for_more(before)


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off(shown, width):
    shown.page.set_viewport_size({"width": width, "height": 1100})
    time.sleep(0.5)
    wider = shown.page.evaluate("""() => [...document.querySelectorAll('.lora-panel, .lora-panel *')].filter(
        e => e.offsetParent && e.scrollWidth > e.clientWidth + 3 && getComputedStyle(e).display !== 'inline'
             && !/auto|scroll/.test(getComputedStyle(e).overflowX)
             && !['SELECT', 'OPTION', 'BUTTON'].includes(e.tagName)).map(
        e => `${e.className} ${e.scrollWidth} > ${e.clientWidth} ${e.textContent.slice(0, 80)}`)""")
    assert wider == []
    shown.page.set_viewport_size({"width": 1280, "height": 1100})


CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
                         .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const back = e => { const c = getComputedStyle(e).backgroundColor;
                      return /rgba\\(.*, 0\\)/.test(c) && e.parentElement ? back(e.parentElement) : c };
  return ['.status', '.card pre', '.card h4', '.card .note', 'h3'].map(s => {
    const e = document.querySelector('.lora-panel ' + s);
    const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
    return [s, (a + 0.05) / (b + 0.05)] }) }"""


def test_it_can_be_read_in_the_light_and_in_the_dark(browser, lab):
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5 to 1, in JupyterLab's own two themes."""
    shown = open_lab(browser, lab)
    shown.tokens(3)
    shown.run()
    brightness = []
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        shown.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        shown.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
        time.sleep(0.5)
        low = [(part, round(value, 2)) for part, value in shown.page.evaluate(CONTRAST) if value < 4.5]
        assert low == [], theme
        brightness.append(shown.page.evaluate("getComputedStyle(document.querySelector('.lora-panel')).backgroundColor"))
    assert brightness[0] != brightness[1]
    shown.page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    shown.page.close()


def test_the_web_page_wants_its_token_and_listens_on_this_machine_only(web):
    for path in ("/", "/api/kernels"):
        assert web.get(path)[0] in (302, 401, 403), f"{path} without a token"
        assert web.get(path, "wrong")[0] in (302, 401, 403), f"{path} with a wrong token"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with socket.socket() as probe:
            probe.settimeout(2)
            assert probe.connect_ex((address, web.port)) != 0, f"it answers on {address}"
    arguments = Path("/proc").glob("[0-9]*/cmdline")
    assert not any(TOKEN.encode() in path.read_bytes() for path in arguments if readable(path) and b"voila" in path.read_bytes())


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:  # that process has ended
        return False
    return True


def test_two_tabs_of_the_web_page_have_a_panel_each(browser, web):
    first, second = open_web(browser, web), open_web(browser, web)
    assert len(web.kernels()) >= 2
    for tab, task in ((first, "sql"), (second, "detox")):
        tab.choose("Task", tasks.get_task(task).title)
        tab.tokens(60)
    first.press("Generate")
    second.press("Generate")
    assert "done" in first.wait("done") and "done" in second.wait("done")
    assert first.page.locator(".card h4").all_inner_texts() == ["Base model", "sql"]
    assert second.page.locator(".card h4").all_inner_texts() == ["Base model", "detox"]
    before = len(web.kernels())
    for tab in (first, second):
        tab.page.close()
    deadline = time.monotonic() + 120
    while len(web.kernels()) > before - 2:
        assert time.monotonic() < deadline, "the kernels of closed tabs go on"
        time.sleep(1)


def test_two_tabs_of_one_notebook_are_two_views_of_one_panel(browser, lab):
    """JupyterLab's tabs share the kernel and so the widgets: a run started in one shows in the other."""
    first = open_lab(browser, lab)
    first.page.keyboard.press("Escape")
    first.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    second = Page(browser.new_page(), lab)
    second.page.goto(f"http://127.0.0.1:{lab.port}/lab/workspaces/other/tree/panel-{lab.opened}.ipynb?reset&token={TOKEN}")
    second.page.locator(".lora-panel").wait_for()
    first.tokens(30)
    first.press("Generate")
    second.page.get_by_role("button", name="Generate").click(force=True)
    first.wait("2 answers so far")
    second.wait("2 answers so far")
    assert first.cards() == second.cards() and len(first.cards()) == 2
    first.page.close()
    second.page.close()
