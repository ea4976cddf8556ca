"""Every committed notebook keeps the rules of notebook_rules.py, and each rule goes red on a planted fault."""

import base64
import copy
import getpass
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import notebook_rules as rules
import pytest

ROOT = Path(__file__).resolve().parent.parent
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(text: str, *outputs: dict, tags: tuple = ()) -> dict:
    return {"cell_type": "code", "metadata": {"tags": list(tags)} if tags else {}, "source": text, "outputs": list(outputs),
            "execution_count": None}


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def picture(alt: str) -> dict:
    return {"output_type": "display_data", "metadata": {"image/png": {"alt": alt}},
            "data": {"image/png": PIXEL, "text/plain": f"[figure] {alt}"}}


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["ValueError: no"]}
LESSON = [
    markdown("# 03 · A lesson\n\n**What you will be able to do** read. **Needs** nothing. Before: [02](02_before.ipynb)."),
    code("# NBVAL_IGNORE_OUTPUT\nprint(torch.__version__)", stream("2.13\n")),
    markdown("See ![a curve that falls](curve.png) and [the words](words.md#rank), or `[x](y)` in code."),
    code("print(1)", stream("1\n")),
    markdown("## Check yourself\n\n[exercises](exercises/03_exercises.ipynb)"),
    code("1 / 0", ERROR, tags=("raises-exception",)),
    markdown("A picture."),
    code("figure = 3\nfinish(figure)", picture("Loss falls.")),
    *[cell for i in range(8) for cell in (markdown(f"Say, do, look: {i}."), code(f"assert {i} >= 0"))],
    markdown("## Recap\n\nDone. Next: [04](04_after.ipynb)"),
]
EXERCISES = [
    markdown("# Exercises"), code("import math"), markdown("Double a number."),
    code("def double(x):\n    ...  # your code here", tags=("exercise",)),
    code("assert double(2) == 4, 'not yet'\nprint('right')", tags=("check",)),
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a notebook beside the files that it links to, and return what is wrong with it."""
    (tmp_path / "notebooks" / "exercises").mkdir(parents=True)
    for name in ("02_before.ipynb", "04_after.ipynb", "curve.png", "exercises/03_exercises.ipynb"):
        (tmp_path / "notebooks" / name).write_text("{}")
    (tmp_path / "notebooks" / "words.md").write_text("# Words\n\n## Rank\n\nHow wide.")
    (tmp_path / "README.md").write_text("Planned, and not there yet: 06 swap, 08 beyond.\n")
    monkeypatch.setattr(rules, "ROOT", tmp_path)

    def check(cells: list[dict], name: str = "03_lesson", change=None) -> list[str]:
        cells, executed = copy.deepcopy(cells), name.split("_")[-1] != "exercises"
        numbers = iter(range(1, 99))
        for index, cell in enumerate(cells):
            cell["id"] = f"cell-{index}"
            if cell["cell_type"] == "code" and executed:
                cell["execution_count"] = next(numbers)
        notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        if change:
            change(notebook)
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return rules.problems(path)

    return check


@pytest.mark.parametrize("path", rules.committed(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_committed_page_keeps_every_rule(path):
    assert rules.problems(path) == []


def test_the_sound_copies_keep_every_rule(write):
    assert write(LESSON) == []
    assert write(LESSON, "03_solutions") == []
    assert write(EXERCISES, "03_exercises") == []


def cell(index: int, **changes):
    return lambda notebook: notebook["cells"][index].update(changes)


def everywhere(change):
    def plant(notebook):
        for each in notebook["cells"]:
            if each["cell_type"] == "code":
                change(each)
    return plant


def say(text: str):
    """In the output of the compared cell."""
    return cell(3, outputs=[stream(text)])


FAULTS = {
    rules.valid: [cell(1, outputs=[{"output_type": "stream"}]), lambda n: n["cells"][2].update(id="cell-1"),
                  lambda n: n["cells"][2].pop("id")],
    rules.stripped: [everywhere(lambda each: each.update(outputs=[]))],
    rules.executed: [cell(3, execution_count=None)],
    rules.in_order: [cell(3, execution_count=7), cell(1, execution_count=2), lambda n: n["cells"].append(dict(
        n["cells"].pop(9), execution_count=99))],
    rules.output_stored: [
        cell(3, outputs=[]), cell(7, source="x = 3\nx", outputs=[]), cell(7, source="x = {1: 2}\nx[1] + 1", outputs=[]),
        cell(7, source="for i in range(3):\n    print(i)", outputs=[]), cell(7, source="display(figure)", outputs=[]),
        cell(7, source="%matplotlib inline\nprint(2)", outputs=[]), cell(1, outputs=[])],
    rules.raising_cells: [cell(5, outputs=[]), cell(3, metadata={"tags": ["raises-exception"]}),
                          cell(3, source="# NBVAL_RAISES_EXCEPTION\nprint(1)")],
    rules.no_traceback: [cell(5, metadata={}), say("Traceback (most recent call last):\n  File …")],
    rules.no_stderr: [cell(3, outputs=[stream("1"), stream("100%|####| 3/3", "stderr")])],
    rules.nbval_markers: [cell(3, source="# NBVAL_SKIP\nprint(1)"), cell(3, metadata={"tags": ["nbval-skip"]}),
                          cell(3, source="# NBVAL_IGNORE_OUTPUTS\nprint(1)"),
                          cell(3, source="print(1)  # NBVAL_IGNORE_OUTPUT")],
    rules.ignored_cells_assert: [everywhere(lambda each: each.update(
        source="# NBVAL_IGNORE_OUTPUT\n" + each["source"].replace("assert", "x =")))],
    rules.widgets_have_state: [lambda n: n["metadata"].update(widgets={"application/vnd.jupyter.widget-state+json": {}})],
    rules.no_machine_paths: [
        say("saved to /home/someone/runs"), say("/tmp/x.json"), say("C:\\Users\\ann"), cell(3, source="print(1)  # /root/x"),
        cell(3, outputs=[{"output_type": "execute_result", "execution_count": 2, "metadata": {}, "data": {
            "text/html": "<b>/Users/ann/x</b>"}}]), lambda n: n["metadata"].update(path="/home/x/y")],
    rules.no_names: [say("ann.lee@example.org"), say("ann@laptop:~$ ls"), lambda n: n["metadata"].update(
        authors=[{"name": "ann.lee@example.org"}])],
    rules.size: [cell(6, source="x" * 400_001)],
    rules.pictures_have_alt_text: [
        cell(2, source="![](curve.png)"), cell(2, source="<img src='curve.png'>"), cell(2, source='<img alt="" src="curve.png">'),
        cell(7, outputs=[picture(" ")]), cell(7, outputs=[{"output_type": "display_data", "metadata": {}, "data": {
            "text/html": "<img src='curve.png'/>"}}])],
    rules.links_lead_somewhere: [
        cell(2, source="[x](05_nowhere.ipynb)"), cell(2, source="![x](nowhere.png)"), cell(2, source="[x](words.md#alpha)"),
        cell(2, source="<a href='nowhere.html'>x</a>"), cell(2, source="[x](/notebooks/02_before.ipynb)"),
        cell(2, source="[x](#no-such-heading)")],
    rules.lesson_skeleton: [
        cell(0, source="# A lesson\n\nWhat you will be able to do. Needs. [02](02_before.ipynb)"),
        cell(0, source="# 03 · A lesson\n\nNeeds. [02](02_before.ipynb)"),
        cell(0, source="# 03 · A lesson\n\nWhat you will be able to do. [02](02_before.ipynb)"),
        cell(0, source="# 03 · A lesson\n\nWhat you will be able to do. Needs nothing."),
        cell(4, source="Text."), cell(-1, source="The end. [04](04_after.ipynb)"), cell(-1, source="## Recap")],
    rules.lesson_length: [
        lambda n: n["cells"].__delitem__(slice(9, 13)), lambda n: [c.update(source="x = 1\n" * 21) for c in n["cells"][9:13:2]],
        everywhere(lambda each: each.update(source=each["source"] + "\nx = 1" * 8)),
        lambda n: [c.update(code("y = 1"), id=c["id"]) for c in n["cells"][8:14:2]] and None],
}
EXERCISE_FAULTS = {
    rules.exercises_are_unsolved: [
        cell(4, outputs=[stream("right")]), cell(1, execution_count=1), cell(3, source="    # BEGIN SOLUTION"),
        cell(3, metadata={}), cell(3, metadata={"tags": ["solution"]}), cell(4, source="print('right')"),
        lambda n: n["cells"].pop(),
        cell(3, source="def double(x):\n    return 2 * x")],
    rules.no_machine_paths: [cell(1, source="open('/home/ann/rows')")],
    rules.links_lead_somewhere: [cell(2, source="[x](nowhere.md)")],
    rules.pictures_have_alt_text: [cell(2, source="![](curve.png)")],
}
PLANTED = [(name, rule, change) for name, table in (("03_lesson", FAULTS), ("03_exercises", EXERCISE_FAULTS))
           for rule, changes in table.items() for change in changes]


@pytest.mark.parametrize(("name", "rule", "change"), PLANTED, ids=[f"{n}-{r.__name__}" for n, r, _ in PLANTED])
def test_each_rule_goes_red_on_its_planted_fault(write, name, rule, change):
    found = write(LESSON if name == "03_lesson" else EXERCISES, name, change)
    assert any(fault.startswith(f"{rule.__name__}: ") for fault in found), found
    # A fault may break a second rule (an emptied notebook also lacks outputs), but no unrelated one.
    related = {rules.stripped: {"output_stored", "raising_cells"}, rules.executed: {"output_stored"},
               rules.in_order: {"lesson_skeleton"}, rules.raising_cells: {"output_stored"},
               rules.lesson_length: {"in_order", "lesson_skeleton", "executed"}}
    assert {fault.split(":")[0] for fault in found} <= {rule.__name__} | related.get(rule, set()), found


def test_every_rule_has_a_planted_fault():
    assert set(FAULTS) | set(EXERCISE_FAULTS) == set(rules.RULES)


def test_the_name_of_whoever_executes_it_is_found(write, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "annabel")
    assert write(LESSON, change=say("hello annabel")) == ["no_names: a person or a machine is named in cell 4: annabel"]


def test_the_project_s_own_folder_is_found(write):
    assert "no_machine_paths" in write(LESSON, change=say(f"in {rules.ROOT}/runs"))[0]


def test_what_is_not_wrong_is_not_reported(write):
    """Rates, fractions, HTML, embedded pictures and cells that show nothing."""
    fine = "12 tok/s and/or 3/4 </b> https://x.org/home/page ../data/rows ~/.cache \\alpha/r " + "/home/AAA+" * 30
    assert write(LESSON, change=say(fine)) == []
    for text in ("x = 1;\nx;", "def f():\n    print(1)", "if x:\n    print(1)", "call()", "print(1, file=f)", "# only\nNone"):
        assert write(LESSON, change=cell(9, source=text)) == [], text
    assert write(LESSON, change=cell(2, source="[x](06_swap.ipynb) and [y](words.md#Rank)")) == []


def test_what_is_not_a_notebook_is_said(tmp_path):
    for text in ("", "{", "[]", '{"cells": 3}'):
        path = tmp_path / "01_x.ipynb"
        path.write_text(text)
        assert rules.problems(path)[0].startswith("valid: not a notebook")


def test_the_command_names_the_fault_and_fails(tmp_path):
    shutil.copy(ROOT / "notebooks" / "04_fine_tune.ipynb", tmp_path)
    notebook = json.loads((tmp_path / "04_fine_tune.ipynb").read_text())
    next(c for c in notebook["cells"] if c["cell_type"] == "code")["execution_count"] = None
    (tmp_path / "04_fine_tune.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, str(ROOT / "tests" / "tools" / "notebook_rules.py")]
    result = subprocess.run([*command, str(tmp_path / "04_fine_tune.ipynb")], capture_output=True, text=True)
    assert result.returncode == 1 and "executed: the cell" in result.stdout, result.stderr


# ---- nbval itself: that make test runs it over everything, and that it can fail


def test_make_runs_nbval_over_every_executed_notebook():
    command = ["make", "-n", "-o", ".venv/.dev", "notebooks-test"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = next(line for line in plan.stdout.splitlines() if "--nbval" in line).split()
    for path in rules.committed():
        if path.suffix == ".ipynb" and rules.Page(path).kind in rules.EXECUTED:
            assert str(path.relative_to(ROOT)) in words
    assert "--nbval-lax" not in words


def test_nbval_compares_what_is_stored(write, tmp_path):
    cases = {"right": ("print(1 / 4)", "0.25\n"), "wrong": ("print(1 / 4)", "0.26\n"), "emptied": ("print(1 / 4)", None),
             "ignored": ("# NBVAL_IGNORE_OUTPUT\nprint(1 / 4)", "0.26\n")}
    for name, (text, stored) in cases.items():
        write([code(text, *([stream(stored)] if stored else []))], name)
    names = [f"{name}.ipynb" for name in cases]
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", "-rA", *names]
    out = subprocess.run(command, cwd=tmp_path / "notebooks", capture_output=True, text=True).stdout
    assert set(re.findall(r"^(PASSED|FAILED) (\w+)", out, re.MULTILINE)) == {
        ("PASSED", "right"), ("FAILED", "wrong"), ("FAILED", "emptied"), ("PASSED", "ignored")}, out[-1500:]
