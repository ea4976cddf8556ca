"""The small module that the notebooks of the LoRA Workbook share.

Every function that a notebook imports from here is first shown, in a few lines, in the notebook
that teaches it. This file holds what all of the module needs; it imports no heavy library, and
neither do tasks, data, recipes and jobs, so that ``python -m helpers.jobs`` answers at once.
"""

import difflib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent
METRICS = "metrics.json"  # beside every adapter and in every run's folder
KINDS = {"bool": (bool, "true or false"), "int": (int, "a whole number"),
         "float": (float, "a number"), "str": (str, "text"), "list": (list, "a list"),
         "dict": (dict, "a map")}  # annotation of a parameter: (its type, in words)

# On CPUs with AVX512-BF16 bitsandbytes looks for a faster kernel on the model hub when it is
# imported, and warns that it found none. No code from a hub is run here; its own kernel is there.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainer would call a host
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class WorkbookError(Exception):
    """Something a person can mend. Its message is one sentence: what is wrong, with which thing,
    and what to do."""


def closest(name: object, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known name that is most like it, and all."""
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=1)
    known = f"there are: {', '.join(names) or 'none'}"
    return f"did you mean {near[0]} ({known})?" if near else f"{known}."


def check_numbers(settings, bounds: tuple[tuple[str, float, float], ...]) -> None:
    """Raise WorkbookError for the first attribute of `settings` that is not a number in its bounds.

    bounds: (attribute, lowest, highest), both included.
    """
    for name, low, high in bounds:
        value = getattr(settings, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise WorkbookError(f"{name} is {value!r}: it must be a number from {low:g} to "
                                f"{high:g}.")


def is_text(value: str) -> bool:
    """False where a str holds NUL, which ends a text for SQLite, or half a surrogate pair, which
    has no UTF-8."""
    return re.search("[\0\ud800-\udfff]", value) is None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path):
    """The content of a JSON file. Raises OSError and ValueError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def disk_errors(where: Path, what: str):
    """Turn 'no space left', 'read-only' and 'permission denied' into one sentence that names the
    folder."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "its disk is full", errno.EDQUOT: "its disk quota is used up",
                   errno.EROFS: "it is read-only", errno.EACCES: "permission is denied"}
        if error.errno not in reasons:
            raise
        raise WorkbookError(f"Could not write {what} to {where}: {reasons[error.errno]}; free some "
                            "space or choose another place.") from error
