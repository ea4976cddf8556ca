"""The metrics: right where they must be, not fooled where a naive one would be, and safe with a model's SQL."""

import importlib.util
import sqlite3
import time
from pathlib import Path

import pytest
from make_practice import practice_rows

from helpers import evaluation as ev
from helpers import sql_databases, sql_queries, sql_scoring, tasks

CONTEXT = "CREATE TABLE people (name VARCHAR, age INTEGER, city VARCHAR)"
REFERENCE = "SELECT name FROM people WHERE age > 30 AND city = 'Rome'"


@pytest.mark.parametrize(("answer", "same"), [
    ("select NAME from People where AGE > 30 and city = 'Rome'", True),
    ('SELECT "name" FROM people WHERE age > 30 AND city = \'Rome\'', True),
    ("SELECT name FROM people WHERE city = 'Rome' AND age > 30", False),  # the same rows, another text
    ("SELECT name FROM people WHERE age > 30 AND city = 'rome'", False),
    ("SELECT name FROM", False),
    ("", False),
])
def test_exact_match_normalises_names_not_values(answer, same):
    assert ev.sql_exact(answer, REFERENCE) is same


@pytest.mark.parametrize(("answer", "same", "valid"), [
    (REFERENCE, True, True),
    ("SELECT name FROM people WHERE city = 'Rome' AND age > 30", True, True),
    ("SELECT name FROM people WHERE age >= 31 AND city = 'Rome'", True, True),
    ("SELECT name FROM people WHERE age >= 30 AND city = 'Rome'", False, True),
    ("SELECT name FROM people WHERE age > 30", False, True),
    ("SELECT name FROM people WHERE city = 'Rome'", False, True),
    ("SELECT name FROM people WHERE age > 30 OR city = 'Rome'", False, True),
    ("SELECT name FROM people WHERE age > 30 AND city = 'rome'", False, True),
    ("SELECT DISTINCT name FROM people WHERE age > 30 AND city = 'Rome'", False, True),
    ("SELECT city FROM people WHERE age > 30 AND city = 'Rome'", False, True),
    ("SELECT name FROM person WHERE age > 30", False, False),
    ("SELECT name FROM people; DROP TABLE people", False, False),
    ("DELETE FROM people", False, False),
    ("hello", False, False),
    ("", False, False),
])
def test_execution_tells_queries_apart(answer, same, valid):
    assert ev.sql_execution(answer, REFERENCE, CONTEXT) == (same, valid)


def test_order_counts_only_when_the_reference_orders():
    ordered = "SELECT name FROM people ORDER BY age DESC, name"
    assert ev.sql_execution(ordered, ordered, CONTEXT) == (True, True)
    assert ev.sql_execution("SELECT name FROM people ORDER BY age, name", ordered, CONTEXT) == (False, True)
    assert ev.sql_execution(ordered, "SELECT name FROM people", CONTEXT) == (True, True)


def test_every_practice_reference_agrees_with_itself_and_not_with_its_neighbours():
    rows = practice_rows("sql", "validation", 120)
    assert all(ev.sql_execution(row["answer"], row["answer"], row["context"]) == (True, True) for row in rows)
    told_apart = []
    for row in rows:
        for old, new in (("COUNT(*)", "COUNT(*) + 1"), (" > ", " < "), (" AND ", " OR "), ("MAX(", "MIN("), (" DESC", " ASC")):
            if old in row["answer"]:
                told_apart.append(not ev.sql_execution(row["answer"].replace(old, new, 1), row["answer"], row["context"])[0])
    assert len(told_apart) > 20
    assert sum(told_apart) / len(told_apart) > 0.95, f"only {sum(told_apart)} of {len(told_apart)} wrong queries were noticed"


CITIES = "CREATE TABLE t (name TEXT, city TEXT)"
RATES = "CREATE TABLE t (rate TEXT, n INTEGER)"
NUMBERS = "CREATE TABLE t (a INTEGER, b REAL, c TEXT)"
PAIR = "CREATE TABLE p (id INTEGER, name TEXT); CREATE TABLE c (id INTEGER, p_id INTEGER, size INTEGER)"
JOINED = "SELECT p.name FROM p JOIN c ON p.id = c.p_id WHERE c.size > 4"
BERN = 'SELECT name FROM t WHERE city = "Bern"'


