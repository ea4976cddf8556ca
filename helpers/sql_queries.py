"""A query as sqlglot's tree: its spelling, the values that it compares columns with, its edits."""

import logging
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from operator import eq, ge, gt, le, lt, ne

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

Columns = dict[str, list[str]]  # a column's name in lower case -> the other columns of its tables
Condition = tuple[set[str], object, Callable]  # columns, value, whether another value meets it
Change = tuple[exp.Expression, str, object, bool]  # node, argument, its new value, see edits()

_PATTERN = str.maketrans("%_", "*?")
_COMPARISONS = {
    exp.EQ: eq, exp.Is: eq, exp.In: eq, exp.NEQ: ne, exp.GT: gt, exp.GTE: ge, exp.LT: lt,
    exp.LTE: le, exp.Between: eq, exp.Glob: fnmatchcase,
    exp.Like: lambda text, like: fnmatchcase(text.lower(), like.lower().translate(_PATTERN))}
_AGGREGATES = (exp.Count, exp.Max, exp.Min, exp.Sum, exp.Avg)
# A change that leaves a query as right as it was is rare among these ...
_OPPOSITE = {exp.EQ: exp.NEQ, exp.NEQ: exp.EQ, exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LT,
             exp.LTE: exp.GT}
# ... and less rare among these.
_OTHERS = {
    exp.EQ: (exp.GTE, exp.LTE), exp.GT: (exp.GTE,), exp.GTE: (exp.GT,), exp.LT: (exp.LTE,),
    exp.LTE: (exp.LT,), exp.And: (exp.Or,), exp.Or: (exp.And,), exp.Add: (exp.Sub,),
    exp.Sub: (exp.Add,), exp.Mul: (exp.Div,), exp.Div: (exp.Mul,), exp.Union: (exp.Intersect,),
    exp.Intersect: (exp.Union, exp.Except), exp.Except: (exp.Union, exp.Intersect)}

# That a model's text is no query is a score, not a warning.
logging.getLogger("sqlglot").setLevel(logging.ERROR)


def parse(text: str, columns: Iterable[str] = ()) -> list[exp.Expression]:
    """The trees of a text's statements; [] when it does not parse.

    columns: those of the tables; if given, another name in double quotes is a text, as for SQLite.
    """
    try:
        trees = [tree for tree in sqlglot.parse(text, dialect="sqlite") if tree]
    except (SqlglotError, RecursionError, ValueError):
        return []
    for tree in trees if columns else ():
        known = {*columns, *(alias.alias.lower() for alias in tree.find_all(exp.Alias))}
        for column in list(tree.find_all(exp.Column)):
            quoted = column.this.args.get("quoted") and not column.table
            if quoted and column.name.lower() not in known:
                column.replace(exp.Literal.string(column.name))
    return trees


def normalise_sql(query: str, columns: Columns | None = None) -> str | None:
    """The query in one spelling (case of keywords and names, spacing, quotes), or None when it is
    not one statement that parses. columns: see parse()."""
    trees = parse(query, columns or ())
    if len(trees) != 1:
        return None
    for identifier in trees[0].find_all(exp.Identifier):
        identifier.set("quoted", False)  # "name" and name are the same column
    return normalize_identifiers(trees[0], dialect="sqlite").sql("sqlite", comments=False)


def conditions(tree: exp.Expression) -> Iterator[Condition]:
    """Every constant of a query or of a table's CHECK, and the columns that it is compared with."""
    for node in tree.find_all(exp.Literal, exp.Null):
        place = node.find_ancestor(*_COMPARISONS, exp.Select)
        value = _value(node)
        if isinstance(node.parent, exp.Neg) and isinstance(value, int | float):
            node, value = node.parent, -value
        if not isinstance(place, tuple(_COMPARISONS)) or place.find(exp.Count):
            yield set(), value, eq
            continue
        compare = {"low": ge, "high": le}.get(node.arg_key, _COMPARISONS[type(place)])
        if value is None:
            compare = eq
        elif isinstance(place, exp.Like | exp.Glob):
            value = str(value)
        negated = isinstance(place.parent, exp.Not) or bool(place.args.get("negate"))
        columns = {column.name.lower() for column in place.find_all(exp.Column)}
        yield columns, value, partial(_meets, compare, value, node is place.this, negated)


def edits(tree: exp.Expression, columns: Columns) -> dict[str, bool]:
    """The query with one thing changed, for each thing: a constant, a column, an operator, a
    condition, DISTINCT, an aggregate, the order, the limit, a join.

    Some of them do not run. Returns {edit: whether a change of meaning is all but certain}.
    """
    root = exp.Paren(this=tree)
    found: dict[str, bool] = {}
    for node in list(tree.walk()):
        for owner, key, new, certain in list(_changes(node, columns)):
            old = owner.args.get(key)
            owner.set(key, new)
            query = root.this.sql("sqlite", copy=False)
            found[query] = certain or found.get(query, False)
            owner.set(key, old)
    found.pop(tree.sql("sqlite"), None)
    return found


