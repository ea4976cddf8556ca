"""Fine-tuning: configs checked before anything is loaded, the loss is the loss, killed runs go on, adapters publish whole."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch._functorch import config as functorch_config

from helpers import WorkbookError, base_models, data, publishing, recipes, tasks, trainer, training
from helpers.fast import attention, packing, recorded


def config(tiny, **changes):
    settings = {"task": "sql", "base_model": str(tiny), "max_rows": 64, "max_steps": 6, "checkpoint_steps": 2, **changes}
    return recipes.FineTuneConfig.from_parameters(**settings)


def train(chosen, folder, resume=False):
    return training.train(chosen, *training.load_inputs(chosen), folder, resume)


def practice_rows(task, split, n):
    return data.load_rows(task, "practice", split, n).rows


def test_presets_fill_what_is_left_open():
    default = recipes.FineTuneConfig.from_parameters(task="sql")
    assert (default.precision, default.rank, default.packing) == ("4bit", 16, "none")
    reference = recipes.FineTuneConfig.from_parameters(task="instruct", preset="reference", rank=4)
    assert (reference.packing, reference.data_fraction, reference.rank, reference.alpha) == ("wrapped", 0.3, 4, 32)
    assert reference.optimizer == "paged_adamw_32bit"
    assert recipes.FineTuneConfig.from_parameters(task="detox", preset="reference").epochs == 4.0


def test_zero_is_zero_and_none_is_the_presets():
    chosen = recipes.FineTuneConfig.from_parameters(task="sql", preset="reference", dropout=0, rank=None)
    assert (chosen.dropout, chosen.rank, recipes.PRESETS["reference"]["dropout"]) == (0, 16, 0.05)


@pytest.mark.parametrize("precision", ["full", "4bit"])
def test_training_gives_the_base_model_back(tiny, tmp_path, precision):
    """The notebook goes on with the model that it loaded: same logits, no LoRA left, one base model in memory."""
    chosen = config(tiny, precision=precision, max_steps=2, compile=precision == "full")
    rows, model, tokenizer = training.load_inputs(chosen)
    ids = tokenizer("SELECT name FROM people", return_tensors="pt")["input_ids"].to(model.device)
    with torch.inference_mode():
        before = model(ids).logits
    training.train(chosen, rows, model, tokenizer, tmp_path / "run")
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    assert not [name for name, _ in model.named_modules() if "lora" in name] and not model.training
    adapted = PeftModel.from_pretrained(model, tmp_path / "run" / "trained").eval()
    with torch.inference_mode():
        assert not torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"task": "slq"}, "did you mean sql"), ({"preset": "fast"}, "preset is 'fast'"), ({"rank": -1}, "rank is -1"),
    ({"learning_rate": 5.0}, "learning_rate is 5.0"), ({"precision": "8bit"}, "precision is '8bit'"),
    ({"base_model": "gpt-9"}, "base_model 'gpt-9' is unknown"), ({"data": "no.jsonl"}, "not an existing file"),
    ({"max_rows": -7}, "max_rows is -7"), ({"dropout": 1.5}, "dropout is 1.5"), ({"rang": 3}, "'rang' is unknown"),
    ({"patience": 0}, "patience is 0: use a number from 1 to"), ({"validation_rows": -1}, "validation_rows is -1"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd'"), ({"data_fraction": 2.0}, "data_fraction is 2.0"),
])
def test_wrong_values_are_named_before_anything_is_loaded(wrong, said):
    with pytest.raises(WorkbookError, match=said):
        recipes.FineTuneConfig.from_parameters(**{"task": "sql", **wrong})


@pytest.mark.parametrize("architecture", ["tiny", "tiny_bloom"])
def test_the_loss_equals_the_models_own(architecture, request):
    """Dropping the prompt's logits changes neither loss nor gradients, in either architecture."""
    model, tokenizer = base_models.load(str(request.getfixturevalue(architecture)), dtype=torch.float32, device="cpu")
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 6), 512)
    batch = data.Collator(tokenizer.pad_token_id)(encoded)
    weight = model.get_input_embeddings().weight
    results = []
    for loss_of in (lambda: model(**batch).loss, lambda: trainer.completion_loss(model, batch)):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        results.append((loss.item(), weight.grad.clone()))
    # Near 10.8 neighbouring float32 numbers are 1e-6 apart, and the two sums run in another order.
    assert results[0][0] == pytest.approx(results[1][0], abs=4e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)
    assert not model.get_output_embeddings()._forward_pre_hooks, "the hook was left behind"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("architecture", ["tiny", "tiny_bloom"])
