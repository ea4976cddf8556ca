"""The panel without a browser: its states, its readouts, what it escapes, what two clicks and a broken adapter do."""

import base64
import csv
import html
import io
import re
import shlex
import shutil
import threading
import time
from pathlib import Path

import nbformat
import pytest
from test_adapters import edit

from helpers import ROOT, WorkbookError, adapters, export_plan, panel, panel_html, tasks

TABLE = "CREATE TABLE employees (name VARCHAR, salary INTEGER)"


@pytest.fixture(scope="session")
def bank(tiny):
    return adapters.AdapterBank(str(tiny))


@pytest.fixture
def shown(bank, shelf, tmp_path):
    made = panel.show(bank, prebuilt=shelf, custom=tmp_path / "custom")
    made.wait(120)
    yield made
    made.halt()
    made.wait(120)


def said(shown) -> str:
    return re.sub(r"<[^>]*>", "", shown.status.value)


def texts(shown) -> list[str]:
    return [re.search(r"<pre>(.*?)</pre>", view.value, re.DOTALL)[1] for view in shown.cards.children]


class Gate:
    """Holds the model at every token until it is let through."""

    def __init__(self, shown):
        self.reached, self.go = threading.Event(), threading.Event()
        self.handle = shown.bank.model.get_base_model().register_forward_pre_hook(self)

    def __call__(self, *_):
        self.reached.set()
        assert self.go.wait(60)

    def open(self):
        self.go.set()
        self.handle.remove()


@pytest.fixture
def gate(shown):
    gate = Gate(shown)
    yield gate
    gate.open()


# ------------------------------------------------------------------------------------------------------------ choosing


def test_it_shows_itself_while_the_base_model_loads(tiny, shelf, tmp_path):
    made = panel.show(base_name=str(tiny), prebuilt=shelf, custom=tmp_path)
    assert made.state == panel.LOADING and made.generate.disabled and made.stop.disabled and made.task.disabled
    made.wait(120)
    assert made.state == panel.IDLE and not made.generate.disabled and made.adapter.value == "instruct"
    assert [name for _, name in made.adapter.options] == [None, "detox", "instruct", "sql"]


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_each_task_fills_in_samples_settings_and_its_adapter(shown, name):
    task = tasks.get_task(name)
    shown.task.value = name
    assert shown.adapter.value == name == shown.bank.active
    assert len(shown.sample.options) == len(task.samples) >= 3
    for number, row in enumerate(task.samples):
        shown.sample.value = number
        assert shown.prompt_text() == task.prompt(row) and html.escape(task.prompt(row)) in shown.prompt.value
    settings = shown.settings()
    assert settings.max_new_tokens == task.max_new_tokens and settings.stop == (task.stop or "")
    assert all(getattr(settings, key) == value for key, value in task.generation.items())


def test_edited_fields_are_the_prompt_and_reset_restores_the_settings(shown):
    shown.task.value = "sql"
    shown.fields["question"].value = "How old is <b>Ann</b>?"
    assert "<QUESTION>: How old is <b>Ann</b>?\n" in shown.prompt_text() and "&lt;b&gt;Ann" in shown.prompt.value
    before = shown.settings()
    shown.numbers["beams"].value, shown.decoding.value = 3, True
    assert shown.settings() != before and not shown.numbers["temperature"].disabled
    shown.reset.click()
    assert shown.settings() == before and shown.numbers["temperature"].disabled


def test_settings_widgets_cannot_leave_what_the_bank_accepts(shown):
    shown.decoding.value = True
    for edge in ("min", "max"):
        for widget in shown.numbers.values():
            widget.value = getattr(widget, edge)
        shown.settings().check()


# -------------------------------------------------------------------------------------------------------------- answers


