"""A query as sqlglot's tree: its spelling, the values that it compares columns with, its edits."""

import logging
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from operator import eq, ge, gt, le, lt, ne

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

Columns = dict[str, list[str]]  # a column's name in lower case -> the other columns of its tables

_number, _text = exp.Literal.number, exp.Literal.string
_COMPARISONS = {
    exp.EQ: eq, exp.Is: eq, exp.In: eq, exp.Between: eq, exp.NEQ: ne, exp.GT: gt, exp.GTE: ge,
    exp.LT: lt, exp.LTE: le, exp.Like: eq, exp.Glob: eq}
_AGGREGATES = (exp.Count, exp.Max, exp.Min, exp.Sum, exp.Avg)
# A change that leaves a query as right as it was is rare among these, less rare among the others.
_OPPOSITE = {exp.EQ: exp.NEQ, exp.NEQ: exp.EQ, exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LT,
             exp.LTE: exp.GT}
_OTHERS = {
    exp.EQ: (exp.GTE, exp.LTE), exp.GT: (exp.GTE,), exp.GTE: (exp.GT,), exp.LT: (exp.LTE,),
    exp.LTE: (exp.LT,), exp.And: (exp.Or,), exp.Or: (exp.And,), exp.Add: (exp.Sub,),
    exp.Sub: (exp.Add,), exp.Mul: (exp.Div,), exp.Div: (exp.Mul,), exp.Union: (exp.Intersect,),
    exp.Intersect: (exp.Union, exp.Except), exp.Except: (exp.Union, exp.Intersect),
    exp.Glob: (exp.Like,)}

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # no query: a score, not a warning


@lru_cache(maxsize=64)  # a row's queries are looked at several times
def parse(text: str, columns: frozenset[str] = frozenset()) -> tuple[exp.Expression, ...]:
    """The trees of a text's statements, for all callers: change a copy. () if it does not parse.
    columns: those of the tables; another name in double quotes is a text then, as for SQLite."""
    try:
        trees = tuple(tree for tree in sqlglot.parse(text, dialect="sqlite") if tree)
    except (SqlglotError, RecursionError, ValueError):
        return ()
    for tree in trees if columns else ():
        known = {*columns, *(alias.alias.lower() for alias in tree.find_all(exp.Alias))}
        for column in list(tree.find_all(exp.Column)):
            quoted = column.this.args.get("quoted") and not column.table
            if quoted and column.name.lower() not in known:
                column.replace(_text(column.name))
    return trees


def normalise_sql(query: str, columns: Iterable[str] = ()) -> str | None:
    """The query in one spelling, or None when it is not one statement that parses. columns: see
    parse()."""
    if len(trees := parse(query, frozenset(columns))) != 1:
        return None
    tree = trees[0].copy()
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("quoted", False)  # "name" and name are the same column
    return normalize_identifiers(tree, dialect="sqlite").sql("sqlite", copy=False, comments=False)


def conditions(tree: exp.Expression) -> Iterator[tuple[set[str], object, list, list]]:
    """Every constant of a query or of a table's CHECK: (columns that it is compared with, its
    value, values that meet that condition, values that miss it closely)."""
    for node in tree.find_all(exp.Literal, exp.Null):
        place, value = node.find_ancestor(*_COMPARISONS, exp.Select), _value(node)
        if isinstance(node.parent, exp.Neg) and isinstance(value, int | float):
            value = -value
        if not isinstance(place, tuple(_COMPARISONS)) or place.find(exp.Count):
            yield set(), value, [], []  # a number of rows, or beside no column
            continue
        compare = eq if value is None else _COMPARISONS[type(place)]
        negated = isinstance(place.parent, exp.Not) or bool(place.args.get("negate"))
        beside = _beside(value)
        pattern = isinstance(place, exp.Like | exp.Glob)
        met = beside[1:3] if pattern else [one for one in beside if compare(one, value)]
        good = [other for other in beside if (other in met) != negated]
        near = [other for other in beside if (other in met) == negated]
        yield {column.name.lower() for column in place.find_all(exp.Column)}, value, good, near


def edits(tree: exp.Expression, columns: Columns) -> dict[str, bool]:
    """The query with one thing changed, as {edit: whether it means something else all but
    certainly}; some do not run."""
    root, gap = exp.Paren(this=tree.copy()), exp.var("\0")  # no query has that character
    write = sqlglot.Dialect.get_or_raise("sqlite").generator().generate
    found: dict[str, bool] = {}
    for node in list(root.this.walk()):
        changes = [(True, new) for new in _sure(node)]
        changes += [(False, new) for new in _unsure(node, columns)]
        if changes:
            node.replace(gap)
            before, after = write(root.this, copy=False).split("\0")
            gap.replace(node)
        for certain, new in changes:
            query = before + write(new, copy=False) + after
            found[query] = certain or found.get(query, False)
    found.pop(write(root.this, copy=False), None)
    return found


