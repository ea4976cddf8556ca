"""A query as its words: the values that it compares columns with, and its single edits.

Works on sqlglot's tokens, not on its trees: a query that SQLite reads and sqlglot does not is read
too, and an edit is a cut in the text, which is fast.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.tokens import TokenType

Columns = dict[str, list[str]]  # a column's name in lower case -> the other columns of its tables

COMPARISONS = ("=", "<>", ">", ">=", "<", "<=", "LIKE", "GLOB", "IN", "BETWEEN", "IS")
AGGREGATES = ("COUNT", "MAX", "MIN", "SUM", "AVG")
SETS = ("UNION", "INTERSECT", "EXCEPT")
_CLAUSES = {"SELECT", "FROM", "WHERE", "GROUP BY", "HAVING", "ORDER BY", "LIMIT", "OFFSET", *SETS,
            "ON", "JOIN", "LEFT", "INNER", "CROSS", "NATURAL", ";"}
_SPELLINGS = {"==": "=", "!=": "<>"}
_FLIPPED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}
# A change that leaves a query as right as it was is rare among these ...
_SWAPS = {"=": ["<>"], "<>": ["="], ">": ["<"], "<": [">"], ">=": ["<"], "<=": [">"]}
# ... and less rare among these.
_OTHER_SWAPS = {
    "=": [">=", "<="], ">": [">="], ">=": [">"], "<": ["<="], "<=": ["<"], "AND": ["OR"],
    "OR": ["AND"], "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "LIKE": ["NOT LIKE"],
    "IN": ["NOT IN"], "BETWEEN": ["NOT BETWEEN"], "NOT": [""], "DISTINCT": [""], "LEFT": [""],
    "JOIN": ["LEFT JOIN"], "UNION": ["INTERSECT"], "INTERSECT": ["UNION", "EXCEPT"],
    "EXCEPT": ["UNION", "INTERSECT"]}


@dataclass(frozen=True)
class Word:
    """One token. kind: "text", "number", "column", or what is written, in upper case; value: that
    of a text or number, or a column's name in lower case; depth: the number of brackets around it;
    table: what stands before a column's name and a dot, in lower case; begin: where that starts."""

    kind: str
    value: str
    start: int
    end: int
    depth: int
    table: str
    begin: int


def read(query: str, columns: Columns) -> list[Word]:
    """A query's words, less the tables before columns' names; [] for a text that has no tokens.

    A name in double quotes that is no column is a text, as it is for SQLite.
    """
    try:
        tokens = sqlglot.tokenize(query, read="sqlite")
    except (SqlglotError, ValueError):
        return []
    aliases = {tokens[i + 1].text for i, token in enumerate(tokens[:-1])
               if token.token_type == TokenType.ALIAS}
    words, depth, between, table, begin = [], 0, [], "", None
    for i, token in enumerate(tokens):
        following = tokens[i + 1].token_type if i + 1 < len(tokens) else None
        begin = token.start if begin is None else begin
        if TokenType.DOT in (following, token.token_type):
            table = token.text.lower() if following == TokenType.DOT else table
            continue
        kind, value = " ".join(token.text.upper().split()), token.text
        kind = _SPELLINGS.get(kind, kind)
        if token.token_type == TokenType.NUMBER:
            kind = "number"
        elif token.token_type == TokenType.STRING:
            kind = "text"
        elif value.lower() in columns and following != TokenType.L_PAREN:
            kind, value = "column", value.lower()
        elif query[token.start] == '"':
            kind = "name" if value in aliases else "text"
        elif kind == "BETWEEN":
            between.append(depth)
        elif kind == "AND" and between and between[-1] == depth:
            kind = "BETWEEN AND"
            between.pop()
        depth -= kind == ")"
        words.append(Word(kind, value, token.start, token.end + 1, depth, table, begin))
        depth += kind == "("
        table, begin = "", None
    return words


def is_ordered(words: list[Word]) -> bool:
    """Whether the query as a whole, not a part of it, orders its rows."""
    return any(word.kind == "ORDER BY" and word.depth == 0 for word in words)


def tables_of(words: list[Word]) -> dict[str, set[str]]:
    """Alias or table -> tables that it stands for, in lower case: one, or several in the parts of
    a query."""
    names: dict[str, set[str]] = {}
    for i, word in enumerate(words[:-1]):
        if word.kind in ("FROM", "JOIN", ",") and words[i + 1].kind not in ("(", "SELECT"):
            table = words[i + 1].value.lower()
            rest = [other for other in words[i + 2:i + 4] if other.kind != "AS"]
            names.setdefault(table, set()).add(table)
            if rest:
                names.setdefault(rest[0].value.lower(), set()).add(table)
    return names


def conditions(words: list[Word]) -> list[tuple[Word | None, str, object]]:
    """Every value in the query as (column that it is compared with or None, operator, value)."""
    found = []
    for i, word in enumerate(words):
        if word.kind == "text":
            found.append((*_compared(words, i), word.value))
        elif word.kind == "number":
            minus = i > 1 and words[i - 1].kind == "-" and words[i - 2].kind in COMPARISONS
            number = _number(word.value)
            found.append((*_compared(words, i), -number if minus else number))
        elif word.kind == "NULL" and "IS" in (words[i - 1].kind, words[i - 2].kind):
            found.append((*_compared(words, i), None))
    return found


