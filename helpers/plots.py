"""One style for every figure: readable in grey and by colour-blind readers, with its alt text."""

import base64
import io
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from PIL import Image

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


# The looks of a chooser; & is its own class. In print, or without inputs, no rule hides anything.
LOOKS = """& {border: 1px solid #8888; border-radius: 6px; min-width: 0; position: relative}
&>input {opacity: 0; position: absolute}
&>label {border: 1px solid #8888; border-radius: 1em; cursor: pointer; display: inline-block;
 margin: 2px; padding: 3px 10px 3px 7px}
&>label::before {border: 1px solid; border-radius: 50%; content: ""; display: inline-block;
 height: .6em; margin-right: .4em; width: .6em}
&>:checked+label {border-color: currentColor; font-weight: bold}
&>:checked+label::before {background: currentColor}
&>:focus-visible+label {outline: 3px solid #56B4E9; outline-offset: 1px}
&>div {display: flex; flex-wrap: wrap; gap: 0 8px; max-width: 420px}
& p {margin: .5em 0 0}
& p:last-child {flex-basis: 100%}
& img {background: none; border-radius: 0; height: auto; image-rendering: pixelated;
 max-width: 100%; padding: 0; vertical-align: top}
"""
HIDDEN = "&>input~div>b, &>input:nth-of-type({0}):not(:checked)~div:nth-of-type({0})"


@dataclass(frozen=True)
class Chooser:
    """A figure with buttons, as a notebook output: HTML for the eye, alt text for nbval."""

    html: str
    alt: str

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/html": self.html, "text/plain": f"[figure] {self.alt}"}


def pixels(array, scale: int, alt: str) -> str:
    """An <img> of an array: a pixel for each number, 0 black and 1 white (a third axis: RGBA)."""
    buffer, levels = io.BytesIO(), (np.clip(np.asarray(array), 0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(levels).save(buffer, "png", optimize=True)
    height, width = (scale * length for length in levels.shape[:2])
    return (f'<img alt="{escape(alt)}" width="{width}" height="{height}" '
            f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')


def choose(name: str, legend: str, states: dict, first: str, alt: str, scale: int = 5) -> Chooser:
    """A figure whose reader chooses one of several states; it needs no kernel and no script.

    name: unlike any other on the page. first: the state that is shown at first.
    states: its label -> ({a picture's caption: an array from 0 to 1}, a text with the numbers).
    scale: a number's width on the screen, in pixels. alt: as in `finish`.
    Where styles or inputs are stripped, and in print, all states stand one below the other.
    """
    if first not in states:
        raise ValueError(f"{name}: there is no state {first!r} to show at first")
    key, buttons, shown = f"choose-{name}", [], []
    for i, (label, (arrays, text)) in enumerate(states.items(), 1):
        title, checked = f"{legend}: {label}", " checked" * (label == first)
        # JupyterLab would take arrow keys for moves from cell to cell.
        buttons.append(f'<input data-lm-suppress-shortcuts type="radio" name="{key}" '
                       f'id="{key}-{i}"{checked}>'
                       f'<label for="{key}-{i}">{escape(label)}</label>')
        pictures = [f"<p>{pixels(array, scale, f'{title}. {caption}')}<br>{escape(caption)}</p>"
                    for caption, array in arrays.items()]
        shown.append(f"<div><b>{escape(title)}</b>{''.join(pictures)}<p>{escape(text)}</p></div>")
    hidden = ", ".join(HIDDEN.format(i + 1) for i in range(len(states)))
    style = f"{LOOKS}@media screen {{{hidden} {{display: none}}}}".replace("&", f".{key}")
    return Chooser("\n".join([
        f'<div role="figure" aria-label="{escape(alt)}"><style>{style}</style>',
        f'<fieldset class="{key}"><legend>{escape(legend)}</legend>',
        *buttons, *shown, "</fieldset></div>"]), alt)
