"""Tasks and rows: templates as designed, splits that do not leak, and bad files named by line."""

import gzip
import json
import re

import pytest

from helpers import WorkbookError, base_models, data
from helpers.tasks import TASKS, Task, get_task, register

ROW = {"context": "CREATE TABLE t (a INTEGER)", "question": "How many?", "answer": "SELECT COUNT(*) FROM t"}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_templates_are_the_designs():
    assert TASKS["sql"].prompt(ROW) == "<TABLE>: CREATE TABLE t (a INTEGER)\n<QUESTION>: How many?\n<SQL>: "
    assert TASKS["detox"].prompt({"toxic": "x {y}"}) == "<Toxic>: x {y}\n<Neutral>: "
    row = {"instruction": "Do it.", "input": "with this"}
    assert TASKS["instruct"].prompt(row) == "<Instruction>: Do it.\n<Input>: with this\n<Response>: "
    assert TASKS["instruct"].prompt({"instruction": "Do it.", "input": ""}) == "<Instruction>: Do it.\n<Response>: "


def test_unknown_task_and_missing_column():
    with pytest.raises(WorkbookError, match="did you mean detox"):
        get_task("detx")
    with pytest.raises(WorkbookError, match="needs the column 'question'"):
        TASKS["sql"].prompt({"context": "c"})


def test_a_task_of_ones_own_works_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.tasks.TASKS", dict(TASKS))
    register(Task(name="titles", title="Titles", columns=("article",), target="headline",
                  template="<Article>: {article}\n<Headline>: "))
    path = write(tmp_path / "t.jsonl", *({"article": f"text {i}", "headline": "h"} for i in range(60)))
    rows = data.load_rows("titles", path)
    assert get_task("titles").prompt(rows.rows[0]).startswith("<Article>: text")
    with pytest.raises(WorkbookError, match="'titles' has no practice data"):
        data.load_rows("titles", "practice")
    with pytest.raises(WorkbookError, match="template's fields"):
        Task(name="bad", title="", columns=("a", "b"), target="c", template="{b} {a}")


@pytest.mark.parametrize(("lines", "expected"), [
    (["{bad"], r"rows\.jsonl, line 1 is not valid JSON"),
    ([ROW, ""], r"line 2 is empty"),
    ([ROW, {"context": "c", "question": "q"}], r"line 2 has no field 'answer'"),
    ([ROW, ROW, {**ROW, "question": 3}], r"line 3: the field 'question' is a int: it must be text"),
    ([{**ROW, "answer": "  "}], r"line 1: the field 'answer' is empty"),
    ([[1]], r"line 1 is a JSON list"),
    ([{**ROW, "split": "test"}], r"split is 'test'"),
    (["[" * 100_000], r"line 1 is not valid JSON"),
])
def test_bad_lines_are_named(tmp_path, lines, expected):
    with pytest.raises(WorkbookError, match=expected) as caught:
        data.load_rows("sql", write(tmp_path / "rows.jsonl", *lines))
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    for name in ("none.jsonl", "."):
        with pytest.raises(WorkbookError, match="not an existing file"):
            data.load_rows("sql", str(tmp_path / name))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(WorkbookError, match="empty.jsonl has no train rows"):
        data.load_rows("sql", str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "caf\xe9"}')
    with pytest.raises(WorkbookError, match="not UTF-8"):
        data.load_rows("sql", str(tmp_path / "latin.jsonl"))
    whole = gzip.compress(json.dumps(ROW).encode() * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WorkbookError, match="not a complete gzip file"):
        data.load_rows("sql", str(tmp_path / "cut.jsonl.gz"))


