"""The task explorer: an ipywidgets panel over one AdapterBank. In a notebook ``panel.show()``; as a web page ``make app``.

One worker thread generates; the widgets' callbacks only read widgets, set flags and start that thread, because they run
on a thread of their own while a cell runs. What the model writes is escaped before it becomes HTML.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import html
import io
import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers import WorkbookError, adapters, evaluation, tasks
from helpers.adapters import EMBEDDED, AdapterBank, AdapterInfo, Answer, Settings

COMPARE, ONE, ALL = "Base and adapter", "Adapter alone", "All adapters in one batch"
LOADING, IDLE, GENERATING, STOPPING, ERROR = "loading", "idle", "generating", "stopping", "error"
REDRAW_SECONDS = 0.05  # a screen update a token would be more traffic than reading needs

STYLE = """<style>
.lora-panel {max-width: 1180px; color: var(--jp-ui-font-color1, #111); background: var(--jp-layout-color1, #fff)}
.lora-panel .widget-html-content, .lora-panel .jupyter-widget-html-content {line-height: 1.45; overflow-wrap: break-word;
  min-width: 0}
.lora-panel .status {display: inline-block; padding: 2px 10px; border-radius: 10px;
  border: 1px solid var(--jp-border-color1, #888); background: var(--jp-layout-color2, #eee);
  color: var(--jp-ui-font-color1, #111)}
.lora-panel .status.error {border: 2px solid var(--jp-error-color1, #b71c1c)}
.lora-panel .card {border: 1px solid var(--jp-border-color1, #888); border-radius: 4px; padding: 8px 10px; min-height: 110px}
.lora-panel .card h4 {margin: 0 0 6px 0}
.lora-panel pre {white-space: pre-wrap; word-break: normal; margin: 0 0 6px 0; padding: 6px; max-height: 320px; overflow: auto;
  background: var(--jp-layout-color2, #f4f4f4); color: var(--jp-content-font-color1, #111)}
.lora-panel table {border-collapse: collapse; margin: 4px 0}
.lora-panel .wide {overflow-x: auto}
.lora-panel td {overflow-wrap: anywhere}
.lora-panel caption {text-align: left; white-space: nowrap}
.lora-panel th, .lora-panel td {border: 1px solid var(--jp-border-color2, #aaa); padding: 2px 8px; text-align: left;
  vertical-align: top}
.lora-panel .note {color: var(--jp-ui-font-color2, #444)}
.lora-panel a {color: var(--jp-content-link-color, #0b57d0)}
.lora-panel :focus-visible {outline: 2px solid var(--jp-brand-color1, #0b57d0); outline-offset: 1px}
</style>"""


# ------------------------------------------------------------------------------------------- what is shown, as text


def table(header: list[str], rows: list[list], caption: str = "") -> str:
    """An HTML table, every cell escaped."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<div class='wide'><table>{title}<thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table></div>"


def card(title: str, text: str | None, readout: str = "", extra: str = "") -> str:
    """One answer as HTML. Everything is escaped but `extra`, which must be HTML already."""
    body = html.escape(text) if text else "<span class='note'>…</span>" if text is None else "<span class='note'>(empty)</span>"
    return (f"<div class='card' role='region' aria-label='{html.escape(title, quote=True)}'><h4>{html.escape(title)}</h4>"
            f"<pre>{body}</pre><div class='note'>{html.escape(readout)}</div>{extra}</div>")


def readout(answer: Answer, mixed: bool = False) -> str:
    """The measured times of an answer in words."""
    swap = "in one mixed batch, no swap" if mixed else f"swap {1e3 * answer.swap_seconds:.3f} ms"
    stopped = ", stopped" if answer.stopped else ""
    return (f"{swap} · first token {1e3 * answer.first_token_seconds:.0f} ms · {answer.tokens_per_second:.1f} tokens/s · "
            f"{answer.tokens} tokens{stopped}")


def sql_results(context: str, queries: list[str], rows: int = 8, seconds: float = 1.0) -> list[str]:
    """Each query's result on one small made-up database with the context's tables, as HTML.

    The database lives in memory and is the same for all queries; a query can only read, for at most `seconds`. A context
    that is more than CREATE TABLE statements is not run.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError

    said = lambda text: f"<div class='note'>{html.escape(text)}</div>"
    try:
        trees = sqlglot.parse(context, dialect="sqlite")
        plain = all(isinstance(tree, sqlglot.exp.Create) and tree.kind == "TABLE" and not tree.expression for tree in trees)
        if not (trees and plain):
            return [said("Not run: the table must be given as CREATE TABLE statements.") for _ in queries]
        connection = evaluation.fill_databases(context, queries, databases=1, rows=24)[0]
    except (SqlglotError, sqlite3.Error, RecursionError, ValueError) as error:
        return [said(f"Not run: the table cannot be made ({str(error).splitlines()[0][:120]}).") for _ in queries]
    shown = []
    try:
        for query in queries:
            try:
                header, found = evaluation.run_sql(connection, query, seconds)
                more = f" (first {rows} of {len(found)} rows)" if len(found) > rows else f" (rows: {len(found)})"
                shown.append(table(header, [list(row) for row in found[:rows]], f"Run on made-up rows{more}"))
            except sqlite3.Error as error:
                shown.append(said(f"Does not run: {error}"))
    finally:
        connection.close()
    return shown


HISTORY = ("time", "task", "mode", "adapter", "prompt", "answer", "tokens", "swap_ms", "first_token_ms", "tokens_per_second",
           "stopped", "settings")


def history_csv(entries: list[dict]) -> str:
    """The history as CSV. A text that a spreadsheet would run as a formula is led by an apostrophe."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, HISTORY)
    writer.writeheader()
    for entry in entries:
        writer.writerow({key: "'" + value if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value
                         for key, value in entry.items()})
    return buffer.getvalue()


def download_link(entries: list[dict]) -> str:
    """An HTML link that holds the CSV itself: it needs no server and works in a notebook and on the web page."""
    data = base64.b64encode(history_csv(entries).encode()).decode()
    return f"<a download='history.csv' href='data:text/csv;base64,{data}'>Save history.csv ({len(entries)} answers)</a>"


def default_adapter(task: tasks.Task, loaded: dict[str, AdapterInfo]) -> str | None:
    """The adapter to start a task with: the one of its name, else the newest that was trained for it, else none."""
    fitting = [name for name, info in loaded.items() if info.task == task.name]
    return task.name if task.name in loaded else fitting[-1] if fitting else None


def megabytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------------------ panel


class Panel:
    """The widgets and the one worker thread behind them. `show` makes one; `wait` waits until it is idle."""

    def __init__(self, bank: AdapterBank | None = None, base_name: str = EMBEDDED, prebuilt: Path | None = None,
                 custom: Path | None = None):
        """Shows itself at once; base model and adapters are loaded by the worker thread unless a `bank` is given."""
        self.bank, self.base_name = bank, bank.base_name if bank else base_name
        self._places = {"prebuilt": prebuilt, "custom": custom}
        self.history: list[dict] = []
        self.problems: dict[str, str] = {}
        self.error: BaseException | None = None
        self.state = IDLE
        self._stop = threading.Event()
        self._busy = threading.RLock()  # held while the state changes: two clicks make one run
        self._worker: threading.Thread | None = None
        self._filling = False
        self._build()
        self._start(LOADING, self._load)

    # -- widgets

    def _build(self) -> None:
        import ipywidgets as w

        wide, label = w.Layout(width="calc(100% - 4px)"), {"description_width": "110px"}
        half = w.Layout(width="auto", min_width="260px", flex="1 1 300px")
        self.status = w.HTML()
        self.task = w.Dropdown(description="Task", options=[(t.title, t.name) for t in tasks.TASKS.values()], style=label,
                               layout=half)
        self.sample = w.Dropdown(description="Sample", options=[("none", -1)], style=label, layout=half)
        self.adapter = w.Dropdown(description="Adapter", options=[("no adapter (base model)", None)], style=label, layout=half)
        self.mode = w.ToggleButtons(description="Answer with", options=[COMPARE, ONE, ALL],
                                    style={**label, "button_width": "auto"})
        self.refresh = w.Button(description="Refresh adapters", icon="refresh",
                                tooltip="Look for new, changed and removed adapters")
        self.fields_box = w.VBox(layout=wide)
        self.fields: dict[str, w.Textarea] = {}
        self.prompt = w.HTML(layout=wide)
        self._build_settings(w, {"description_width": "140px"})
        self.generate = w.Button(description="Generate", button_style="primary", icon="play", tooltip="Write the answers")
        self.stop = w.Button(description="Stop", button_style="danger", icon="stop", tooltip="Stop after the next token")
        self.cards = w.HBox(layout=w.Layout(width="100%", flex_flow="row wrap"))
        self.memory, self.history_view, self.download = w.HTML(), w.HTML(), w.HTML()
        self.export = w.Button(description="Export CSV", icon="download", tooltip="All answers of this session as CSV")
        row = lambda *items: w.HBox(items, layout=w.Layout(width="100%", flex_flow="row wrap"))
        self.settings_box = w.Accordion([self.settings_view], titles=("Settings",), selected_index=None, layout=wide)
        self.view = w.VBox([
            w.HTML(STYLE + "<h3>Task explorer: one base model, adapters swapped live</h3>"), self.status,
            row(self.task, self.sample), row(self.adapter, self.refresh), self.fields_box,
            self.prompt, self.mode, self.settings_box, row(self.generate, self.stop), self.cards,
            w.Accordion([self.memory, w.VBox([row(self.export, self.download), self.history_view])],
                        titles=("Base model and adapters in memory", "History"), selected_index=None, layout=wide)],
            layout=wide)
        self.view.add_class("lora-panel")
        self.task.observe(lambda change: self._choose_task(), "value")
        self.sample.observe(lambda change: self._fill_sample(), "value")
        self.adapter.observe(lambda change: self._choose_adapter(), "value")
        self.mode.observe(lambda change: self._controls(), "value")
        self.decoding.observe(lambda change: self._controls(), "value")
        for button, action in ((self.generate, self.run), (self.stop, self.halt), (self.refresh, self.look_again),
                               (self.reset, self._reset_settings), (self.export, self.export_csv)):
            button.on_click(lambda _, action=action: action())
        self._choose_task()

    def _build_settings(self, w, label) -> None:
        layout = w.Layout(width="300px")
        number = lambda kind, text, low, high, step, tip: kind(
            description=text, min=low, max=high, step=step, value=low, style=label, layout=layout, tooltip=tip)
        self.decoding = w.Dropdown(description="Decoding", options=[("greedy", False), ("sampling", True)], style=label,
                                   layout=layout)
        self.numbers = {
            "max_new_tokens": number(w.BoundedIntText, "New tokens", 1, 1024, 1, "at most so many tokens"),
            "temperature": number(w.BoundedFloatText, "Temperature", 0.05, 5, 0.05, "below 1: sharper; above 1: flatter"),
            "top_p": number(w.BoundedFloatText, "Top-p", 0.05, 1, 0.05, "draw from the likeliest tokens that sum to p"),
            "top_k": number(w.BoundedIntText, "Top-k (0: off)", 0, 1000, 1, "draw from the k likeliest tokens"),
            "beams": number(w.BoundedIntText, "Beams", 1, 8, 1, "beam search; shows its end only"),
            "repetition_penalty": number(w.BoundedFloatText, "Repetition penalty", 0.5, 2, 0.05, "1: none"),
            "seed": number(w.BoundedIntText, "Seed", 0, 2**31 - 1, 1, "of the draws"),
        }
        self.reset = w.Button(description="Reset settings", icon="undo", tooltip="Back to this task's own settings")
        self.settings_view = w.HBox([self.decoding, *self.numbers.values(), self.reset],
                                    layout=w.Layout(width="100%", flex_flow="row wrap"))

    # -- what the callbacks do

    @property
    def current_task(self) -> tasks.Task:
        return tasks.get_task(self.task.value)

    def _choose_task(self) -> None:
        """Fields, samples, settings and adapter of the chosen task."""
        import ipywidgets as w

        task = self.current_task
        self._filling = True
        self.fields = {name: w.Textarea(description=name.capitalize(), rows=3 if name in ("context", "input") else 2,
                                        style={"description_width": "110px"}, layout=w.Layout(width="calc(100% - 4px)"))
                       for name in task.columns}
        for field in self.fields.values():
            field.observe(lambda change: self._show_prompt(), "value")
        self.fields_box.children = tuple(self.fields.values())
        telling = [name for name in task.columns if name not in task.optional][-1]  # the question, not the table
        self.sample.options = [(row[telling][:70], number) for number, row in enumerate(task.samples)] or [("none", -1)]
        self._filling = False
        self._fill_sample()
        self._reset_settings()
        if len(self.adapter.options) > 1:
            self.adapter.value = default_adapter(task, self.bank.adapters)

    def _fill_sample(self) -> None:
        if self._filling or self.sample.value is None or self.sample.value < 0:
            return
        row = self.current_task.samples[self.sample.value]
        for name, field in self.fields.items():
            field.value = row.get(name, "")
        self._show_prompt()

    def prompt_text(self) -> str:
        """The finished prompt: the task's template with what stands in the fields."""
        return self.current_task.prompt({name: field.value for name, field in self.fields.items()})

    def _show_prompt(self) -> None:
        self.prompt.value = ("<div class='note'>The prompt as the model reads it:</div>"
                             f"<pre>{html.escape(self.prompt_text())}</pre>")

    def _reset_settings(self) -> None:
        task = self.current_task
        wanted = dataclasses.replace(Settings(max_new_tokens=task.max_new_tokens), **task.generation)
        self.decoding.value = wanted.sample
        for name, widget in self.numbers.items():
            widget.value = getattr(wanted, name)

    def settings(self) -> Settings:
        """The settings as they stand in the widgets."""
        numbers = {name: widget.value for name, widget in self.numbers.items()}
        return Settings(sample=self.decoding.value, stop=self.current_task.stop or "", **numbers)

    def _choose_adapter(self) -> None:
        """Swap at once; while an answer is generated, after it (the worker does it)."""
        with self._busy:
            if self.bank is None or self._filling or self.state == LOADING:
                return
            if self.state in (GENERATING, STOPPING):
                self._say(f"{self.state}; swaps to {self.adapter.label} after this answer")
            else:
                self._say(f"{self.state}: {self._swap_to_chosen() or 'nothing to swap'}")

    def _swap_to_chosen(self) -> str:
        name = self.adapter.value
        if self.bank is None or name == self.bank.active or (name is not None and name not in self.bank.adapters):
            return ""
        return f"swapped to {self.adapter.label} in {1e3 * self.bank.swap(name):.3f} ms"

    def halt(self) -> None:
        """Ask the running answer to end at its next token."""
        with self._busy:  # not between the worker's last look and its end
            if self.state == GENERATING:
                self._stop.set()
                self._set(STOPPING)

    def look_again(self) -> bool:
        """Find adapters anew (the Refresh button). False when something else is running."""
        return self._start(LOADING, self._load)

    def run(self) -> bool:
        """Start what the widgets say (the Generate button). False when a run is going on: two clicks make one run."""
        return self._start(GENERATING, self._answer)

    def export_csv(self) -> None:
        self.download.value = download_link(self.history) if self.history else "No answers yet."

    def wait(self, seconds: float = 600) -> None:
        """Wait until the panel is idle again. Raises WorkbookError when that takes longer than `seconds`."""
        worker = self._worker
        if worker is not None:
            worker.join(seconds)
            if worker.is_alive():
                raise WorkbookError(f"The panel is still {self.state} after {seconds:g} seconds: press Stop, or wait longer.")

    # -- the worker

    def _start(self, state: str, work) -> bool:
        with self._busy:
            if self._worker is not None and self._worker.is_alive() and self.state not in (IDLE, ERROR):
                return False
            self._stop.clear()
            self.error = None
            self._set(state)
            self._worker = threading.Thread(target=self._guarded, args=(work,), name="panel-worker", daemon=True)
            self._worker.start()
        return True

    def _guarded(self, work) -> None:
        """Run the work; whatever it raises is shown, and the panel can be used again."""
        try:
            said = work()
        except Exception as error:  # shown to the person who pressed the button; kept for whoever debugs
            self.error = error
            said = str(error) if isinstance(error, WorkbookError) else f"{type(error).__name__}: {error}"
        with self._busy:
            swapped = self._swap_to_chosen()
            self._set(ERROR if self.error else IDLE, f"{said}; {swapped}" if swapped else said)

    def _load(self) -> str:
        if self.bank is None:
            self.bank = AdapterBank(self.base_name)
        found = adapters.discover(self.base_name, **self._places)
        self.problems = {**found.problems, **self.bank.sync(found.adapters)}
        self._list_adapters()
        count = len(self.bank.adapters)
        broken = f", {len(self.problems)} cannot be used (see below)" if self.problems else ""
        return f"{count} adapter{'s' * (count != 1)} on one base model{broken}"

    def _list_adapters(self) -> None:
        chosen, first = self.adapter.value, len(self.adapter.options) == 1
        self._filling = True
        self.adapter.options = [("no adapter (base model)", None)] + [
            (f"{info.title} · rank {info.rank}", name) for name, info in self.bank.adapters.items()]
        self._filling = False
        known = chosen in self.bank.adapters
        self.adapter.value = default_adapter(self.current_task, self.bank.adapters) if first else chosen if known else None
        rows = [[f"base model {self.base_name}", "", "", "", megabytes(self.bank.base_bytes)]]
        for name, info in self.bank.adapters.items():
            rows.append([info.title, info.rank, f"{info.alpha:g}", ", ".join(info.target_modules),
                         megabytes(self.bank.adapter_bytes(name))])
        faults = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(text)}</li>" for name, text in self.problems.items())
        self.memory.value = table(["", "rank", "alpha", "target modules", "memory"], rows) + (
            f"<div>Cannot be used:</div><ul>{faults}</ul>" if faults else "")

    def _answer(self) -> str:
        prompt, settings, task, mode = self.prompt_text(), self.settings(), self.current_task, self.mode.value
        settings.check()
        chosen = self.adapter.value
        names = [None, *self.bank.adapters] if mode == ALL else [chosen] if mode == ONE or chosen is None else [None, chosen]
        titles = ["Base model" if name is None else self.bank.adapters[name].title for name in names]
        views = self._empty_cards(titles)
        answers = (self._all_at_once if mode == ALL else self._one_by_one)(prompt, names, titles, views, settings)
        texts = [task.answer(answer.text) for answer in answers]
        extras = sql_results(self.fields["context"].value, texts) if task.name == "sql" else [""] * len(texts)
        for view, title, text, answer, extra in zip(views, titles, texts, answers, extras, strict=False):
            view.value = card(title, text, readout(answer, mode == ALL), extra)
        self._remember(task, mode, answers, texts, settings)
        slowest = f"; swaps took {', '.join(f'{1e3 * a.swap_seconds:.3f} ms' for a in answers)}" if mode != ALL else ""
        return f"{'stopped' if self._stop.is_set() else 'done'} ({len(self.history)} answers so far){slowest}"

    def _empty_cards(self, titles: list[str]) -> list:
        import ipywidgets as w

        views = [w.HTML(card(title, None), layout=w.Layout(flex="1 1 300px", min_width="280px", width="auto"))
                 for title in titles]
        self.cards.children = tuple(views)
        return views

    def _one_by_one(self, prompt, names, titles, views, settings) -> list[Answer]:
        answers = []
        for name, title, view in zip(names, titles, views, strict=True):
            if self._stop.is_set():
                break
            show = _throttled(lambda text, view=view, title=title: setattr(view, "value", card(title, text, "…")))
            answers.append(self.bank.generate(prompt, name, settings, show, self._stop))
        return answers

    def _all_at_once(self, prompt, names, titles, views, settings) -> list[Answer]:
        def show(texts):
            for view, title, text in zip(views, titles, texts, strict=True):
                view.value = card(title, text, "…")

        return self.bank.generate_mixed([prompt] * len(names), names, settings, _throttled(show), self._stop)

    def _remember(self, task, mode, answers, texts, settings) -> None:
        for answer, text in zip(answers, texts, strict=True):
            self.history.append({
                "time": time.strftime("%Y-%m-%d %H:%M:%S"), "task": task.name, "mode": mode, "adapter": answer.adapter or "base",
                "prompt": answer.prompt, "answer": text, "tokens": answer.tokens,
                "swap_ms": round(1e3 * answer.swap_seconds, 4), "first_token_ms": round(1e3 * answer.first_token_seconds, 1),
                "tokens_per_second": round(answer.tokens_per_second, 2), "stopped": answer.stopped,
                "settings": ", ".join(f"{key}={value}" for key, value in settings.options().items())})
        columns = ("time", "task", "adapter", "answer", "tokens", "first_token_ms", "tokens_per_second")
        self.history_view.value = table([name.replace("_", " ") for name in columns],
                                        [[entry[name] for name in columns] for entry in self.history[:-21:-1]],
                                        f"The newest of {len(self.history)} answers first")

    # -- states

    def _set(self, state: str, said: str | None = None) -> None:
        self.state = state
        self._controls()
        self._say(f"{state}{': ' + said if said else ''}")

    def _say(self, text: str) -> None:
        self.status.value = (f"<div role='status' aria-live='polite'><span class='status {self.state}'>"
                             f"{html.escape(text)}</span></div>")

    def _controls(self) -> None:
        """Each state offers what makes sense in it."""
        ready = self.state in (IDLE, ERROR)
        self.generate.disabled = not ready or self.bank is None
        self.refresh.disabled = not ready
        self.stop.disabled = self.state != GENERATING
        self.task.disabled = self.sample.disabled = not ready
        self.adapter.disabled = self.state == LOADING or self.mode.value == ALL
        for name in ("temperature", "top_p", "top_k", "seed"):
            self.numbers[name].disabled = not self.decoding.value

    # -- how a notebook shows it

    def static_html(self) -> str:
        """The panel as it stands, as plain HTML for pages that run no widgets (code hosts, printed notebooks)."""
        fields = "".join(f"<p><b>{html.escape(field.description)}</b>: {html.escape(field.value)}</p>"
                         for field in self.fields.values())
        answers = "".join(view.value for view in self.cards.children)
        chosen = " · ".join((self.task.label, self.adapter.label or "", self.mode.value))
        return (f"<h3>Task explorer (a picture of its last state; run the notebook to use it)</h3><p>{html.escape(chosen)}</p>"
                f"{fields}{answers}{self.memory.value}")

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {**self.view._repr_mimebundle_(), "text/html": self.static_html(), "text/plain": "The task explorer panel"}


def _throttled(show):
    last = [0.0]

    def call(text):
        now = time.monotonic()
        if now - last[0] >= REDRAW_SECONDS:
            last[0] = now
            show(text)

    return call


def show(bank: AdapterBank | None = None, **options) -> Panel:
    """The panel, as the last expression of a cell: ``panel.show()`` loads the base model, ``panel.show(bank)`` shares one."""
    return Panel(bank, **options)


# --------------------------------------------------------------------------------------------------------- web page


def app_notebook(options: str):
    """The notebook behind the web page: one cell that shows the panel."""
    import nbformat

    root = Path(__file__).resolve().parent.parent
    cell = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(root)!r})\n"
                                     f"from helpers import panel\npanel.show({options})")
    return nbformat.v4.new_notebook(cells=[cell], metadata={
        "title": "Task explorer", "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}})


def main(arguments: list[str] | None = None) -> int:
    """``python -m helpers.panel``: the panel as a web page on this machine only, behind a token."""
    import nbformat

    parser = argparse.ArgumentParser(prog="python -m helpers.panel", description="The task explorer as a web page (Voila).")
    parser.add_argument("--base", default=EMBEDDED, help="base model")
    parser.add_argument("--prebuilt", type=Path, help="folder of adapters (default: adapters/prebuilt)")
    parser.add_argument("--port", type=int, default=8866)
    parser.add_argument("--keep", type=int, default=300, metavar="SECONDS", help="how long a closed tab's kernel stays (300)")
    options = parser.parse_args(arguments)
    extra = f", prebuilt={str(options.prebuilt.resolve())!r}" if options.prebuilt else ""
    token = os.environ.get("VOILA_TOKEN") or secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix="task-explorer-") as folder:
        path = Path(folder) / "task_explorer.ipynb"
        nbformat.write(app_notebook(f"base_name={options.base!r}{extra}"), path)
        print(f"Task explorer: http://127.0.0.1:{options.port}/?token={token}\nEach browser tab gets a kernel and a base model "
              f"of its own, so tabs cannot disturb each other; it ends {options.keep} seconds after its tab. "
              "Ctrl-C ends the page.", flush=True)
        # The token goes by a file that only this user can read: arguments are visible to everyone on the machine.
        config = Path(folder) / "voila.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({"Voila": {"token": token}}))
        command = [sys.executable, "-m", "voila", str(path), "--no-browser", f"--port={options.port}", "--Voila.ip=127.0.0.1",
                   # Voila's own message from a closing tab is refused where there is a token: so its kernel is culled.
                   f"--MappingKernelManager.cull_idle_timeout={options.keep}",
                   f"--MappingKernelManager.cull_interval={min(30, options.keep)}"]
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, "JUPYTER_CONFIG_PATH": folder})
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())  # the page and its kernels end with this process
        try:
            return server.wait()
        except KeyboardInterrupt:  # Ctrl-C reached the server too
            return server.wait()


if __name__ == "__main__":
    sys.exit(main())
