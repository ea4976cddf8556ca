"""The book: it builds without a warning, holds every page, and a browser without a network shows each of them as it should.

The browser's part is skipped, with the reason, where no Chromium is found: `make browser` installs one where it can.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from book import PAGES, is_drawing, prepare

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path for pattern in PAGES if pattern.endswith(".ipynb") for path in sorted(ROOT.glob(pattern))]
SOURCES = [path for pattern in PAGES if not pattern.startswith("images") for path in sorted(ROOT.glob(pattern))]
NO_ALT = "No description has been provided"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """The book, built as `make book` does. (`pytest -rP` shows how long that took.)"""
    folder, start = tmp_path_factory.mktemp("book") / "html", time.monotonic()
    made = subprocess.run([sys.executable, "tests/tools/book.py", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0 and not made.stderr, made.stderr[-3000:]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"built in {time.monotonic() - start:.0f} s: {len(pages_of(folder))} pages, {size / 1e6:.1f} MB")
    return folder


def pages_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


class Html(HTMLParser):
    """What a page holds: its anchors, links, pictures, and the files that it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.ids, self.links, self.loads, self.pictures = path, set(), [], [], []
        self.feed(self.text)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.pictures.append((given.get("src", ""), given.get("alt") or ""))
        loads = given.get("href") if tag == "link" and given.get("rel") in ("stylesheet", "icon") else given.get("src")
        if tag != "a" and loads:
            self.loads.append(loads)

    def target(self, link: str) -> tuple[Path, str]:
        name, _, anchor = link.partition("#")
        name = unquote(name.partition("?")[0])
        return ((self.path.parent / name).resolve() if name else self.path), unquote(anchor)


def faults(folder: Path) -> list[str]:
    """Every broken link, every file from elsewhere and every picture without a description, of all pages."""
    pages = {path.resolve(): Html(path.resolve()) for path in pages_of(folder)}
    said = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for link in page.links:
            if re.match(r"(https?|mailto):", link):
                continue
            target, anchor = page.target(link)
            if not target.is_file() or target not in pages and target.suffix == ".html":
                said.append(f"{name}: the link {link} leads nowhere")
            elif anchor and anchor not in pages[target].ids:
                said.append(f"{name}: the link {link} has no such anchor")
        for load in page.loads:
            if not load.startswith("data:") and (re.match(r"\w+:|//", load) or not page.target(load)[0].is_file()):
                said.append(f"{name}: it loads {load}")
        said += [f"{name}: the picture {source} has no description" for source, alt in page.pictures if not alt.strip() or NO_ALT in alt]
    for path in folder.rglob("*.css"):
        if found := re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^)\"'\s]+)", path.read_text(encoding="utf-8")):
            said.append(f"{path.name}: it loads {found[0]}")
    return said


# ---- the files -------------------------------------------------------------------------------------------------------


def test_every_page_and_notebook_of_the_project_is_reached_from_the_first_page(book):
    expected = {book / path.relative_to(ROOT).with_suffix(".html") for path in SOURCES}
    assert len(expected) > 30 and not [path for path in expected if not path.is_file()]
    reached, waiting = set(), [book / "index.html"]
    while waiting:
        page = Html(waiting.pop())
        reached.add(page.path)
        found = {page.target(link)[0] for link in page.links if not re.match(r"\w+:", link)}
        waiting += [path for path in found - reached - set(waiting) if path.suffix == ".html"]
    assert expected <= reached


def test_no_link_is_broken_no_file_comes_from_elsewhere_and_every_picture_is_described(book):
    pages = [Html(path) for path in pages_of(book)]
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages)} links, {sum(len(page.pictures) for page in pages)} pictures")
    assert faults(book) == []
    assert not [page.path.name for page in pages if NO_ALT in page.text]


def test_a_table_is_a_table_in_outputs_too(book):
    assert not [page.name for page in pages_of(book) if "<p>|" in page.read_text(encoding="utf-8")]
    assert "<table" in Html(book / "notebooks" / "05_evaluate.html").text


def test_every_figure_has_the_description_that_its_notebook_stores(book):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        stored = [output["metadata"]["image/png"]["alt"] for cell in cells for output in cell.get("outputs", [])
                  if "image/png" in output.get("data", {})]
        shown = [alt for _, alt in Html(book / path.relative_to(ROOT).with_suffix(".html")).pictures]
        assert [alt for alt in shown if alt in stored] == stored, path.name


def test_drawing_code_and_solutions_are_folded(book):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        solutions = sum("solution" in cell["metadata"].get("tags", []) for cell in cells)
        hidden = sum(bool(cell["metadata"].get("jupyter", {}).get("source_hidden")) for cell in cells)
        html = Html(book / path.relative_to(ROOT).with_suffix(".html")).text
        assert html.count("Show the solution") == solutions, path.name
        assert html.count("Show the code") >= hidden, path.name
        assert solutions or not path.stem.endswith("_solutions")