@pytest.mark.parametrize(("context", "reference", "answer", "same"), [
    # a name in double quotes that is no column is a text
    (CITIES, BERN, 'SELECT name FROM t WHERE city = "Rome"', False),
    (CITIES, BERN, "SELECT 1 WHERE 0", False),
    (CITIES, BERN, 'SELECT name FROM t WHERE city = "bern"', False),
    (CITIES, BERN, "SELECT name FROM t WHERE city = 'Bern'", True),
    (CITIES, BERN, 'SELECT "name" FROM t WHERE "city" = "Bern"', True),
    (CITIES, BERN, 'SELECT name FROM t WHERE city IN ("Bern", "Rome")', False),
    (CITIES, 'SELECT name FROM t WHERE name <> "O\'Hara"', "SELECT name FROM t", False),
    # % outside of LIKE is a character like any other
    (RATES, "SELECT n FROM t WHERE rate = '50%'", "SELECT n FROM t WHERE rate = '50'", False),
    (RATES, "SELECT n FROM t WHERE rate = '50%'", "SELECT n FROM t WHERE rate LIKE '50%'", False),
    (RATES, "SELECT n FROM t WHERE rate IN ('5_', '%')", "SELECT n FROM t WHERE rate IN ('5_')", False),
    # empty cells
    (CITIES, "SELECT name FROM t WHERE city IS NULL", "SELECT name FROM t WHERE city = ''", False),
    (CITIES, "SELECT name FROM t WHERE city IS NOT NULL", "SELECT name FROM t", False),
    (CITIES, "SELECT name FROM t WHERE city IS NOT NULL", "SELECT name FROM t WHERE city <> ''", False),
    (CITIES, "SELECT name FROM t WHERE NOT city IS NULL", "SELECT name FROM t WHERE city IS NOT NULL", True),
    (CITIES, "SELECT COUNT(city) FROM t", "SELECT COUNT(*) FROM t", False),
    (CITIES, "SELECT name FROM t WHERE COALESCE(city, '') = ''", "SELECT name FROM t WHERE city = ''", False),
    # patterns
    (CITIES, "SELECT city FROM t WHERE name LIKE '%Ann%'", "SELECT city FROM t WHERE name LIKE 'Ann%'", False),
    (CITIES, "SELECT city FROM t WHERE name LIKE '%Ann%'", "SELECT city FROM t WHERE name LIKE '%Ann'", False),
    (CITIES, "SELECT city FROM t WHERE name LIKE '%Ann%'", "SELECT city FROM t WHERE name = 'Ann'", False),
    (CITIES, "SELECT city FROM t WHERE name LIKE '%Ann%'", "SELECT city FROM t WHERE name LIKE '%ann%'", True),
    (CITIES, "SELECT city FROM t WHERE name LIKE 'B_b'", "SELECT city FROM t WHERE name LIKE 'B%b'", False),
    (CITIES, "SELECT city FROM t WHERE name LIKE 'B_b'", "SELECT city FROM t WHERE name LIKE 'B__b'", False),
    (CITIES, "SELECT city FROM t WHERE name GLOB 'A*'", "SELECT city FROM t WHERE name LIKE 'A%'", False),
    # numbers are equal as numbers, in order or not
    (NUMBERS, "SELECT a FROM t", "SELECT a * 1.0 FROM t", True),
    (NUMBERS, "SELECT a FROM t ORDER BY a", "SELECT a * 1.0 FROM t ORDER BY a", True),
    (NUMBERS, "SELECT c, AVG(b) FROM t GROUP BY c", "SELECT c, SUM(b / 7) / COUNT(b) * 7 FROM t GROUP BY c", True),
    (NUMBERS, "SELECT c, AVG(b) FROM t GROUP BY c", "SELECT c, SUM(b) / COUNT(*) FROM t GROUP BY c", False),
    (NUMBERS, "SELECT a FROM t", "SELECT a + 0.001 FROM t", False),
    (NUMBERS, "SELECT a FROM t", "SELECT CAST(a AS TEXT) FROM t", False),
    # order counts where the query as a whole orders
    (NUMBERS, "SELECT a FROM t WHERE c = 'order by'", "SELECT a FROM t WHERE c = 'order by' ORDER BY a DESC", True),
    (NUMBERS, "SELECT a FROM (SELECT a FROM t ORDER BY a)", "SELECT a FROM t ORDER BY a DESC", True),
    (NUMBERS, "SELECT a -- order by\nFROM t", "SELECT a FROM t ORDER BY a DESC", True),
    (NUMBERS, "SELECT a FROM t\nORDER\tBY a", "SELECT a FROM t ORDER BY a DESC", False),
    (NUMBERS, "SELECT a FROM t ORDER BY a, b", "SELECT a FROM t ORDER BY a", True),  # b shows nowhere
    (NUMBERS, "SELECT a, b FROM t ORDER BY a, b", "SELECT a, b FROM t ORDER BY a", False),
    # single edits of other kinds
    (NUMBERS, "SELECT c FROM t ORDER BY a DESC LIMIT 3", "SELECT c FROM t ORDER BY a DESC LIMIT 4", False),
    (NUMBERS, "SELECT c FROM t GROUP BY c HAVING COUNT(*) > 20", "SELECT c FROM t GROUP BY c HAVING COUNT(*) > 21", False),
    (NUMBERS, "SELECT c FROM t WHERE a BETWEEN 300 AND 400", "SELECT c FROM t WHERE a BETWEEN 300 AND 401", False),
    (NUMBERS, "SELECT c FROM t WHERE a BETWEEN 300 AND 400", "SELECT c FROM t WHERE a >= 300 AND a <= 400", True),
    (NUMBERS, "SELECT c FROM t WHERE a > (SELECT AVG(a) FROM t)", "SELECT c FROM t WHERE a >= (SELECT AVG(a) FROM t)", False),
    (NUMBERS, "SELECT MAX(a) FROM t WHERE b < -2.5 AND c > 'k'", "SELECT MAX(a) FROM t WHERE b <= -2.5 AND c > 'k'", False),
    (NUMBERS, "SELECT a FROM t UNION SELECT b FROM t", "SELECT a FROM t UNION ALL SELECT b FROM t", False),
    (PAIR, JOINED, JOINED.replace(" ON p.id = c.p_id", ""), False),
    (PAIR, JOINED, JOINED.replace("c.p_id", "c.id"), False),
    (PAIR, JOINED, JOINED.replace("> 4", ">= 5"), True),
    (PAIR, "SELECT p.name FROM p JOIN c ON p.id = c.p_id", "SELECT p.name FROM p LEFT JOIN c ON p.id = c.p_id", False),
    (PAIR, "SELECT name FROM p WHERE id IN (SELECT p_id FROM c)", "SELECT name FROM p WHERE id IN (SELECT id FROM c)", False),
])
def test_execution_sees_what_a_careless_database_hides(context, reference, answer, same):
    assert ev.sql_execution(reference, reference, context) == (True, True)
    assert ev.sql_execution(answer, reference, context) == (same, True)


