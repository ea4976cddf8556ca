"""Property tests: whatever comes in, the answer is a result or one sentence that names it, never another exception.

The number of examples follows from the hypothesis profile: `quick` (CI, the default) or `long`:
    HYPOTHESIS_PROFILE=long python -m pytest tests/test_fuzz.py
"""

import contextlib
import dataclasses
import gzip
import html
import json
import os
import random
import re
import sqlite3
import string
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sqlglot.errors import SqlglotError

from helpers import WorkbookError, base_models, data, evaluation, jobs, recipes, tasks

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=60, derandomize=True, **QUIET)  # the same examples on every commit
settings.register_profile("long", max_examples=3000, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)
ANY_TEXT = st.text(st.characters())  # with control characters, without lone surrogates
HOSTILE = ["\0", "\ud800", "~nobody-of-that-name/x", "../../etc/passwd", "a" * 300, "/" * 5000, "{0}", "{x.__class__}", "%s",
           "-p", "--resume", "nan", "1e999", "9" * 5000, "[" * 600, "!!python/object/apply:os.system [ls]", "&a [*a]", "²",
           "2026-01-01", "{[1]: 2}", "None", "\u202e", "'\"`$(id)"]


def a_sentence(error: WorkbookError) -> str:
    text = str(error)
    assert text and "\n" not in text.strip() and "\r" not in text.strip(), repr(text)
    return text


# ---- tasks


names = st.lists(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), min_size=2, max_size=5, unique=True)


@given(columns=names, contents=st.lists(ANY_TEXT, min_size=5, max_size=5))
@example(columns=["a", "b", "c"], contents=["{b}", "{0}{{}}", "{a.__class__}", "%s", ""])
def test_a_prompt_holds_every_value_as_it_is(columns, contents):
    """Template and row give a text from which the row can be read back; braces in values mean nothing."""
    *shown, target = columns
    template = "".join(f"<{name}>: {{{name}}}\n" for name in shown) + "<answer>: "
    task = tasks.Task(name="t", title="", columns=tuple(shown), target=target, template=template)
    row = dict(zip(columns, contents, strict=False))
    assume(not any(f"<{name}>: " in value or "<answer>: " in value for name in shown for value in row.values()))
    rest, found = task.prompt(row), {}
    for name, after in zip(shown, [*(f"\n<{name}>: " for name in shown[1:]), "\n<answer>: "], strict=True):
        start = f"<{name}>: " if name == shown[0] else ""
        assert rest.startswith(start)
        found[name], rest = rest.removeprefix(start).split(after, 1)
    assert found == {name: row[name] for name in shown} and rest == ""
    assert task.completion(row) == row[target].strip()


@given(name=st.sampled_from(sorted(tasks.TASKS)), text=ANY_TEXT)
def test_an_answer_is_stable(name, text):
    """Cutting at the stop text and trimming is done once and for all."""
    task = tasks.TASKS[name]
    answer = task.answer(text)
    assert task.answer(answer) == answer and (task.stop is None or task.stop not in answer)
    assert answer in text


@given(template=st.text(alphabet=string.printable, max_size=40), columns=st.lists(ANY_TEXT, max_size=3))
def test_a_template_that_cannot_work_is_refused(template, columns):
    try:
        task = tasks.Task(name="t", title="", columns=tuple(columns), target="y", template=template)
    except WorkbookError as error:
        a_sentence(error)
        return
    task.prompt({name: "v" for name in columns})


# ---- data files


def load(path: Path, content: bytes, name: str = "sql") -> data.Rows | str:
    path.write_bytes(content)
    try:
        return data.load_rows(name, str(path))
    except WorkbookError as error:
        return a_sentence(error)


ROW = {"context": "CREATE TABLE t (a INTEGER)", "question": "How many?", "answer": "SELECT COUNT(*) FROM t", "split": "train"}
LINES = st.dictionaries(st.sampled_from([*ROW, "extra"]), JSON | st.text(), max_size=5).map(lambda some: json.dumps(ROW | some))


@given(content=st.binary(max_size=400) | st.lists(LINES | ANY_TEXT, max_size=4).map(lambda x: "\n".join(x).encode()))
def test_any_file_is_rows_or_a_sentence(tmp_path, content):
    loaded = load(tmp_path / "rows.jsonl", content)
    columns = tasks.TASKS["sql"].columns
    assert isinstance(loaded, str) or all(isinstance(row[name], str) for row in loaded.rows for name in columns)


