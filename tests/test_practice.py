"""Practice rows: what the files hold, deterministic, without duplicates or leaks, and SQL that runs."""

import re
import sqlite3
from pathlib import Path
from statistics import median

import make_practice as practice
import pytest
import sqlglot
from make_practice import practice_rows

from helpers import WorkbookError, data

TASKS = ["sql", "detox", "instruct"]
COLUMNS = {"sql": ("context", "question", "answer"), "detox": ("toxic", "neutral"),
           "instruct": ("instruction", "input", "response")}
SIZES = {"train": 5000, "validation": 500}
ROWS = {(task, split): data.load_rows(task, "practice", split).rows for task in TASKS for split in SIZES}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SIZES)
def test_rows_have_their_columns_and_no_duplicates(task, split):
    rows = ROWS[task, split]
    assert len(rows) == SIZES[split]
    assert {tuple(row) for row in rows} == {COLUMNS[task]}
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    for row in rows:
        for column, value in row.items():
            assert isinstance(value, str) and value == value.strip() and "  " not in value, row
            assert value or column == "input", row
            assert not re.search(r"\{|\}", value) or row.get("instruction", "").count("JSON"), row


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SIZES)
def test_same_seed_same_rows_and_fewer_rows_are_a_prefix(task, split):
    for load in (practice_rows, lambda task, split, n, seed=0: data.load_rows(task, "practice", split, n, seed=seed).rows):
        assert load(task, split, 300) == ROWS[task, split][:300]
        other = load(task, split, 300, seed=1)
        assert other == load(task, split, 300, seed=1) and other != ROWS[task, split][:300]


def test_the_files_hold_what_the_script_makes(capsys, monkeypatch, tmp_path):
    assert practice.main(["--check"]) == 0
    monkeypatch.setattr(practice, "FOLDER", tmp_path)
    monkeypatch.setattr(practice, "COUNTS", {"train": 20, "validation": 5})
    assert practice.main(["--check"]) == 1 and "sql.jsonl.gz does not hold" in capsys.readouterr().out
    assert practice.main([]) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {f"{task}.jsonl.gz" for task in TASKS}
    assert practice.main(["--check"]) == 0 and practice.main([]) == 0
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}, "the same rows, the same bytes"
    monkeypatch.setattr(practice, "COUNTS", {"train": 19, "validation": 5})
    assert practice.main(["--check"]) == 1


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in Path(practice.__file__).parent.glob("*.jsonl.gz")]
    assert len(sizes) == len(TASKS) and max(sizes) < 500_000


def columns_of(context: str) -> dict[str, set[str]]:
    return {table: set(re.findall(r"(\w+) (?:VARCHAR|INTEGER)", columns))
            for table, columns in re.findall(r"CREATE TABLE (\w+) \(([^)]*)\)", context)}


def test_sql_validation_has_other_tables_and_other_columns():
    tables, columns = {}, {}
    for split in SIZES:
        schemas = [columns_of(row["context"]) for row in ROWS["sql", split]]
        tables[split] = {table for schema in schemas for table in schema}
        columns[split] = {column for schema in schemas for names in schema.values() for column in names}
    assert len(tables["train"]) >= 40 and len(tables["validation"]) >= 8
    assert not tables["train"] & tables["validation"]
    assert columns["train"] & columns["validation"] <= {"name", "id"}


def test_detox_validation_has_other_sentences_topics_and_frames():
    train, validation = ({row["toxic"].lower() for row in ROWS["detox", split]} for split in SIZES)
    assert not train & validation
    held_out_topics = [t for items in practice.TOPICS.values() for t in practice._part(items, True)]
    for topic in held_out_topics:
        word = re.compile(rf"\b{re.escape(topic)}\b")
        known = [t for items in practice.TOPICS.values() for t in practice._part(items, False) if word.search(t)]
        assert known or not any(word.search(sentence) for sentence in train), topic
    for frame in ("belongs in the trash", "my dog could make", "never show me", "of course you think", "enough with"):
        assert not any(frame in sentence for sentence in train), frame
        assert any(frame in sentence for sentence in validation), frame


def test_instruct_validation_has_other_prompts_and_words():
    prompts = {split: {(r["instruction"], r["input"]) for r in ROWS["instruct", split]} for split in SIZES}
    assert not prompts["train"] & prompts["validation"]
    words = {split: {w for pair in pairs for w in re.findall(r"\w+", " ".join(pair).lower())}
             for split, pairs in prompts.items()}
    for kind, items in practice.KINDS.items():
        assert not set(practice._part(items, True)) & words["train"], kind