def test_packed_documents_train_like_rows_of_their_own(architecture, compiled, request):
    """One packed batch has the loss and the gradients of the same rows padded: documents do not see each other."""
    model, tokenizer = base_models.load(str(request.getfixturevalue(architecture)), dtype=torch.float32, device="cpu")
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 24), 512)
    packed = packing.pack(Dataset.from_list(encoded), 512, "documents")
    assert len(packed) < 12 and max(map(len, packed["seq_lengths"])) > 1
    batches = [data.Collator(tokenizer.pad_token_id)(encoded),
               packing.PackedCollator(tokenizer.pad_token_id, 512)(list(packed))]
    weight = model.get_input_embeddings().weight
    results = []
    cross_entropy = trainer.summed_cross_entropy
    for batch in batches:
        if compiled and "document" in batch:
            torch._dynamo.reset()
            recorded.compile_blocks(model)
            cross_entropy = torch.compile(cross_entropy, dynamic=True)
        model.zero_grad()
        loss = trainer.completion_loss(model, batch, summed=cross_entropy)
        loss.backward()
        results.append((loss.item(), weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], abs=2e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["tiny", "tiny_bloom"])
def test_wrapped_rows_are_one_text_each_and_keep_every_token(architecture, request):
    model, tokenizer = base_models.load(str(request.getfixturevalue(architecture)), dtype=torch.float32, device="cpu")
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 24), 512)
    rows = list(packing.pack(Dataset.from_list(encoded), 256, "wrapped"))
    stream = [token for row in encoded for token in row["input_ids"]]
    assert [token for row in rows for token in row["input_ids"]] == stream
    assert all(len(row["input_ids"]) == 256 for row in rows[:-1]) and 0 < len(rows[-1]["input_ids"]) < 256
    collate = packing.PackedCollator(tokenizer.pad_token_id, 256)
    whole, padded = collate(rows[:2]), collate(rows[-2:])
    assert whole.keys() == padded.keys(), "a compiled model would be compiled again for the one row that is short"
    expected = []
    for batch, last in ((whole, 256), (padded, len(rows[-1]["input_ids"]))):
        assert batch["input_ids"].shape == (2, 256) and "document" not in batch
        mask = (torch.arange(256) < torch.tensor([[256], [last]])).long()
        with torch.inference_mode():
            expected.append(model(input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=mask).loss.item())
            assert trainer.completion_loss(model, batch).item() == pytest.approx(expected[-1], abs=2e-6)
    assert attention.use_plain_causal_attention(model) == (architecture == "tiny")  # BLOOM has its own
    for batch, loss in zip((whole, padded), expected, strict=True):
        with torch.inference_mode():
            assert trainer.completion_loss(model, batch).item() == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_plain_causal_attention_leaves_masks_and_generation_as_they_were(architecture, tmp_path):
    """Only a batch with neither mask nor cache is changed, and it sees no future."""
    base = make_tiny(tmp_path / architecture, architecture)
    model, tokenizer = base_models.load(str(base), dtype=torch.float32, device="cpu")
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 5 + [1] * 11, [1] * 16])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    def results():
        with torch.inference_mode():
            return [model(ids, attention_mask=mask, use_cache=False).logits, model(ids, use_cache=False).logits,
                    model.generate(ids, attention_mask=mask, **settings), model.generate(ids, **settings)]

    before = results()
    assert attention.use_plain_causal_attention(model)
    for one, other in zip(before, results(), strict=True):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
        torch.testing.assert_close(model(changed, use_cache=False).logits[:, :-1], before[1][:, :-1])


