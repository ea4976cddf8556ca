"""Write every NN_exercises.ipynb of this folder from its NN_solutions.ipynb.

    python notebooks/exercises/make_exercises.py           write them
    python notebooks/exercises/make_exercises.py --check   write nothing; exit 1 naming the files that drifted

In code cells tagged ``solution`` the lines between ``# BEGIN SOLUTION`` and ``# END SOLUTION`` become one line to fill
in; markdown cells tagged ``solution``, or that begin with the word "Solution", are left out; outputs are cleared. The
same solutions always give the same bytes.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
BLANK = "...  # your code here"
MARKED = re.compile(r"^([ \t]*)# BEGIN SOLUTION\n.*?^[ \t]*# END SOLUTION$", re.MULTILINE | re.DOTALL)


class ExerciseError(Exception):
    """A solutions notebook that cannot be turned into exercises; the message names the file, the cell and the cure."""


def exercise(solutions: Path) -> str:
    """The text of the exercises notebook made from one solutions notebook. Raises ExerciseError for a bad cell."""
    notebook = nbformat.read(solutions, as_version=4)
    cells = []
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        solved = "solution" in tags
        if cell.cell_type == "markdown" and (solved or re.match(r"[#*\s]*Solution\b", cell.source)):
            continue
        if cell.cell_type == "code":
            source, blanks = MARKED.subn(lambda match: match[1] + BLANK, cell.source)
            # Half a pair of markers, or markers without the tag, would hand a solution to the learner.
            if solved != (blanks > 0) or "BEGIN SOLUTION" in source or "END SOLUTION" in source:
                raise ExerciseError(f"{solutions.name}, cell {number}: a code cell is tagged `solution` if and only if "
                                    "it has `# BEGIN SOLUTION` and `# END SOLUTION` lines, in pairs; mend the cell.")
            cell.source, cell.outputs, cell.execution_count = source, [], None
        cell.metadata = {"tags": [{"solution": "exercise"}.get(tag, tag) for tag in tags]} if tags else {}
        cells.append(cell)
    if cells:  # only the title says which of the two files this is
        title, *rest = cells[0].source.split("\n", 1)
        cells[0].source = "\n".join([title.replace("solutions", "exercises").replace("Solutions", "Exercises"), *rest])
    notebook.cells = cells
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}  # no versions: they differ between machines
    return nbformat.writes(notebook) + "\n"


def write_all(folder: Path = FOLDER, check: bool = False) -> list[str]:
    """Write the exercise files of a folder, or with `check` only compare. Returns the names that differed."""
    solutions = folder.glob("*_solutions.ipynb")
    wanted = {path.name.replace("_solutions", "_exercises"): exercise(path) for path in solutions}
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*_exercises.ipynb")}
    drifted = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    for name in drifted if not check else []:
        if name in wanted:
            temporary = folder / f".{name}.tmp"
            temporary.write_text(wanted[name], encoding="utf-8")
            os.replace(temporary, folder / name)
        else:  # its solutions were renamed or removed
            (folder / name).unlink()
    return drifted


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when a file drifted")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the notebooks lie (default: this folder)")
    options = parser.parse_args(arguments)
    try:
        drifted = write_all(options.folder, options.check)
    except ExerciseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in drifted:
        print(f"{name}: {'drifted from its solutions; run `make exercises`' if options.check else 'written'}")
    return 1 if drifted and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
