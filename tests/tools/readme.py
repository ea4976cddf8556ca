"""README's tables stand between markers, and the commands that measure put them there."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import write_text  # noqa: E402

README = ROOT / "README.md"


def markers(name: str) -> tuple[str, str]:
    """The lines between which a table stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def put(name: str, table: str, readme: Path = README) -> None:
    """Put a table between its markers, and leave the rest as it is."""
    begin, end = markers(name)
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    write_text(readme, f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}")
