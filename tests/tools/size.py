"""How much there is to read in helpers/, file by file, and what is longer or more tangled than the rules of the house allow.

    python tests/tools/size.py           a line per file, and the totals
    python tests/tools/size.py --check   exit 1, with a sentence for each limit that is broken

A file's lines are those that are not blank. A function's are all from its `def` to its end, docstring and inner functions
included.
"""

import argparse
import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

HELPERS = Path(__file__).resolve().parent.parent.parent / "helpers"
FILE, FUNCTION, WIDTH, IMPORTS = 300, 40, 100, 10  # lines, lines, characters, inside functions in all files together
COLUMNS = ("lines", f"functions > {FUNCTION}", f"lines > {WIDTH}", "inner imports", "inner classes")


@dataclass
class Size:
    """One file: its lines that are not blank, and where everything else that is counted stands."""

    path: Path
    lines: int = 0
    functions: list[str] = field(default_factory=list)  # longer than FUNCTION
    wide: list[str] = field(default_factory=list)  # lines of more than WIDTH characters
    imports: list[str] = field(default_factory=list)  # inside functions; their lines' numbers
    classes: list[str] = field(default_factory=list)  # inside functions

    def row(self) -> tuple[int, ...]:
        """As many numbers as there are COLUMNS."""
        return self.lines, len(self.functions), len(self.wide), len(self.imports), len(self.classes)


def measure(path: Path) -> Size:
    """Count one source file. Raises SyntaxError and OSError."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    size = Size(path, sum(bool(line.strip()) for line in lines))
    size.wide = [f"line {number} has {len(line)} characters" for number, line in enumerate(lines, 1) if len(line) > WIDTH]

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            name, where = inside, f"line {getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = child.name
                length = child.end_lineno - child.lineno + 1
                if length > FUNCTION:
                    size.functions.append(f"{where}: the function {name} has {length} lines")
            elif inside and isinstance(child, ast.ClassDef):
                size.classes.append(f"{where}: the class {child.name} is inside the function {inside}")
            elif inside and isinstance(child, ast.Import | ast.ImportFrom):
                size.imports.append(str(child.lineno))
            visit(child, name)

    visit(ast.parse(text), "")
    return size


def problems(sizes: list[Size], root: Path) -> list[str]:
    """A sentence for each limit that is broken."""
    said = []
    for size in sizes:
        name = size.path.relative_to(root)
        if size.lines > FILE:
            said.append(f"{name} has {size.lines} lines that are not blank: at most {FILE}.")
        said += [f"{name}, {one}: at most {FUNCTION}." for one in size.functions]
        said += [f"{name}, {one}: at most {WIDTH}." for one in size.wide]
        said += [f"{name}, {one}: put it at the top." for one in size.classes]
    if (count := sum(len(size.imports) for size in sizes)) > IMPORTS:
        where = "; ".join(f"{size.path.relative_to(root)} line {', '.join(size.imports)}" for size in sizes if size.imports)
        said.append(f"{count} imports stand inside functions: at most {IMPORTS} ({where}).")
    return said


def main(arguments: list[str], folder: Path = HELPERS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1, with a sentence for each limit that is broken")
    options = parser.parse_args(arguments)
    sizes = [measure(path) for path in sorted(folder.rglob("*.py"))]
    if options.check:
        said = problems(sizes, folder.parent)
        print("\n".join(said or ["Every limit is kept."]))
        return 1 if said else 0
    totals = [sum(column) for column in zip(*(size.row() for size in sizes), strict=True)]
    print(f"{'file':28}" + "".join(f"{name:>16}" for name in COLUMNS))
    for name, row in [*((str(size.path.relative_to(folder)), size.row()) for size in sizes), (f"{len(sizes)} files", totals)]:
        print(f"{name:28}" + "".join(f"{number:16,}" for number in row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
