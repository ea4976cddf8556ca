"""More training rows from SQL rows, so that an adapter learns to read tables and not to recite them.

    python tests/tools/sql_rows.py sql.jsonl.gz sql-more.jsonl.gz --copies 7

Each copy of a WikiSQL row after the first has its columns in another order. In half of the copies
the text values are replaced, in question and query alike, by values that other rows compare with a
column of the same name. Spider's rows are repeated as they are, in each copy or in the first few
(--spider): in another order, and with further tables of their database, they taught less.
Validation rows stay as they are.
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


def shuffled(row: dict, rng: random.Random) -> dict:
    """The row with tables, and the columns of each, in another order."""
    read = [(name, rng.sample(columns, len(columns))) for name, columns in tables(row["context"])]
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


def more(rows: list[dict], copies: int, seed: int, spider: int) -> list[dict]:
    rng = random.Random(seed)
    train = [row for row in rows if row["split"] == "train"]
    values = defaultdict(list)
    for row in train:
        for column, value in COMPARED.findall(row["answer"]) if row["source"] == "wikisql" else []:
            values[column].append(value)
    made = [row for row in rows if row["split"] != "train"]
    for copy in range(copies):
        for row in train:
            if not copy or row["source"] != "wikisql" and copy < spider:
                made.append(row)
            elif row["source"] == "wikisql":
                made.append(shuffled(revalued(row, rng, values) if rng.random() < 0.5 else row, rng))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--copies", type=int, default=7)
    parser.add_argument("--spider", type=int, help="copies of Spider's rows (default: as many)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with gzip.open(arguments.source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    made = more(rows, arguments.copies, arguments.seed, arguments.spider or arguments.copies)
    with gzip.open(arguments.target, "wt", encoding="utf-8", compresslevel=1) as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{len(made):,} rows from {len(rows):,}")


if __name__ == "__main__":
    main()
