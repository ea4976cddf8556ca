"""Judges without references, systems side by side, cards kept up to date, and the evaluation job."""

import json
from dataclasses import asdict

import pytest
import torch
from make_practice import practice_rows

from helpers import (
    WorkbookError,
    base_models,
    evaluation,
    judges,
    publishing,
    recipes,
    tasks,
    training,
)


def test_the_classifier_tells_mild_insults_from_greetings():
    nice, rude = judges.offensive(["have a nice day", "you are an idiot"])
    assert nice < 0.2 < 0.8 < rude
    assert judges.offensive([]) == []


def test_similarity_is_one_for_equals_and_falls_with_meaning():
    others = ["the train is late", "the train is delayed", "my soup is cold"]
    same, near, far = judges.similarity(["the train is late"] * 3, others)
    assert same == pytest.approx(1.0, abs=1e-5)
    assert far < 0.4 < near < same


def test_deleting_words_leaves_the_others():
    assert judges.without_listed_words("this stupid printer never works") == "this printer never works"
    assert judges.without_judged_words("have a nice day") == "have a nice day"


GOOD = {"Describe the sea in at most 12 words.": "Wide, blue and salty.",
        "Write at least 30 words about the sea.": "wave " * 30,
        "Write one sentence about the sea in capital letters only.": "THE SEA IS WIDE.",
        "Write one sentence about the sea in lower-case letters only.": "the sea is wide.",
        'Write one sentence about the sea. Use the word "sea".': "The Sea is wide.",
        'Write one sentence about the sea without the letter "z" and with the word "because".': "I swim because I can.",
        'List exactly three things about the sea. Begin every line with "- ".': "- wide\n- blue\n- salty",
        "Ask one question about the sea. Write nothing but the question.": "How deep is it?",
        'Answer only with "yes" or "no": can you see the sea?': "Yes.",
        'Describe the sea as a JSON object with the key "name".': '{"name": "sea"}',
        "Describe the sea in exactly two paragraphs, with an empty line between them.": "It is wide.\n\nIt is blue.",
        'Describe the sea. Begin with the word "Well".': "Well, it is wide.",
        'Describe the sea. End with the words "That is all."': "It is wide. That is all."}
BAD = ["", "word " * 13, "too short", "The SEA.", "the Sea", "The ocean.", "because of the zebra", "- one\n- two", "Why? How?",
       "yes, I can", '["name"]', "It is wide.\nIt is blue.", "Wells are deep.", "That is all. Really."]


def test_verifiable_instructions_are_strict():
    asked = {one.instruction: one for one in judges.verifiable_instructions()}
    assert len(asked) == 104, "every instruction is its own"
    for (instruction, good), bad in zip(GOOD.items(), BAD[1:], strict=True):
        assert asked[instruction].passes(good), instruction
        assert not asked[instruction].passes(bad), (instruction, bad)
        assert not asked[instruction].passes(" \n"), "an empty answer follows nothing"


@pytest.mark.parametrize(("instruction", "answer", "passes"), [
    ('Describe the sea as a JSON object with the key "name".', '{"a": 1}', False),
    ('Describe the sea as a JSON object with the key "name".', '{"a": {"name": 1}}', False),
    ('Describe the sea as a JSON object with the key "name".', '{"a": "name"}', False),
    ('Describe the sea as a JSON object with the key "name".', '{"a": 1, "name": null}', True),
    ('Write one sentence about the sea. Use the word "sea".', "I like every season.", False),
    ('Write one sentence about the sea. Use the word "sea".', "The deep-sea fish glows.", True),
    ('Write one sentence about bread. Use the word "bread".', "Gingerbread is sweet.", False),
    ('Write one sentence about the sea without the letter "z" and with the word "because".', "Becauses are nouns.", False),
])
def test_a_word_is_a_whole_word_and_a_key_a_key(instruction, answer, passes):
    asked = {one.instruction: one for one in judges.verifiable_instructions()}
    assert asked[instruction].passes(answer) is passes


def test_token_losses_are_the_models_own(tiny):
    model, tokenizer = base_models.load(str(tiny), dtype=torch.float32, device="cpu")
    prompts, completions = ["a b c", "one two three four five"], ["d e", "six"]
    found = evaluation.token_losses(model, tokenizer, prompts, completions)
    for prompt, completion, loss in zip(prompts, completions, found, strict=True):
        ids = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(ids[0]) + ids[1]])
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([ids[0] + ids[1]]), labels=labels).loss.item()
        assert loss == pytest.approx(own, abs=1e-5)


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """A published adapter of the tiny base, for detox: (folder, model with it, tokenizer)."""
    from peft import PeftModel

    folder = tmp_path_factory.mktemp("adapted")
    chosen = recipes.FineTuneConfig.from_parameters(task="detox", base_model=str(tiny), max_rows=64, max_steps=8,
                                                        learning_rate=5e-2)
    training.run(chosen, folder / "run")
    published = publishing.publish(folder / "run", folder / "mine", {})
    model, tokenizer = base_models.load(str(tiny), dtype=torch.float32, device="cpu")
    return published, PeftModel.from_pretrained(model, published).eval(), tokenizer


