"""More training rows from SQL rows, so that an adapter learns to read tables and not to recite them.

    python tests/tools/sql_rows.py sql.jsonl.gz more.jsonl.gz --copies 6 --spider 2

Each copy of a training row after the first has its columns, and its tables, in another order. In
half of WikiSQL's copies the text values are replaced, in question and query alike, by values that
other rows compare with a column of the same name. Spider's rows, which are few, are taken
`--spider` times in each copy; a third of them get a further table of their database. Validation
rows stay as they are.
"""

import argparse
import gzip
import json
import random
import re
from collections import defaultdict
from pathlib import Path

TABLE = re.compile(r"CREATE TABLE (.+?) \((.*)\)")
COMPARED = re.compile(r"(\S+) = '((?:[^']|'')+)'")


def tables(context: str) -> list[tuple[str, list[str]]]:
    """Name and columns of each table. Raises ValueError where they do not give the context again."""
    found = [TABLE.fullmatch(part) for part in context.split("; ")]
    if None in found or written(read := [(one[1], one[2].split(", ")) for one in found]) != context:
        raise ValueError(context)
    return read


def written(read: list[tuple[str, list[str]]]) -> str:
    return "; ".join(f"CREATE TABLE {name} ({', '.join(columns)})" for name, columns in read)


def shuffled(row: dict, rng: random.Random, others: list[tuple[str, list[str]]]) -> dict:
    """The row with tables and columns in another order, and a third of the time one table more."""
    read = tables(row["context"])
    known = {name.lower() for name, _ in read}
    others = [one for one in others if one[0].lower() not in known]
    if others and rng.random() < 1 / 3:
        read.append(rng.choice(others))
    read = [(name, rng.sample(columns, len(columns))) for name, columns in read]
    return row | {"context": written(rng.sample(read, len(read)))}


def revalued(row: dict, rng: random.Random, values: dict[str, list[str]]) -> dict:
    """The row with other text values, each of which stands once in question and query."""
    question, answer = row["question"], row["answer"]
    for column, value in COMPARED.findall(answer):
        other = rng.choice(values[column])
        plain, new = value.replace("''", "'"), other.replace("''", "'")
        if question.count(plain) == 1 and answer.count(f"'{value}'") == 1:
            question = question.replace(plain, new)
            answer = answer.replace(f"'{value}'", f"'{other}'")
    return row | {"question": question, "answer": answer}


def more(rows: list[dict], copies: int, spider: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    train = [row for row in rows if row["split"] == "train"]
    values, databases = defaultdict(list), defaultdict(dict)
    for row in train:
        if row["source"] == "spider":
            databases[row["schema"]].update({one[0]: one for one in tables(row["context"])})
        for column, value in COMPARED.findall(row["answer"]) if row["source"] == "wikisql" else []:
            values[column].append(value)
    made = [row for row in rows if row["split"] != "train"]
    for copy in range(copies):
        for row in train:
            if row["source"] == "spider":
                others = list(databases[row["schema"]].values())
                made += [row] * spider
            elif not copy:
                made.append(row)
            else:
                changed = revalued(row, rng, values) if rng.random() < 0.5 else row
                made.append(shuffled(changed, rng, []))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--spider", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with gzip.open(arguments.source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    made = more(rows, arguments.copies, arguments.spider, arguments.seed)
    with gzip.open(arguments.target, "wt", encoding="utf-8", compresslevel=1) as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made):,} rows from {len(rows):,}")


if __name__ == "__main__":
    main()