@given(change=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3), cut=st.floats(0.1, 1))
def test_a_damaged_gzip_file_is_a_sentence_or_whole(tmp_path, change, cut):
    whole = bytearray(gzip.compress(b"".join(json.dumps(ROW | {"question": f"q{i}"}).encode() + b"\n" for i in range(200))))
    for where, byte in change:
        whole[int(where * len(whole))] = byte
    loaded = load(tmp_path / "rows.jsonl.gz", bytes(whole[:int(cut * len(whole))]))
    assert isinstance(loaded, str) or len(loaded.rows) == 200


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis"])
def test_encodings_are_read_right_or_refused(tmp_path, encoding):
    text = json.dumps(ROW | {"question": "Wie viele Käufer?" if encoding != "shift_jis" else "何人?"}, ensure_ascii=False)
    loaded = load(tmp_path / "rows.jsonl", text.encode(encoding))
    if encoding in ("utf-8", "utf-8-sig"):
        assert loaded.rows[0]["question"] == "Wie viele Käufer?"
    else:
        assert isinstance(loaded, str) and ("UTF-8" in loaded or "line 1" in loaded)


@pytest.mark.parametrize(("value", "said"), [
    ("\ud800", "line 1"), ("a\0b", "line 1"), (["x"], "is a list"), ({"x": {"y": 1}}, "is a dict"), (None, "NoneType"),
    (10**400, "is a int"), (True, "is a bool")])
def test_what_is_not_text_is_refused_with_its_line(tmp_path, value, said):
    loaded = load(tmp_path / "rows.jsonl", json.dumps(ROW | {"question": value}).encode())
    assert isinstance(loaded, str) and said in loaded and "'question'" in loaded, loaded


def test_a_huge_line_is_read_or_refused_in_time(tmp_path):
    started = time.monotonic()
    loaded = load(tmp_path / "rows.jsonl", json.dumps(ROW | {"question": "why " * 1_000_000}).encode())
    assert len(loaded.rows) == 1 and time.monotonic() - started < 20
    for content in (b"[" * 1_000_000, b'{"a":' * 100_000, b"9" * 1_000_000, b'"' + b"x" * 2_000_000):
        assert "line 1" in load(tmp_path / "rows.jsonl", content)


PRINTED = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]) | st.just("\n"))  # the vocabulary lacks some controls


@pytest.fixture(scope="session")
def tokenizer():
    return base_models.load_tokenizer()


@given(question=PRINTED.filter(str.strip), answer=PRINTED.filter(str.strip))
def test_what_is_loaded_can_be_tokenized(tmp_path, tokenizer, question, answer):
    loaded = load(tmp_path / "rows.jsonl", json.dumps(ROW | {"question": question, "answer": answer}).encode())
    if isinstance(loaded, str):
        return
    task = tasks.TASKS["sql"]
    [row], _ = data.encode_rows(tokenizer, task, loaded.rows, 100_000)
    text = tokenizer.decode(row["input_ids"][:-1])
    assert text == task.prompt(loaded.rows[0]) + task.completion(loaded.rows[0])


# ---- parameters


@given(kind=st.sampled_from([int, float, bool, str, list, dict]), optional=st.booleans(),
       value=JSON.map(json.dumps) | st.text() | st.sampled_from(HOSTILE))
def test_a_parameter_is_of_its_type_or_refused(kind, optional, value):
    parameter = jobs.Parameter("rank", None if optional else kind(), kind, "")
    try:
        converted = jobs.convert(parameter, value)
    except WorkbookError as error:
        a_sentence(error)
        return
    assert (converted is None and optional) or type(converted) is kind
    json.dumps(converted)  # it goes into status.json
    assert not isinstance(converted, float) or abs(converted) < float("inf")


@given(pairs=st.lists(st.tuples(st.sampled_from([p for p in jobs.load_jobs()["sql"].declared] + ["", "x"]),
                                st.text() | st.sampled_from(HOSTILE)), max_size=3))
