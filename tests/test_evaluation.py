"""The metrics: right where they must be, not fooled where a naive one would be, and safe with a model's SQL."""

import sqlite3
import time

import pytest
from make_practice import practice_rows

from helpers import evaluation as ev

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
    assert ev.bootstrap([1.0] * 5) == ev.Estimate(1.0, 1.0, 1.0, 5)
    with pytest.raises(ValueError):
        ev.bootstrap([])


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