STAFF = ("CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, age INTEGER CHECK (age >= 18), "
         "twice INTEGER GENERATED ALWAYS AS (age * 2))")
SHOP = ("CREATE TABLE p (id INTEGER PRIMARY KEY, name TEXT); CREATE TABLE c (id INTEGER PRIMARY KEY, p_id INTEGER NOT NULL "
        "REFERENCES p (id) ON DELETE CASCADE, FOREIGN KEY (p_id) REFERENCES p (id)); CREATE UNIQUE INDEX i ON p (name); "
        "CREATE VIEW v AS SELECT p.name AS n, c.id AS number FROM p JOIN c ON p.id = c.p_id")


@pytest.mark.parametrize(("context", "reference", "wrong"), [
    (STAFF, "SELECT name FROM t WHERE age > 30", "SELECT name FROM t WHERE age >= 30"),
    (STAFF, "SELECT id FROM t WHERE name = 'Ann'", "SELECT age FROM t WHERE name = 'Ann'"),
    (STAFF, "SELECT twice FROM t ORDER BY twice, id", "SELECT age FROM t ORDER BY age, id"),
    (SHOP, "SELECT n FROM v WHERE number = 3", "SELECT n FROM v WHERE number = 4"),
    (SHOP, "SELECT p.name FROM p JOIN c ON p.id = c.p_id", "SELECT p.name FROM p JOIN c ON p.id = c.id"),
    ("CREATE TABLE t (a INTEGER, b TEXT); CREATE TABLE u AS SELECT a, b AS d FROM t WHERE a > 1",
     "SELECT d FROM u WHERE a = 7", "SELECT d FROM u WHERE a = 6"),
    ("CREATE TABLE t (a INT, b TEXT, PRIMARY KEY (a, b)) WITHOUT ROWID", "SELECT b FROM t WHERE a = 5", "SELECT b FROM t"),
    ("CREATE TABLE t (a INT, b TEXT) STRICT", "SELECT b FROM t WHERE a = 5", "SELECT b FROM t WHERE a = 6"),
    ("CREATE TABLE t (a VARCHAR(10) DEFAULT 'x' COLLATE NOCASE, b DECIMAL(10, 2) NOT NULL, d BOOLEAN CHECK (d IN (0, 1)))",
     "SELECT a FROM t WHERE d = 1 AND b > 2.5", "SELECT a FROM t WHERE d = 1"),
    ("CREATE TABLE t (k TEXT CHECK (k IN ('red', 'green')), n INTEGER)", "SELECT n FROM t WHERE k = 'red'",
     "SELECT n FROM t WHERE k = 'green'"),
    ('CREATE TABLE "my table" ("first ""name" TEXT, `group` TEXT, [order] INTEGER)',
     'SELECT "group" FROM "my table" WHERE [order] > 3', 'SELECT "group" FROM "my table" WHERE [order] > 4'),
    ("CREATE TABLE t (a, b)", "SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t"),
])
def test_ordinary_schemas_work(context, reference, wrong):
    """Keys, checks, generated columns, views and indexes: the rows keep every constraint but foreign keys."""
    assert ev.sql_execution(reference, reference, context) == (True, True)
    assert ev.sql_execution(wrong, reference, context) == (False, True)
    row = {"context": context, "question": "?", "answer": reference}
    assert ev.score(tasks.get_task("sql"), [reference], [row]) == [{"exact": 1.0, "execution": 1.0, "valid": 1.0}]