def test_no_row_of_any_seed_leaks():
    train_key = {task: {tuple(r.values())[:-1] for seed in range(3) for r in practice_rows(task, "train", 1500, seed)}
                 for task in TASKS}
    for task in TASKS:
        for seed in range(3):
            rows = practice_rows(task, "validation", 300, seed)
            assert not train_key[task] & {tuple(row.values())[:-1] for row in rows}


def filled_database(context: str) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.executescript(context)
    for table in columns_of(context):
        types = [column[2] for column in connection.execute(f"PRAGMA table_info({table})")]
        for i in range(1, 4):
            values = [f"text {i}" if kind == "VARCHAR" else i for kind in types]
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)
    return connection


@pytest.mark.parametrize("split", SIZES)
def test_sql_answers_run_on_their_own_tables(split):
    for row in ROWS["sql", split][:1000]:
        with filled_database(row["context"]) as connection:
            connection.execute(row["answer"]).fetchall()
        connection.close()
    for row in ROWS["sql", split][:300]:
        for statement in (row["answer"], row["context"]):
            for tree in sqlglot.parse(statement, read="sqlite"):
                assert not isinstance(tree, sqlglot.exp.Command | None), statement


@pytest.mark.parametrize("split", SIZES)
def test_sql_questions_name_every_value_and_column_of_the_answer(split):
    for row in ROWS["sql", split]:
        question, answer = row["question"], row["answer"]
        values = re.findall(r"'([^']*)'", answer) + re.findall(r"(?:[=<>]|LIMIT) (\d+)", answer)
        for value in values:
            if not answer.endswith("LIMIT 1"):
                assert re.search(rf"\b{re.escape(value)}\b", question), row
        selected = re.search(r"SELECT (.*?) FROM", answer)[1]
        tested = re.findall(r"([\w.]+) [=<>] ['\d]", answer.split(" WHERE ")[-1])
        for column in re.findall(r"[a-z_]+", selected) + [name.split(".")[-1] for name in tested]:
            assert column.replace("_", " ") in question, row


def test_sql_has_every_pattern_and_one_answer_for_a_prompt():
    rows = ROWS["sql", "train"]
    for part in ("COUNT(*)", "MIN(", "MAX(", "AVG(", "SUM(", " > ", " < ", " AND ", "ORDER BY", "DESC LIMIT",
                 "ASC LIMIT", "GROUP BY", "DISTINCT", "JOIN"):
        for split in SIZES:
            assert sum(part in row["answer"] for row in ROWS["sql", split]) >= SIZES[split] / 200, (part, split)
    assert len({(row["context"], row["question"]) for row in rows}) == len(rows)


def test_rows_are_short():
    limits = {"sql": (45, 90), "detox": (30, 60), "instruct": (35, 90)}  # words and signs: median, longest
    for (task, _), rows in ROWS.items():
        lengths = [len(re.findall(r"\w+|[^\w\s]", " ".join(row.values()))) for row in rows]
        assert median(lengths) <= limits[task][0] and max(lengths) <= limits[task][1], (task, max(lengths))


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))


def test_detox_toxic_side_is_rude_and_neutral_side_is_not():
    rude = re.compile(rf"\b({'|'.join(practice.RUDE['adj'] + practice.RUDE['noun'])}|hell|damn|crap|shut up|rubbish)\b")
    for split in SIZES:
        for row in ROWS["detox", split]:
            assert rude.search(row["toxic"].lower()) and not rude.search(row["neutral"].lower()), row
            assert words_of(row["neutral"]) & words_of(row["toxic"]), row
            assert re.match(r"[A-Z\"]", row["neutral"]) and row["neutral"][-1] in ".?\"", row


def test_articles_agree_and_no_word_is_doubled():
    for rows in ROWS.values():
        for row in rows:
            text = "\n".join(row.values())
            assert not re.search(r"\ba [aeio]\w", text) and not re.search(r"\ban [^aeiou\W]", text), row
            assert not re.search(r"\b(\w+) \1\b", text), row


@pytest.mark.parametrize("call, words", [
    (("poem", "practice", "train", 1), "'poem'.*instruct, sql, detox"),
    (("sql", "practice", "test", 1), "'test'.*train or validation"),
    (("detox", "practice", "validation", -1), "-1.*at least 1"),
])
def test_bad_calls_say_what_is_wrong(call, words):
    with pytest.raises(WorkbookError, match=words):
        data.load_rows(*call)


def test_a_generator_that_runs_dry_says_how_many_there_are(monkeypatch):
    monkeypatch.setitem(practice.ROW_MAKERS, "sql", lambda rng, held_out: {"answer": rng.choice("abc")})
    with pytest.raises(ValueError, match="at most 3"):
        practice_rows("sql", "train", 50)
