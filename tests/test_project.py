"""The project holds together: dependency lists agree, notebooks are committed as a reader should meet them."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "exercises").glob("*_solutions.ipynb"))


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_constraints_pin_every_dependency_inside_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for text in (*project()["dependencies"], *project()["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not pinned in constraints.txt: run `make lock`"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement.specifier}"


def test_conda_installs_the_same_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"], "environment.yml installs through pyproject.toml alone"


def test_every_dependency_has_its_reason():
    lines = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if re.match(r'\s+"[\w-]+>=', line)]
    assert len(lines) == len(project()["dependencies"]) + len(project()["optional-dependencies"]["dev"])
    assert all("#" in line for line in lines)


def test_imports_point_one_way():
    """No helper imports another that (directly or not) imports it, and the cheap ones stay cheap."""
    graph = {}
    for path in (ROOT / "helpers").glob("*.py"):
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        graph[path.stem] = {node.module.removeprefix("helpers.") for node in found if node.module.startswith("helpers.")}
        graph[path.stem] |= {alias.name for node in found if node.module == "helpers" for alias in node.names} - {"WorkbookError"}

    def reaches(start, goal, seen=()):
        return any(step == goal or (step not in seen and reaches(step, goal, (*seen, step))) for step in graph.get(start, ()))

    assert not [name for name in graph if reaches(name, name)]


def test_helpers_import_without_heavy_libraries():
    code = ("import sys, helpers.jobs, helpers.tasks, helpers.data, helpers.fine_tuning, helpers.base_models; "
            "import helpers.evaluation\n"
            "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def problems(notebook: dict, text: str) -> list[str]:
    """What a reader would trip over in a committed notebook."""
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    counts = [cell["execution_count"] for cell in code]
    if None in counts:
        found.append("a cell was not executed")
    elif counts != list(range(1, len(counts) + 1)):
        found.append("cells were not executed once each from top to bottom")
    for cell in code:
        source = "".join(cell["source"])
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        must_fail = "raises-exception" in cell["metadata"].get("tags", [])
        if failed and not must_fail:
            found.append("a traceback is stored")
        if must_fail and not failed:
            found.append("a cell that must raise stores no error")
        if re.search(r"^print\(|\n *print\(", source) and not cell["outputs"] and "def " not in source and "if " not in source:
            found.append(f"a cell that prints stores no output: {source[:60]!r}")
    if re.search(r"(/home/|/root/|/Users/|C:\\\\Users|/work/|/tmp/)", text):
        found.append("an absolute path is stored")
    if re.search(r"!\[\]\(", text):
        found.append("a picture without alt text")
    if len(text.encode()) > 400_000:
        found.append(f"{len(text.encode()):,} bytes")
    if any("state" not in view for view in notebook["metadata"].get("widgets", {}).values()):
        found.append("metadata.widgets without state")
    return found


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: p.name)
def test_notebooks_are_committed_as_a_reader_should_meet_them(path):
    text = path.read_text()
    assert problems(json.loads(text), text) == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.name)
def test_lessons_read_well(path):
    cells = json.loads(path.read_text())["cells"]
    code = [len("".join(c["source"]).strip().splitlines()) for c in cells if c["cell_type"] == "code"]
    markdown = sum(c["cell_type"] == "markdown" for c in cells)
    assert 25 <= len(cells) <= 60 and markdown >= len(code), f"{len(cells)} cells, {markdown} of them prose"
    assert statistics.median(code) <= 8 and sum(n <= 20 for n in code) / len(code) >= 0.9


@pytest.mark.parametrize(("fault", "said"), [
    (lambda n: n["cells"][-1].update(execution_count=None), "not executed"),
    (lambda n: n["cells"][-1].update(execution_count=7), "top to bottom"),
    (lambda n: n["cells"][-1].update(outputs=[]), "stores no output"),
    (lambda n: n["cells"][-1].update(outputs=[{"output_type": "error"}]), "traceback"),
    (lambda n: n["cells"][-1]["metadata"].update(tags=["raises-exception"]), "must raise"),
    (lambda n: n["cells"][0].update(source="![](x.png)"), "alt text"),
    (lambda n: n["cells"][0].update(source="see /home/ann/x"), "absolute path"),
    (lambda n: n["cells"][0].update(source="x" * 400_001), "bytes"),
    (lambda n: n["metadata"].update(widgets={"a": {}}), "without state"),
])
def test_each_planted_fault_is_found(fault, said):
    notebook = {"metadata": {}, "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": "text"},
        {"cell_type": "code", "metadata": {}, "source": "print(1)", "execution_count": 1,
         "outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}]}
    assert problems(notebook, json.dumps(notebook)) == []
    fault(notebook)
    assert any(said in problem for problem in problems(notebook, json.dumps(notebook)))


def test_links_between_pages_lead_somewhere():
    """Links to lessons that are planned are named in README and allowed; every other relative link must exist."""
    planned = set(re.findall(r"0\d_\w+", "00_start_here 05_evaluate 06_swap_adapters 07_many_workers 08_beyond"))
    for page in [ROOT / "README.md", *(ROOT / "notebooks").glob("*.md"), *LESSONS, *SOLUTIONS]:
        text = page.read_text()
        if page.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\((?!https?:|#|mailto:|attachment:)([^)#\s]+)", text):
            if Path(target).stem not in planned:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