@example(pairs=[("data", "~nobody-of-that-name/rows.jsonl")])
@example(pairs=[("base_model", "~nobody-of-that-name")])
@example(pairs=[("adapter_dir", "~nobody-of-that-name/x")])
@example(pairs=[("data", "\0")])
@example(pairs=[("base_model", "a" * 300)])
@example(pairs=[("packing", "[" * 600)])
def test_a_command_line_is_planned_or_refused_in_a_sentence(pairs, tmp_path, capsys):
    words = [word for name, value in pairs for word in ("-p", f"{name}={value}")]
    try:
        code = jobs.main(["run", "sql", "--dry-run", f"--runs-dir={tmp_path / 'runs'}", *words])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert "Traceback" not in err and (code == 0 or err.strip()) and not (tmp_path / "runs").exists()
    assert code == 0 or "usage:" in err or len(err.strip("\n").split("\n")) == 1, err


@given(given=st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(recipes.FineTuneConfig)]),
                             JSON | st.sampled_from(HOSTILE), max_size=4))
def test_a_config_is_checked_or_refused(given):
    try:
        config = recipes.FineTuneConfig.from_parameters(**{"task": "sql", **given})
    except WorkbookError as error:
        a_sentence(error)
        return
    assert 1 <= config.rank <= 1024 and config.batch_size >= 1 and config.precision in ("4bit", "full")


@given(name=st.text() | st.sampled_from(HOSTILE))
def test_a_base_model_is_found_or_refused(name):
    try:
        assert base_models.resolve(name).name
    except WorkbookError as error:
        a_sentence(error)


STATUS = json.dumps({"job": "sql", "state": "failed", "error": None, "attempts": 1, "parameters": {}, "pid": 1, "pid_created": 1.0,
                     "host": "x", "created": "2026-01-01T00:00:00+00:00", "started": "2026-01-01T00:00:00+00:00",
                     "ended": "2026-01-01T00:00:09+00:00", "seconds": 9.0}).encode()