def _value(node: exp.Expression) -> object:
    """A constant in Python; SQLite's integers have 64 bits."""
    if isinstance(node, exp.Null) or node.is_string:
        return None if isinstance(node, exp.Null) else node.this
    number = float(node.this)
    return int(node.this) if node.this.isdigit() and number < 2**62 else number


def _meets(compare: Callable, value, flipped: bool, negated: bool, other) -> bool:
    return (compare(value, other) if flipped else compare(other, value)) != negated


def _changes(node: exp.Expression, columns: Columns) -> Iterator[Change]:
    """What can be changed at one node."""
    for certain, found in ((True, _sure(node)), (False, _unsure(node, columns))):
        for new in found:
            yield *_place(node, new), certain
    for key, new in _settings(node):
        yield node, key, new, False


def _place(node: exp.Expression, new: exp.Expression | None) -> tuple[exp.Expression, str, object]:
    """(parent, argument, its value with `new` in the node's place; None: without the node)"""
    parent, key = node.parent, node.arg_key
    if node.index is None:
        return parent, key, new
    others = [new if one is node else one for one in parent.args[key]]
    return parent, key, [one for one in others if one]


def _sure(node: exp.Expression) -> Iterator[exp.Expression]:
    """Another constant, the opposite operator, a condition that is always or never met."""
    kind, constant = type(node), isinstance(node, exp.Literal | exp.Boolean)
    if isinstance(node, exp.Literal) and not isinstance(node.parent, exp.Limit):
        value = _value(node)
        yield exp.Literal.string(value + "s") if node.is_string else _literal(value + 1)
    if kind in _OPPOSITE:
        yield _OPPOSITE[kind](**node.copy().args)
    is_condition = node.arg_key == "on" or isinstance(
        node.parent, exp.Where | exp.Having | exp.And | exp.Or)
    if is_condition and not constant:
        yield from (_literal(1), _literal(0))


def _unsure(node: exp.Expression, columns: Columns) -> Iterator[exp.Expression | None]:
    """What else can stand in a node's place; None: nothing."""
    kind = type(node)
    if kind is exp.Literal and node.is_string:
        text = node.this
        for other in (text.swapcase(), text[:-1], text.lstrip("%"), text.rstrip("%")):
            yield exp.Literal.string(other)
    elif kind is exp.Literal:
        yield from (_literal(_value(node) - 1), _literal(_value(node) + 1))
    elif kind is exp.Column:
        for name in columns.get(node.name.lower(), ()):
            yield exp.Column(**{**node.copy().args, "this": exp.to_identifier(name, quoted=True)})
    elif kind in _AGGREGATES:
        yield from (other(this=node.this.copy()) for other in _AGGREGATES)
        if isinstance(node.this, exp.Column) and kind not in (exp.Max, exp.Min):
            yield kind(this=exp.Distinct(expressions=[node.this.copy()]))
    elif kind is exp.Distinct and isinstance(node.parent, _AGGREGATES):
        yield node.expressions[0].copy()
    elif kind in (exp.Like, exp.In, exp.Between):
        yield exp.Not(this=node.copy())
    elif kind is exp.Not:
        yield node.this.copy()
    elif kind is exp.Is:
        yield exp.EQ(this=node.this.copy(), expression=exp.Literal.string(""))
    elif kind is exp.Ordered:
        down = bool(node.args.get("desc"))
        yield exp.Ordered(this=node.this.copy(), desc=not down, nulls_first=down)
        if len(node.parent.expressions) > 1:
            yield None
    elif kind in (exp.Order, exp.Limit):
        yield None
    for other in _OTHERS.get(kind, ()):
        yield other(**node.copy().args)


def _settings(node: exp.Expression) -> Iterator[tuple[str, object]]:
    """(argument of a node, its new value)"""
    if isinstance(node, exp.Select):
        grouped = node.args.get("group") or any(one.find(exp.AggFunc) for one in node.expressions)
        if node.args.get("distinct"):
            yield "distinct", None
        elif node.parent_select is None and not grouped and isinstance(node.parent, exp.Paren):
            yield "distinct", exp.Distinct()
    elif isinstance(node, exp.Join):
        yield "side", None if node.side else "LEFT"
    elif isinstance(node, exp.Union):
        yield "distinct", not node.args.get("distinct")


def _literal(number: float) -> exp.Expression:
    return exp.Literal.number(number)