def _value(node: exp.Expression) -> object:
    """A constant in Python; SQLite's integers have 64 bits."""
    if isinstance(node, exp.Null):
        return None
    if node.is_string:
        return node.this
    number = float(node.this)
    return int(node.this) if node.this.isdigit() and number < 2**62 else number


def _beside(value) -> list:
    """A constant and what differs little; after a text stand two that it matches as a pattern."""
    if value is None:
        return [None, "", 0]
    if not isinstance(value, str):
        return [value, value - 1, value + 1]
    plain, filled = (re.sub("[%*]", other, re.sub("[_?]", "q", value)) for other in ("", "x"))
    return [value, plain, filled, plain.swapcase(), plain[:-1], plain[1:], plain + "s",
            "x" + plain, f"x{plain}x"]


def _sure(node: exp.Expression) -> Iterator[exp.Expression]:
    """Another constant, the opposite operator, a condition that is always or never met."""
    if isinstance(node, exp.Literal) and not isinstance(node.parent, exp.Limit):
        yield _text(node.this + "s") if node.is_string else _number(_value(node) + 1)
    if type(node) in _OPPOSITE:
        yield _OPPOSITE[type(node)](**node.copy().args)
    conditional = isinstance(node.parent, exp.Where | exp.Having | exp.And | exp.Or)
    if (conditional or node.arg_key == "on") and not isinstance(node, exp.Literal | exp.Boolean):
        yield from (_number(1), _number(0))


def _unsure(node: exp.Expression, columns: Columns) -> Iterator[exp.Expression]:
    """What else can stand in a node's place."""
    kind = type(node)
    if kind is exp.Literal and node.is_string:
        text = node.this
        yield from map(_text, (text.swapcase(), text[:-1], text.lstrip("%"), text.rstrip("%")))
    elif kind is exp.Literal:
        yield from (_number(_value(node) - 1), _number(_value(node) + 1))
    elif kind is exp.Column:
        for name in columns.get(node.name.lower(), ()):
            yield _changed(node, "this", exp.to_identifier(name, quoted=True))
    elif kind in _AGGREGATES:
        yield from (other(this=node.this.copy()) for other in _AGGREGATES)
        if isinstance(node.this, exp.Column) and kind in (exp.Count, exp.Avg):
            yield kind(this=exp.Distinct(expressions=[node.this.copy()]))
            rows, total = exp.Count(this=exp.Star()), exp.Sum(this=node.this.copy())
            yield rows if kind is exp.Count else exp.Div(this=total, expression=rows)
    elif kind is exp.Distinct and isinstance(node.parent, _AGGREGATES):
        yield node.expressions[0]
    elif kind is exp.Is:
        yield exp.EQ(this=node.this.copy(), expression=_text(""))
    elif kind is exp.Ordered:
        down = bool(node.args.get("desc"))
        yield exp.Ordered(this=node.this.copy(), desc=not down, nulls_first=down)
    elif isinstance(node, exp.Select | exp.SetOperation):
        yield from _other_clauses(node)
    for other in _OTHERS.get(kind, ()):
        yield other(**node.copy().args)


def _other_clauses(query: exp.Query) -> Iterator[exp.Query]:
    """DISTINCT more or less, no order, a sort key less, no limit, a join of another kind."""
    distinct, order, joins = (query.args.get(key) for key in ("distinct", "order", "joins"))
    is_whole = isinstance(query.parent, exp.Paren) and not query.find(exp.Group, exp.AggFunc)
    other = exp.Distinct() if is_whole and not distinct else None
    if isinstance(query, exp.Union):
        other = not distinct
    for key, value in (("distinct", other), ("order", None), ("limit", None)):
        yield _changed(query, key, value)
    for i in range(len(order.expressions) if order else 0):
        yield _changed(query, "order", _changed(order, "expressions", None, i))
    for i, join in enumerate(joins or ()):
        yield _changed(query, "joins", _changed(join, "side", None if join.side else "LEFT"), i)


def _changed(node: exp.Expression, key: str, value, index: int | None = None) -> exp.Expression:
    other = node.copy()
    other.set(key, value, index)
    return other
