"""How many wrong queries does the SQL score accept, and how many right ones does it reject? Queries with one thing changed, and
queries written in another way, are scored against the unchanged ones.

    python tests/benchmarks/sql_mutants.py [--data rows.jsonl.gz] [--rows 500] [--mutants 10] [--show 20] [--json result.json]

Each reference is changed in up to ten ways: a constant, a column, an operator, a condition left out, DISTINCT, an aggregate, the
order, LIMIT, AND or OR, a join. A change that scores as right has survived. It is not a fault of the score if it means the same:
where both queries have the same normal form, or return the same on 300 random databases of up to 200 rows. Changes and databases
are made here, by code of their own, not by the score's. A reference is also written in up to six other ways that mean the same (line
breaks, lower case, other aliases, operands swapped, comparisons and BETWEEN in other words): each must score as right. The rows are practice rows, or those of --data (fields: context, answer).
PYTHONPATH=<another checkout> judges that one's score.
"""

import argparse
import collections
import gzip
import json
import os
import random
import sqlite3
import sys
import time
from pathlib import Path

import sqlglot
from sqlglot import exp

if not os.environ.get("PYTHONPATH"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from helpers.evaluation import normalise_sql, sql_execution

COMPARED = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE)
AGGREGATES = (exp.Max, exp.Min, exp.Sum, exp.Avg, exp.Count)
WORDS = ["alpha", "beta", "Gamma", "7", "12", "x", ""]


def tables_of(context: str) -> dict[str, dict[str, bool]]:
    """Table -> column -> whether it holds numbers, names in lower case."""
    tables = {}
    for tree in sqlglot.parse(context, dialect="sqlite"):
        columns = tree.find_all(exp.ColumnDef)
        tables[tree.this.this.name.lower()] = {column.name.lower(): "INT" in column.sql().upper() for column in columns}
    return tables


# ---- ten ways to change a query: each changes the copied tree that it is given, and returns False where it finds nothing


def constant(tree, tables, rng):
    literals = [node for node in tree.find_all(exp.Literal) if not isinstance(node.parent, exp.Limit)]
    if not literals:
        return False
    literal = rng.choice(literals)
    if not literal.is_string:
        literal.replace(exp.Literal.number(float(literal.this) + rng.choice([-1, 1, 10]) if "." in literal.this
                                           else int(literal.this) + rng.choice([-1, 1, 10])))
        return True
    text = literal.this
    other = rng.choice([text + "x", "x" + text, text[:-1], text.swapcase(), "another", text.replace("%", "", 1)])
    literal.replace(exp.Literal.string(other))


def column(tree, tables, rng):
    found = []
    for node in tree.find_all(exp.Column):
        others = {name for columns in tables.values() if node.name.lower() in columns for name in columns} - {node.name.lower()}
        found += [(node, name) for name in sorted(others)]
    if not found:
        return False
    node, name = rng.choice(found)
    node.set("this", exp.to_identifier(name, quoted=True))


def operator(tree, tables, rng):
    nodes = list(tree.find_all(*COMPARED))
    if not nodes:
        return False
    node = rng.choice(nodes)
    kind = rng.choice([kind for kind in COMPARED if kind is not type(node)])
    node.replace(kind(this=node.this.copy(), expression=node.expression.copy()))


def condition(tree, tables, rng):
    """Leave out one condition: one side of an AND or OR, or all of a WHERE or HAVING."""
    nodes = [node for node in tree.find_all(exp.And, exp.Or, exp.Where, exp.Having) if node.find_ancestor(exp.Join) is None]
    if not nodes:
        return False
    node = rng.choice(nodes)
    if isinstance(node, exp.Connector):
        node.replace(rng.choice([node.left, node.right]).copy())
    else:
        node.pop()


