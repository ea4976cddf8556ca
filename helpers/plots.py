"""One style for every figure: readable in grey and by colour-blind readers, with its alt text."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from cycler import cycler

from helpers import ROOT

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/): neighbours also differ in lightness.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
HATCHES = ["", "//", "..", "xx", "\\\\", "++", "oo"]


def style() -> None:
    """Apply the workbook's style: colour, line and marker change together, for prints in grey."""
    plt.rcParams.update({
        "figure.figsize": (7, 3.8), "figure.dpi": 110, "savefig.dpi": 110,
        "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
        "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "lines.markersize": 5,
        "svg.hashsalt": "lora-workbook",
        "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=LINES) + cycler(marker=MARKERS),
    })


@dataclass(frozen=True)
class Picture:
    """A figure as a notebook output: PNG for the eye, alt text for screen readers and nbval."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, include=None, exclude=None):
        png, said = base64.b64encode(self.png).decode(), f"[figure] {self.alt}"
        # JupyterLab and the book read the metadata's alt text, nbconvert does not; nbval the text.
        return {"image/png": png, "text/plain": said}, {"image/png": {"alt": self.alt}}


def finish(figure, name: str, alt: str) -> Picture:
    """Save a figure to images/<name>.png (a job: to its run folder), close it and return it.

    alt: what a reader who cannot see the figure is told; no digits that differ from run to run.
    """
    buffer = io.BytesIO()
    # No software version in the file: the same figure is the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None, "Description": alt})
    plt.close(figure)
    folder = Path(os.environ.get("WORKBOOK_RUN_DIR") or ROOT) / "images"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(buffer.getvalue())
    return Picture(buffer.getvalue(), alt)
