"""The validation loss while training: it is measured right, changes nothing in the training, chooses the checkpoint, and can end it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_training import config, practice_rows

from helpers import WorkbookError, base_models, data, publishing, tasks, trainer, training
from helpers.fast import recorded

WEIGHTS = "adapter_model.safetensors"


def train(chosen, folder, validation=(), resume=False):
    return training.train(chosen, *training.load_inputs(chosen), folder, resume, validation)


@pytest.fixture(scope="module")
def watched():
    """13 rows: no multiple of a batch, and of unlike lengths."""
    return practice_rows("sql", "validation", 113)[100:]


@pytest.fixture(scope="module")
def overfitted(tiny, tmp_path_factory, watched):
    """A learning rate so high that the validation loss soon rises: (recipe, folder, record)."""
    chosen = config(tiny, precision="full", max_rows=8, max_steps=40, checkpoint_steps=4, learning_rate=0.1, dropout=0.1)
    folder = tmp_path_factory.mktemp("overfitted")
    return chosen, folder, train(chosen, folder, watched)


@pytest.mark.parametrize("changes", [
    {"precision": "full"}, {"precision": "4bit"}, {"precision": "full", "packing": "documents", "completion_only": False},
    {"precision": "full", "packing": "wrapped", "gradient_accumulation": 2, "gradient_checkpointing": True}],
    ids=["full", "4bit", "documents", "wrapped"])
def test_a_run_with_validation_takes_the_same_steps(changes, tiny, tmp_path, watched):
    chosen = config(tiny, max_steps=6, dropout=0.2, learning_rate=1e-2, batch_size=4, **changes)
    without, seen = (train(chosen, tmp_path / name, rows) for name, rows in (("without", ()), ("with", watched)))
    assert seen["loss_log"] == without["loss_log"] and len({loss for _, loss in seen["loss_log"]}) == 6
    assert [step for step, _ in seen["validation_log"]] == [0, 2, 4, 6]
    assert without["validation_log"] == [] and without["kept_step"] == 6


def test_an_evaluation_leaves_4bit_weights_as_they_are_on_every_cpu(tiny, tmp_path, watched, monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes packs them for inference, which no gradient passes; here it is told of one."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, tokenizer = base_models.load(str(tiny), "4bit", device="cpu")
    assert [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model(**tokenizer("SELECT name FROM people", return_tensors="pt"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_compiled_steps_are_not_compiled_again_for_the_validation(tiny, tmp_path, watched):
    chosen = config(tiny, precision="full", packing="documents", compile=True, max_length=256, max_steps=4, dropout=0.1)
    runs, graphs = [], []
    for name, rows in (("without", ()), ("with", watched)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs.append(train(chosen, tmp_path / name, rows)["loss_log"])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert runs[0] == runs[1] and graphs[0] == graphs[1] > 0


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_validation_loss_is_the_mean_over_all_scored_tokens(completion_only, tiny, tmp_path, watched):
    """Not the mean of the batches' means: the last batch has one row."""
    chosen = config(tiny, precision="full", batch_size=4, max_steps=2, completion_only=completion_only)
    record = train(chosen, tmp_path / "run", watched)
    model, tokenizer = base_models.load(str(tiny))
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], watched, 512)
    batch = data.Collator(tokenizer.pad_token_id)(encoded)
    if not completion_only:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert record["validation_log"][0] == (0, pytest.approx(expected, abs=2e-6))


def test_the_best_checkpoint_is_what_is_saved(overfitted):
    _, folder, record = overfitted
    losses = dict(record["validation_log"])
    assert record["kept_step"] == min(losses, key=losses.get) < 36, "the validation loss was to rise before the end"
    saved, best, last = (load_file(path / WEIGHTS) for path in (
        folder / "trained", *(folder / "checkpoints" / f"checkpoint-{step}" for step in (record["kept_step"], 40))))
    assert saved.keys() == best.keys()
    assert all(torch.equal(tensor, best[name].bfloat16()) for name, tensor in saved.items())
    assert not all(torch.equal(tensor, last[name].bfloat16()) for name, tensor in saved.items())