@pytest.mark.parametrize(("context", "reference"), [
    (CITIES, "SELECT name FROM t WHERE city = 'Bern' AND city = 'Rome'"),  # never a row
    (CITIES, "SELECT COUNT(*) FROM t WHERE 1 = 0"),
    (CITIES, "SELECT name FROM t WHERE city = 'Bern' AND city <> 'Rome'"),  # a condition that changes nothing
    (NUMBERS, "SELECT c FROM t GROUP BY c HAVING COUNT(*) > 5000"),  # no test database is so large
    ("CREATE TABLE t (a INTEGER CHECK (length(c) > 90), c TEXT)", "SELECT a FROM t WHERE c = 'x'"),  # no random row fits
])
def test_what_the_databases_cannot_tell_is_left_out_and_counted(context, reference):
    task = tasks.get_task("sql")
    for answer, valid in ((reference, True), ("SELECT 1 WHERE 0", True), ("SELECT nothing FROM nowhere", False)):
        assert ev.sql_execution(answer, reference, context) == (None, valid), "the same rows are left out for every answer"
    rows = [{"context": context, "question": "?", "answer": reference}, {"context": CITIES, "question": "?", "answer": BERN}]
    scores = ev.score(task, [reference, BERN], rows)
    assert [row["execution"] for row in scores] == [None, 1.0] and ev.undecidable(scores) == 1
    metrics = ev.summarise(scores)
    assert metrics["execution"].n == 1 and metrics["exact"].n == 2
    assert "execution" not in ev.summarise(scores[:1]), "a mean of no rows is no number, and has no place in a record"
    assert ev.difference([None, 1.0, 0.5], [0.0, 0.5, 0.5]) == ev.difference([1.0, 0.5], [0.5, 0.5])
    assert ev.difference([None], [1.0]).n == 0


def test_exact_match_knows_a_text_in_double_quotes():
    assert not ev.sql_exact(BERN.replace("Bern", "bern"), BERN, CITIES)
    assert ev.sql_exact("select NAME from T where CITY = 'Bern'", BERN, CITIES)
    assert ev.sql_exact('SELECT "name" AS "N" FROM t ORDER BY "N"', "SELECT name AS n FROM t ORDER BY n", CITIES)


