"""The small module that the notebooks of the LoRA Workbook share.

A notebook shows every function in a few lines before it imports it from here. This file holds what
all modules need. It imports no heavy library, so that ``python -m helpers.jobs`` answers at once.
"""

import difflib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent
METRICS = "metrics.json"  # beside every adapter and in every run's folder
# The annotation of a parameter: (its type, the type in words).
KINDS = {"bool": (bool, "true or false"), "int": (int, "a whole number"), "str": (str, "text"),
         "float": (float, "a number"), "list": (list, "a list"), "dict": (dict, "a map")}

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainer would call a host
# On some CPUs bitsandbytes warns that the hub has no faster kernel. No code from a hub is run here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class WorkbookError(Exception):
    """Something a person can mend: one sentence that names the thing, the fault and the cure."""


def closest(name: object, names: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the known name that is most like it, and all."""
    near = difflib.get_close_matches(str(name), names, n=1)
    known = f"there are: {', '.join(names) or 'none'}"
    return f"did you mean {near[0]} ({known})?" if near else f"{known}."


def check_numbers(settings, bounds: Collection[tuple[str, float, float]]) -> None:
    """Raise WorkbookError for the first attribute of `settings` that is no number in its bounds:
    (attribute, lowest, highest), both included."""
    for name, low, high in bounds:
        value = getattr(settings, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and low <= value <= high):
            raise WorkbookError(f"{name} is {value!r}: use a number from {low:g} to {high:g}.")


def is_text(value: str) -> bool:
    """False with NUL, which ends a text for SQLite, or half a surrogate pair: it has no UTF-8."""
    return re.search("[\0\ud800-\udfff]", value) is None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
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
    """Turn a full, read-only or forbidden disk into one sentence that names the folder."""
    reasons = {errno.ENOSPC: "its disk is full", errno.EDQUOT: "its disk quota is used up",
               errno.EROFS: "it is read-only", errno.EACCES: "permission is denied"}
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise WorkbookError(f"Could not write {what} to {where}: {reasons[error.errno]}; free some "
                            "space or choose another place.") from error
