"""What a committed notebook must be: executed, comparable by nbval, readable by everybody, and naming nobody's machine.

    python tests/tools/notebook_rules.py          check every committed notebook and page; exit 1 naming each fault
    python tests/tools/notebook_rules.py FILE …   check these

A rule is a function of a `Page` that yields one sentence per fault. `RULES` says for which kinds of pages it holds:
lessons and solutions are executed and committed with their outputs, exercises are generated and hold none, the web
page of `make app` is executed when it is looked at, and the pages in Markdown are only checked for links and pictures.
tests/test_notebook_rules.py shows each rule going red.
"""

import ast
import functools
import getpass
import json
import re
import socket
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 400_000  # bytes; beyond that code hosts stop rendering a notebook
# Folders at the root of a file system. A path below one of them is somebody's machine, in a source as in an output.
MACHINE = (r"(?<![\w.~$}*-])/(?:home|root|Users|tmp|var|opt|mnt|private|work\w*|usr|srv|data|content|scratch|builds)/[\w.~-]"
           r"|\b[A-Z]:\\\\?\w")
COMMON_NAMES = {"root", "user", "runner", "ubuntu", "debian", "admin", "jovyan", "vscode", "localhost", "build", "builder",
                "base", "model", "notebook", "python", "jupyter", "worker", "main"}  # say nothing about a person


@dataclass(frozen=True)
class Page:
    """A notebook or a Markdown page, as committed. ``kind``: lesson, solutions, exercises, app or page."""

    path: Path

    @functools.cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @functools.cached_property
    def notebook(self) -> dict:
        return json.loads(self.text)

    @functools.cached_property
    def kind(self) -> str:
        if self.path.suffix == ".md":
            return "page"
        if self.path.parent.name == "app":
            return "app"
        return next((kind for kind in ("solutions", "exercises") if self.path.stem.endswith(kind)), "lesson")

    @functools.cached_property
    def code(self) -> list[dict]:
        """The code cells that have something in them."""
        return [cell for cell in self.notebook["cells"] if cell["cell_type"] == "code" and source(cell).strip()]

    @functools.cached_property
    def prose(self) -> str:
        """The text of a Markdown page, or of a notebook's Markdown cells, without its code."""
        if self.kind == "page":
            text = self.text
        else:
            text = "\n\n".join(source(c) for c in self.notebook["cells"] if c["cell_type"] == "markdown")
        return re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$|(`+)[^`].*?\3", "", text, flags=re.MULTILINE | re.DOTALL)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def named(cell: dict) -> str:
    """A cell as a person finds it: its first line that is not a comment."""
    lines = [line for line in source(cell).strip().splitlines() if line.strip()]
    return repr(next((line for line in lines if not line.startswith("#")), lines[0])[:60])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def markers(cell: dict) -> set[str]:
    """What nbval is told about a cell, by comments or tags, as the comments' names."""
    comments = {line.strip().lstrip("#").strip() for line in source(cell).splitlines() if line.strip().startswith("#")}
    return {c for c in comments if re.match(r"(NBVAL|PYTEST_VALIDATE)_", c)} | {
        tag.upper().replace("-", "_") for tag in tags(cell) if tag.startswith("nbval-")}


def is_compared(cell: dict) -> bool:
    """Whether ``pytest --nbval`` compares the cell's outputs with the stored ones."""
    return not markers(cell) & {"NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP"}


def shows_something(code: str) -> bool:
    """Whether a cell surely writes: it prints or displays outside functions and conditions, or ends in a value.

    A call at the end may return None, so it is not taken for a value; nbval itself finds an output that is not stored.
    """
    lines = [line for line in code.splitlines() if not re.match(r"\s*[%!?]", line)]  # IPython's own syntax
    if any(line.startswith("!") for line in code.splitlines()):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            body = ast.parse("\n".join(lines)).body
    except SyntaxError:
        return False
    if not body:
        return False
    last = body[-1]
    if isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call | ast.Await | ast.Yield):
        empty = isinstance(last.value, ast.Constant) and last.value.value is None
        if not empty and not code.rstrip().endswith(";"):
            return True
    return any(_prints(statement) for statement in body)


def _prints(node: ast.AST) -> bool:
    hidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.IfExp, ast.Match, ast.ExceptHandler,
              ast.While, ast.BoolOp)
    if isinstance(node, hidden):
        return False
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "display"):
        return not any(keyword.arg in ("file", "end") for keyword in node.keywords)
    if isinstance(node, ast.With) and "redirect" in ast.unparse(node.items[0]):
        return False
    return any(_prints(child) for child in ast.iter_child_nodes(node))