@given(content=st.binary(max_size=40) | st.integers(0, len(STATUS)).map(lambda end: STATUS[:end]))
@example(content=STATUS)
def test_a_status_file_that_was_cut_off_is_named(content, tmp_path, capsys):
    (tmp_path / "sql-1").mkdir(exist_ok=True)
    (tmp_path / "sql-1" / "status.json").write_bytes(content)
    for words in (["status"], ["run", "sql", "--resume", "sql-1", "--dry-run"]):
        assert jobs.main([*words, f"--runs-dir={tmp_path}"]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err


# ---- a model's SQL


WORDS = st.sampled_from("SELECT FROM WHERE t a ( ) , * = <> 'x' \"a\" 1 1e999 0x1F 99999999999999999999 NULL AND OR NOT IN LIKE "
                        "JOIN ON GROUP BY ORDER LIMIT COUNT ( MAX CASE WHEN END UNION WITH RECURSIVE AS ; -- /* */ ? :x @y [ ] ` "
                        "VALUES PRAGMA INSERT UPDATE DELETE DROP CREATE TABLE INTO SET".split(" "))
QUERIES = st.lists(WORDS, max_size=14).map(" ".join)
CONTEXT = "CREATE TABLE t (a INTEGER, b VARCHAR)"


@given(query=QUERIES | QUERIES.map("SELECT a FROM t WHERE ".__add__) | ANY_TEXT | st.sampled_from(HOSTILE))
@example(query="SELECT a FROM t WHERE a > 99999999999999999999")
@example(query="SELECT a FROM t WHERE a > 1e999")
@example(query="SELECT a FROM t WHERE a = -1e999")
@example(query="SELECT a FROM t WHERE b = '\0'")
@example(query="SELECT (" + "(" * 3000)
@example(query="SELECT a FROM t WHERE " + " OR ".join(["a = 1"] * 3000))
def test_any_answer_is_scored(query):
    """A model may write anything: scoring never raises, and what is no query is not valid."""
    same, valid = evaluation.sql_execution(query, "SELECT a FROM t WHERE a > 1", CONTEXT)
    assert valid or not same
    evaluation.sql_exact(query, "SELECT a FROM t")
    row = {"context": CONTEXT, "question": "q", "answer": "SELECT a FROM t"}
    [scored] = evaluation.score(tasks.TASKS["sql"], [query], [row])
    assert all(0 <= value <= 1 for value in scored.values())


@given(answer=ANY_TEXT | st.sampled_from(HOSTILE[3:]), reference=ANY_TEXT.filter(str.strip))
def test_any_text_is_scored(answer, reference):
    [scored] = evaluation.score(tasks.TASKS["detox"], [answer], [{"toxic": "x", "neutral": reference}])
    assert all(0 <= value <= 1 for value in scored.values())
    [scored] = evaluation.score(tasks.TASKS["detox"], [reference.strip()], [{"toxic": "x", "neutral": reference}])
    assert scored["exact"] == 1


WRITES = ["INSERT INTO t VALUES (1, 'x')", "UPDATE t SET a = 1", "DELETE FROM t", "DROP TABLE t",
          "REPLACE INTO t VALUES (1, 'x')",
          "CREATE TABLE u (a)", "CREATE TEMP TABLE u (a)", "CREATE VIEW v AS SELECT 1", "ALTER TABLE t ADD COLUMN c",
          "WITH x AS (SELECT 1) INSERT INTO t SELECT *, 1 FROM x", "CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END",
          "ATTACH '{file}' AS x", "VACUUM INTO '{file}'", "VACUUM", "DETACH main", "PRAGMA writable_schema = 1",
          "PRAGMA user_version", "SELECT * FROM pragma_database_list", "SELECT load_extension('{file}')",
          "SELECT writefile('{file}', 'x')",
          "SELECT readfile('/etc/hostname')", "SELECT edit('x')", "BEGIN", "SAVEPOINT s", "EXPLAIN DELETE FROM t", "ANALYZE",
          "SELECT fts3_tokenizer('simple', x'00')", "CREATE VIRTUAL TABLE v USING fts5(x)", "REINDEX", "SELECT 1; DELETE FROM t",
          "/* SELECT */ DELETE FROM t", "SELECT a FROM t; ATTACH '{file}' AS x", "UPDATE sqlite_master SET sql = ''"]


@pytest.mark.parametrize("query", WRITES)
def test_a_models_sql_cannot_write_or_leave_its_database(tmp_path, query):
    database, secret = tmp_path / "rows.db", tmp_path / "secret"
    connection = sqlite3.connect(database)
    connection.executescript(CONTEXT + "; INSERT INTO t VALUES (7, 'kept')")
    connection.commit()
    before = database.read_bytes()
    with pytest.raises(sqlite3.Error):
        evaluation.run_sql(connection, query.format(file=secret))
    assert evaluation.run_sql(connection, "SELECT * FROM t")[1] == [(7, "kept")]
    connection.close()
    assert database.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["rows.db"]


@pytest.mark.parametrize("added", [
    "ATTACH '{file}' AS x; CREATE TABLE x.y (a)", "VACUUM INTO '{file}'",
    "/* /* */ ATTACH '{file}' AS x; CREATE TABLE x.y (a); */",
    "CREATE TABLE u AS SELECT load_extension('{file}')", "CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END",
    "PRAGMA writable_schema = 1", "CREATE VIRTUAL TABLE v USING fts5(x)", "CREATE TABLE u (a); \0", "DROP TABLE t",
    "CREATE TABLE u AS SELECT zeroblob(900000000) AS z", "CREATE TABLE u (a, b GENERATED ALWAYS AS (load_extension('{file}')))",
    "CREATE TABLE u AS SELECT writefile('{file}', 'x') AS z", "CREATE TABLE u AS SELECT printf('%.*c', 900000000, 'a') AS z",
    "CREATE TEMP TRIGGER r AFTER INSERT ON t BEGIN SELECT 1; END", "ANALYZE", "DELETE FROM t", "CREATE INDEX i ON t (random())",
    "CREATE TABLE u AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"])
def test_a_rows_context_can_only_make_tables(tmp_path, added):
    """Rows come from anywhere, and their context is run to make the test databases; the panel shows it too."""
    from helpers import panel_html

    context = f"{CONTEXT}; " + added.format(file=tmp_path / "secret")
    with pytest.raises((sqlite3.Error, SqlglotError)):
        evaluation.fill_databases(context, ["SELECT a FROM t"])
    started = time.monotonic()
    assert "Not run" in panel_html.sql_results(context, ["SELECT a FROM t"])[0] and time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())


SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


LONG = f"replace(replace('{'a' * 100}', 'a', '{'a' * 20}'), 'a', '{'a' * 20}')"  # 40,000 characters