def test_base_and_adapter_side_by_side_equal_the_bank(shown):
    shown.task.value = "sql"
    shown.numbers["max_new_tokens"].value = 12
    shown.generate.click()
    shown.wait()
    assert shown.state == panel.IDLE and len(shown.history) == 2
    assert [entry["adapter"] for entry in shown.history] == ["base", "sql"]
    task, prompt = tasks.get_task("sql"), shown.prompt_text()
    for entry, name, text in zip(shown.history, (None, "sql"), texts(shown), strict=True):
        wanted = task.answer(shown.bank.generate(prompt, name, shown.settings()).text)
        assert entry["answer"] == wanted and (html.escape(wanted) == text or wanted == "")
    for view in shown.cards.children:
        assert re.search(r"swap \d+\.\d{3} ms · first token \d+ ms · [\d.]+ tokens/s · \d+ tokens", view.value)
        assert "Run on made-up rows" in view.value or "Does not run" in view.value


def test_all_adapters_answer_in_one_mixed_batch(shown):
    shown.numbers["max_new_tokens"].value = 6
    shown.mode.value = panel.ALL
    assert shown.adapter.disabled
    shown.run()
    shown.wait()
    assert [entry["adapter"] for entry in shown.history] == ["base", "detox", "instruct", "sql"]
    assert len({entry["answer"] for entry in shown.history}) == 4 and "mixed batch" in shown.cards.children[0].value


def test_one_adapter_alone_and_the_base_alone(shown):
    shown.mode.value = panel.ONE
    shown.numbers["max_new_tokens"].value = 4
    for name in ("detox", None):
        shown.adapter.value = name
        shown.run()
        shown.wait()
    assert [entry["adapter"] for entry in shown.history] == ["detox", "base"] and len(shown.cards.children) == 1


def test_tokens_stream_onto_the_card(shown, monkeypatch):
    monkeypatch.setattr(panel, "REDRAW_SECONDS", 0)
    shown.mode.value = panel.ONE
    shown.numbers["max_new_tokens"].value = 10
    seen = []
    original = panel_html.card
    monkeypatch.setattr(panel_html, "card", lambda title, text, *rest: seen.append(text) or original(title, text, *rest))
    shown.run()
    shown.wait()
    streamed = [text for text in seen if text]
    assert len(streamed) >= 10 and all(streamed[-2].startswith(text.rstrip("\ufffd")) for text in streamed[:-2])


def test_choosing_an_adapter_swaps_at_once_and_says_the_time(shown):
    shown.adapter.value = "detox"
    assert shown.bank.active == "detox" and re.search(r"swapped to detox .* in \d+\.\d{3} ms", said(shown))


# --------------------------------------------------------------------------------------------------------------- states


def test_two_clicks_make_one_run(shown, gate):
    shown.mode.value = panel.ONE
    shown.numbers["max_new_tokens"].value = 3
    shown.generate.click()
    assert gate.reached.wait(30) and shown.state == panel.GENERATING
    assert shown.generate.disabled and shown.refresh.disabled and not shown.stop.disabled and shown.task.disabled
    shown.generate.click()
    assert not shown.run() and not shown.look_again()
    gate.open()
    shown.wait()
    assert len(shown.history) == 1 and shown.stop.disabled and not shown.generate.disabled


def test_stop_in_the_middle_keeps_what_was_written_and_frees_the_panel(shown, gate):
    shown.numbers["max_new_tokens"].value = 400
    shown.run()
    assert gate.reached.wait(30)
    shown.stop.click()
    assert shown.state == panel.STOPPING and shown.stop.disabled and shown.generate.disabled
    gate.open()
    shown.wait()
    assert shown.state == panel.IDLE and said(shown).startswith("idle: stopped")
    assert len(shown.history) == 1 and shown.history[0]["stopped"] and shown.history[0]["tokens"] == 1
    shown.numbers["max_new_tokens"].value = 3
    shown.run()
    shown.wait()
    assert not shown.history[-1]["stopped"]


def test_stop_when_nothing_runs_does_nothing(shown):
    shown.halt()
    assert shown.state == panel.IDLE


