"""SQL answers: exact match, and execution on databases that tell a reference from its edits."""

import contextlib
import sqlite3
import time
from collections import Counter
from functools import lru_cache

from helpers.sql_databases import Schema, Values, fill, limits, read_schema, run_sql, values_of
from helpers.sql_queries import edits, normalise_sql, parse

MOST_ROWS = 5000  # of a result that is compared
# Of a database: rows, rows per number that the reference counts to, share of empty cells; in turn.
_SHAPES = ((24, 1.3, 0.0), (9, 2, 0.1), (16, 1, 0.0), (4, 1, 0.0), (24, 3, 0.1), (9, 1, 0.0),
           (16, 2, 0.3), (4, 0, 0.0))
# Databases for a reference: at least; while an edit lives; while one lives that must not.
_FEWEST, _MORE, _MOST = 3, 12, 32
_STEPS = 30_000  # of SQLite, that an edit may take: unlike time, the same on every machine


def sql_exact(answer: str, reference: str, context: str = "") -> bool:
    """Whether two queries are the same after normalisation."""
    columns = read_schema(context).columns if context else ()
    normal = normalise_sql(answer, columns)
    return normal is not None and normal == normalise_sql(reference, columns)


def sql_execution(answer: str, reference: str, context: str) -> tuple[bool | None, bool]:
    """``(same, valid)``: whether two queries return the same on every test database, and whether
    the answer ran on all.

    Rows are compared as a multiset, or in order when the reference as a whole orders them; column
    names don't count. same is None, whatever the answer, when the databases cannot tell the
    reference from its single edits. Raises sqlite3.Error when the reference itself does not run.
    """
    indices, ordered, decidable = _choose(reference, context)
    schema = read_schema(context)
    own, both = values_of(schema, [reference]), values_of(schema, [reference, answer])
    plans = [(own, index) for index in indices] + [(both, -1 - index) for index in range(_FEWEST)]
    same = True
    for values, index in plans:
        with contextlib.closing(_database(schema, values, index)) as connection:
            _, expected = run_sql(connection, reference, max_rows=MOST_ROWS)
            try:
                _, got = run_sql(connection, answer, max_rows=MOST_ROWS)
            except sqlite3.Error:
                return (False if decidable else None), False
            same = same and same_rows(got, expected, ordered)
    return (same if decidable else None), True


def same_rows(a: list[tuple], b: list[tuple], ordered: bool) -> bool:
    """Whether two results are equal, with fractions to ten digits."""
    if a == b:
        return True
    a, b = ([tuple(float(f"{value:.10g}") if isinstance(value, float) else value for value in row)
             for row in rows] for rows in (a, b))
    return a == b if ordered else Counter(a) == Counter(b)


@lru_cache(maxsize=4096)
def _choose(reference: str, context: str) -> tuple[tuple[int, ...], bool, bool]:
    """(numbers of the databases that tell a reference from its single edits, whether the order of
    its rows counts, whether all edits are told).

    An edit that no database shows may mean the same, as LEFT JOIN before a WHERE does: only one
    that all but certainly does not makes it undecidable, and that sqlglot cannot parse it."""
    schema = read_schema(context)
    values, trees = values_of(schema, [reference]), parse(reference, frozenset(schema.columns))
    ordered = bool(trees and trees[0].args.get("order"))
    alive = edits(trees[0], schema.columns) if trees else {reference: True}
    alive["SELECT 1 WHERE 0"] = True
    chosen, deadline = [], time.monotonic() + 10
    for index in range(_MOST):
        with contextlib.closing(_database(schema, values, index)) as connection:
            _, expected = run_sql(connection, reference, max_rows=MOST_ROWS)
            left = _alike(connection, alive, expected, ordered)
        if index < _FEWEST or len(left) < len(alive):
            chosen.append(index)
        alive = left
        enough = _MORE if alive else _FEWEST
        if index + 1 >= enough and not any(alive.values()) or time.monotonic() > deadline:
            break
    return tuple(chosen), ordered, not any(alive.values())


def _database(schema: Schema, values: Values, index: int) -> sqlite3.Connection:
    fewest, per_count, nulls = _SHAPES[index % len(_SHAPES)]
    count = max((number for number in values.counts if number <= 100), default=0)
    rows = max(fewest, int(per_count * count) + index % 2)
    return fill(schema, values, index, rows, nulls)


def _alike(connection: sqlite3.Connection, queries: dict[str, bool], expected: list[tuple],
           ordered: bool) -> dict[str, bool]:
    """Those of the queries that return what is expected, or take too many steps to tell."""
    left = {}
    with limits(connection, 60):
        connection.set_progress_handler(lambda: True, _STEPS)
        for query, certain in queries.items():
            try:
                same = same_rows(connection.execute(query).fetchmany(MOST_ROWS), expected, ordered)
            except sqlite3.Error as error:
                same = error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT
            if same:
                left[query] = certain
    return left