def unread_formulas(html: str) -> list[str]:
    """What is still TeX, in a formula or between dollars, outside code."""
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", html, flags=re.DOTALL)
    return re.findall(r"\$[^$\s<]*\\\w+", prose) + re.findall(r"\\\w+", "".join(re.findall(r"<math\b.*?</math>", prose, re.DOTALL)))


def test_formulas_are_mathml_and_widgets_are_their_static_picture(book):
    texts = {path: Html(path).text for path in pages_of(book)}
    assert sum(text.count("<math") for text in texts.values()) > 200
    assert not {path.name: found for path, text in texts.items() if (found := unread_formulas(text))}
    assert unread_formulas(r"<pre>$\a</pre><p>$\b$ <math><mi>\c</mi></math></p>") == [r"$\b", r"\c"]
    text = Html(book / "notebooks" / "06_swap_adapters.html").text
    assert "a picture of its last state" in text and "widget-view" not in text


def test_a_drawing_is_most_of_its_cell():
    drawing = "figure, ax = plt.subplots()\nax.plot(x)\nplots.finish(figure)\n"
    assert is_drawing(drawing) and is_drawing("x = 1\n" + drawing) and not is_drawing("x = 1\n" * 4 + drawing)
    assert not is_drawing("figure, ax = plt.subplots()\nplt.show()")


def test_a_cell_with_two_pictures_is_refused():
    picture = {"output_type": "display_data", "data": {"image/png": ""}, "metadata": {"image/png": {"alt": "a"}}}
    cell = {"cell_type": "code", "metadata": {}, "source": ["# NBVAL_IGNORE_OUTPUT\n", "x"], "outputs": [picture]}
    made = json.loads(prepare("01_a.ipynb", json.dumps({"cells": [cell]})))["cells"][0]
    assert made["source"] == "x" and made["metadata"]["mystnb"] == {"image": {"alt": "a"}}
    hidden = {**cell, "metadata": {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}}
    made = json.loads(prepare("01_a.ipynb", json.dumps({"cells": [hidden]})))["cells"][0]
    assert made["metadata"]["tags"] == ["hide-input"]
    with pytest.raises(ValueError, match="two pictures"):
        prepare("01_a.ipynb", json.dumps({"cells": [{**cell, "outputs": [picture] * 2}]}))


BROKEN = {
    "a link": ('<a href="gone.html">x</a>', "the link gone.html leads nowhere"),
    "an anchor": ('<a href="#gone">x</a>', "the link #gone has no such anchor"),
    "an anchor of another page": ('<a href="b.html#gone">x</a>', "the link b.html#gone has no such anchor"),
    "a script from elsewhere": ('<script src="https://cdn.example/x.js"></script>', "it loads https://cdn.example/x.js"),
    "a style sheet that is not there": ('<link rel="stylesheet" href="gone.css">', "it loads gone.css"),
    "a picture without a description": ('<img src="a.png">', "the picture a.png has no description"),
    "a picture with none of ours": (f'<img src="a.png" alt="{NO_ALT} for this image">', "the picture a.png has no description"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_each_planted_fault_is_found(tmp_path, broken):
    html, said = BROKEN[broken]
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.html").write_text("<h1 id='there'>b</h1>", encoding="utf-8")
    (tmp_path / "a.html").write_text("<a href='b.html#there'>b</a><a href='https://example.org'>x</a>" + html, encoding="utf-8")
    assert faults(tmp_path) == [f"a.html: {said}"]


def test_a_style_sheet_that_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.css").write_text("@import '//fonts.example/x.css'; a {background: url(b.png)}", encoding="utf-8")
    assert faults(tmp_path) == ["a.css: it loads //fonts.example/x.css"]


# ---- the browser -----------------------------------------------------------------------------------------------------

TOO_WIDE = """() => {
    document.querySelectorAll('details').forEach(fold => fold.open = true);
    const page = document.documentElement, over = page.scrollWidth - page.clientWidth;
    return over > 0 ? `it is ${over} pixels wider than the window` : '';
}"""
BRIGHTNESS = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number))"
UNSEEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.getAttribute('src'))"


@contextlib.contextmanager
def window(browser, said: list[str]):
    """A window without a network, which notes what goes wrong in it."""
    with contextlib.closing(browser.new_context(viewport=WIDE, color_scheme="light", offline=True)) as context:
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"console: {error}"))
        page.on("requestfailed", lambda request: said.append(f"a request failed: {request.url}"))
        page.on("request", lambda request: re.match("file:|data:", request.url) or said.append(f"a request: {request.url}"))
        yield page


def look(page, path: Path, said: list[str]) -> list[str]:
    """Open a page, wide and as a phone, light and dark. Returns what is wrong with it."""
    said.clear()
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(WIDE)
    page.goto(path.as_uri(), wait_until="load")
    said += [f"the picture {source} is not shown" for source in page.evaluate(UNSEEN)]
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            if (page.evaluate(BRIGHTNESS) > 128) != (scheme == "light"):
                said.append(f"{size['width']} px: its background is not {scheme}")
            if wide := page.evaluate(TOO_WIDE):
                said.append(f"{size['width']} px, {scheme}: {wide}")
    return [f"{path.name}: {one}" for one in dict.fromkeys(said)]


