"""What the panel shows, as HTML and CSV text; what a model or a person wrote is escaped."""

import base64
import csv
import io
import sqlite3
import time
from collections.abc import Iterable
from html import escape

from helpers import ROOT, evaluation
from helpers.adapters import AdapterBank, AdapterInfo, Answer, Settings
from helpers.export_plan import offers

STYLE = """<style>
.lora-panel {max-width: 1180px; color: var(--jp-ui-font-color1, #111);
  background: var(--jp-layout-color1, #fff)}
.lora-panel .widget-hbox {flex-flow: row wrap; width: 100%}
.lora-panel .widget-html-content, .lora-panel .jupyter-widget-html-content {line-height: 1.45;
  overflow-wrap: break-word; min-width: 0}
.lora-panel .status, .lora-panel .card {border: 1px solid var(--jp-border-color1, #888);
  border-radius: 6px; padding: 4px 10px}
.lora-panel .status {display: inline-block; background: var(--jp-layout-color2, #eee)}
.lora-panel .status.error {border: 2px solid var(--jp-error-color1, #b71c1c)}
.lora-panel .card {min-height: 110px}
.lora-panel .card h4 {margin: 0}
.lora-panel pre {white-space: pre-wrap; word-break: normal; margin: 6px 0; padding: 6px;
  max-height: 320px; overflow: auto; background: var(--jp-layout-color2, #f4f4f4);
  color: var(--jp-content-font-color1, #111)}
.lora-panel .wide {overflow-x: auto}
.lora-panel table {border-collapse: collapse; margin: 4px 0}
.lora-panel caption {text-align: left; white-space: nowrap}
.lora-panel th, .lora-panel td {border: 1px solid var(--jp-border-color2, #aaa); padding: 2px 8px;
  text-align: left; vertical-align: top}
.lora-panel td {overflow-wrap: anywhere}
.lora-panel .note {color: var(--jp-ui-font-color2, #444)}
.lora-panel a {color: var(--jp-content-link-color, #0b57d0)}
.lora-panel :focus-visible {outline: 2px solid var(--jp-brand-color1, #0b57d0); outline-offset: 1px}
</style>"""
HEAD = STYLE + "<h3>Task explorer: one base model, adapters swapped live</h3>"
NUMBERS = {  # setting: (its label, lowest, highest, step, tooltip)
    "max_new_tokens": ("New tokens", 1, 1024, 1, "at most so many tokens"),
    "temperature": ("Temperature", 0.05, 5, 0.05, "below 1: sharper; above 1: flatter"),
    "top_p": ("Top-p", 0.05, 1, 0.05, "draw from the likeliest tokens that sum to p"),
    "top_k": ("Top-k (0: off)", 0, 1000, 1, "draw from the k likeliest tokens"),
    "beams": ("Beams", 1, 8, 1, "beam search; shows its end only; of SQL the first beam that runs"),
    "repetition_penalty": ("Repetition penalty", 0.5, 2, 0.05, "1: none"),
    "seed": ("Seed", 0, 2**31 - 1, 1, "of the draws"),
}
COLUMNS = ["time", "task", "adapter", "answer", "tokens", "first_token_ms", "tokens_per_second"]


def note(text: str) -> str:
    """One line in the colour of side remarks."""
    return f"<div class='note'>{escape(text)}</div>"


def status(state: str, text: str) -> str:
    """The status line. Screen readers say it when it changes."""
    return ("<div role='status' aria-live='polite'>"
            f"<span class='status {state}'>{escape(text)}</span></div>")


def prompt(text: str) -> str:
    """The prompt with its line breaks."""
    return f"{note('The prompt as the model reads it:')}<pre>{escape(text)}</pre>"


def page(lines: list[str], parts: list[str]) -> str:
    """The panel's last state for pages that run no widgets; parts: HTML already."""
    body = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return ("<h3>Task explorer (a picture of its last state; run the notebook to use it)</h3>"
            f"{body}{''.join(parts)}")


