"""What each notebook needs, measured: seconds and peak memory, written to notebooks/needs.json and into README's table.

    python tests/tools/needs.py           run every notebook
    python tests/tools/needs.py 01 03     run these
    python tests/tools/needs.py --keep    … and keep the executed notebooks and their pictures, as `make notebooks` does
    python tests/tools/needs.py --table   run nothing; write README's table again

Every notebook runs headless, from a clean kernel, in a copy of the project, so that nothing in this folder changes. Run
it on a machine that does nothing else: `busy` is the share of all cores, in percent, that other programs took just
before a notebook started, and the table says so when it was more than a few.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import readme

from helpers import write_text

ROOT = readme.ROOT
NEEDS, README = ROOT / "notebooks" / "needs.json", readme.README
BEGIN, END = readme.markers("needs")
COPIED = ("notebooks", "helpers", "adapters", "tests", "pyproject.toml", "README.md", "Makefile")
INTERVAL = 0.2  # seconds between two looks at the memory
QUIET = 10  # percent of all cores: with more than that, the minutes are marked


def lessons() -> list[Path]:
    """The lessons that exist, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def code_of(notebook) -> str:
    """A hash of a notebook's code without its comments: figures measured with other code are out of date."""
    code = [re.sub(r"(?m)(^ *|  )# .*$", "", cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:12]


class PeakMemory:
    """Watches the children that this process starts from now on, and theirs: the largest sum of their resident memory, in bytes.

    Pages that several share count each time.
    """

    def __init__(self):
        import psutil

        self.bytes, self._gone, self._me = 0, psutil.Error, psutil.Process()
        self._others = set(self._me.children())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _started(self) -> list:
        """The processes that were started since, and theirs."""
        started = set(self._me.children()) - self._others
        with contextlib.suppress(self._gone):  # it ended between the list and the look: the next look finds the others
            return [*started, *(process for child in started for process in child.children(recursive=True))]
        return []

    def _watch(self):
        own = self._me.cmdline()
        while not self._done.wait(INTERVAL):
            total = 0
            for process in self._started():
                try:
                    resident = process.memory_info().rss
                    # Forked and not its own program yet, a child shows its parent's memory: not the notebook's.
                    if process.cmdline() != own:
                        total += resident
                except self._gone:  # it ended between the list and the look
                    continue
            self.bytes = max(self.bytes, total)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()


def measure(path: Path, keep: bool = False, timeout: int = 3600) -> dict:
    """Run one notebook in a copy of the project. Returns its figures. Raises what its failing cell raised.

    keep: put the executed notebook in the place of the one that was run, and its pictures into images/."""
    import nbformat
    import psutil
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="needs-") as folder:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__", "custom"))
            elif source.exists():
                shutil.copy(source, Path(folder) / name)
        os.environ["CUSTOM_LORA_ADAPTERS_DIR"] = str(Path(folder) / "adapters" / "custom")
        place = {"metadata": {"path": str(Path(folder) / "notebooks")}}
        client = NotebookClient(notebook, timeout=timeout, record_timing=False, resources=place)
        busy, start = psutil.cpu_percent(interval=3), time.monotonic()
        with PeakMemory() as memory:
            client.execute()
        seconds = time.monotonic() - start
        if keep:
            write_text(path, nbformat.writes(notebook) + "\n")
            for picture in Path(folder, "images").glob("*.png"):
                shutil.copy(picture, ROOT / "images")
    return {"seconds": round(seconds, 1), "peak_bytes": memory.bytes, "busy": round(busy), "code": code_of(notebook),
            "date": date.today().isoformat(), "machine": machine()}


def machine() -> str:
    """One line that says where the figures come from."""
    import torch

    from helpers import base_models

    return f"{base_models.hardware()}, Python {platform.python_version()}, torch {torch.__version__}"


def table() -> str:
    """The lessons and their figures as Markdown; a lesson without figures has dashes, and what is wrong with figures is said."""
    import nbformat

    known = json.loads(NEEDS.read_text(encoding="utf-8")) if NEEDS.exists() else {}
    lines, machines = [], set()
    for path in lessons():
        notebook = nbformat.read(path, as_version=4)
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        device = "CPU" if 'device="cpu"' in code else "GPU if there is one, otherwise CPU"
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        if found := known.get(path.stem):
            machines.add(f"{found['machine']}, {found['date']}")
            notes = [note for note, holds in (("before its last change", found["code"] != code_of(notebook)),
                                              ("machine busy", found["busy"] > QUIET)) if holds]
            note = f" ({', '.join(notes)})" if notes else ""
            figures = f"{found['seconds'] / 60:.1f}{note} | {found['peak_bytes'] / 1e9:.1f}"
        else:
            figures = "– | –"
        lines.append(f"| {title} | {device} | {figures} |")
    head = ["| notebook | device | minutes | memory (GB) |", "| --- | --- | ---: | ---: |"]
    return "\n".join([*head, *lines, "", f"Measured by `make needs` on: {'; '.join(sorted(machines)) or 'nothing yet'}."])


def write_readme() -> None:
    """Put the table between README's markers."""
    readme.put("needs", table(), README)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="notebooks to run, such as 01 03 (default: all)")
    parser.add_argument("--keep", action="store_true", help="keep the executed notebooks and their pictures")
    parser.add_argument("--table", action="store_true", help="run nothing; only write README's table again")
    options = parser.parse_args(arguments)
    chosen = [path for path in lessons() if not options.numbers or path.stem[:2] in options.numbers]
    failed = []
    for path in chosen if not options.table else []:
        print(f"{path.stem}: ", end="", flush=True)
        try:
            found = measure(path, options.keep)
        except Exception as error:  # the other notebooks still run; the exit code says that one did not
            failed.append(path.stem)
            print(f"failed: {str(error).strip().splitlines()[-1]}")
            continue
        known = json.loads(NEEDS.read_text(encoding="utf-8")) if NEEDS.exists() else {}
        write_text(NEEDS, json.dumps(known | {path.stem: found}, indent=1, sort_keys=True) + "\n")
        print(f"{found['seconds']:.0f} s, {found['peak_bytes'] / 1e9:.1f} GB (other programs took {found['busy']}%)")
    write_readme()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