def distinct(tree, tables, rng):
    node = rng.choice(list(tree.find_all(exp.Select, exp.Count)))
    if isinstance(node, exp.Select):
        node.set("distinct", None if node.args.get("distinct") else exp.Distinct())
    elif isinstance(node.this, exp.Distinct):
        node.set("this", node.this.expressions[0].copy())
    elif isinstance(node.this, exp.Star):
        return False
    else:
        node.set("this", exp.Distinct(expressions=[node.this.copy()]))


def aggregate(tree, tables, rng):
    nodes = [node for node in tree.find_all(*AGGREGATES) if not isinstance(node.this, exp.Star | exp.Distinct)]
    if not nodes:
        return False
    node = rng.choice(nodes)
    node.replace(rng.choice([kind for kind in AGGREGATES if kind is not type(node)])(this=node.this.copy()))


def direction(tree, tables, rng):
    nodes = list(tree.find_all(exp.Ordered))
    if not nodes:
        return False
    node = rng.choice(nodes)
    node.set("desc", not node.args.get("desc"))
    node.set("nulls_first", not node.args.get("desc"))  # SQLite's own place for them


def limit(tree, tables, rng):
    nodes = list(tree.find_all(exp.Limit))
    if not nodes:
        return False
    node = rng.choice(nodes)
    if rng.random() < 0.5:
        node.pop()
    else:
        node.set("expression", exp.Literal.number(int(node.expression.this) + rng.choice([1, 2])))


def connector(tree, tables, rng):
    nodes = list(tree.find_all(exp.And, exp.Or))
    if not nodes:
        return False
    node = rng.choice(nodes)
    node.replace((exp.Or if isinstance(node, exp.And) else exp.And)(this=node.this.copy(), expression=node.expression.copy()))


def join(tree, tables, rng):
    nodes = [node for node in tree.find_all(exp.Join) if node.args.get("on")]
    if not nodes:
        return False
    node = rng.choice(nodes)
    if rng.random() < 0.5:
        node.set("on", exp.true())
    else:
        node.set("side", None if node.side else "LEFT")


WAYS = (constant, column, operator, condition, distinct, aggregate, direction, limit, connector, join)


def mutants(query: str, context: str, rng: random.Random, most: int = 10) -> list[tuple[str, str]]:
    """(way, changed query), each text once; those that SQLite refuses are left out."""
    tree, tables = sqlglot.parse_one(query, dialect="sqlite"), tables_of(context)
    connection = sqlite3.connect(":memory:")
    connection.executescript(context)
    found = {tree.sql("sqlite"): None}
    for way in list(WAYS) * 3:
        copy = tree.copy()
        if len(found) > most or way(copy, tables, rng) is False:
            continue
        text = copy.sql("sqlite")
        try:
            connection.execute(text)
        except sqlite3.Error:
            continue
        found.setdefault(text, way.__name__)
    connection.close()
    return [(way, text) for text, way in found.items() if way]


# ---- six ways to write a query that mean the same


def pretty(tree):
    return tree.sql("sqlite", pretty=True)


def lower_case(tree):
    """All but texts and quoted names in lower case: keywords, names of columns and tables."""
    text = tree.sql("sqlite")
    for token in sqlglot.tokenize(text, read="sqlite"):
        if text[token.start] not in "'\"":
            text = text[:token.start] + text[token.start:token.end + 1].lower() + text[token.end + 1:]
    return text


def other_aliases(tree):
    names = {table.alias_or_name.lower() for table in tree.find_all(exp.Table)}
    for table in list(tree.find_all(exp.Table)):
        table.set("alias", exp.TableAlias(this=exp.to_identifier("z_" + table.alias_or_name.lower())))
    for node in tree.find_all(exp.Column):
        if node.table.lower() in names:
            node.set("table", exp.to_identifier("z_" + node.table.lower()))
    return tree.sql("sqlite")


