"""Text as tokens: every tokenizer's own convention, the same in training, evaluation and panel; and what rows are like."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from tokenizers.processors import TemplateProcessing

from helpers import (
    WorkbookError,
    base_models,
    data,
    evaluation,
    generation,
    preflight,
    recipes,
    trainer,
    training,
)
from helpers.tasks import TASKS

BOS, END = 1, 2  # <|im_start|> and <|im_end|> of the embedded base model's tokenizer


@pytest.fixture(scope="module")
def variant(tiny, tmp_path_factory):
    """A copy of the tiny base whose tokenizer follows another convention."""

    def make(name: str, bos_first: bool = False, drop: tuple = (), generation_end: object = END):
        folder = tmp_path_factory.mktemp("variants") / name
        shutil.copytree(tiny, folder)
        tokenizer = base_models.load_tokenizer(str(tiny))
        if bos_first:
            tokenizer._tokenizer.post_processor = TemplateProcessing(
                single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", BOS)])
        tokenizer.save_pretrained(folder)
        known = folder / "tokenizer_config.json"
        known.write_text(json.dumps({key: value for key, value in json.loads(known.read_text()).items() if key not in drop}))
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**settings, "eos_token_id": generation_end}))
        return str(folder)

    return make


def test_the_embedded_bases_tokens_are_its_tokenizers_own():
    tokenizer = base_models.load_tokenizer()
    for name in ("sql", "detox", "instruct"):
        for row in data.load_rows(name, n=100).rows:
            text = TASKS[name].prompt(row)
            assert data.prompt_ids(tokenizer, text) == tokenizer(text)["input_ids"] == tokenizer(
                text, add_special_tokens=False)["input_ids"]


def test_what_the_tokenizer_puts_first_stands_before_every_prompt(variant):
    model, tokenizer = base_models.load(variant("bos", bos_first=True), device="cpu", dtype=torch.float32)
    text = "<Toxic>: this is bad\n<Neutral>: "
    row = data.encode(tokenizer, text, "fine")
    assert row["input_ids"][:2] == tokenizer(text)["input_ids"][:2] and row["input_ids"].count(BOS) == 1
    assert row["labels"][-2:] == row["input_ids"][-2:] and row["labels"][0] == -100
    [answer] = generation.write_batch(model, tokenizer, [text], max_new_tokens=4, do_sample=False)
    own = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4, do_sample=False, pad_token_id=END)
    assert answer.text == tokenizer.decode(own[0, len(tokenizer(text)["input_ids"]):], skip_special_tokens=True)
    [asked] = evaluation.chat_prompts(tokenizer, ["hello"])
    assert data.prompt_ids(tokenizer, asked) == asked, "a chat template has put its own tokens"


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_a_base_with_bos_is_trained_and_asked_with_it(variant, tmp_path, packing, monkeypatch):
    base = variant(f"bos-{packing}", bos_first=True)
    config = recipes.FineTuneConfig.from_parameters(task="sql", base_model=base, max_rows=32, max_steps=2, packing=packing)
    seen, real = [], trainer.completion_loss
    monkeypatch.setattr(trainer, "completion_loss", lambda model, batch, *rest, **more: seen.append(batch["input_ids"]) or real(
        model, batch, *rest, **more))
    training.train(config, *training.load_inputs(config), tmp_path / "run")
    assert len(seen) == 2 and all((ids[:, 0] == BOS).all() for ids in seen)


def test_special_token_text_has_no_power():
    tokenizer, task = base_models.load_tokenizer(), TASKS["instruct"]
    row = {"instruction": "Say <|im_end|>.", "input": "", "response": "It is <|im_end|> here."}
    ids = data.encode(tokenizer, task.prompt(row), task.completion(row))["input_ids"]
    assert ids.index(END) == len(ids) - 1, "an end in mid-answer"
    assert tokenizer.decode(ids[:-1]) == task.prompt(row) + task.completion(row)
    counts = preflight.preflight(task, [row], [], tokenizer, 512)
    assert counts["special"] == 1
    assert "encoded as plain text: 1." in " ".join(preflight.describe(counts, task, 512))


def test_a_tokenizer_without_an_end_takes_the_models(variant):
    tokenizer = base_models.load_tokenizer(variant("no-end", drop=("eos_token", "pad_token"), generation_end=[END, 0]))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, END)
    nothing = variant("no-end-at-all", drop=("eos_token", "pad_token"), generation_end=None)
    with pytest.raises(WorkbookError, match="has no end-of-text token, .*set eos_token in"):
        base_models.load_tokenizer(nothing)


def test_a_folder_without_a_tokenizer_is_one_sentence(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(WorkbookError, match="The tokenizer of .*bare cannot be loaded .*: put its tokenizer files into"):
        base_models.load_tokenizer(str(tmp_path / "bare"))


def test_an_end_of_either_kind_ends_an_answer(variant):
    """The tokenizer says <|im_end|>, the generation config another token: whichever is written first ends the row."""
    model, tokenizer = base_models.load(variant("other-end", generation_end=81), device="cpu", dtype=torch.float32)
    for end in (END, 81):
        def force(batch, scores, end=end):
            return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([end]), 0.0)
        answers = generation.write_batch(model, tokenizer, ["a", "b c"], max_new_tokens=8, do_sample=False,
                                         logits_processor=[force])
        assert [answer.tokens for answer in answers] == [0, 0]


def test_detox_is_judged_without_bos(variant):
    model, tokenizer = base_models.load(variant("no-bos", drop=("bos_token",)), device="cpu", dtype=torch.float32)
    assert tokenizer.bos_token_id is None
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    rows = data.load_rows("detox", split="validation", n=3).rows
    systems = evaluation.compare(TASKS["detox"], adapted, tokenizer, rows)
    assert 0 <= systems["human"]["metrics"]["joint"].value <= 1


def test_a_target_of_several_lines_is_joined_or_named(tmp_path):
    def load(task, **row):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({**row, "split": "train"}), encoding="utf-8")
        return data.load_rows(task, str(path)).rows[0]

    table = {"context": "CREATE TABLE t (a TEXT)", "question": "Which?"}
    query = "SELECT a\n  FROM t\r\n WHERE a = 'x  y'\n"
    assert load("sql", **table, answer=query)["answer"].strip() == "SELECT a FROM t WHERE a = 'x  y'"
    for unsafe in ("SELECT a -- all\nFROM t", "SELECT a FROM t WHERE a = 'x\ny'"):
        with pytest.raises(WorkbookError, match=r"line 1: the field 'answer' holds '\\n', at which answers of task 'sql' end"):
            load("sql", **table, answer=unsafe)
    with pytest.raises(WorkbookError, match=r"the field 'neutral' holds '\\n'"):
        load("detox", toxic="bad", neutral="one\ntwo")
    assert load("instruct", instruction="List.", input="", response="one\ntwo")["response"] == "one\ntwo"


def test_rows_of_any_script_reach_both_splits(tmp_path):
    numbers = ["一二三四五六七八九十"[int(digit)] for digit in "0123456789"]
    texts = ["".join(numbers[int(digit)] for digit in str(i)) for i in range(200)] + ["🙂" * (i + 1) for i in range(50)]
    lines = [{"toxic": text, "neutral": "好"} for text in texts] + [{"toxic": f"word {i}", "neutral": "ok"} for i in range(200)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    splits, _, _ = data.load_splits("detox", str(path))
    for split in splits.values():
        foreign = sum(row["neutral"] == "好" for row in split)
        assert 0 < foreign < len(split)
    assert len(splits["validation"]) < 50


def test_preflight_counts_what_is_wrong_with_rows():
    tokenizer, task = base_models.load_tokenizer(), TASKS["detox"]
    train = [{"toxic": toxic, "neutral": neutral} for toxic, neutral in (
        ("You fool!", "You."), ("you fool", "You."), ("you fool", "Dear."), ("shut up " * 60, "please"),
        ("ты очень плохой", "ты хороший"), ("fine", "so " * 50))]
    validation = [{"toxic": "YOU FOOL", "neutral": "You."}, {"toxic": "new", "neutral": "new"}]
    counts = preflight.preflight(task, train, validation, tokenizer, 100)
    expected = {"train": 6, "validation": 2, "duplicates": 1, "contradicted": 1, "leaked": 1, "too_long": 1,
                "cut_targets": 1, "special": 0}
    assert {name: counts[name] for name in expected} == expected
    kept = data.encode_rows(tokenizer, task, train, 100)[0]
    assert counts["tokens"] == sum(len(row["input_ids"]) for row in kept)
    assert counts["scored_tokens"] == sum(label != -100 for row in kept for label in row["labels"])
    lines = preflight.describe(counts, task, 100)
    assert len(lines) == 6 and any("flatters: 1." in line for line in lines)
    clean = preflight.preflight(task, train[:1], validation[1:], tokenizer, 100)
    assert preflight.describe(clean, task, 100)[1].startswith("No duplicates")


def test_the_command_prints_the_preflight_alone(jobs, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"context": "CREATE TABLE t (a TEXT)", "question": "Which?", "answer": "SELECT a FROM t"}
    path.write_text("\n".join(json.dumps({**row, "split": split}) for split in data.SPLITS), encoding="utf-8")
    done = jobs("check", path, "--task", "sql", "-p", "max_length=64")
    assert done.returncode == 0 and "score flatters: 1." in done.stdout, done.stderr
    assert not (tmp_path / "runs").exists()
    for arguments, said in ((("check", path), "--task"), (("check", path, "--task", "sqk"), "did you mean sql"),
                            (("check", path, "--task", "sql", "-p", "rank=8"), "check has no parameter 'rank'"),
                            (("check", tmp_path / "none.jsonl", "--task", "sql"), "not an existing file"),
                            (("run", "sql", "--task", "sql"), "unrecognized arguments: --task")):
        done = jobs(*arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_no_notebook_or_helper_makes_tokens_of_its_own():
    """Prompts become tokens in helpers.data alone: `add_special_tokens` anywhere else is another convention."""
    own = [path.name for path in (ROOT / "helpers").rglob("*.py") if "add_special_tokens" in path.read_text(encoding="utf-8")]
    assert sorted(own) == ["data.py", "scoring.py"], own  # scoring counts the tokens of answers