def table(header: list[str], rows: Iterable, caption: str = "") -> str:
    """A table, every cell escaped."""
    lines = [f"<caption>{escape(caption)}</caption>" if caption else ""]
    for number, cells in enumerate([header, *rows]):
        tag = "td" if number else "th"
        row = [f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells]
        lines.append(f"<tr>{''.join(row)}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def card(title: str, text: str | None, times: str = "", extra: str = "") -> str:
    """One answer; text None: not begun. Everything is escaped but `extra`, which must be HTML."""
    empty = f"<span class='note'>{'…' if text is None else '(empty)'}</span>"
    return (f"<div class='card' role='region' aria-label='{escape(title)}'><h4>{escape(title)}</h4>"
            f"<pre>{escape(text) if text else empty}</pre>{note(times)}{extra}</div>")


def readout(answer: Answer, mixed: bool = False) -> str:
    """The measured times of an answer in words; mixed: it was one of a batch with many adapters."""
    swap = "in one mixed batch, no swap" if mixed else f"swap {1e3 * answer.swap_seconds:.3f} ms"
    return (f"{swap} · first token {1e3 * answer.first_token_seconds:.0f} ms · "
            f"{answer.tokens_per_second:.1f} tokens/s · {answer.tokens} tokens"
            f"{', stopped' if answer.stopped else ''}")


def adapter_line(info: AdapterInfo) -> str:
    """An adapter in the list: its title, its rank, and what makes it slower than plain LoRA."""
    slow = f" · slower ({', '.join(info.extras)})" if info.extras else ""
    return f"{info.title} · rank {info.rank}{slow}"


def memory_table(bank: AdapterBank, problems: dict[str, str]) -> str:
    """What is in memory, with its size, and the adapters that cannot be used, with the reason."""
    rows = [[f"base model {bank.base_name}", "", "", "", f"{bank.base_bytes / 1e6:.1f} MB"]]
    for name, info in bank.adapters.items():
        rows.append([info.title, info.rank, f"{info.alpha:g}", ", ".join(info.target_modules),
                     f"{bank.adapter_bytes(name) / 1e6:.1f} MB"])
    shown = table(["", "rank", "alpha", "target modules", "memory"], rows)
    return shown + (table(["cannot be used", "why"], problems.items()) if problems else "")


def take_home(info: AdapterInfo | None, base_model: str) -> str:
    """The commands that export the chosen adapter to other tools."""
    if info is None:
        return note("Choose an adapter first.")
    folder = info.folder.resolve()
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    offered = offers(str(folder), base_model, plain=not info.extras, verified=info.verified)
    return table(["for", "command, typed in the project's folder"], offered,
                 f"{info.title} in other tools (notebook 10)")


def sql_results(context: str, queries: list[str], seconds: float = 1.0) -> list[str]:
    """Each query's first rows on one small made-up database with the context's tables.

    A query can only read, for at most `seconds`. A context that does more than make tables is not
    run.
    """
    try:
        if not context.strip():
            raise ValueError("there is no CREATE TABLE statement")
        connection = evaluation.fill_databases(context, queries, databases=1)[0]
    except (sqlite3.Error, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        return [note(f"Not run: the table cannot be made ({reason}).")] * len(queries)
    shown = []
    for query in queries:
        try:
            header, found = evaluation.run_sql(connection, query, seconds)
            count = f"first 8 of {len(found)} rows" if len(found) > 8 else f"rows: {len(found)}"
            shown.append(table(header, found[:8], f"Run on made-up rows ({count})"))
        except sqlite3.Error as error:
            shown.append(note(f"Does not run: {error}"))
    connection.close()
    return shown


def history_entry(task: str, mode: str, answer: Answer, text: str, settings: Settings) -> dict:
    """One answer's line of the history; text: the answer as it is shown."""
    return {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "task": task, "mode": mode,
            "adapter": answer.adapter or "base", "prompt": answer.prompt, "answer": text,
            "tokens": answer.tokens, "swap_ms": round(1e3 * answer.swap_seconds, 4),
            "first_token_ms": round(1e3 * answer.first_token_seconds, 1),
            "tokens_per_second": round(answer.tokens_per_second, 2),
            "stopped": answer.stopped, "settings": settings.options()}


def history_table(entries: list[dict]) -> str:
    """The newest twenty answers."""
    rows = [[entry[name] for name in COLUMNS] for entry in entries[:-21:-1]]
    header = [name.replace("_", " ") for name in COLUMNS]
    return table(header, rows, f"The newest of {len(entries)} answers first")


def download_link(entries: list[dict]) -> str:
    """The history as CSV in a link that holds it: it needs no server."""
    if not entries:
        return "No answers yet."
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(entries[0])
    for entry in entries:  # an apostrophe leads what a spreadsheet would run as a formula
        writer.writerow([f"'{cell}" if str(cell).startswith(tuple("=+-@\t\r")) else cell
                         for cell in entry.values()])
    data = base64.b64encode(buffer.getvalue().encode()).decode()
    return (f"<a download='history.csv' href='data:text/csv;base64,{data}'>"
            f"Save history.csv ({len(entries)} answers)</a>")