def test_a_recorded_run_trains_all_modules_in_training_mode(tiny, tmp_path):
    chosen = config(tiny, packing="wrapped", max_length=256)
    model, tokenizer = base_models.load(str(tiny))
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 24), 256)
    trained_by = training.make_trainer(chosen, model, tokenizer, encoded, tmp_path)
    trained_by.__class__, seen = recorded.RecordedTrainer, []  # three steps warm up first, so this runs on a CPU
    loss_of = trained_by.compute_loss

    def noted(model, *given, **named):
        seen.append({module.training for module in model.modules()})
        return loss_of(model, *given, **named)

    trained_by.compute_loss = noted
    batch = trained_by.data_collator(list(trained_by.train_dataset)[:2])
    losses = [trained_by.training_step(trained_by.model, batch, torch.tensor(100.0)).item()]
    trained_by.__class__ = trainer.CompletionTrainer
    losses.append(trained_by.training_step(trained_by.model, batch, torch.tensor(100.0)).item())
    assert seen == [{True}, {True}] and losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("architecture", "changes"), [
    ("mistral", {}), ("qwen3", {"use_sliding_window": True, "max_window_layers": 1})])
def test_layers_that_see_a_window_keep_their_mask(architecture, changes, tmp_path):
    base = make_tiny(tmp_path / "windowed", architecture, sliding_window=8, **changes)
    model, _ = base_models.load(str(base), dtype=torch.float32, device="cpu")
    assert not attention.use_plain_causal_attention(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "completion_only"), [
    ("wrapped", True), ("wrapped", False), ("documents", True), ("documents", False)])
def test_batches_of_one_shape_score_the_same(kind, completion_only, tiny):
    """Short batches are filled up with padding, and scored places with some that count for nothing."""
    model, tokenizer = base_models.load(str(tiny), dtype=torch.float32, device="cpu")
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 24), 512)
    if not completion_only:
        encoded = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in encoded]
    rows = list(packing.pack(Dataset.from_list(encoded), 256, kind))
    most = packing.most_scored([row["labels"] for row in rows], 4)
    assert most == max(len(packing.PackedCollator(0, 256)(list(four))["places"])
                       for four in itertools.combinations(rows, 4))
    loose, fixed = (packing.PackedCollator(tokenizer.pad_token_id, 256, *given) for given in ((), (4, most)))
    shapes = [{name: tensor.shape for name, tensor in fixed(rows[:n]).items()} for n in (1, 2, 4)]
    assert shapes[0] == shapes[1] == shapes[2] and shapes[0]["input_ids"] == (4, 256)
    assert ("places" in shapes[0]) == completion_only and shapes[0]["targets"] == ((most,) if completion_only else (1024,))
    with torch.inference_mode():
        losses = [trainer.completion_loss(model, collate(rows[:2])).item() for collate in (loose, fixed)]
        nothing = trainer.completion_loss(model, fixed([]))
    # All places of a row are summed in another order than those that are picked out.
    assert losses[0] == pytest.approx(losses[1], abs=1e-6 if completion_only else 4e-6) and nothing.item() == 0


def test_steps_are_recorded_only_where_nothing_changes_between_them(tiny):
    good = {"packing": "wrapped", "compile": True}
    assert recorded.records_steps(config(tiny, **good), "llama")
    assert recorded.records_steps(config(tiny, **good), "bloom")
    assert recorded.records_steps(config(tiny, **good | {"packing": "documents"}), "llama")
    for changes, kind in (({"packing": "none"}, "llama"), ({"packing": "documents"}, "bloom"), ({}, "mistral"),
                          ({"gradient_accumulation": 2}, "llama")):
        assert not recorded.records_steps(config(tiny, **good | changes), kind), changes


