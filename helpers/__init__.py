"""The small module that the notebooks of the LoRA Workbook share.

Every function a notebook imports from here is first shown, in a few lines, in the notebook that teaches it.
Heavy libraries (torch, transformers, ...) are imported inside the functions that need them, so that
``import helpers.jobs`` or ``helpers.tasks`` answers at once.
"""

__version__ = "0.1.0"


class WorkbookError(Exception):
    """Something a person can mend. Its message is one sentence: what is wrong, with which thing, and what to do."""