def swapped(tree):
    """The operands of AND, OR and = in the other order."""
    for node in list(tree.find_all(exp.Connector, exp.EQ)):
        left, right = node.left.copy(), node.right.copy()
        precedence = isinstance(left, exp.Or) and isinstance(node, exp.And)
        node.set("this", right)
        node.set("expression", exp.Paren(this=left) if precedence or isinstance(left, exp.Connector) else left)
    return tree.sql("sqlite")


def negated(tree):
    opposite = {exp.GT: exp.LTE, exp.GTE: exp.LT, exp.LT: exp.GTE, exp.LTE: exp.GT, exp.EQ: exp.NEQ, exp.NEQ: exp.EQ}
    for node in list(tree.find_all(exp.GT, exp.GTE, exp.LT, exp.LTE)):
        other = opposite[type(node)](this=node.this.copy(), expression=node.expression.copy())
        node.replace(exp.Not(this=exp.Paren(this=other)))
    return tree.sql("sqlite")


def two_comparisons(tree):
    for node in list(tree.find_all(exp.Between)):
        low = exp.GTE(this=node.this.copy(), expression=node.args["low"].copy())
        high = exp.LTE(this=node.this.copy(), expression=node.args["high"].copy())
        node.replace(exp.Paren(this=exp.And(this=low, expression=high)))
    return tree.sql("sqlite")


REWRITES = (pretty, lower_case, other_aliases, swapped, negated, two_comparisons)


def rewrites(query: str) -> list[tuple[str, str]]:
    """(way, query that means the same), each text once."""
    tree = sqlglot.parse_one(query, dialect="sqlite")
    found = {query: None}
    for way in REWRITES:
        found.setdefault(way(tree.copy()), way.__name__)
    return [(way, text) for text, way in found.items() if way]


# ---- are two queries the same?


def literals_of(query: str) -> tuple[list, dict[str, list]]:
    tree = sqlglot.parse_one(query, dialect="sqlite")
    values, near = [], collections.defaultdict(list)
    for literal in tree.find_all(exp.Literal):
        if literal.is_string:
            text = literal.this.replace("%", "")
            some = [literal.this, text, text + "x", "x" + text, text[:-1], text[1:], text.upper(), text.lower(), "x" + text + "x"]
        else:
            number = float(literal.this) if "." in literal.this else int(literal.this)
            some = [number, number, number - 1, number + 1, number + 5, number * 10]
        values += some
        for node in literal.parent.find_all(exp.Column):
            near[node.name.lower()] += some
    return values, near


def database(tables: dict, context: str, queries: list[str], rows: int, seed: int) -> sqlite3.Connection:
    rng = random.Random(seed)
    connection = sqlite3.connect(":memory:")
    connection.executescript(context)
    read = [literals_of(query) for query in queries]
    rows = max(2, int(rows * rng.choice([0.05, 0.3, 1])))
    empty = rng.choice([0, 0, 0.05, 0.3])
    for table, columns in tables.items():
        filled = []
        for _ in range(rows):
            row = []
            for name, number in columns.items():
                own = [value for _, near in read for value in near[name]]
                anything = [value for values, _ in read for value in values]
                draw = rng.random()
                if draw < empty:
                    row.append(None)
                elif own and draw < 0.6:
                    row.append(rng.choice(own))
                elif anything and draw < 0.65:
                    row.append(rng.choice(anything))
                else:
                    row.append(rng.randint(-3, rng.choice([4, 30, 1000])) if number else rng.choice(WORDS))
            filled.append(row)
        filled += rng.choices(filled, k=rows // 5)
        connection.executemany(f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(columns))})', filled)
    return connection


def result(connection, query: str, ordered: bool):
    deadline = time.monotonic() + 2
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    rows = [tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
            for row in connection.execute(query).fetchmany(20_000)]
    return rows if ordered else collections.Counter(rows)