@pytest.mark.parametrize("architecture", ["tiny", "tiny_bloom"])
def test_compiled_blocks_store_less_and_compute_the_same(architecture, request):
    """Fewer activations wait for the backward pass: the bytes of all tensors that it is handed, without the weights."""
    model, _ = base_models.load(str(request.getfixturevalue(architecture)), dtype=torch.float32, device="cpu")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    ids = torch.randint(5, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(64) < 62, -100)  # few logits
    batch, stored, gradients = {"input_ids": ids, "labels": labels}, [], []
    for share in (None, 0.9, 0.0):
        torch._dynamo.reset()
        if share is not None:
            recorded.compile_blocks(model, stored=share)
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trainer.completion_loss(model, batch)
        model.zero_grad()
        loss.backward()
        stored.append(sum(size for place, size in kept.items() if place not in weights))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert stored[0] > 1.2 * stored[1] > 1.4 * stored[2], stored
    assert functorch_config.activation_memory_budget == 0
    recorded.undo_compile(model)
    assert functorch_config.activation_memory_budget == 1, "a caller's own torch.compile stores as before"
    for one in gradients[1:]:
        for a, b in zip(gradients[0], one, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_a_recording_gets_every_batch_and_hands_out_its_gradients(monkeypatch):
    """The bookkeeping around a graph, with one that computes on a CPU; the test below records a real one where there is a GPU."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def loss_of(batch):
        return (weight * batch["x"]).sum() * batch["count"]

    class Graph:
        def replay(self):
            step.loss.copy_(loss_of(step.batch).detach())
            step.gradients[0].copy_(step.batch["x"].sum(0) * step.batch["count"])

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    step = recorded.RecordedStep(loss_of, [weight], warm_up=2)
    for i in range(5):
        batch = {"x": torch.tensor([[1.0 + i, 2.0], [0.5, 3.0 * i]]), "count": torch.tensor(0.5)}
        loss = step(batch)
        assert loss == loss_of(batch) and not loss.requires_grad and (step.graph is not None) == (i >= 2)
        torch.testing.assert_close(weight.grad, batch["x"].sum(0) / 2)
        weight.grad = None  # as a trainer does


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize(("architecture", "changes"), [
    ("tiny", {}), ("tiny_bloom", {}), ("tiny", {"packing": "documents"}), ("tiny", {"precision": "4bit"}),
    ("tiny_bloom", {"precision": "4bit"}), ("tiny", {"completion_only": False})])
def test_a_recorded_run_learns_what_an_unrecorded_one_does(architecture, changes, request, tmp_path, monkeypatch):
    """Same losses step by step, in both architectures; rows differ from step to step, so a graph stuck on one batch shows."""
    chosen = config(request.getfixturevalue(architecture), **{"packing": "wrapped", "precision": "full", "compile": True,
                                                              "max_steps": 12, "max_length": 256, "batch_size": 2,
                                                              "learning_rate": 1e-2, **changes})
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    with_graph = train(chosen, tmp_path / "recorded")["loss_log"]
    assert len(replays) == 9 and len(set(map(id, replays))) == 1, "three steps warm up, one recording serves all others"
    monkeypatch.setattr(recorded, "records_steps", lambda *_: False)
    without = train(chosen, tmp_path / "not")["loss_log"]
    assert len(replays) == 9 and len({loss for _, loss in with_graph}) == 12
    for (_, one), (_, other) in zip(with_graph, without, strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def test_a_model_without_positions_is_not_packed(tmp_path):
    base = make_tiny(tmp_path / "tiny-mpt", "mpt")
    with pytest.raises(WorkbookError, match="packing='documents' cannot be used with .*tiny-mpt"):
        train(config(base, packing="documents"), tmp_path / "run")


def test_accumulated_batches_train_like_one_large_batch(tiny, tmp_path):
    once = train(config(tiny, batch_size=8), tmp_path / "once")
    twice = train(config(tiny, batch_size=4, gradient_accumulation=2), tmp_path / "twice")
    for (_, a), (_, b) in zip(once["loss_log"], twice["loss_log"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_run_learns_is_repeatable_and_its_adapter_is_what_was_trained(tiny, tmp_path):
    chosen = config(tiny, max_steps=30, learning_rate=3e-2, precision="full")
    first = train(chosen, tmp_path / "first")
    assert first["final_loss"] < first["loss_log"][0][1] - 0.1, "the loss did not fall"
    assert train(chosen, tmp_path / "again")["loss_log"] == first["loss_log"]
    model, tokenizer = base_models.load(chosen.base_model, chosen.precision)
    trained = PeftModel.from_pretrained(model, tmp_path / "first" / "trained").eval()
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 64), 512)
    batch = {name: tensor.to(model.device) for name, tensor in data.Collator(tokenizer.pad_token_id)(encoded).items()}
    with torch.inference_mode():
        with_adapter = trainer.completion_loss(trained, batch).item()
        with trained.disable_adapter():
            without = trainer.completion_loss(trained, batch).item()
    assert with_adapter < without - 0.1
    with pytest.raises(WorkbookError, match="already holds a training run"):
        train(chosen, tmp_path / "first")
    with pytest.raises(WorkbookError, match="was made with seed=0, not 1"):
        train(config(tiny, max_steps=30, learning_rate=3e-2, precision="full", seed=1), tmp_path / "first",
                              resume=True)


def test_the_adapter_of_a_4bit_base_trains_in_float32(tiny, tmp_path):
    chosen = config(tiny)
    model, tokenizer = base_models.load(str(tiny), "4bit")
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 8), 512)
    made = training.make_trainer(chosen, model, tokenizer, encoded, tmp_path)
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(("steps", "checkpoint", "logged"), [
    (80, 20, 1), (700, 20, 5), (208, 1, 1), (2100, 20, 20), (5000, 7, 7)])
def test_checkpoints_stand_where_a_loss_is_logged(tiny, tmp_path, steps, checkpoint, logged):
    """Otherwise a resumed run would log the mean of fewer steps, and its loss log would not be that of a whole run."""
    chosen = config(tiny, max_steps=steps, checkpoint_steps=checkpoint, precision="full")
    model, tokenizer = base_models.load(str(tiny))
    encoded, _ = data.encode_rows(tokenizer, tasks.TASKS["sql"], practice_rows("sql", "train", 8), 512)
    assert training.make_trainer(chosen, model, tokenizer, encoded, tmp_path).args.logging_steps == logged


def test_every_epoch_has_its_own_order_and_every_row_once():
    lengths = [random.Random(i).randint(5, 100) for i in range(1003)]
    sampler = trainer.LengthSampler(lengths, 8, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again and sorted(first) == list(range(1003))
    sampler.epoch = 1
    assert list(sampler) != first
    batches = [first[i:i + 8] for i in range(0, 1000, 8)]
    waste = sum(8 * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches) / sum(lengths)
    random_order = [list(range(i, i + 8)) for i in range(0, 1000, 8)]
    random_waste = sum(8 * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in random_order) / sum(lengths)
    assert waste < random_waste / 3, "batches of like length waste little padding"
    most = max(sum(lengths[i] > 90 for i in b) for b in batches)
    assert most < 8, "a batch of long rows alone is one kind of row alone"


def test_only_a_complete_checkpoint_is_resumed(tmp_path):
    for step, complete in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "complete.json").write_text("{}")
    assert trainer.last_checkpoint(tmp_path).name == "checkpoint-10"
    assert trainer.last_checkpoint(tmp_path / "none") is None


def test_publishing_is_all_or_nothing(tiny, tmp_path, monkeypatch):
    chosen = config(tiny, max_steps=2)
    train(chosen, tmp_path / "run")
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    measured = {"rows": 10, "source": "practice", "main": "exact", "base": {"exact": estimate},
                "adapter": {"exact": {**estimate, "value": 0.75}}}
    target = tmp_path / "adapters" / "mine"
    with monkeypatch.context() as broken:
        broken.setattr("helpers.publishing.model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(WorkbookError, match="its disk is full"):
            publishing.publish(tmp_path / "run", target, measured)
    assert list(target.parent.iterdir()) == [], "a half-written adapter was left behind"
    publishing.publish(tmp_path / "run", target, measured)
    assert sorted(p.name for p in target.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors",
                                                        "metrics.json"]
    card = (target / "README.md").read_text()
    assert "| adapter | 0.750 [0.400, 0.600] |" in card and "base_model: tiny-llama" in card and str(tmp_path) not in card
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    with pytest.raises(WorkbookError, match="already exists"):
        publishing.publish(tmp_path / "run", target, measured)


def small(tiny):
    given = {"base_model": tiny, "max_rows": 64, "max_steps": 60, "checkpoint_steps": 5, "dropout": 0.1, "eval_rows": 2}
    return [part for name, value in given.items() for part in ("-p", f"{name}={value}")]


def the_run(tmp_path, exclude=()):
    return next(p for p in (tmp_path / "runs").iterdir() if p.name not in exclude and (p / "status.json").exists())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_job_goes_on_and_ends_with_the_same_loss(tiny, tmp_path, jobs, kill):
    process = jobs("run", "sql", *small(tiny), background=True)
    deadline = time.time() + 240
    while not list((tmp_path).glob("runs/*/checkpoints/checkpoint-*/complete.json")):
        assert time.time() < deadline and process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.02)
    os.kill(process.pid, kill)
    process.communicate(timeout=60)
    interrupted = the_run(tmp_path)
    assert not (interrupted / "trained").exists(), "the run was over before it was killed"
    assert not list((tmp_path / "adapters").glob("*")), "an interrupted run published something"
    jobs("status")
    assert json.loads((interrupted / "status.json").read_text())["state"] == "interrupted"
    resumed = jobs("run", "sql", "--resume")
    assert resumed.returncode == 0 and "Going on from checkpoint-" in resumed.stdout, resumed.stdout[-2000:] + resumed.stderr
    whole = jobs("run", "sql", *small(tiny))
    assert whole.returncode == 0, whole.stdout[-2000:]
    records = [json.loads((folder / "trained" / "metrics.json").read_text())
               for folder in (interrupted, the_run(tmp_path, exclude=[interrupted.name]))]
    assert [(len(record["loss_log"]), len(record["validation_log"])) for record in records] == [(60, 13)] * 2
    for name in ("loss_log", "validation_log", "kept_step"):
        assert records[0][name] == records[1][name], "the resumed run took another path"


def test_the_reference_recipe_runs_on_a_bloom(tiny_bloom, tmp_path, jobs):
    result = jobs("run", "sql", "-p", f"base_model={tiny_bloom}", "-p", "preset=reference", "-p", "max_steps=2",
                  "-p", "max_rows=200", "-p", "eval_rows=2")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    adapter = next((tmp_path / "adapters").iterdir())
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == [
        "dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["run", "sqll"], "sql"), (["run", "sql", "-p", "rnk=3"], "rank"), (["run", "sql", "-p", "rank=x"], "rank"),
    (["run", "sql", "-p", "base_model=nope"], "base_model 'nope' is unknown"),
    (["run", "sql", "-p", "data=nope.jsonl"], "not an existing file"),
    (["run", "sql", "--workers", "0"], "whole number"),
])
def test_bad_input_is_one_sentence_and_creates_nothing(arguments, said, tmp_path, jobs):
    result = jobs(*arguments)
    assert result.returncode == 2 and said in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_an_output_folder_that_exists_is_refused_at_once(tmp_path, jobs):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    result = jobs("run", "sql", "-p", f"adapter_dir={tmp_path / 'taken'}")
    assert result.returncode == 2 and "already exists" in result.stderr
    assert Path(tmp_path / "taken" / "file").read_text(encoding="utf-8") == "mine"


def test_rows_longer_than_the_context_end_in_one_sentence(tiny, tmp_path, jobs):
    row = {"context": "CREATE TABLE t (a INTEGER)", "question": "why " * 700, "answer": "SELECT a FROM t"}
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({**row, "split": split}) + "\n" for split in ("train", "validation")))
    result = jobs("run", "sql", "-p", f"base_model={tiny}", "-p", f"data={path}", "-p", "eval_rows=1")
    assert result.returncode == 1 and "All 1 rows are longer than max_length=512" in result.stderr + result.stdout
    assert not list((tmp_path / "adapters").glob("*"))


def test_a_run_that_diverges_ends_with_its_step_and_publishes_nothing(tiny, tmp_path, monkeypatch):
    """One infinite weight in the base model: seen before training, and if it were not, by the loss."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkbookError, match="results are not finite numbers, so its weights may not be"):
        train(config(broken, precision="full"), tmp_path / "refused")
    monkeypatch.setattr("helpers.probe.check", lambda model: None)
    with pytest.raises(WorkbookError, match=r"diverged: at step \d+ the (loss|grad_norm) is (nan|inf).*learning_rate"):
        train(config(broken, precision="full"), tmp_path / "run")
    assert not (tmp_path / "run" / "trained").exists()


def test_a_run_that_learns_nothing_is_no_success(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as still:
        still.setattr(trainer, "completion_loss", lambda model, batch, *rest: next(  # a loss that no weight moves
            p for p in model.parameters() if p.requires_grad).sum() * 0 + 1.0)
        with pytest.raises(WorkbookError, match="Nothing was learned: after 6 steps every lora_B is still zero"):
            train(config(tiny, precision="full"), tmp_path / "still")
    assert not (tmp_path / "still" / "trained").exists()
    rows = data.load_rows("sql", "practice", "train", 8)
    chosen = config(tiny, precision="full", max_rows=8, max_steps=None)  # one step: no warm-up may swallow it
    _, model, tokenizer = training.load_inputs(chosen)
    one = training.train(chosen, rows, model, tokenizer, tmp_path / "one")
    assert one["steps"] == 1 and one["warnings"] == []


def test_a_loss_that_did_not_fall_is_said_on_the_card(tiny, tmp_path, monkeypatch):
    real, rising = trainer.completion_loss, itertools.count()
    monkeypatch.setattr(trainer, "completion_loss", lambda *given: real(*given) + next(rising))
    record = train(config(tiny, precision="full"), tmp_path / "run")
    assert record["warnings"] and "did not fall" in record["warnings"][0]
    published = publishing.publish(tmp_path / "run", tmp_path / "mine", {})
    assert "**Warning.** The training loss did not fall" in (published / "README.md").read_text()


def test_a_recipe_that_the_base_cannot_follow_is_refused_when_the_model_is_loaded(tiny):
    model, _ = base_models.load(str(tiny))
    assert "q_proj" in training.check_fits(config(tiny), model)
    for wrong, said in (({"target_modules": "q_prj"}, "target_modules names 'q_prj'"), ({"max_length": 4096}, "reads at most 512")):
        with pytest.raises(WorkbookError, match=said):
            training.check_fits(config(tiny, **wrong), model)


def test_a_run_is_resumed_with_the_rows_and_the_base_that_it_began_with(tiny, tmp_path):
    rows, base = tmp_path / "rows.jsonl", tmp_path / "base"
    shutil.copytree(tiny, base)
    text = "".join(json.dumps(row) + "\n" for row in practice_rows("sql", "train", 40))
    rows.write_text(text)
    chosen = config(base, data=str(rows), precision="full", max_steps=2)
    train(chosen, tmp_path / "run")
    rows.write_text(text.replace("SELECT", "select", 1))
    with pytest.raises(WorkbookError, match="was made with data_revision="):
        train(chosen, tmp_path / "run", resume=True)
    rows.write_text(text)
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkbookError, match="was made with base_revision="):
        train(chosen, tmp_path / "run", resume=True)


def test_what_another_launcher_left_in_the_environment(tiny, tmp_path, monkeypatch):
    """RANK alone means nothing; WORLD_SIZE without a group is one sentence, and nothing is half done."""
    chosen = config(tiny, precision="full", max_steps=2)
    monkeypatch.setenv("RANK", "1")
    train(chosen, tmp_path / "alone")
    assert (tmp_path / "alone" / "trained" / "adapter_model.safetensors").is_file()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WorkbookError, match="WORLD_SIZE is 2 in the environment, but .* unset RANK"):
        train(chosen, tmp_path / "two")
    assert not (tmp_path / "two").exists()