def test_swapping_while_generating_waits_and_then_holds(shown, gate):
    shown.mode.value = panel.ONE
    shown.adapter.value = "sql"
    shown.numbers["max_new_tokens"].value = 20
    wanted = None
    shown.run()
    assert gate.reached.wait(30)
    shown.adapter.value = "detox"  # returns at once
    assert shown.bank.active == "sql" and "swaps to detox" in said(shown)
    gate.open()
    shown.wait()
    assert shown.bank.active == "detox" == shown.adapter.value
    wanted = shown.bank.generate(shown.prompt_text(), "sql", shown.settings()).text
    assert shown.history[0]["adapter"] == "sql" and shown.history[0]["answer"] == shown.current_task.answer(wanted)


def test_an_exception_is_shown_and_the_panel_stays_usable(shown):
    def broken(*_):
        raise RuntimeError("<script>the model broke</script>")

    handle = shown.bank.model.get_base_model().register_forward_pre_hook(broken)
    shown.run()
    shown.wait()
    assert shown.state == panel.ERROR and "RuntimeError" in said(shown) and "<script>" not in shown.status.value
    assert isinstance(shown.error, RuntimeError) and not shown.generate.disabled
    handle.remove()
    shown.numbers["max_new_tokens"].value = 3
    shown.run()
    shown.wait()
    assert shown.state == panel.IDLE and shown.error is None


def test_a_prompt_that_is_too_long_is_said_in_one_sentence(shown):
    shown.fields["instruction"].value = "word " * 600
    shown.run()
    shown.wait()
    assert shown.state == panel.ERROR and "more than the 512 that this base model reads" in said(shown)
    assert isinstance(shown.error, WorkbookError)


def test_a_base_model_that_cannot_be_had_is_an_error_state(tmp_path):
    made = panel.show(base_name="no-such-model", prebuilt=tmp_path, custom=tmp_path)
    made.wait(60)
    assert made.state == panel.ERROR and "no-such-model" in said(made) and made.generate.disabled and not made.refresh.disabled


