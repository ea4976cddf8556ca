"""Small random databases in memory that tell SQL queries apart, and running a stranger's SQL."""

import contextlib
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from sqlglot import exp

from helpers.sql_queries import Columns, conditions, parse
from helpers.tasks import TASKS

READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
                   sqlite3.SQLITE_RECURSIVE})
MAKES = READS | {sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX,
                 sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_INSERT,
                 sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_REINDEX}
_FORBIDDEN = {"load_extension", "randomblob", "zeroblob", "random"}
_SLOW = {"printf", "format"}  # one call can take a minute; a table needs none
_NUMBERS = ("INT", "REAL", "FLOA", "DOUB", "NUM", "DEC", "BOOL")
_TEXTS = ("1", "2", "3", "5", "12", "alpha", "beta", "gamma", "delta")
_COLUMNS = """SELECT m.type, m.name, c.name, c.type, c.hidden
    FROM sqlite_master AS m, pragma_table_xinfo(m.name) AS c
    WHERE m.type IN ('table', 'view') AND m.name NOT GLOB 'sqlite_*'"""


@dataclass(frozen=True)
class Schema:
    """tables: name -> its columns that can be written, as (name in lower case, is a number);
    columns: every column, of views too."""

    context: str
    tables: dict[str, list[tuple[str, bool]]]
    columns: Columns


@dataclass
class Values:
    """What queries compare columns with: values that meet a condition on a column (good) or miss it
    closely (near), whole numbers beside no column (counts), columns beside columns (keys)."""

    good: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    near: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    counts: list[int] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


@contextlib.contextmanager
def limits(connection: sqlite3.Connection, seconds: float,
           allowed: frozenset[int] = READS) -> Iterator[None]:
    """For a with block: a stranger's SQL can only read (or do what is allowed), for so many seconds
    of CPU time. Raises sqlite3.Error for whatever is wrong, forbidden or too slow."""
    forbidden = _FORBIDDEN if allowed is READS else _FORBIDDEN | _SLOW

    def authorise(action, first, second, database, trigger):
        if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in forbidden:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

    deadline = time.thread_time() + seconds
    connection.set_authorizer(authorise)
    connection.set_progress_handler(lambda: time.thread_time() > deadline, 1000)
    # The deadline is looked at between operations, and one on long texts can take minutes.
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200)
    try:
        yield
    except (sqlite3.Warning, ValueError) as error:  # several statements at once; a NUL character
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)


def run_sql(connection: sqlite3.Connection, query: str, seconds: float = 1.0, max_rows: int = 1000):
    """(column names, at most `max_rows` rows) of a model's query, which can only read. Raises
    sqlite3.Error when it is wrong, forbidden or too slow."""
    with limits(connection, seconds):
        cursor = connection.execute(query)
        if cursor.description is None:
            raise sqlite3.ProgrammingError("the text is not a query")
        return [column[0] for column in cursor.description], cursor.fetchmany(max_rows)


def query_runs(prompt: str, text: str) -> bool:
    """Whether an answer runs on a small database with the tables of its prompt, as in
    execution-guided decoding (Wang and others, arXiv:1807.03100). True where no SQL was asked."""
    for task in TASKS.values():
        row = task.row(prompt) if task.metric == "execution" else None
        try:
            if row and "context" in row:  # else its tables are not in the prompt
                [connection] = fill_databases(row["context"], [], 1)
                with contextlib.closing(connection):
                    run_sql(connection, task.answer(text), max_rows=1)
        except sqlite3.Error:
            return False
    return True


@lru_cache(maxsize=1024)
def read_schema(context: str) -> Schema:
    """The tables and views that a context makes. Raises sqlite3.Error when it does more."""
    with contextlib.closing(_make(context)) as connection:
        found = connection.execute(_COLUMNS).fetchall()
    tables, columns = {}, {}
    for kind, table, name, declared, hidden in found:
        if kind == "table" and not hidden:  # hidden: a generated column
            is_number = any(word in declared.upper() for word in _NUMBERS)
            tables.setdefault(table, []).append((name.lower(), is_number))
        others = [row[2] for row in found if row[1] == table and row[2] != name]
        columns[name.lower()] = list(dict.fromkeys(columns.get(name.lower(), []) + others))
    return Schema(context, tables, columns)


def values_of(schema: Schema, queries: list[str]) -> Values:
    """What queries and CHECKs compare columns with; columns of one name count as one."""
    values, names = Values(), frozenset(schema.columns)
    checks = [schema.context] if "check" in schema.context.lower() else []
    for tree in (tree for text in queries + checks for tree in parse(text, names)):
        for columns, value, good, near in conditions(tree):
            for column in columns:
                values.good[column] += good
                values.near[column] += near
            if not columns and isinstance(value, int):
                values.counts.append(value)
        for equal in tree.find_all(exp.EQ):
            if isinstance(equal.left, exp.Column) and isinstance(equal.right, exp.Column):
                values.keys |= {equal.left.name.lower(), equal.right.name.lower()}
    return values


def fill(schema: Schema, values: Values, index: int, rows: int = 24,
         nulls: float = 0.0) -> sqlite3.Connection:
    """A database with `rows` random rows in each table, less those that a constraint refuses.
    index: its seed; nulls: the share of empty cells. Raises sqlite3.Error beyond a second of CPU
    time."""
    rng = random.Random(f"0/{index}")
    connection = _make(schema.context)
    deadline = time.thread_time() + 1
    with limits(connection, 1, MAKES):
        for table, columns in schema.tables.items():
            name = exp.to_identifier(table, quoted=True).sql("sqlite")
            insert = f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})"
            for row in _rows(rng, columns, values, rows, nulls):
                if time.thread_time() > deadline:
                    raise sqlite3.OperationalError("its rows take too long to check")
                with contextlib.suppress(sqlite3.Error, ValueError):  # half a surrogate pair
                    connection.execute(insert, row)
    return connection


def fill_databases(context: str, queries: list[str],
                   databases: int = 6) -> list[sqlite3.Connection]:
    """Random databases with the context's tables, built to tell the queries apart; every second one
    has empty cells. Raises sqlite3.Error when the context does more than make tables, views and
    indexes."""
    schema = read_schema(context)
    values = values_of(schema, queries)
    return [fill(schema, values, index, nulls=0.1 * (index % 2)) for index in range(databases)]


def _make(context: str) -> sqlite3.Connection:
    """Run a row's context, a stranger's SQL: it can make tables, views and indexes of 8 MB."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA max_page_count = 2000")
    with limits(connection, 1, MAKES):
        connection.executescript(context)
    return connection


def _rows(rng: random.Random, columns: list[tuple[str, bool]], values: Values, rows: int,
          nulls: float) -> list[list]:
    """Random rows that meet all, most or few conditions; some twice, for a missing DISTINCT."""
    others, key_top = [], rng.choice((rows // 4, rows // 2, rows))
    for name, is_number in columns:
        top = key_top if name in values.keys else rng.choice((0, 2, 9, 60))
        numbers = is_number or top > 9 or name in values.keys
        others.append(range(1, top + 2) if numbers else _TEXTS[:top + 1])
    made = []
    for _ in range(rows - rows // 4):
        share, row = rng.choice((1, 0.8, 0.3)), []
        for (name, _), pool in zip(columns, others, strict=True):
            if rng.random() < nulls:
                pool = (None,)
            elif values.good[name] and rng.random() < share:
                pool = values.good[name]
            elif values.near[name] and rng.random() < 0.7:
                pool = values.near[name]
            row.append(rng.choice(pool))
        made.append(row)
    return made + rng.choices(made, k=rows // 4)