def output_texts(cell: dict):
    """Every text that a cell's stored outputs show a reader, pictures aside."""
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", ""))
        yield from (output.get("ename", ""), output.get("evalue", ""), *output.get("traceback", []))
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield "".join(content)


# ---- rules for executed notebooks ------------------------------------------------------------------------------------


def valid(page: Page):
    """It is a notebook of format 4.5, whose cells have ids of their own."""
    import nbformat

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a missing or doubled id is a warning that mends the copy in memory
            nbformat.validate(page.notebook)
    except (nbformat.ValidationError, Warning) as error:
        yield f"not a valid notebook: {str(error).splitlines()[0]}"


def stripped(page: Page):
    """nbval would compare nothing, and a reader on a code host would see nothing."""
    if not any(cell["outputs"] for cell in page.code):
        yield "no cell stores an output: execute it with `make notebooks` (outputs are committed)"


def executed(page: Page):
    """nbval does not compare a cell without a count."""
    for cell in page.code:
        if cell["execution_count"] is None:
            yield f"the cell {named(cell)} was not executed"


def in_order(page: Page):
    counts = [cell["execution_count"] for cell in page.code]
    if None not in counts and counts != list(range(1, len(counts) + 1)):
        yield f"cells were not executed once each from top to bottom: their counts are {counts}"


def output_stored(page: Page):
    for cell in page.code:
        if cell["execution_count"] is not None and shows_something(source(cell)) and not cell["outputs"]:
            yield f"the {'compared ' * is_compared(cell)}cell {named(cell)} shows something and stores no output"


def raising_cells(page: Page):
    """nbval passes such a cell when nothing raises and no error is stored."""
    for cell in page.code:
        must = "raises-exception" in tags(cell) or "NBVAL_RAISES_EXCEPTION" in markers(cell)
        if must and not any(output["output_type"] == "error" for output in cell["outputs"]):
            yield f"the cell {named(cell)} is tagged raises-exception and stores no error"


def no_traceback(page: Page):
    for cell in page.code:
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        streams = [text for output in cell["outputs"] if output["output_type"] != "error"
                   for text in output_texts({"outputs": [output]})]
        if failed and "raises-exception" not in tags(cell):
            yield f"the cell {named(cell)} stores an error"
        if any("Traceback (most recent call last)" in text for text in streams):
            yield f"the cell {named(cell)} stores a traceback"


def no_stderr(page: Page):
    """Warnings and progress bars differ between machines; nbval compares them."""
    for cell in page.code:
        if any(output.get("name") == "stderr" for output in cell["outputs"]):
            yield f"the cell {named(cell)} stores what went to stderr (a warning or a progress bar)"


def nbval_markers(page: Page):
    """A misspelt marker is a comment; a skipped cell is not executed and cannot fail."""
    for cell in page.code:
        for marker in markers(cell) - {"NBVAL_IGNORE_OUTPUT", "NBVAL_CHECK_OUTPUT", "NBVAL_RAISES_EXCEPTION"}:
            why = "skips a cell, which then is never tested" if marker == "NBVAL_SKIP" else "is not a marker that nbval knows"
            yield f"{marker} {why}: {named(cell)}"
        if re.search(r"#.*NBVAL_", source(cell)) and not markers(cell):
            yield f"a marker for nbval must be alone on its line: {named(cell)}"


def ignored_cells_assert(page: Page):
    """Where training or time is random, outputs are not compared: then bounds must be asserted."""
    ignored = [cell for cell in page.code if not is_compared(cell)]
    asserting = sum(any(isinstance(node, ast.Assert) for node in ast.walk(_parsed(cell))) for cell in page.code)
    if len(ignored) > len(page.code) / 2 and asserting * 6 < len(ignored):
        yield f"{len(ignored)} of {len(page.code)} cells are not compared, and only {asserting} assert something"


def _parsed(cell: dict) -> ast.AST:
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return ast.Module([], [])


def widgets_have_state(page: Page):
    """Code hosts refuse a notebook whose widget metadata lacks it."""
    if any("state" not in view for view in page.notebook["metadata"].get("widgets", {}).values()):
        yield "metadata.widgets without a state"


# ---- rules for all notebooks -----------------------------------------------------------------------------------------


def no_machine_paths(page: Page):
    for number, text in enumerate(_texts(page)):
        text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)  # embedded pictures
        for place in {str(ROOT), str(Path.home())} - {"/"}:
            text = text.replace(place, f"/home/{place.rsplit('/', 1)[-1]}")
        if found := re.search(MACHINE + r"[\w./~-]*", text):
            yield f"an absolute path stands in {'its metadata' if number == 0 else f'cell {number}'}: {found[0][:60]}"