def test_the_judges_databases_are_the_same_every_time():
    reference = "SELECT p.name FROM p JOIN c ON p.id = c.p_id WHERE c.size > 4 ORDER BY c.size LIMIT 2"
    dumps = []
    for _ in range(2):
        sql_scoring._choose.cache_clear()
        assert ev.sql_execution(reference, reference, PAIR) == (True, True)
        chosen = sql_scoring._choose(reference, PAIR)
        dumps.append((chosen, [list(one.iterdump()) for one in ev.fill_databases(PAIR, [reference], databases=3)]))
    assert dumps[0] == dumps[1]


def test_edits_change_one_thing_each():
    query = "SELECT t.a FROM t WHERE t.a > 3 AND c LIKE '%x' OR b BETWEEN 1 AND 2 ORDER BY a DESC, b LIMIT 5"
    columns = {"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]}
    found = sql_queries.edits(sql_queries.parse(query)[0], columns)
    for old, new in (("> 3", "> 4"), ("> 3", ">= 3"), ("t.a > 3", "1"), ("b BETWEEN 1 AND 2", "0"), ("AND c", "OR c"),
                     ("'%x'", "'x'"), ("DESC", "ASC"), (", b LIMIT", " LIMIT"), (", b LIMIT", ", b DESC LIMIT"), ("LIMIT 5", ""),
                     ("LIMIT 5", "LIMIT 6"), ("SELECT t.a", 'SELECT t."b"'), ("SELECT", "SELECT DISTINCT"), ("2", "3")):
        assert query.replace(old, new, 1).rstrip() in found, new
    assert query not in found and all(found[query.replace("> 3", new)] for new in ("> 4", "< 3"))


def test_wrong_queries_are_noticed():
    """By a mutation engine of its own; tests/benchmarks/sql_mutants.py says more, on rows of your choice."""
    spec = importlib.util.spec_from_file_location("sql_mutants", Path(__file__).parent / "benchmarks" / "sql_mutants.py")
    sql_mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sql_mutants)
    found = sql_mutants.judge(practice_rows("sql", "validation", 60), most=6)
    assert found["mutants"] > 250 and found["undecidable"] <= 1, found
    assert found["share of the wrong that is accepted"] < 0.02, found["survivors"]
    assert found["right"] > 100 and not found["rejected"], found["rejected"]


def test_a_models_sql_can_only_read_for_a_limited_time():
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (a INTEGER)")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    start = time.monotonic()
    with pytest.raises(sqlite3.Error):
        ev.run_sql(connection, endless, seconds=0.2)
    assert time.monotonic() - start < 3
    for query in ("INSERT INTO t VALUES (1)", "ATTACH 'x.db' AS x", "PRAGMA writable_schema=1", "SELECT load_extension('x')",
                  "CREATE TABLE u (a)", "SELECT zeroblob(1000000000)", "SELECT 1; SELECT 2", "SELECT '\0'"):
        with pytest.raises(sqlite3.Error):
            ev.run_sql(connection, query)
    assert ev.run_sql(connection, "SELECT COUNT(*) FROM t") == (["COUNT(*)"], [(0,)])


def test_intervals_cover_the_truth():
    import numpy as np

    rng = np.random.default_rng(0)
    covered = sum(low <= 0.3 <= high for low, high in (
        (e.low, e.high) for e in (ev.bootstrap(list(rng.random(100) < 0.3), seed=i, samples=500) for i in range(200))))
    assert 175 <= covered <= 200  # 95% of 200, less what 100 rows and the percentile method cost
    assert ev.bootstrap([1.0] * 5) == ev.Estimate(1.0, 1.0, 1.0, 5, "bootstrap")
    with pytest.raises(ValueError):
        ev.bootstrap([])


def test_a_share_has_wilsons_interval():
    """It covers a rare share too, where a bootstrap sees no doubt at all."""
    none = ev.estimate([0.0] * 100)
    assert (none.value, none.low, none.n, none.method) == (0, 0, 100, "wilson") and 0.03 < none.high < 0.04
    half = ev.estimate([1.0, 0.0] * 50)
    assert half.low == pytest.approx(0.4038, abs=1e-4) and half.high == pytest.approx(0.5962, abs=1e-4)
    assert ev.estimate([0.5, 1.0]).method == "bootstrap" and ev.estimate([0.5, 1.0]) == ev.bootstrap([0.5, 1.0])
    import numpy as np

    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.97):
        found = [ev.estimate([float(value) for value in rng.random(50) < share]) for _ in range(300)]
        assert sum(one.low <= share <= one.high for one in found) >= 270, share