def test_hammering_every_control_ends_idle_with_whole_answers(shown):
    """Random clicks from several threads, as impatient people and two tabs would make them."""
    import random

    shown.numbers["max_new_tokens"].value = 8
    errors = []

    def clicks(seed):
        rng = random.Random(seed)
        try:
            for _ in range(40):
                rng.choice([shown.run, shown.halt, shown.look_again, shown.export_csv,
                            lambda: setattr(shown.adapter, "value", rng.choice([None, "sql", "detox", "instruct"]))])()
                time.sleep(rng.random() / 50)
        except Exception as error:  # collected, and fails the test below
            errors.append(error)

    threads = [threading.Thread(target=clicks, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown.wait()
    deadline = time.monotonic() + 30
    while shown.state != panel.IDLE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert errors == [] and shown.state == panel.IDLE and shown.error is None
    whole = {name: shown.bank.generate(shown.prompt_text(), name, shown.settings()).text for name in (None, *shown.bank.adapters)}
    for entry in shown.history:
        assert whole[None if entry["adapter"] == "base" else entry["adapter"]].strip().startswith(entry["answer"])


# ---------------------------------------------------------------------------------------------------------- adapters


def test_refresh_finds_a_new_adapter_and_names_a_broken_one(shown, shelf, tmp_path):
    shutil.copytree(shelf / "sql", tmp_path / "custom" / "mine")
    edit(shutil.copytree(shelf / "sql", tmp_path / "custom" / "broken"), r=3)
    shown.task.value = "sql"
    shown.refresh.click()
    shown.wait()
    assert "4 adapters" in said(shown) and "1 cannot be used" in said(shown)
    assert ("Custom: mine · rank 4", "custom/mine") in shown.adapter.options and shown.adapter.value == "sql"
    assert "custom/broken" in shown.memory.value and "rank 3" in shown.memory.value
    shown.adapter.value = "custom/mine"
    shown.numbers["max_new_tokens"].value = 4
    shown.run()
    shown.wait()
    assert shown.history[-1]["adapter"] == "custom/mine"
    shutil.rmtree(tmp_path / "custom" / "mine")  # the active one goes
    shown.refresh.click()
    shown.wait()
    assert shown.adapter.value is None and shown.bank.active is None and shown.state == panel.IDLE


def test_the_memory_table_holds_base_and_every_adapter(shown):
    for part in (f">{shown.bank.base_bytes / 1e6:.1f} MB<", "q_proj, v_proj, down_proj", ">4<", ">8<",
                 f">{shown.bank.adapter_bytes('sql') / 1e6:.1f} MB<"):
        assert part in shown.memory.value


def test_each_export_that_it_offers_is_a_command_that_works(shown, tiny):
    for name, info in shown.bank.adapters.items():
        shown.adapter.value = name
        commands = re.findall(r"<td>(python -m .*?)</td>", shown.home.value)
        assert len(commands) == len(export_plan.FOR) - (not info.verified) - bool(info.extras)
        for command in commands:
            words = shlex.split(html.unescape(command))[3:]
            assert words[0] == "export" and Path(words[1]).resolve() == info.folder.resolve()
            assert words[4:] == ["-p", f"base_model={tiny}"]
            export_plan.plan_export(words[1], words[3], base_model=str(tiny))
    shown.adapter.value = None
    assert "Choose an adapter" in shown.home.value


def test_no_adapters_at_all_is_a_base_model_to_try(tiny, tmp_path):
    made = panel.show(base_name=str(tiny), prebuilt=tmp_path / "a", custom=tmp_path / "b")
    made.wait(60)
    made.numbers["max_new_tokens"].value = 3
    for mode in (panel.COMPARE, panel.ALL):
        made.mode.value = mode
        made.run()
        made.wait()
        assert made.state == panel.IDLE, said(made)
    assert [entry["adapter"] for entry in made.history] == ["base", "base"]


# ---------------------------------------------------------------------------------------------------- text and export


def test_model_text_is_escaped_everywhere(shown, monkeypatch):
    evil = "<img src=x onerror=alert(1)>"
    monkeypatch.setattr(shown.bank, "generate", lambda prompt, name, *_: adapters.Answer(
        name, prompt, evil, 3, 0.0, 0.1, 0.2, False))
    shown.task.value = "sql"
    shown.run()
    shown.wait()
    for markup in (*[view.value for view in shown.cards.children], shown.history_view.value, shown.static_html()):
        assert "<img" not in markup
    assert "&lt;img" in shown.cards.children[0].value


def test_the_exported_csv_reads_back_and_runs_no_formula(shown, monkeypatch):
    monkeypatch.setattr(shown.bank, "generate", lambda prompt, name, *_: adapters.Answer(
        name, prompt, '=HYPERLINK("x"), "quoted"', 3, 0.001, 0.1, 0.2, False))
    shown.export.click()
    assert shown.download.value == "No answers yet."
    shown.run()
    shown.wait()
    shown.export.click()
    data = re.search(r"base64,([^']+)'", shown.download.value)[1]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))
    assert [row["adapter"] for row in rows] == ["base", "instruct"] and tuple(rows[0]) == tuple(shown.history[0])
    assert rows[0]["answer"] == '\'=HYPERLINK("x"), "quoted"' and rows[0]["swap_ms"] == "1.0"


def test_sql_answers_are_run_and_shown_as_a_table():
    good, count, bad, writes, empty = panel_html.sql_results(TABLE, [
        "SELECT name FROM employees", "SELECT COUNT(*) FROM employees", "SELECT age FROM employees", "DROP TABLE employees", ""])
    assert "first 8 of" in good and good.count("<tr>") == 9 and "rows: 1" in count
    assert "no such column" in bad and "not authorized" in writes and "Does not run" in empty


@pytest.mark.parametrize("query", [
    "ATTACH 'x.db' AS x", "PRAGMA writable_schema=1", "INSERT INTO employees VALUES (1, 2)", "SELECT 1; SELECT 2",
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n", "SELECT load_extension('x')",
    "SELECT randomblob(1000000000)"])