def edits(query: str, columns: Columns) -> dict[str, bool]:
    """The query with one thing changed, for each thing: a constant, a column, an operator, a
    condition, DISTINCT, an aggregate, the order, the limit.

    Some of them do not run. Returns {edit: whether a change of meaning is all but certain}.
    """
    found: dict[str, bool] = {}
    words = read(query, columns)
    for i in range(len(words)):
        for start, end, new in _sure_changes(words, i):
            found[query[:start] + new + query[end:]] = True
        for start, end, new in _changes(words, i, columns):
            found.setdefault(query[:start] + new + query[end:], False)
    found.pop(query, None)
    return found


def _number(text: str) -> float:
    try:
        number = int(text, 0) if text[:2].lower() == "0x" else int(text)
    except ValueError:
        number = float(text)
    return number if abs(number) < 2**62 else float(number)  # SQLite's integers have 64 bits


def _compared(words: list[Word], i: int) -> tuple[Word | None, str]:
    """The column and the operator that the value at place i stands beside."""
    operator = ""
    for j in range(i - 1, -1, -1):
        kind = words[j].kind
        if kind in COMPARISONS:
            negated = "NOT" in (words[j - 1].kind, words[j + 1].kind)
            operator = "=" if kind == "IS" else kind
            operator = "<>" if negated and operator in ("=", "IN", "LIKE") else operator
        elif kind == "column" and operator:
            counted = "COUNT" in (words[j - 2].kind, words[j - 3].kind)
            return (None, "") if counted else (words[j], operator)
        elif kind in _CLAUSES or kind in ("AND", "OR", "column"):
            break
    if i + 2 < len(words) and words[i + 1].kind in COMPARISONS and words[i + 2].kind == "column":
        return words[i + 2], _FLIPPED.get(words[i + 1].kind, words[i + 1].kind)
    return None, ""


def _sure_changes(words: list[Word], i: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of another constant, the opposite operator, a condition that is always
    or never met."""
    word = words[i]
    if word.kind == "text":
        yield word.start, word.end, _quoted(word.value + "s")
    elif word.kind == "number" and words[i - 1].kind != "LIMIT":
        yield word.start, word.end, str(_number(word.value) + 1)
    for other in _SWAPS.get(word.kind, ()):
        yield word.start, word.end, other
    depth = word.depth + (word.kind == "(")
    if word.kind in ("WHERE", "HAVING", "ON", "AND", "OR", "("):
        end = _end(words, i + 1, depth, {"AND", "OR"})
        connected = end < len(words) and words[end].kind in ("AND", "OR")
        part = words[i + 1:end]
        if part and (connected or word.kind != "(") and part[0].kind not in ("TRUE", "number"):
            yield part[0].begin, part[-1].end, "1"
            yield part[0].begin, part[-1].end, "0"


def _changes(words: list[Word], i: int, columns: Columns) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of the other edits at place i."""
    word = words[i]
    following = words[i + 1] if i + 1 < len(words) else word
    last = words[i + 2] if i + 2 < len(words) else word
    if word.kind == "text":
        text = word.value
        for other in (text.swapcase(), text[:-1], text.lstrip("%"), text.rstrip("%")):
            yield word.start, word.end, _quoted(other)
    elif word.kind == "number":
        for other in (_number(word.value) - 1, _number(word.value) + 1):
            yield word.start, word.end, str(other)
    elif word.kind == "column":
        for name in columns[word.value]:
            yield word.start, word.end, f'"{name}"'
    elif word.kind in AGGREGATES and following.kind == "(":
        for name in AGGREGATES:
            yield word.start, word.end, name
        if last.kind == "column" and word.kind not in ("MAX", "MIN"):
            yield last.begin, last.begin, "DISTINCT "
    elif word.kind == "SELECT" and i == 0 and following.kind not in ("DISTINCT", *AGGREGATES):
        if not any(other.kind in ("GROUP BY", *SETS) for other in words):
            yield word.end, word.end, " DISTINCT"
    elif word.kind == "IS":
        negated = following.kind == "NOT"
        yield word.start, (last if negated else following).end, "<> ''" if negated else "= ''"
    elif word.kind == "UNION":
        all_rows = following.kind == "ALL"
        end = (following if all_rows else word).end
        yield word.start, end, "UNION" if all_rows else "UNION ALL"
    elif word.kind == "LIMIT":
        yield word.start, following.end, ""
    elif word.kind == "ORDER BY":
        yield from _order_changes(words, i)
    if not (word.kind == "*" and words[i - 1].kind in ("SELECT", "(", ",")):
        for other in _OTHER_SWAPS.get(word.kind, ()):
            yield word.start, word.end, other


def _order_changes(words: list[Word], i: int) -> Iterator[tuple[int, int, str]]:
    """Each sort key turned round, and left out; the order left out."""
    depth, stop = words[i].depth, _end(words, i + 1, words[i].depth, set())
    yield words[i].start, words[stop - 1].end, ""
    start = i + 1
    while start < stop:
        end = min(_end(words, start, depth, {","}), stop)
        final = words[end - 1]
        if final.kind in ("ASC", "DESC"):
            yield final.start, final.end, "DESC" if final.kind == "ASC" else "ASC"
        else:
            yield final.end, final.end, " DESC"
        if start > i + 1:
            yield words[start - 1].start, final.end, ""
        elif end < stop:
            yield words[start].begin, words[end].end, ""
        start = end + 1


def _end(words: list[Word], start: int, depth: int, stops: set[str]) -> int:
    """Where the part that begins at place `start` ends: with its bracket, at a clause or a stop."""
    for j in range(start, len(words)):
        if words[j].depth < depth or words[j].depth == depth and words[j].kind in stops | _CLAUSES:
            return j
    return len(words)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