@pytest.mark.parametrize(("answer", "reference", "expected"), [
    ("\u4eca\u65e5\u306f\u96e8", "\u4eca\u65e5\u306f\u6674\u308c", 2 * 3 / 9),  # Japanese
    ("\u6211\u7231\u5317\u4eac", "\u6211\u7231\u5317\u4eac\u3002", 1.0),  # Chinese, with its full stop
    ("\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27", "\u0e01\u0e34\u0e19\u0e1b\u0e25\u0e32", 2 * 4 / 13),  # Thai
    ("GPU \u5f88\u5feb", "gpu \u5f88\u6162", 2 * 2 / 6),
    ("\uc548\ub155 \uc138\uacc4", "\uc548\ub155 \uce5c\uad6c", 0.5),  # Korean has spaces
])
def test_rouge_counts_characters_where_no_spaces_are_written(answer, reference, expected):
    assert ev.rouge_l(answer, reference) == pytest.approx(expected)


def test_text_metrics():
    assert ev.rouge_l("the cat sat", "the cat sat") == 1.0
    assert ev.rouge_l("the cat", "a dog") == ev.rouge_l("", "x") == 0.0
    assert ev.rouge_l("the big cat sat", "the cat sat") == pytest.approx(2 * 3 / 7)
    assert ev.chrf("hello world", "hello world") == pytest.approx(1.0)
    assert ev.chrf("hello", "qqqq") < 0.1


def test_generation_keeps_order_stops_and_does_not_depend_on_padding():
    import torch

    from helpers import base_models

    model, tokenizer = base_models.load(dtype=torch.float32, device="cpu")
    prompts = ["1, 2, 3, 4,", "The capital of France is the city of", "A, B, C, D,"]
    together = ev.generate(model, tokenizer, prompts, 6)
    assert together == [ev.generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert together[0].split(",")[0].strip() == "5"
    assert "\n" in ev.generate(model, tokenizer, ["Line one\nLine two\nLine"], 30)[0]
    stopped = ev.generate(model, tokenizer, ["Line one\nLine two\nLine"], 30, stop="\n")[0]
    assert stopped.rstrip().count("\n") == 0 and len(stopped) > 1


TABLES = "CREATE TABLE boats (name VARCHAR, length INTEGER); CREATE TABLE crews (boat VARCHAR, \"size of\" INTEGER)"


@pytest.mark.parametrize(("text", "runs"), [
    ("SELECT name FROM boats WHERE length > 3", True), ("SELECT name FROM boats\nand more", True), ("SELECT nme FROM boats", False),
    ('SELECT "size of" FROM crews JOIN boats ON boat = name', True), ("SELECT name FROM crews", False), ("", False),
    ("DROP TABLE boats", False), ("a boat", False)])
def test_a_query_runs_on_the_tables_of_its_prompt_or_not(text, runs):
    prompt = tasks.get_task("sql").prompt({"context": TABLES, "question": "Which boats?\n<SQL>: none"})
    assert sql_databases.query_runs(prompt, text) is runs


def test_an_answer_to_no_sql_prompt_is_taken_as_it_is():
    assert sql_databases.query_runs("Say it politely: ", "SELECT nothing")
    broken = tasks.get_task("sql").prompt({"context": "no tables", "question": "Which?"})
    assert not sql_databases.query_runs(broken, "SELECT 1")


def test_a_prompt_without_its_tables_takes_the_answer_as_it_is(monkeypatch):
    task = tasks.Task(name="bare", title="SQL without tables", columns=("question",), target="answer", template="Ask: {question}\n",
                      metric="execution")
    monkeypatch.setitem(tasks.TASKS, "bare", task)
    assert sql_databases.query_runs(task.prompt({"question": "Which?"}), "SELECT nothing")


@pytest.mark.parametrize("name", ["sql", "detox", "instruct"])
def test_a_prompt_is_read_back(name):
    task = tasks.get_task(name)
    for row in practice_rows(name, "validation", 20):
        read = task.row(task.prompt(row))
        whole = all(row.get(column) for column in task.columns)  # else a line is left out
        assert read == ({column: row[column] for column in task.columns} if whole else None)
        assert task.row("x" + task.prompt(row)) is None