def no_names(page: Page):
    """Neither the person who executed it, nor their machine, nor an address."""
    names = {getpass.getuser(), socket.gethostname().split(".")[0]}
    names = {re.escape(name) for name in names if len(name) > 2 and name.lower() not in COMMON_NAMES}
    patterns = [r"\b[\w.+-]+@[\w-]+\.[a-z]{2,6}\b(?!/)", r"\b[a-z][\w-]*@[\w-]+:[~/$]", *(rf"\b{name}\b" for name in names)]
    for number, text in enumerate(_texts(page)):
        text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)
        for pattern in patterns:
            if found := re.search(pattern, text):
                yield f"a person or a machine is named in {'its metadata' if number == 0 else f'cell {number}'}: {found[0]}"


def _texts(page: Page) -> list[str]:
    """The notebook's metadata, then each cell's source and shown outputs."""
    cells = [[source(cell), json.dumps(cell["metadata"]), *output_texts(cell)] for cell in page.notebook["cells"]]
    return [json.dumps(page.notebook["metadata"]), *("\n".join(cell) for cell in cells)]


def size(page: Page):
    if (count := len(page.text.encode())) > LIMIT:
        yield f"{count:,} bytes: at most {LIMIT:,}"


def pictures_have_alt_text(page: Page):
    if re.search(r"!\[\s*\]\(", page.prose):
        yield "a picture without alt text: ![what it shows](file)"
    texts = [page.prose]
    for cell in page.code if page.kind != "page" else []:
        for output in cell.get("outputs", []):
            texts += ["".join(text) for kind, text in output.get("data", {}).items() if kind in ("text/html", "text/markdown")]
            for kind in output.get("data", {}):
                if kind.startswith("image/") and not output.get("metadata", {}).get(kind, {}).get("alt", "").strip():
                    yield f"the cell {named(cell)} stores a picture without alt text: return plots.finish(figure, name, alt)"
    for text in texts:
        for image in re.findall(r"<img\b[^>]*>", text, re.IGNORECASE):
            if not re.search(r"""\balt\s*=\s*(?:"\s*[^"\s][^"]*"|'\s*[^'\s][^']*'|[^\s"'>]+)""", image, re.IGNORECASE):
                yield f"a picture without alt text: {image[:60]}"


def links_lead_somewhere(page: Page):
    """Relative links and pictures exist; their #headings too. What README names as planned need not be there yet."""
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", page.prose)
    links += re.findall(r"<(?:a|img)\b[^>]*?(?:href|src)=[\"']([^\"']+)", page.prose)
    for link in links:
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        name, _, heading = link.partition("#")
        target = page.path.parent / unquote(name) if name else page.path
        if name.startswith("/"):
            yield f"the link {link} is absolute: it leads nowhere on another machine"
        elif not target.exists():
            if Path(name).suffix != ".ipynb" or Path(name).stem[:2] not in planned():
                yield f"the link {link} leads nowhere"
        elif heading and target.suffix in (".md", ".ipynb") and unquote(heading).lower() not in headings(target):
            yield f"the link {link} leads to a heading that is not there"


def planned() -> set[str]:
    """Numbers of the lessons that README's sentence 'Planned, and not there yet: …' names."""
    found = re.search(r"Planned, and not there yet: ([^\n]*)", (ROOT / "README.md").read_text(encoding="utf-8"))
    return set(re.findall(r"\b\d\d\b", found[1])) if found else set()


def headings(path: Path) -> set[str]:
    """Anchors of a page's headings, in the form of code hosts and in JupyterLab's, lower case."""
    lines = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", Page(path).prose, re.MULTILINE)
    anchors = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", line.lower())) for line in lines}
    explicit = re.findall(r"""<a\b[^>]*\b(?:id|name)=["']([^"']+)""", Page(path).text)
    return anchors | {line.lower().replace(" ", "-") for line in lines} | {name.lower() for name in explicit}


# ---- rules for lessons and for exercises -----------------------------------------------------------------------------