def means_the_same(query: str, reference: str, context: str, databases: int = 300) -> bool:
    """The same normal form, or the same result on every one of many random databases. One that takes too long for a query is
    passed over."""
    if normalise_sql(query) == normalise_sql(reference):
        return True
    tables = tables_of(context)
    ordered = sqlglot.parse_one(reference, dialect="sqlite").args.get("order") is not None
    rows = {1: 200, 2: 60}.get(len(list(sqlglot.parse_one(reference, dialect="sqlite").find_all(exp.Table))), 20)
    for seed in range(databases):
        connection = database(tables, context, [reference, query], rows, seed)
        try:
            if result(connection, query, ordered) != result(connection, reference, ordered):
                return False
        except sqlite3.OperationalError:
            continue
        finally:
            connection.close()
    return True


def judge(rows: list[dict[str, str]], seed: int = 0, most: int = 10) -> dict:
    """Counts of mutants and survivors, in all and by way, the survivors that do not mean the same, the right that are rejected."""
    ways, survivors, undecidable, refused, seconds, alone = collections.Counter(), [], 0, 0, 0.0, 0.0
    equal, right, rejected = collections.Counter(), collections.Counter(), []
    for number, row in enumerate(rows):
        rng = random.Random(f"{seed}/{number}")
        reference, context = row["answer"], row["context"]
        started = time.perf_counter()
        try:
            same, _ = sql_execution(reference, reference, context)
        except sqlite3.Error:
            refused += 1
            continue
        alone += time.perf_counter() - started
        if same is None:
            undecidable += 1
            continue
        for way, query in rewrites(reference):
            right[way] += 1
            if sql_execution(query, reference, context) != (True, True):
                rejected.append({"way": way, "reference": reference, "mutant": query, "context": context})
        for way, query in mutants(reference, context, rng, most):
            started = time.perf_counter()
            accepted = sql_execution(query, reference, context)[0]
            seconds += time.perf_counter() - started
            ways[way] += 1
            if accepted and means_the_same(query, reference, context):
                equal[way] += 1
            elif accepted:
                survivors.append({"way": way, "reference": reference, "mutant": query, "context": context})
    wrong = sum(ways.values()) - sum(equal.values())
    by_way = collections.Counter(one["way"] for one in survivors)
    return {"rows": len(rows), "undecidable": undecidable, "reference does not run": refused, "mutants": sum(ways.values()),
            "mean the same": sum(equal.values()), "wrong but accepted": len(survivors),
            "share of the wrong that is accepted": round(len(survivors) / max(1, wrong), 5),
                "right": sum(right.values()), "right but rejected": len(rejected),
            "milliseconds for a row's first answer": round(1000 * alone / max(1, len(rows)), 2),
            "milliseconds for each further answer": round(1000 * seconds / max(1, sum(ways.values())), 2),
            "by way (wrong, accepted)": {way: [ways[way] - equal[way], by_way[way]] for way in sorted(ways)},
            "survivors": survivors, "rejected": rejected}


def load(path: str | None, count: int, seed: int) -> list[dict[str, str]]:
    if path is None:
        from make_practice import practice_rows

        return practice_rows("sql", "validation", count)
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return random.Random(seed).sample(rows, min(count, len(rows)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a .jsonl or .jsonl.gz file; default: practice rows")
    parser.add_argument("--source", help="only rows whose field source says this")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--mutants", type=int, default=10, help="at most, of each query")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print so many of the wrong that were accepted, and of the right that were rejected")
    parser.add_argument("--json", type=Path, help="write the counts there")
    arguments = parser.parse_args()
    found = load(arguments.data, 10**9 if arguments.source else arguments.rows, arguments.seed)
    if arguments.source:
        found = [row for row in found if row.get("source") == arguments.source][:arguments.rows]
    counts = judge(found, arguments.seed, arguments.mutants)
    for kind in ("survivors", "rejected"):
        for found in counts.pop(kind)[:arguments.show]:
            print(f"{kind}: {found['way']}\n  {found['reference']}\n  {found['mutant']}\n  {found['context'][:200]}")
    print(json.dumps(counts, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
