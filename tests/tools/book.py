"""The book: one HTML site of the committed notebooks and pages, for readers without a kernel and without a network.

    python tests/tools/book.py            writes runs/book/index.html
    python tests/tools/book.py FOLDER     writes FOLDER/index.html

Pages and notebooks are copied into a temporary folder, which is laid out like the project; there the notebooks get what
Sphinx needs to know. notebooks/book/conf.py says the rest. A warning of Sphinx is an error.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BOOK = ROOT / "notebooks" / "book"
PAGES = ("*.md", "notebooks/*.md", "notebooks/[0-9]*.ipynb", "notebooks/exercises/*.ipynb", "adapters/prebuilt/*/README.md",
         "tests/benchmarks/NOTES.md", "images/*.*")


def is_drawing(source: str) -> bool:
    """Whether at least half of a cell's lines make a figure."""
    lines = source.rstrip().splitlines()
    start = next((number for number, line in enumerate(lines) if "plt.subplots(" in line), len(lines))
    return "plots.finish(" in source and start <= len(lines) / 2


def prepare_cell(cell: dict) -> None:
    """Fold drawing code and solutions, and hand the alt text of a stored picture to myst-nb, which reads it from the cell."""
    cell["source"] = re.sub(r"\A# NBVAL_\w+\n", "", "".join(cell["source"]))  # a note for the tests
    data = cell["metadata"]
    tags, shown = data.setdefault("tags", []), data.setdefault("mystnb", {})
    if "solution" in tags:
        shown |= {"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
    folded = "solution" in tags or data.get("jupyter", {}).get("source_hidden") or is_drawing(cell["source"])
    if folded and "hide-input" not in tags:
        tags.append("hide-input")
    pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
    if len(pictures) > 1:
        raise ValueError("a cell stores two pictures, and myst-nb has one alt text for both: make two cells of it")
    for picture in pictures:
        shown["image"] = {"alt": picture["metadata"].get("image/png", {}).get("alt", "")}


def prepare(name: str, text: str) -> str:
    """A notebook as the book shows it. ``name`` is its file's name."""
    notebook = json.loads(text)
    cells = notebook["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            prepare_cell(cell)
    if found := re.fullmatch(r"(\d\d)_(exercises|solutions)\.ipynb", name):
        number, kind = found.groups()
        first = "".join(cells[0]["source"])
        cells[0]["source"] = re.sub(r"\A# .*", f"# {number} · {kind.capitalize()}", first)
        if kind == "exercises":
            link = f"## Solutions\n\n```{{toctree}}\n{number}_solutions\n```"
            cells.append({"cell_type": "markdown", "id": "solutions", "metadata": {}, "source": link})
    return json.dumps(notebook)


def copy_sources(folder: Path) -> None:
    """Everything that the book shows, laid out like the project, with its first page at the top."""
    for pattern in PAGES:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ipynb":
                target.write_text(prepare(path.name, path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(path, target)
    first = (BOOK / "index.md").read_text(encoding="utf-8")
    (folder / "index.md").write_text(first.replace("](../../", "]("), encoding="utf-8")


def build(out: Path) -> int:
    """Build into ``out``, in place of what is there. Returns Sphinx's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        sources, made = Path(folder, "sources"), Path(folder, "book")
        copy_sources(sources)
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(BOOK), "-d", str(Path(folder, "cache")),
                   str(sources), str(made)]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}).returncode
        if status == 0:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(made, out, ignore=shutil.ignore_patterns(".buildinfo*", "objects.inv", "_sources"))
    return status


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "runs" / "book")
    out = parser.parse_args(arguments).folder.resolve()
    status = build(out)
    if status == 0:
        print(f"The book: {out / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