def lesson_skeleton(page: Page):
    """The parts that every lesson has (00 has no exercises and nothing before it, 10 nothing after it)."""
    number, prose = page.path.stem[:2], page.prose
    first, last = source(page.notebook["cells"][0]), source(page.notebook["cells"][-1])
    parts = {f"a title '# {number} · …'": re.match(rf"# {number} · \S", first),
             "what you will be able to do": re.search(r"what you will be able to do", prose, re.IGNORECASE),
             "what it needs": re.search(r"\bneeds\b", prose, re.IGNORECASE),
             "a recap": re.search(r"^## Recap", prose, re.MULTILINE | re.IGNORECASE)}
    if number != "00":
        parts["exercises: '## Check yourself'"] = re.search(r"^## Check yourself", prose, re.MULTILINE | re.IGNORECASE)
        before = "\n".join(source(cell) for cell in page.notebook["cells"][:4] if cell["cell_type"] == "markdown")
        parts["a link to a lesson before it"] = any(other < number for other in re.findall(r"\]\((\d\d)_\w+\.ipynb", before))
    if number != "10":
        parts["a link to the next lesson in the last cell"] = any(
            other > number for other in re.findall(r"\]\((\d\d)_\w+\.ipynb", last))
    for part, found in parts.items():
        if not found:
            yield f"the lesson lacks {part}"


def lesson_length(page: Page):
    """At least 25 cells, prose at least as frequent as code, code cells of 8 lines in the median and 90% within 20."""
    cells = page.notebook["cells"]
    lengths = [len(source(cell).strip().splitlines()) for cell in page.code]
    prose = sum(cell["cell_type"] == "markdown" for cell in cells)
    if len(cells) < 25:
        yield f"{len(cells)} cells: a lesson has at least 25"
    if prose < len(lengths):
        yield f"{prose} cells of prose for {len(lengths)} of code: prose is at least as frequent"
    if statistics.median(lengths or [0]) > 8:
        yield f"code cells have {statistics.median(lengths):g} lines in the median: at most 8"
    if lengths and sum(length <= 20 for length in lengths) / len(lengths) < 0.9:
        yield "more than a tenth of the code cells are longer than 20 lines"


def exercises_are_unsolved(page: Page):
    """Made by make_exercises.py, never executed: blanks to fill in, no solution, no output."""
    if any(cell["outputs"] or cell["execution_count"] is not None for cell in page.code):
        yield "an exercise file stores an output or a count: make it again with `make exercises`"
    if re.search(r"(BEGIN|END) SOLUTION", page.text) or any("solution" in tags(cell) for cell in page.notebook["cells"]):
        yield "an exercise file holds a solution"
    blanks = [cell for cell in page.code if "...  # your code here" in source(cell)]
    if not blanks or not all("exercise" in tags(cell) for cell in blanks):
        yield "an exercise file has no blank to fill in, or one without the tag `exercise`"
    after = [following for cell, following in zip(page.code, [*page.code[1:], None], strict=True) if cell in blanks]
    if not all(following and "assert" in source(following) for following in after):
        yield "a blank of an exercise file is not followed by a cell that checks it"


EXECUTED, NOTEBOOKS = ("lesson", "solutions"), ("lesson", "solutions", "exercises", "app")
ALL = (*NOTEBOOKS, "page")
RULES = {
    valid: NOTEBOOKS, stripped: EXECUTED, executed: EXECUTED, in_order: EXECUTED, output_stored: EXECUTED,
    raising_cells: EXECUTED, no_traceback: EXECUTED, no_stderr: EXECUTED, nbval_markers: EXECUTED,
    ignored_cells_assert: EXECUTED, widgets_have_state: NOTEBOOKS, no_machine_paths: NOTEBOOKS, no_names: NOTEBOOKS,
    size: NOTEBOOKS, pictures_have_alt_text: ALL, links_lead_somewhere: ALL, lesson_skeleton: ("lesson",),
    lesson_length: ("lesson",), exercises_are_unsolved: ("exercises",),
}


def committed() -> list[Path]:
    """Every notebook of the project and every page in Markdown that a reader meets."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("notebooks/**/*.md"), *ROOT.glob("notebooks/**/*.ipynb")]
    return sorted(path for path in pages if ".ipynb_checkpoints" not in path.parts)


def problems(path: Path) -> list[str]:
    """What is wrong with a committed page, each as 'rule: sentence'."""
    page = Page(Path(path).resolve())
    if page.kind != "page":
        try:
            cells = page.notebook["cells"]
            assert isinstance(cells, list)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            return [f"valid: not a notebook: {error!r}"]
    return [f"{rule.__name__}: {fault}" for rule, kinds in RULES.items() if page.kind in kinds for fault in rule(page)]


def main(arguments: list[str]) -> int:
    count = 0
    for path in [Path(argument) for argument in arguments] or committed():
        for fault in problems(path):
            print(f"{path}: {fault}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