def test_every_system_answers_the_same_rows(adapted):
    _, model, tokenizer = adapted
    rows = practice_rows("detox", "validation", 6)
    systems = evaluation.compare(tasks.get_task("detox"), model, tokenizer, rows)
    assert {"base", "adapter", "copied", "listed words deleted", "judge's own words deleted", "human"} <= set(systems)
    assert all(len(system["answers"]) == len(system["scores"]) == 6 for system in systems.values())
    assert systems["base"]["answers"] != systems["adapter"]["answers"], "the adapter was judged without being switched on"
    assert systems["copied"]["metrics"]["similarity"].value == pytest.approx(1.0, abs=1e-4)
    assert systems["human"]["metrics"]["exact"].value == 1.0
    for scores in systems["human"]["scores"]:
        assert scores["joint"] == pytest.approx(scores["style"] * max(scores["similarity"], 0) * scores["fluency"])


def test_beams_are_a_system_of_their_own_where_queries_run(adapted):
    _, model, tokenizer = adapted
    found = [set(evaluation.compare(tasks.get_task(name), model, tokenizer, practice_rows(name, "validation", 2), only=("adapter",),
                                    beams=2)) - {"adapter"} for name in ("sql", "instruct")]
    assert found == [{"adapter, 2 beams"}, set()]


def test_a_chat_answer_is_read_fairly():
    sql = tasks.get_task("sql")
    assert evaluation.chat_answer(sql, "Here it is:\n```sql\nSELECT a\nFROM t\n```\nIt works.") == "SELECT a FROM t"
    assert evaluation.chat_answer(sql, "SELECT a FROM t") == "SELECT a FROM t"
    row = {"context": "CREATE TABLE t (a)", "question": "Which a?"}
    assert sql.chat(row) == f"{sql.ask}\n\nCREATE TABLE t (a)\n\nWhich a?"


def test_pairs_see_what_intervals_hide():
    a, b = [1.0] * 20 + [0.0] * 12, [1.0] * 24 + [0.0] * 8
    assert evaluation.bootstrap(a).high > evaluation.bootstrap(b).low
    assert evaluation.difference(b, a).low > 0


def test_a_card_is_kept_up_with_its_numbers(adapted, tmp_path, monkeypatch):
    folder = adapted[0]
    estimate = asdict(evaluation.bootstrap([1.0, 0.0, 1.0, 1.0]))
    evaluated = {"rows": 4, "source": "practice", "base": {"style": estimate}, "adapter": {"joint": estimate}}
    publishing.update_card(folder, evaluation=evaluated, tried=[{"learning rate": "0.001", "joint": "0.750"}])
    card = (folder / "README.md").read_text()
    assert "| base | 0.750 [0.250, 1.000] |  |" in card and "| adapter |  | 0.750 [0.250, 1.000] |" in card
    assert "## What was tried" in card and "| 0.001 | 0.750 |" in card
    before = sorted(path.read_text() for path in folder.glob("*.*") if path.suffix in (".md", ".json"))
    monkeypatch.setattr(publishing, "model_card", lambda record: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WorkbookError, match="its disk is full"):
        publishing.update_card(folder, command="another")
    after = sorted(path.read_text() for path in folder.glob("*.*") if path.suffix in (".md", ".json"))
    assert before == after and not list(folder.glob(".*")), "half an update was left behind"
    with pytest.raises(WorkbookError, match="has no metrics.json"):
        publishing.update_card(tmp_path, examples=[])


def test_the_evaluation_job_judges_an_adapter_and_keeps_its_card(adapted, tiny, tmp_path, jobs):
    result = jobs("evaluate", adapted[0], "-p", f"base_model={tiny}", "-p", "eval_rows=4", "-p", "update_card=true")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    run = next((tmp_path / "runs").glob("evaluate-*"))
    assert json.loads((run / "status.json").read_text())["state"] == "succeeded"
    record = json.loads((adapted[0] / "metrics.json").read_text())
    assert json.loads((run / "metrics.json").read_text())["evaluation"] == record["evaluation"]
    assert record["evaluation"]["rows"] == 4 and "joint" in record["evaluation"]["adapter"] and len(record["examples"]) == 4
    assert (run / "images" / "05-systems.png").exists(), "a job's figure belongs to its run, not to images/"
    assert (adapted[0] / "README.md").read_text().count("**Prompt**") == 4
    for rows in (3, 5):  # the second replaces what the first added
        result = jobs("evaluate", adapted[0], "-p", f"base_model={tiny}", "-p", f"eval_rows={rows}", "-p", "update_card=true",
                      "-p", "adapter_only=true")
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    after = json.loads((adapted[0] / "metrics.json").read_text())
    assert {**after, "more": []} == {**record, "more": []}
    [added] = after["more"]
    assert added["rows"] == 5 and "joint" in added["adapter"] and "base" not in added and "human" in added


def test_what_cannot_be_evaluated_is_refused_before_a_kernel_starts(adapted, tiny, tmp_path, jobs):
    for arguments, said in ((["evaluate", tmp_path / "none"], "none"), (["evaluate", adapted[0]], "base"),
                            (["evaluate", adapted[0], "-p", f"base_model={tiny}", "-p", "task=slq"], "did you mean sql"),
                            (["evaluate", adapted[0], "-p", f"base_model={tiny}", "-p", "eval_rows=-1"], "eval_rows is -1")):
        result = jobs(*arguments)
        assert result.returncode == 2 and said in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_number_beyond_sqlites_integers_is_only_a_wrong_answer():
    same, valid = evaluation.sql_execution(f"SELECT a FROM t WHERE a = {10**30}", "SELECT a FROM t WHERE a = 5",
                                           "CREATE TABLE t (a INTEGER)")
    assert (same, valid) == (False, True)
