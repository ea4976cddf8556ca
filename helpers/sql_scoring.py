"""SQL answers: exact match after normalisation, and execution on databases that tell them apart."""

from __future__ import annotations

import logging
import random
import re
import sqlite3
import time
from collections import Counter

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

# That a model's text is no query is a score, not a warning.
logging.getLogger("sqlglot").setLevel(logging.ERROR)


def normalise_sql(query: str) -> str | None:
    """The query in one spelling (case of keywords and names, spacing), or None when it does not
    parse."""
    try:
        tree = sqlglot.parse_one(query, dialect="sqlite")
        for identifier in tree.find_all(exp.Identifier):
            identifier.set("quoted", False)  # "name" and name are the same column
        return normalize_identifiers(tree, dialect="sqlite").sql(dialect="sqlite", comments=False)
    except (SqlglotError, RecursionError, ValueError):
        return None


def sql_exact(answer: str, reference: str) -> bool:
    """Whether two queries are the same after normalisation."""
    normal = normalise_sql(answer)
    return normal is not None and normal == normalise_sql(reference)


_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
          sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "randomblob", "zeroblob", "random"}


def run_sql(connection: sqlite3.Connection, query: str, seconds: float = 1.0, max_rows: int = 1000):
    """Run one query of a model: it can only read, for a limited time, and returns at most
    `max_rows` rows.

    Returns ``(column names, rows)``. Raises sqlite3.Error when the query is wrong, forbidden or too
    slow.
    """

    def authorise(action, first, second, database, trigger):
        if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN_FUNCTIONS:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY

    deadline = time.monotonic() + seconds
    connection.set_authorizer(authorise)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    # The deadline is looked at between SQLite's operations. One operation on long texts (instr,
    # LIKE) can take minutes, and a thousand rows of them a gigabyte: so no text beyond 50 kB, and
    # no pattern beyond 200 characters.
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200)
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            raise sqlite3.ProgrammingError("the text is not a query")
        rows = cursor.fetchmany(max_rows)
        return [column[0] for column in cursor.description], rows
    except (sqlite3.Warning, ValueError) as error:  # several statements at once; a NUL character
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)


def _schema(context: str) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Tables of a context as (name, [(column, is a number)])."""
    tables = []
    for tree in sqlglot.parse(context, dialect="sqlite"):
        if isinstance(tree, exp.Create):
            numeric = ("INT", "REAL", "NUM", "FLOAT", "DOUB", "DEC")
            columns = []
            for column in tree.find_all(exp.ColumnDef):
                kind = column.args.get("kind")
                columns.append((column.name, bool(kind) and kind.sql().upper().startswith(numeric)))
            tables.append((tree.this.this.name, columns))
    return tables


def _literals(query: str) -> tuple[list[str], list[float], dict[str, list]]:
    """Text and number literals of a query, and the literals that each column is compared with."""
    try:
        tree = sqlglot.parse_one(query, dialect="sqlite")
    except (SqlglotError, RecursionError, ValueError):
        return [], [], {}
    compared: dict[str, list] = {}
    for comparison in tree.find_all(exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Like,
                                    exp.Between, exp.In):
        columns = [column.name.lower() for column in comparison.find_all(exp.Column)]
        for literal in comparison.find_all(exp.Literal):
            for column in columns:
                compared.setdefault(column, []).append(_literal_value(literal))
    values = [_literal_value(literal) for literal in tree.find_all(exp.Literal)]
    texts = [value for value in values if isinstance(value, str)]
    return texts, [value for value in values if not isinstance(value, str)], compared


def _literal_value(literal):
    if literal.is_string:
        return literal.this.replace("%", "").strip() or "x"
    try:
        number = int(literal.this)
    except ValueError:
        number = float(literal.this)
    return number if -(2**62) < number < 2**62 else float(number)  # SQLite's integers have 64 bits


_MAKES = {sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_TRANSACTION,
          sqlite3.SQLITE_READ, sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE}


def _make_tables(connection: sqlite3.Connection, context: str) -> None:
    """Run a row's context, which may come from anywhere: it can make tables in this database and do
    nothing else."""
    deadline = time.monotonic() + 1
    connection.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in _MAKES else sqlite3.SQLITE_DENY)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    try:
        connection.executescript(context)
    except ValueError as error:  # a NUL character
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)


def fill_databases(context: str, queries: list[str], seed: int = 0, databases: int = 6,
                   rows: int = 24) -> list[sqlite3.Connection]:
    """Random in-memory databases with the context's tables, built to tell the queries apart.

    A column that a query compares with a value holds that value in about a third of the rows (so
    that every condition is met by some rows and missed by others, alone and together), neighbours
    of it (one more, one less, another case), and values used for other columns. Keys are drawn from
    a small range, so that joins meet.
    Raises sqlite3.Error or sqlglot's error when the context is not a list of CREATE TABLE
    statements.
    """
    tables = _schema(context)
    texts: list[str] = []
    numbers: list[float] = []
    compared: dict[str, list] = {}
    for query in queries:
        found_texts, found_numbers, found = _literals(query)
        texts += found_texts
        numbers += found_numbers
        for column, values in found.items():
            compared.setdefault(column, []).extend(values)
    connections = []
    for index in range(databases):
        rng = random.Random(f"{seed}/{index}")
        connection = sqlite3.connect(":memory:")
        _make_tables(connection, context)
        for table, columns in tables:
            count = rng.randint(rows // 3, rows) if index else rows
            marks = ", ".join("?" * len(columns))
            chosen = []
            for _ in range(count):
                chosen.append([_random_value(rng, name.lower(), number, compared, texts, numbers)
                               for name, number in columns])
            chosen += rng.choices(chosen, k=count // 2)  # twice: shows a missing DISTINCT
            connection.executemany(f'INSERT INTO "{table}" VALUES ({marks})', chosen)
        connections.append(connection)
    return connections


def _random_value(rng: random.Random, column: str, number: bool, compared, texts, numbers):
    own = compared.get(column, [])
    if own and rng.random() < 0.55:
        return rng.choice(own)
    if own and rng.random() < 0.4:
        value = rng.choice(own)
        if isinstance(value, str):
            return rng.choice([value.upper(), value.lower(), value + "s"])
        return value + rng.choice([-1, 1])
    if number:
        return rng.choice(numbers) if numbers and rng.random() < 0.15 else rng.randint(1, 9)
    if texts and rng.random() < 0.15:
        return rng.choice(texts)
    return rng.choice(["1", "2", "3", "alpha", "beta", "gamma", "delta", "12", "5"])


def sql_execution(answer: str, reference: str, context: str, seed: int = 0) -> tuple[bool, bool]:
    """Whether two queries return the same on every test database.

    Results are compared as multisets of rows, and in order when the reference orders its rows;
    column names don't count.
    Returns ``(same, valid)``; valid: the answer ran on all databases. Raises sqlite3.Error when the
    reference itself does not run.
    """
    same, valid = True, True
    ordered = re.search(r"\border\s+by\b", reference, re.IGNORECASE) is not None
    for connection in fill_databases(context, [reference, answer], seed):
        try:
            _, expected = run_sql(connection, reference)
            try:
                _, got = run_sql(connection, answer)
            except sqlite3.Error:
                same = valid = False
                break
            if ordered:
                same = same and got == expected
            else:
                same = same and Counter(map(repr, got)) == Counter(map(repr, expected))
        finally:
            connection.close()
    return same, valid