def test_every_page_opens_without_a_network_on_a_phone_and_in_the_dark(browser, book):
    said, found = [], []
    with window(browser, said) as page:
        for path in pages_of(book):
            found += look(page, path, said)
    assert found == []


@pytest.mark.parametrize(("word", "page"), [("absmax", "02_qlora_from_scratch"), ("paradetox", "detox/README")])
def test_the_search_finds_a_word(browser, book, word, page):
    said = []
    with window(browser, said) as shown:
        shown.goto((book / "index.html").as_uri())
        shown.locator("input[name=q]").fill(word)
        shown.locator("input[name=q]").press("Enter")
        result = shown.locator(f"#search-results a[href*='{page}']").first
        result.wait_for(timeout=30_000)
        result.click()
        shown.wait_for_url(f"**/{page}.html*")
        assert word in shown.locator("article").inner_text().lower()
    assert said == []


def test_a_solution_is_seen_after_a_click(browser, book):
    with window(browser, []) as page:
        page.goto((book / "notebooks" / "exercises" / "01_exercises.html").as_uri())
        page.get_by_role("link", name="01 · Solutions").last.click()
        page.wait_for_url("**/01_solutions.html")
        code = page.locator("details.hide pre").first
        assert not code.is_visible()
        page.get_by_text("Show the solution").first.click()
        code.wait_for(state="visible", timeout=10_000)


CHOICES = {"01_lora_from_scratch": ("4", "64"), "02_qlora_from_scratch": ("NF4, 64", "FP4, all"),
           "03_tasks_and_data": ("packed", "padded")}  # the state that is shown at first, and one to press


@pytest.mark.parametrize("size", (WIDE, PHONE), ids=("wide", "phone"))
@pytest.mark.parametrize("name", CHOICES)
def test_a_figure_s_state_is_chosen_by_mouse_and_by_keyboard(browser, book, name, size):
    said = []
    with window(browser, said) as page:
        page.set_viewport_size(size)
        page.goto((book / "notebooks" / f"{name}.html").as_uri())
        figure = page.locator("fieldset[class^=choose]")
        labels, states = figure.locator("label").all_inner_texts(), figure.locator("> div")
        first, pressed = CHOICES[name]

        def seen() -> list[str]:
            return [labels[i] for i in range(len(labels)) if states.nth(i).is_visible()]

        assert seen() == [first]
        figure.get_by_text(pressed, exact=True).click()
        assert seen() == [pressed]
        shown, beside = states.nth(labels.index(pressed)), labels[labels.index(pressed) + 1]
        assert re.search(r"\d+(%| bits)", shown.inner_text()) and pressed not in shown.inner_text().splitlines()
        assert shown.locator("img").first.evaluate("i => i.getBoundingClientRect().width") > 150
        page.keyboard.press("ArrowRight")
        assert seen() == [beside]
        assert figure.locator(":focus-visible + label").evaluate("l => getComputedStyle(l).outlineStyle") == "solid"
        page.keyboard.press("ArrowLeft")
        assert seen() == [pressed]
        assert figure.evaluate("f => f.scrollWidth <= f.clientWidth") and page.evaluate(TOO_WIDE) == ""
        page.emulate_media(media="print")
        assert seen() == labels
        page.emulate_media(media="screen")
        page.evaluate("document.querySelectorAll('fieldset[class^=choose] input').forEach(input => input.remove())")
        assert seen() == labels and figure.locator("> div > b").first.is_visible()
    assert said == []


DARK = "<style>body {background: #fff} @media (prefers-color-scheme: dark) {body {background: #000}}</style>"
ILL = {
    "an error": ("<script>undefined_name</script>", "console: undefined_name is not defined"),
    "a message": ("<script>console.error('no')</script>", "console: no"),
    "a request to elsewhere": ("<img alt='x' src='http://127.0.0.1:9/x.png'>", "a request: http://127.0.0.1:9/x.png"),
    "a missing file": ("<img alt='x' src='gone.png'>", "the picture gone.png is not shown"),
    "a wide box": ("<div style='width: 500px'>x</div>", "390 px, dark: it is "),
    "a wide box in a fold": ("<details><div style='width: 500px'>x</div></details>", "390 px, light: it is "),
    "no dark colours": ("<style>body {background: #fff !important}</style>", "1280 px: its background is not dark"),
}


@pytest.mark.parametrize("ill", ILL)
def test_the_browser_sees_each_planted_fault(browser, tmp_path, ill):
    html, expected = ILL[ill]
    said, path = [], tmp_path / "a.html"
    with window(browser, said) as page:
        path.write_text(f"<!doctype html>{DARK}<p>well</p>", encoding="utf-8")
        assert look(page, path, said) == []
        path.write_text(f"<!doctype html>{DARK}{html}", encoding="utf-8")
        assert [one for one in look(page, path, said) if one.startswith(f"a.html: {expected}")]
