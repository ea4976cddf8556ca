"""The task explorer: widgets over one AdapterBank.

In a notebook ``panel.show()``; as a web page ``make app``. One worker thread loads and generates;
the widgets' callbacks only read widgets, set flags and start it.
"""

import threading
import time
from pathlib import Path

import ipywidgets as w

from helpers import WorkbookError, adapters, panel_html, tasks
from helpers.adapters import AdapterBank, Settings
from helpers.registry import EMBEDDED

COMPARE, ONE, ALL = "Base and adapter", "Adapter alone", "All adapters in one batch"
LOADING, IDLE, GENERATING, STOPPING, ERROR = "loading", "idle", "generating", "stopping", "error"
REDRAW_SECONDS = 0.05  # a screen update a token would be more traffic than reading needs
NO_ADAPTER, NO_SAMPLE = ("no adapter (base model)", None), ("none", -1)
LABEL, WIDE = {"description_width": "130px"}, {"width": "calc(100% - 4px)"}
HALF = {"width": "auto", "min_width": "260px", "flex": "1 1 300px"}


class Panel:
    """The widgets and the one worker thread behind them. ``panel.show`` is another name for it."""

    def __init__(self, bank: AdapterBank | None = None, base_name: str = EMBEDDED,
                 prebuilt: Path | None = None, custom: Path | None = None):
        """Shows itself at once. The worker loads the base model, unless there is a `bank`, and the
        adapters of the folders (as in `adapters.discover`)."""
        self.bank, self.history, self.error, self.state = bank, [], None, IDLE
        self._base_name = bank.base_name if bank else base_name
        self._folders = {"prebuilt": prebuilt, "custom": custom}
        self._stop = threading.Event()
        self._busy = threading.RLock()  # held while the state changes: two clicks make one run
        self._make_controls()
        self._make_view()
        self._choose_task()
        self._start(LOADING, self._load)

    # -- what a person does

    def run(self, _=None) -> bool:
        """Generate what the widgets say. False when something runs already."""
        return self._start(GENERATING, self._answer)

    def look_again(self, _=None) -> bool:
        """Find adapters anew. False when something runs already."""
        return self._start(LOADING, self._load)

    def halt(self, _=None) -> None:
        """Stop the running answer at its next token."""
        with self._busy:  # not between the worker's last look and its end
            if self.state == GENERATING:
                self._stop.set()
                self._set(STOPPING)

    def export_csv(self, _=None) -> None:
        """Offer the history as a file."""
        self.download.value = panel_html.download_link(self.history)

    def wait(self, seconds: float = 600) -> None:
        """Wait until the panel is idle. Raises WorkbookError after `seconds`."""
        self._worker.join(seconds)
        if self._worker.is_alive():
            raise WorkbookError(f"The panel is still {self.state} after {seconds:g} s: press Stop.")

    @property
    def current_task(self) -> tasks.Task:
        return tasks.get_task(self.task.value)

    def prompt_text(self) -> str:
        """The task's template with what stands in the fields."""
        return self.current_task.prompt({name: box.value for name, box in self.fields.items()})

    def settings(self) -> Settings:
        """The settings as they stand in the widgets."""
        numbers = {name: widget.value for name, widget in self.numbers.items()}
        return Settings(sample=self.decoding.value, stop=self.current_task.stop or "", **numbers)

    def static_html(self) -> str:
        """The panel as it stands, for pages that run no widgets (code hosts, printed notebooks)."""
        shown = [f"{self.task.label} · {self.adapter.label or ''} · {self.mode.value}"]
        shown += [f"{box.description}: {box.value}" for box in self.fields.values()]
        return panel_html.page(shown, [view.value for view in (*self.cards.children, self.memory)])

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {**self.view._repr_mimebundle_(), "text/html": self.static_html(),
                "text/plain": "The task explorer panel"}

    # -- widgets

    def _make_controls(self) -> None:
        titles = [(task.title, task.name) for task in tasks.TASKS.values()]
        self.task = _dropdown("Task", titles, self._choose_task)
        self.sample = _dropdown("Sample", [NO_SAMPLE], self._fill_sample)
        self.adapter = _dropdown("Adapter", [NO_ADAPTER], self._choose_adapter)
        self.mode = w.ToggleButtons(description="Answer with", options=[COMPARE, ONE, ALL],
                                    style={**LABEL, "button_width": "auto"})
        self.mode.observe(self._controls, "value")
        draws = [("greedy", False), ("sampling", True)]
        self.decoding = _dropdown("Decoding", draws, self._controls)
        self.numbers = {}
        for name, (label, low, high, step, tooltip) in panel_html.NUMBERS.items():
            kind = w.BoundedIntText if isinstance(step, int) else w.BoundedFloatText
            self.numbers[name] = kind(description=label, min=low, max=high, step=step, value=low,
                                      tooltip=tooltip, style=LABEL, layout=HALF)
        self.refresh = _button("Refresh adapters", "refresh", self.look_again, "Find new adapters")
        self.reset = _button("Reset settings", "undo", self._reset_settings, "As the task says")
        self.generate = _button("Generate", "play", self.run, "Write the answers", "primary")
        self.stop = _button("Stop", "stop", self.halt, "Stop after the next token", "danger")
        self.export = _button("Export CSV", "download", self.export_csv, "All answers as CSV")

    def _make_view(self) -> None:
        self.inputs, self.prompt, self.cards = w.VBox(layout=WIDE), w.HTML(layout=WIDE), w.HBox()
        self.status, self.memory, self.history_view, self.download, self.home = [
            w.HTML() for _ in range(5)]
        settings = w.HBox([self.decoding, *self.numbers.values(), self.reset])
        history = w.VBox([w.HBox([self.export, self.download]), self.history_view])
        self.view = w.VBox([
            w.HTML(panel_html.HEAD), self.status, w.HBox([self.task, self.sample]),
            w.HBox([self.adapter, self.refresh]), self.inputs, self.prompt, self.mode,
            w.Accordion([settings], titles=["Settings"], layout=WIDE),
            w.HBox([self.generate, self.stop]), self.cards,
            w.Accordion([self.memory, history, self.home], layout=WIDE, titles=[
                "Base model and adapters in memory", "History", "Take the adapter home"])],
            layout=WIDE)
        self.view.add_class("lora-panel")

    # -- what the widgets' callbacks do

    def _choose_task(self, _=None) -> None:
        task, self.fields = self.current_task, {}
        for name in task.columns:
            box = w.Textarea(description=name.capitalize(), rows=3, style=LABEL, layout=WIDE)
            box.observe(self._show_prompt, "value")
            self.fields[name] = box
        self.inputs.children = tuple(self.fields.values())
        # A sample is named by what tells it apart: the question, not the table.
        telling = [name for name in task.columns if name not in task.optional][-1]
        self.sample.options = [(row[telling][:70], number)
                               for number, row in enumerate(task.samples)] or [NO_SAMPLE]
        self._fill_sample()
        self._reset_settings()
        if len(self.adapter.options) > 1:
            self.adapter.value = self._fitting_adapter()

    def _fill_sample(self, _=None) -> None:
        row = dict(enumerate(self.current_task.samples)).get(self.sample.value, {})
        for name, box in self.fields.items():
            box.value = row.get(name, "")
        self._show_prompt()

    def _show_prompt(self, _=None) -> None:
        self.prompt.value = panel_html.prompt(self.prompt_text())

    def _reset_settings(self, _=None) -> None:
        task = self.current_task
        wanted = Settings(max_new_tokens=task.max_new_tokens, **task.generation)
        self.decoding.value = wanted.sample
        for name, widget in self.numbers.items():
            widget.value = getattr(wanted, name)

    def _choose_adapter(self, _=None) -> None:
        """Swap at once; while an answer is generated, the worker swaps after it."""
        self._show_home()
        with self._busy:
            if self.state in (GENERATING, STOPPING):
                self._set(self.state, f"swaps to {self.adapter.label} after this answer")
            elif self.state != LOADING:
                self._set(self.state, self._swap_to_chosen())

    def _show_home(self) -> None:
        known = self.bank.adapters if self.bank else {}
        info = known.get(self.adapter.value)
        self.home.value = panel_html.take_home(info, self._base_name)

    def _swap_to_chosen(self) -> str:
        name = self.adapter.value
        if not self.bank or name == self.bank.active or name not in (None, *self.bank.adapters):
            return ""
        return f"swapped to {self.adapter.label} in {1e3 * self.bank.swap(name):.3f} ms"

    def _controls(self, _=None) -> None:
        ready = self.state in (IDLE, ERROR)
        self.generate.disabled = not ready or self.bank is None
        self.refresh.disabled = self.task.disabled = self.sample.disabled = not ready
        self.stop.disabled = self.state != GENERATING
        self.adapter.disabled = self.state == LOADING or self.mode.value == ALL
        for name in ("temperature", "top_p", "top_k", "seed"):
            self.numbers[name].disabled = not self.decoding.value

    def _set(self, state: str, said: str = "") -> None:
        self.state = state
        self._controls()
        self.status.value = panel_html.status(state, f"{state}: {said}" if said else state)

    # -- the worker

    def _start(self, state: str, work) -> bool:
        with self._busy:
            if self.state not in (IDLE, ERROR):
                return False
            self._stop.clear()
            self._set(state)
            self._worker = threading.Thread(target=self._guarded, args=(work,), daemon=True)
            self._worker.start()
        return True

    def _guarded(self, work) -> None:
        """Run the work; whatever it raises is shown, and the panel can be used again."""
        self.error = None  # else kept for whoever debugs
        try:
            said = work()
        except Exception as error:
            self.error = error
            said = str(error) if isinstance(error, WorkbookError) else repr(error)
        with self._busy:
            try:
                swapped = self._swap_to_chosen()
            except WorkbookError as problem:  # another user of the bank has just unloaded it
                swapped = str(problem)
            self._set(ERROR if self.error else IDLE, "; ".join(filter(None, [said, swapped])))

    def _load(self) -> str:
        if self.bank is None:
            self.bank = AdapterBank(self._base_name)
        found = adapters.discover(self._base_name, **self._folders)
        problems = {**found.problems, **self.bank.sync(found.adapters)}
        known, chosen = self.bank.adapters, self.adapter.value
        if len(self.adapter.options) == 1:  # the first load
            chosen = self._fitting_adapter()
        self.adapter.options = [NO_ADAPTER] + [(panel_html.adapter_line(info), name)
                                               for name, info in known.items()]
        self.adapter.value = chosen if chosen in known else None
        self.memory.value = panel_html.memory_table(self.bank, problems)
        self._show_home()
        broken = f", {len(problems)} cannot be used (see below)" if problems else ""
        return f"{len(known)} adapter{'s' * (len(known) != 1)} on one base model{broken}"

    def _fitting_adapter(self) -> str | None:
        """The adapter named as the task, else the newest that was trained for it, else none."""
        task, known = self.task.value, self.bank.adapters
        fitting = [name for name, info in known.items() if info.task == task]
        return task if task in known else fitting[-1] if fitting else None

    def _answer(self) -> str:
        bank, task, mode, chosen = self.bank, self.current_task, self.mode.value, self.adapter.value
        prompt, settings, answers = self.prompt_text(), self.settings(), []
        plain = [name for name, info in bank.adapters.items() if not info.extras]
        names = {COMPARE: [None, chosen], ONE: [chosen], ALL: [None, *plain]}[mode]
        names = list(dict.fromkeys(names))  # None is the base model: once
        cards = [_Card(bank.adapters[name].title if name else "Base model") for name in names]
        self.cards.children = cards
        if mode == ALL:
            prompts = [prompt] * len(names)
            answers = bank.generate_mixed(prompts, names, settings, self._grow, self._stop)
        for name, shown in zip(names, cards, strict=True) if mode != ALL else ():
            if not self._stop.is_set():
                answers.append(bank.generate(prompt, name, settings, shown.grow, self._stop))
        texts = [task.answer(answer.text) for answer in answers]
        extras = [""] * len(texts)
        if task.name == "sql":
            extras = panel_html.sql_results(self.fields["context"].value, texts)
        for shown, answer, text, extra in zip(cards, answers, texts, extras, strict=False):
            times = panel_html.readout(answer, mode == ALL)
            shown.value = panel_html.card(shown.title, text, times, extra)
            self.history.append(panel_html.history_entry(task.name, mode, answer, text, settings))
        self.history_view.value = panel_html.history_table(self.history)
        ended = "stopped" if self._stop.is_set() else "done"
        said = f"{ended} ({len(self.history)} answers so far)"
        swaps = ", ".join(f"{1e3 * answer.swap_seconds:.3f} ms" for answer in answers)
        if mode == ALL:
            left = ", ".join(name for name in bank.adapters if name not in plain)
            return f"{said}; not in the batch, as no plain LoRA: {left}" if left else said
        return f"{said}; swaps took {swaps}"

    def _grow(self, texts: list[str]) -> None:
        for shown, text in zip(self.cards.children, texts, strict=True):
            shown.grow(text)


class _Card(w.HTML):
    def __init__(self, title: str):
        super().__init__(panel_html.card(title, None), layout=HALF)
        self.title, self.drawn = title, 0.0

    def grow(self, text: str) -> None:
        """Show the answer so far, at most once in REDRAW_SECONDS."""
        if time.monotonic() - self.drawn >= REDRAW_SECONDS:
            self.drawn = time.monotonic()
            self.value = panel_html.card(self.title, text, "…")


def _dropdown(label: str, options: list, action) -> w.Dropdown:
    made = w.Dropdown(description=label, options=options, style=LABEL, layout=HALF)
    made.observe(action, "value")
    return made


def _button(text: str, icon: str, action, tooltip: str, style: str = "") -> w.Button:
    made = w.Button(description=text, icon=icon, tooltip=tooltip, button_style=style)
    made.on_click(action)
    return made


show = Panel