def test_a_split_never_shares_a_table(tmp_path):
    # The same table with other columns, in another spelling, and joined with its neighbour in some rows.
    spellings = ("CREATE TABLE {0} (a INTEGER)", "create table {0}(b TEXT)", 'CREATE TABLE IF NOT EXISTS "{0}" (d INTEGER)',
                 "CREATE TABLE {0} (a INTEGER); CREATE TABLE {1} (e INTEGER)")
    rows = [{**ROW, "context": spellings[i % 4].format(f"t{i // 4 * 2}", f"t{i // 4 * 2 + 1}"), "question": f"q{i}"}
            for i in range(200)]
    for at in range(1, 100, 2):  # rows that show the second table alone
        rows.append({**ROW, "context": f"CREATE TABLE t{at} (f INTEGER)", "question": f"alone {at}"})
    path = write(tmp_path / "r.jsonl", *rows)
    train, validation = data.load_rows("sql", path), data.load_rows("sql", path, "validation")
    assert len(train.rows) + len(validation.rows) == len(rows)
    assert len(validation.rows) > 0

    def groups(loaded):
        names = {name for row in loaded.rows for name in re.findall(r"t(\d+)\b", row["context"])}
        return {int(name) // 2 for name in names}

    assert not groups(train) & groups(validation)
    own = write(tmp_path / "own.jsonl", {**ROW, "split": "validation"}, {**ROW, "split": "train"})
    assert len(data.load_rows("sql", own, "validation").rows) == 1


def test_fraction_and_count_choose_by_seed(tmp_path):
    path = write(tmp_path / "r.jsonl", *({**ROW, "question": f"q{i}", "split": "train"} for i in range(100)))
    assert len(data.load_rows("sql", path, fraction=0.3).rows) == 30
    first = data.load_rows("sql", path, n=10, seed=1)
    assert first.total == 100
    assert first.rows == data.load_rows("sql", path, n=10, seed=1).rows != data.load_rows("sql", path, n=10, seed=2).rows
    with pytest.raises(WorkbookError, match="data_fraction"):
        data.load_rows("sql", path, fraction=0)


def test_a_files_other_fields_stay(tmp_path):
    """Notebook 05 judges rows by their `source`."""
    path = write(tmp_path / "r.jsonl", {**ROW, "source": "mine", "level": 3, "split": "train"}, {**ROW, "split": "train"})
    assert data.load_rows("sql", path).rows == [{**ROW, "source": "mine", "level": 3}, ROW]


def test_practice_rows_are_chosen_like_any_other_files():
    """Only that seed 0 takes the first rows: they are in random order already."""
    every = data.load_rows("sql", "practice", "validation")
    assert every.total == len(every.rows) == 500 and every.rows[0].keys() == ROW.keys()
    assert data.load_rows("sql", "practice", "validation", fraction=0.1).rows == every.rows[:50]
    assert data.load_rows("sql", "practice", "validation", n=9_999).rows == every.rows
    path = str(data.PRACTICE / "sql.jsonl.gz")
    assert data.load_rows("sql", path, "validation").rows == every.rows
    other = data.load_rows("sql", "practice", "validation", n=50, seed=3).rows
    assert other == data.load_rows("sql", path, "validation", n=50, seed=3).rows != every.rows[:50]


def test_hub_columns_are_mapped_from_a_local_folder(tmp_path):
    rows = [{"en_toxic_comment": f"rude {i}", "en_neutral_comment": "kind"} for i in range(80)]
    write(tmp_path / "train.jsonl", *rows)
    loaded = data.load_rows("detox", f"hub:{tmp_path}")
    assert loaded.rows[0].keys() == {"toxic", "neutral"}
    with pytest.raises(WorkbookError, match="row 1 has no field 'context', which task 'sql' needs: it has 'en_neutral_comment'"):
        data.load_rows("sql", f"hub:{tmp_path}")


@pytest.mark.parametrize(("row", "expected"), [
    ({"en_neutral_comment": None}, "row 80: the field 'neutral' is a NoneType: it must be text"),
    ({"en_neutral_comment": " "}, "row 80: the field 'neutral' is empty"),
    ({"split": "test"}, "row 80: split is 'test'")])
def test_a_hub_row_is_checked_like_a_files(tmp_path, row, expected):
    rows = [{"en_toxic_comment": f"rude {i}", "en_neutral_comment": "kind", "split": "validation"} for i in range(80)]
    write(tmp_path / "train.jsonl", *rows[:-1], rows[-1] | row)
    with pytest.raises(WorkbookError, match=expected):
        data.load_rows("detox", f"hub:{tmp_path}")


def test_a_hub_rows_own_split_counts(tmp_path):
    rows = [{"en_toxic_comment": f"rude {i}", "en_neutral_comment": "kind", "split": "validation"} for i in range(80)]
    write(tmp_path / "train.jsonl", *rows)
    assert len(data.load_rows("detox", f"hub:{tmp_path}", "validation").rows) == 80
    with pytest.raises(WorkbookError, match="has no train rows"):
        data.load_rows("detox", f"hub:{tmp_path}")


def test_prompt_tokens_are_the_same_in_training_and_in_use():
    tokenizer = base_models.load_tokenizer()
    task = TASKS["sql"]
    prompt = data.encode(tokenizer, task.prompt(ROW))["input_ids"]
    row = data.encode(tokenizer, task.prompt(ROW), task.completion(ROW))
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert row["labels"][len(prompt):] == row["input_ids"][len(prompt):]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert data.encode_rows(tokenizer, task, [ROW], 512) == ([row], 0)
    long = {**ROW, "question": "why " * 600}
    assert data.encode_rows(tokenizer, task, [ROW, long], 512)[1] == 1
    with pytest.raises(WorkbookError, match="All 1 rows are longer than max_length=512"):
        data.encode_rows(tokenizer, task, [long], 512)