@pytest.mark.parametrize("added", [
    "CREATE VIEW v AS " + SLOW, "CREATE VIEW v AS SELECT load_extension('x') AS i",
    "CREATE VIEW v AS SELECT zeroblob(900000000) AS i",
    f"CREATE TABLE v (i CHECK (instr({LONG}, substr({LONG}, 20000) || 'b') = i))",
    f"CREATE TABLE v (i, j GENERATED ALWAYS AS (instr({LONG}, substr({LONG}, 20000) || 'b')) STORED)",
    f"CREATE TABLE v (i, j GENERATED ALWAYS AS (hex({LONG} || i)) STORED)",
    "CREATE TABLE v (i, j GENERATED ALWAYS AS (format('%.*c', 900000000, 'a')) STORED)"])
def test_what_a_context_leaves_for_later_is_bounded_too(added):
    """A view runs when it is asked, a check and a generated column when a row comes."""
    started = time.monotonic()
    with contextlib.suppress(sqlite3.Error):
        for connection in evaluation.fill_databases(f"{CONTEXT}; {added}", ["SELECT a FROM t"], databases=1):
            with pytest.raises(sqlite3.Error):
                evaluation.run_sql(connection, "SELECT * FROM v, missing")
            with contextlib.suppress(sqlite3.Error):
                evaluation.run_sql(connection, "SELECT * FROM v", seconds=0.5)
    assert time.monotonic() - started < 10


COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {})"
GROW = "WITH RECURSIVE n(i, s) AS (SELECT 1, printf('%.*c', {}, 'a') UNION ALL SELECT i + 1, s || '' FROM n)"
GREEDY = {
    "one slow call": "SELECT instr(printf('%.*c', 990000, 'a'), printf('%.*c', 490000, 'a') || 'b')",
    "one call of long texts": "SELECT instr(printf('%.*c', 49000, 'a'), printf('%.*c', 24000, 'a') || 'b')",
    "a long pattern": "SELECT printf('%.*c', 49000, 'a') LIKE '%' || printf('%.*c', 24000, 'a') || 'b'",
    "a GLOB pattern": "SELECT printf('%.*c', 49000, 'a') GLOB '*' || printf('%.*c', 24000, 'a') || 'b'",
    "a pattern of many parts": "SELECT printf('%.*c', 49000, 'a') LIKE '" + "%a" * 90 + "b'",
    "a large result": COUNT.format(1000) + " SELECT printf('%.*c', 990000, 'a') || i FROM n",
    "a result of long texts": COUNT.format(1000) + " SELECT printf('%.*c', 49000, 'a') || i FROM n",
    "a large sort": GROW.format(990000) + " SELECT * FROM n ORDER BY i DESC LIMIT 1",
    "a sort of long texts": GROW.format(49000) + " SELECT * FROM n ORDER BY i DESC LIMIT 1",
    "a large set": GROW.format(40000).replace("UNION ALL", "UNION") + " SELECT count(*) FROM n",
    "a text that grows": "WITH RECURSIVE n(s) AS (SELECT 'ab' UNION ALL SELECT s || s FROM n) SELECT max(length(s)) FROM n",
    "group_concat": COUNT.format(10**9) + " SELECT group_concat(printf('%.*c', 9999, 'a')) FROM n",
    "a cross join": COUNT.format(3000) + " SELECT count(*) FROM n a, n b, n c, n d",
    "replace": "SELECT replace(printf('%.*c', 49000, 'a'), 'a', printf('%.*c', 49000, 'b'))",
}
LIMITS = """import resource, sqlite3, sys, time
from helpers.sql_scoring import run_sql
connection = sqlite3.connect(":memory:")
run_sql(connection, "SELECT 1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
try:
    run_sql(connection, sys.argv[1], seconds=0.5)
    end = "a result"
except sqlite3.Error as error:
    end = "an error"
print(time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("name", GREEDY)
def test_a_models_sql_ends_in_time_and_memory(name):
    """In a process of its own, so that its memory can be told: 0.5 s are allowed; at most 2 s of CPU and 150 MB."""
    command = [sys.executable, "-c", LIMITS, GREEDY[name]]
    result = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-500:]
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 2 and megabytes < 150, f"{seconds:.1f} s, {megabytes:.0f} MB"


# ---- adapters' configs (files, tensors and links: test_adapters.py)


SETTINGS = ["r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path", "revision", "use_rslora", "bias",
            "init_lora_weights", "modules_to_save", "task_type", "x"]


@given(changes=st.dictionaries(st.sampled_from(SETTINGS), JSON, max_size=3), seed=st.integers(0, 9))
def test_any_adapter_config_is_read_or_refused(changes, seed, tiny, tmp_path_factory):
    from helpers import adapters

    folder = tmp_path_factory.mktemp("adapter") / "mine"
    folder.mkdir()
    sound = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": tiny.name}
    (folder / "adapter_config.json").write_text(json.dumps(sound | changes))
    (folder / "adapter_model.safetensors").write_bytes(random.Random(seed).randbytes(200))
    with pytest.raises(WorkbookError) as caught:
        adapters.read_adapter(folder, str(tiny))
    a_sentence(caught.value)


# ---- what is typed into the panel


@pytest.fixture(scope="module")
def shown(tiny, tmp_path_factory):
    from helpers import adapters, panel

    nothing = tmp_path_factory.mktemp("none")
    made = panel.show(adapters.AdapterBank(str(tiny)), prebuilt=nothing, custom=nothing)
    made.wait(120)
    return made


class Tags(HTMLParser):
    """The tags of a markup, and what could run in it."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.harmful = set(), []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.harmful += [f"{tag} {name}={value}" for name, value in attrs if name.startswith("on") or (
            name in ("href", "src") and not (value or "").startswith("data:text/csv;base64,"))]