def test_a_query_can_only_read_and_only_for_a_while(query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert "Does not run" in panel_html.sql_results(TABLE, [query], seconds=0.3)[0]
    assert time.monotonic() - start < 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("context", ["", "no sql", "ATTACH 'x.db' AS x", f"{TABLE}; DROP TABLE employees",
                                     f"{TABLE}; ATTACH 'x.db' AS x", "CREATE TABLE a AS SELECT load_extension('x')", "CREATE TABLE a ("])
def test_a_context_that_does_more_than_make_tables_is_not_run(context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Not run" in panel_html.sql_results(context, ["SELECT 1"])[0] and not list(tmp_path.iterdir())


def test_a_context_may_make_its_tables_from_queries_and_views():
    for context in ("CREATE TABLE a AS SELECT 1 AS b", f"{TABLE}; CREATE VIEW v AS SELECT name FROM employees"):
        assert "Run on made-up rows" in panel_html.sql_results(context, ["SELECT 1"])[0]


def test_sql_cells_are_escaped():
    shown = panel_html.sql_results("CREATE TABLE t (a VARCHAR)", ["SELECT '<b>x</b>' AS \"<i>y\" FROM t"])[0]
    assert "<b>" not in shown and "&lt;b&gt;x" in shown and "&lt;i&gt;y" in shown


# ------------------------------------------------------------------------------------------------------- how it is shown


def test_a_static_page_shows_the_last_state_beside_the_live_view(shown):
    shown.task.value = "sql"
    shown.numbers["max_new_tokens"].value = 4
    shown.run()
    shown.wait()
    bundle = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"] == "The task explorer panel"
    assert shown.fields["question"].value in bundle["text/html"] and "tokens/s" in bundle["text/html"]


def test_every_control_has_a_label_or_a_name(shown):
    import ipywidgets as w

    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    controls = [x for x in walk(shown.view) if isinstance(x, (w.Button, w.Dropdown, w.Textarea, w.BoundedIntText,
                                                              w.BoundedFloatText, w.ToggleButtons))]
    assert len(controls) >= 19 and all(control.description for control in controls)
    assert all(button.tooltip for button in controls if isinstance(button, w.Button))


def test_the_style_takes_its_colours_from_the_theme():
    colours = re.findall(r"(?:color|background|border|outline)[^;:}]*:([^;}]*)", panel_html.STYLE)
    assert all("var(--jp-" in value for value in colours if re.search(r"#[0-9a-f]{3}", value))
    assert len(re.findall(r"var\(--jp-", panel_html.STYLE)) > 10


def test_the_web_pages_notebook_shows_the_panel_and_nothing_else(shelf, tiny, monkeypatch, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "app" / "task_explorer.ipynb", as_version=4)
    [cell] = notebook.cells
    assert cell.outputs == [] and cell.execution_count is None  # Voila executes it; a stored panel would be of another day
    monkeypatch.chdir(tmp_path)  # and back, after the cell's own chdir
    for name, value in (("WORKBOOK_BASE", tiny), ("WORKBOOK_PREBUILT", shelf), ("CUSTOM_LORA_ADAPTERS_DIR", tmp_path)):
        monkeypatch.setenv(name, str(value))
    lines, _, last = cell.source.rpartition("\npanel.show(")
    names = {}
    exec(lines, names)
    made = eval("panel.show(" + last, names)
    made.wait(60)
    assert made.state == panel.IDLE and list(made.bank.adapters) == ["detox", "instruct", "sql"]


def test_a_task_of_ones_own_appears_in_the_panel(tiny, tmp_path):
    task = tasks.Task(name="titles", title="Headline writing", columns=("article",), target="headline",
                      template="<Article>: {article}\n<Headline>: ")
    tasks.register(task)
    try:
        made = panel.show(base_name=str(tiny), prebuilt=tmp_path, custom=tmp_path)
        made.wait(60)
        made.task.value = "titles"
        made.fields["article"].value = "It rained."
        assert made.prompt_text() == "<Article>: It rained.\n<Headline>: "
    finally:
        del tasks.TASKS["titles"]