def test_training_ends_when_patience_is_at_its_end_also_when_resumed(overfitted, tmp_path, watched):
    """The first run, of no patience, says after which evaluation it must end."""
    chosen, _, patient = overfitted
    steps, losses = zip(*patient["validation_log"], strict=True)
    end = next(i for i in range(2, len(losses)) if min(losses[:i + 1]) == min(losses[:i - 1]))
    impatient = {**{name: getattr(chosen, name) for name in chosen.__dataclass_fields__}, "patience": 2}
    chosen = type(chosen)(**impatient)
    record = train(chosen, tmp_path / "run", watched)
    assert record["steps"] == steps[end] < 40
    assert record["validation_log"] == patient["validation_log"][:end + 1]
    shutil.rmtree(tmp_path / "run" / "trained")
    shutil.rmtree(trainer.last_checkpoint(tmp_path / "run" / "checkpoints"))
    again = train(chosen, tmp_path / "run", resume=True)  # with the rows that the run began with
    for name in ("loss_log", "validation_log", "kept_step", "steps"):
        assert again[name] == record[name], name


def test_two_workers_measure_what_one_does_and_train_as_without(tiny, tmp_path, watched):
    given = {"precision": "full", "max_steps": 4, "dropout": 0.1, "learning_rate": 1e-2}
    with_curve, without = (training.run(config(tiny, batch_size=4, **given), tmp_path / name, 2, validation=rows)
                           for name, rows in (("with", watched), ("without", ())))
    assert with_curve["loss_log"] == without["loss_log"] and with_curve["workers"] == 2
    alone = training.run(config(tiny, batch_size=8, **given | {"max_steps": 2}), tmp_path / "alone", validation=watched)
    assert with_curve["validation"]["rows"] == 13 and [step for step, _ in with_curve["validation_log"]] == [0, 2, 4]
    assert with_curve["validation_log"][0][1] == pytest.approx(alone["validation_log"][0][1], abs=1e-5)


def test_a_recorded_step_finds_the_model_in_training_mode_after_an_evaluation(tiny, tmp_path, watched):
    chosen = config(tiny, precision="full", packing="wrapped", max_length=256, dropout=0.1)
    model, tokenizer = base_models.load(str(tiny))
    encoded, seen = (data.encode_rows(tokenizer, tasks.TASKS["sql"], rows, 256)[0]
                     for rows in (practice_rows("sql", "train", 24), watched))
    made = training.make_trainer(chosen, model, tokenizer, encoded, tmp_path, seen)
    made.__class__ = recorded.RecordedTrainer  # three steps warm up first, so this runs on a CPU
    batch = made.data_collator(list(made.train_dataset)[:2])
    made.training_step(made.model, batch, torch.tensor(100.0))
    first = made.evaluate()
    assert {module.training for module in made.model.modules()} == {True}
    assert made.evaluate() == first, "dropout was on"


def test_the_card_says_which_step_was_kept_and_a_loss_that_did_not_fall(tiny, tmp_path, watched, monkeypatch):
    # Four batches an evaluation. What is popped last is the largest: each evaluation is worse than the one before.
    real, worse = trainer.summed_cross_entropy, [3.0] * 4 + [2.0] * 4 + [1.0] * 4
    monkeypatch.setattr(trainer, "summed_cross_entropy", lambda *given: real(*given) * worse.pop())
    record = train(config(tiny, precision="full", batch_size=4, max_steps=4), tmp_path / "run", watched)
    assert worse == [] and record["kept_step"] == 2
    assert ["validation loss did not fall" in warning for warning in record["warnings"]].count(True) == 1
    published = publishing.publish(tmp_path / "run", tmp_path / "mine", {})
    card, metrics = (published / "README.md").read_text(), json.loads((published / "metrics.json").read_text())
    assert "| kept | step 2, where the loss on 13 other validation rows was lowest: " in card
    assert "**Warning.** The validation loss did not fall" in card
    assert "validation_log" not in metrics and metrics["validation"]["rows"] == 13


def test_without_rows_the_last_step_is_kept_and_that_is_said(tiny, tmp_path, capsys):
    for rows, said in ((0, False), (8, True)):
        record = train(config(tiny, precision="full", max_steps=2, validation_rows=rows), tmp_path / str(rows))
        assert ("no validation rows" in capsys.readouterr().out) == said
        assert record["kept_step"] == 2 and record["validation"] is None
        publishing.publish(tmp_path / str(rows), tmp_path / f"mine-{rows}", {})
        assert "| kept |" not in (tmp_path / f"mine-{rows}" / "README.md").read_text()


def test_patience_needs_a_loss_to_wait_for(tiny):
    with pytest.raises(WorkbookError, match="patience is 2, but validation_rows is 0"):
        config(tiny, patience=2, validation_rows=0)
    with pytest.raises(WorkbookError, match="patience is 2, but validation_rows is 0"):
        config(tiny, patience=2, preset="reference")