def markup_of(shown) -> str:
    views = [shown.status, shown.prompt, shown.memory, shown.history_view, shown.download, *shown.cards.children]
    return "".join(view.value for view in views) + shown.static_html()


def type_and_run(shown, text: str, task: str) -> str:
    """Fill every field with the text, generate, export; returns all markup. The panel must be usable afterwards."""
    shown.task.value = task
    for field in shown.fields.values():
        field.value = text
    shown.numbers["max_new_tokens"].value = 2
    assert shown.run()
    shown.wait(60)
    assert shown.state in ("idle", "error")
    shown.export.click()
    status = html.unescape(re.sub(r"<[^>]*>", "", shown.status.value))
    assert "\n" not in status.strip() and not (shown.error and type(shown.error) is not WorkbookError), shown.error
    return markup_of(shown)


SAFE = {"div", "span", "pre", "h3", "h4", "p", "b", "i", "table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li", "a"}
TYPED = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'><svg/onload=alert(1)>", "</pre></div><iframe src=//x>",
         "&lt;b&gt;", "javascript:alert(1)", "\x00\x01\x1b[31m\x7f\x9f", "\u202eright to left", "\U0001f600 \u0301\u0301",
         "{x} {0} %s", "a" * 100_000, "<b>" * 30_000, "word " * 20_000, "\n" * 100_000, "", " ",
         "CREATE TABLE \"<i>\" (\"<img>\" INTEGER)", "=HYPERLINK(\"x\")", "\ud800"]


@pytest.mark.parametrize("text", TYPED, ids=lambda text: repr(text[:20]))
def test_whatever_is_typed_leaves_a_panel_that_works(shown, text):
    """Through the real bank and model: a result or a sentence, never markup of the writer's own."""
    parsed = Tags(type_and_run(shown, text, "sql"))
    assert parsed.tags <= SAFE and parsed.harmful == []
    shown.task.value = "detox"
    shown.fields["toxic"].value = "you fool"
    assert shown.run()
    shown.wait(60)
    assert shown.state == "idle", shown.error


PIECES = st.sampled_from(["<", ">", "&", "\"", "'", "script", "img", " onload=", "/", "x", "`", "=", "<!--", "]]>", "&#60;"])


@given(text=st.text() | st.lists(PIECES, max_size=12).map("".join))
def test_what_a_model_writes_is_never_markup(shown, text):
    """A model that answers with what it was given: every place that shows it escapes it."""
    from helpers import adapters

    def echo(prompt, name=None, settings=None, on_text=None, stop=None):
        if on_text:
            on_text(text)
        return adapters.Answer(name, prompt, text, 1, 0.0, 0.1, 0.2, False)

    shown.bank.generate = echo
    try:
        parsed = Tags(type_and_run(shown, text or "x", "sql"))
    finally:
        del shown.bank.generate
    assert parsed.tags <= SAFE and parsed.harmful == []
