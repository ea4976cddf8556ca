"""The small module that the notebooks of the LoRA Workbook share.

Every function a notebook imports from here is first shown, in a few lines, in the notebook that teaches it.
Heavy libraries (torch, transformers, ...) are imported inside the functions that need them, so that
``import helpers.jobs`` or ``helpers.tasks`` answers at once.
"""

import logging
import re

__version__ = "0.1.0"

# On CPUs with AVX512-BF16 bitsandbytes looks for a faster kernel on the model hub when it is imported, and warns that it found
# none. We run no code from a hub, and its own kernel is there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class WorkbookError(Exception):
    """Something a person can mend. Its message is one sentence: what is wrong, with which thing, and what to do."""


def check_numbers(settings, bounds: tuple[tuple[str, float, float], ...]) -> None:
    """Raise WorkbookError for the first attribute of `settings` that is no number from low to high (name, low, high)."""
    for name, low, high in bounds:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise WorkbookError(f"{name} is {value!r}: it must be a number from {low:g} to {high:g}.")


def is_text(value: str) -> bool:
    """False for what a str can hold and others cannot: NUL ends a text for SQLite, half a surrogate pair has no UTF-8."""
    return re.search("[\0\ud800-\udfff]", value) is None
