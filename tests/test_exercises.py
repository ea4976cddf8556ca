"""The exercises are made from the solutions, hide them, and cannot be passed without solving them."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest

EXERCISES = Path(__file__).resolve().parent.parent / "notebooks" / "exercises"
SOLUTIONS = sorted(EXERCISES.glob("*_solutions.ipynb"))

_spec = importlib.util.spec_from_file_location("make_exercises", EXERCISES / "make_exercises.py")
make_exercises = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_exercises)

SOLVED = "def double(x):\n    # BEGIN SOLUTION\n    secret = 2 * x\n    return secret\n    # END SOLUTION"


def notebook(*cells) -> nbformat.NotebookNode:
    """A notebook of (type, source, tags) cells, with fixed ids and an output under every code cell."""
    made = []
    for number, (kind, source, tags) in enumerate(cells):
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        cell = new(source, id=f"cell-{number}", metadata={"tags": tags} if tags else {})
        if kind == "code":
            cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="out\n")], number + 1
        made.append(cell)
    return nbformat.v4.new_notebook(cells=made)


@pytest.fixture
def folder(tmp_path):
    """A folder with one solutions notebook, its exercises written."""
    nbformat.write(notebook(
        ("markdown", "# 09 · Doubling: solutions\n\nSolutions stay a word here.", []),
        ("markdown", "Double a number.", []),
        ("code", SOLVED, ["solution"]),
        ("markdown", "**Solution.** Multiply by two.", []),
        ("markdown", "Twice is enough.", ["solution"]),
        ("code", "assert double(2) == 4, 'double(2) should be 4'", ["check"]),
    ), tmp_path / "09_solutions.ipynb")
    assert make_exercises.main(["--folder", str(tmp_path)]) == 0
    return tmp_path


def test_exercise_hides_the_solution_and_keeps_the_rest(folder):
    text = (folder / "09_exercises.ipynb").read_text()
    made = nbformat.reads(text, as_version=4)
    nbformat.validate(made)
    assert [cell.source for cell in made.cells] == [
        "# 09 · Doubling: exercises\n\nSolutions stay a word here.",
        "Double a number.",
        "def double(x):\n    ...  # your code here",
        "assert double(2) == 4, 'double(2) should be 4'",
    ]
    assert [cell.id for cell in made.cells] == ["cell-0", "cell-1", "cell-2", "cell-5"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in made.cells if cell.cell_type == "code")
    assert "secret" not in text and "out\\n" not in text


def test_same_solutions_give_the_same_bytes(folder):
    solutions = folder / "09_solutions.ipynb"
    first = make_exercises.exercise(solutions)
    assert first == make_exercises.exercise(solutions) == (folder / "09_exercises.ipynb").read_text()
    rewritten = json.loads(solutions.read_text())  # another key order, other versions: the same exercises
    rewritten["metadata"] = {"language_info": {"name": "python", "version": "3.99"}, "kernelspec": {
        "name": "python3", "language": "python", "display_name": "Python 3"}}
    solutions.write_text(json.dumps(rewritten))
    assert make_exercises.exercise(solutions) == first


@pytest.mark.parametrize("drift", ["edited", "missing", "orphan", "solution changed"])
def test_check_names_a_file_that_drifted(folder, capsys, drift):
    assert make_exercises.main(["--folder", str(folder), "--check"]) == 0
    exercises, solutions, named = folder / "09_exercises.ipynb", folder / "09_solutions.ipynb", "09_exercises.ipynb"
    if drift == "edited":
        exercises.write_text(exercises.read_text().replace("Double a number.", "Halve a number."))
    elif drift == "missing":
        exercises.unlink()
    elif drift == "orphan":
        (folder / "08_exercises.ipynb").write_text(exercises.read_text())
        named = "08_exercises.ipynb"
    else:
        solutions.write_text(solutions.read_text().replace("Double a number.", "Double any number."))
    before = {path.name: path.read_text() for path in folder.iterdir()}
    capsys.readouterr()
    assert make_exercises.main(["--folder", str(folder), "--check"]) == 1
    assert capsys.readouterr().out.startswith(f"{named}: drifted")
    assert {path.name: path.read_text() for path in folder.iterdir()} == before, "--check must not write"
    assert make_exercises.main(["--folder", str(folder)]) == 0
    assert make_exercises.main(["--folder", str(folder), "--check"]) == 0


@pytest.mark.parametrize("source, tags", [
    (SOLVED, []),  # markers without the tag would give the solution away
    ("x = 1", ["solution"]),  # a tag without markers leaves nothing to fill in
    (SOLVED.replace("# END SOLUTION", ""), ["solution"]),
    (SOLVED + "\n    # END SOLUTION", ["solution"]),
])
def test_a_cell_that_would_leak_is_refused(tmp_path, capsys, source, tags):
    nbformat.write(notebook(("markdown", "# 09", []), ("code", source, tags)), tmp_path / "09_solutions.ipynb")
    assert make_exercises.main(["--folder", str(tmp_path)]) == 1
    assert "09_solutions.ipynb, cell 1" in capsys.readouterr().err
    assert not (tmp_path / "09_exercises.ipynb").exists()


def test_there_are_solutions_and_no_exercise_drifted():
    assert SOLUTIONS
    assert make_exercises.write_all(check=True) == [], "run `make exercises`"


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_three_levels_each_with_a_check(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown").lower()
    assert all(level in text for level in ("warm-up", "practice", "stretch"))
    code = [cell for cell in cells if cell.cell_type == "code"]
    solved = [number for number, cell in enumerate(code) if "solution" in cell.metadata.get("tags", [])]
    assert len(solved) >= 3
    assert all(number + 1 < len(code) and "assert" in code[number + 1].source for number in solved)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_every_check_fails_helpfully_when_unsolved(path):
    """Run the exercises as a learner finds them: each check right after a blank must fail with its own words."""
    from nbclient import NotebookClient

    unsolved = nbformat.reads(make_exercises.exercise(path), as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(unsolved, timeout=600, allow_errors=True, resources=where).execute()
    code = [cell for cell in unsolved.cells if cell.cell_type == "code"]
    blanks = [number for number, cell in enumerate(code) if make_exercises.BLANK in cell.source]
    assert blanks
    for number in blanks:
        check = code[number + 1]
        errors = [output for output in check.outputs if output.output_type == "error"]
        assert errors, f"this check passes without a solution:\n{check.source}"
        name, message = errors[0].ename, errors[0].evalue.strip()
        assert name == "AssertionError" and message, f"{name}: {message!r} says too little:\n{check.source}"
