"""From a trained adapter to a folder that others can use: weights, config, metrics.json and a card.

metrics.json is the one record of a run: `training_record` begins it, `publish` adds the evaluation,
and every number of the card comes from it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from helpers import (METRICS, WorkbookError, base_models, disk_errors, read_json, sha256,
                     write_json, write_text)
from helpers.adapter_files import CONFIG, WEIGHTS, read_adapter
from helpers.export_plan import offers
from helpers.preflight import describe
from helpers.recipes import check_free
from helpers.registry import resolve
from helpers.tasks import get_task


def save_adapter(model, base_model: str, folder: Path) -> None:
    """Write a PEFT model's active adapter as bfloat16 safetensors, and a config that names the base
    model, not a path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous()
               for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    lora, base = model.peft_config[model.active_adapter], resolve(base_model)
    lora.save_pretrained(folder)
    changes = {"base_model_name_or_path": base.hub_id or base.name, "inference_mode": True,
               "revision": base_models.revision_of(base_model),
               "target_modules": sorted(lora.target_modules)}
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **changes})


def training_record(config, trainer, rows, used: int) -> dict:
    """What happened in a training run of `used` of the `rows`, as metrics.json keeps it.
    Raises WorkbookError if nothing was learned."""
    kept = trainer.state.best_global_step or trainer.state.global_step
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if not any(p.any() for name, p in trained.items() if "lora_B" in name):
        raise WorkbookError(f"Nothing was learned: after {kept} steps every lora_B is still zero, "
                            "so the adapter changes no answer. Train on more rows, epochs or "
                            "max_steps, or with another learning_rate.")
    log = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    tenth = max(1, len(log) // 10)
    first, last = (sum(loss for _, loss in part) / tenth for part in (log[:tenth], log[-tenth:]))
    falls = [("training", first, last)] if len(log) > 1 else []
    curve, validation = trainer.validation_log(), None
    if curve:
        before, best = curve[0][1], dict(curve)[kept]
        falls.append(("validation", before, best))
        validation = {"rows": len(trainer.eval_dataset), "before": before, "kept": best}
    warnings = [f"The {name} loss did not fall ({before:.3f} at first, {after:.3f} later): the "
                "adapter may have learned nothing of use."
                for name, before, after in falls if after >= before]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "config": dataclasses.asdict(config), "data_source": rows.source,
        "data_licence": rows.licence, "rows": used, "rows_left_out": len(rows.rows) - used,
        "steps": trainer.state.global_step, "final_loss": last, "warnings": warnings,
        "training_seconds": trainer.progress.seconds(), "hardware": base_models.hardware(),
        "workers": trainer.accelerator.num_processes, "dtype": str(base_models.best_dtype()),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "base_revision": base_models.revision_of(config.base_model), "peak_gpu_bytes": peak,
        "kept_step": kept, "validation": validation, "loss_log": log, "validation_log": curve,
    }


def save_trained(model, record: dict, run_dir: Path) -> None:
    """Put adapter and record into ``run_dir/trained``, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=run_dir) as temporary:
        folder = Path(temporary) / "trained"
        save_adapter(model, record["config"]["base_model"], folder)
        write_json(folder / METRICS, record)
        shutil.rmtree(run_dir / "trained", ignore_errors=True)
        os.replace(folder, run_dir / "trained")


def publish(run_dir: Path, adapter_dir: Path, evaluation: dict, examples: list[dict] | None = None,
            command: str = "", preflight: dict | None = None) -> Path:
    """Make `adapter_dir` from ``run_dir/trained``, all or nothing; the run keeps the same record.

    evaluation: what was measured, see `evaluation_table`. examples: rows to show, each with the
    keys note, prompt, adapter and reference. command: how the run was started. preflight: what
    `preflight.preflight` has counted.
    Raises WorkbookError when the folder exists, or a disk is full.
    """
    run_dir, adapter_dir = Path(run_dir), Path(adapter_dir)
    record = read_json(run_dir / "trained" / METRICS)
    del record["loss_log"], record["validation_log"]
    place, colon, path = record["config"]["data"].rpartition(":")
    if os.path.isabs(path):  # the folders of this machine are nobody's business
        record["config"]["data"] = place + colon + Path(path).name
    record |= {"evaluation": evaluation, "command": command, "examples": examples or [],
               "preflight": preflight,
               "weights_sha256": sha256(run_dir / "trained" / WEIGHTS)}  # checked when it is read
    with new_folder(adapter_dir, "the adapter") as folder:
        shutil.copytree(run_dir / "trained", folder, dirs_exist_ok=True)
        write_record(folder, record)
        read_adapter(folder, record["config"]["base_model"])  # as whoever loads it will
    with disk_errors(run_dir, "the adapter"):
        write_json(run_dir / METRICS, {**record, "adapter": adapter_dir.name})
    return adapter_dir


@contextmanager
def new_folder(out: Path, what: str):
    """A folder to fill in a with block, at whose end it becomes `out`, whole or not at all. Raises
    WorkbookError where `out` holds something or its disk is full; `what` names the content."""
    check_free(out)
    with disk_errors(out.parent, what):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=out.parent) as place:
            staging = Path(place) / out.name
            staging.mkdir()
            yield staging
            if out.is_dir():
                out.rmdir()
            os.replace(staging, out)


def write_record(folder: Path, record: dict) -> None:
    """metrics.json and the card made from it. If no card can be made of the record, nothing is
    written."""
    card = model_card(record)
    write_json(folder / METRICS, record)
    write_text(folder / "README.md", card)


def update_card(folder: Path, **changes) -> dict:
    """Change what an adapter's metrics.json says (an evaluation, examples) and its card with it.

    Returns the new record. Raises WorkbookError when the folder has no metrics.json of this
    project, or the disk is full.
    """
    folder = Path(folder)
    if not (folder / METRICS).is_file():
        raise WorkbookError(f"{folder} has no {METRICS}, so its card cannot be updated: publish it "
                            "with notebook 04.")
    record = {**read_json(folder / METRICS), **changes}
    with disk_errors(folder, "the card"):
        write_record(folder, record)
    return record


# --- the card

def model_card(record: dict) -> str:
    """The text of a card. record: the content of metrics.json."""
    task, base = get_task(record["config"]["task"]), resolve(record["config"]["base_model"])
    template = task.template.encode("unicode_escape").decode()
    lines = ["---", f"base_model: {base.hub_id or base.name}", "library_name: peft",
             "pipeline_tag: text-generation", "tags: [lora]", "---", "",
             f"# {task.title}: a LoRA adapter for {base.name}", "",
             f"Trained by the LoRA Workbook. Prompt: `{template}`",
             "", *markdown_table(["", ""], _facts(record, base)), ""]
    for warning in record.get("warnings", []):
        lines += [f"**Warning.** {warning}", ""]
    lines += ["## Measured", ""]
    evaluations = [one for one in (record.get("evaluation"), *record.get("more", [])) if one]
    for evaluation in evaluations:
        lines += [*evaluation_table(evaluation), ""]
    if not evaluations:
        lines += ["Not evaluated.", ""]
    if record.get("tried"):
        names = list(dict.fromkeys(name for run in record["tried"] for name in run))
        rows = [[run.get(name, "") for name in names] for run in record["tried"]]
        lines += ["## What was tried", "", *markdown_table(names, rows, numbers_from=0), ""]
    for example in record.get("examples", []):
        lines += [f"**Prompt** ({example['note']})", "", *_block(example["prompt"].strip()),
                  "adapter:", "", *_block(example["adapter"]),
                  "expected:", "", *_block(example["reference"])]
    offered = [[purpose, f"`{command}`"] for purpose, command in offers("PATH")]
    lines += ["## Take it home", "", *markdown_table(
        ["for", "command of the LoRA Workbook; PATH is this folder"], offered), ""]
    return "\n".join(lines).rstrip() + "\n"


def _facts(record: dict, base) -> list[list[str]]:
    config = record["config"]
    whole = config.get("packing", "none") == "none"
    packed = "" if whole else f" packed into rows of {config['max_length']} tokens"
    rows_a_step = config["batch_size"] * config["gradient_accumulation"] * record["workers"]
    command = [["command", f"`{record['command']}`"]] if record.get("command") else []
    checked = []
    if record.get("preflight"):
        task, found = get_task(config["task"]), record["preflight"]
        checked = [["rows checked", " ".join(describe(found, task, config["max_length"]))]]
    kept = []
    if watched := record.get("validation"):
        kept = [["kept", f"step {record['kept_step']:,}, where the loss on {watched['rows']} other "
                         f"validation rows was lowest: {watched['kept']:.3f} nats per token, "
                         f"{watched['before']:.3f} before training"]]
    return [
        ["base model", f"{base.hub_id or base.name}, revision {record['base_revision']}, licence "
                       f"{base.licence}"],
        ["data", f"{record['data_source']}: {record['rows']:,} training rows{packed}. "
                 f"{record['data_licence']}"],
        *checked,
        ["LoRA", f"rank {config['rank']}, alpha {config['alpha']}, dropout {config['dropout']:g}, "
                 f"{record['trained_parameters']:,} parameters"],
        ["training", f"{record['steps']:,} steps of {rows_a_step} rows, learning rate "
                     f"{config['learning_rate']:g} {config['schedule']}, {config['optimizer']}, "
                     f"base weights {config['precision']}, computing in "
                     f"{record['dtype'].removeprefix('torch.')}, seed {config['seed']}"],
        ["hardware", f"{record['hardware']}, {record['workers']} worker(s), "
                     f"{record['training_seconds'] / 60:.1f} minutes"],
        *kept,
        ["adapter licence", "Apache-2.0 for the weights; the base model's and the data's licences "
                            "apply too"], *command]


def _block(text: str) -> list[str]:
    return ["```", text, "```", ""]


def markdown_table(header: list, rows: list[list], numbers_from: int | None = None) -> list[str]:
    """Lines of a Markdown table; columns from `numbers_from` on are aligned to the right."""
    left = len(header) if numbers_from is None else numbers_from
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    first = "|".join(f" {cell} " if cell else " " for cell in header)
    return [f"|{first}|", *(f"| {' | '.join(map(str, cells))} |" for cells in (rule, *rows))]


def evaluation_table(evaluation: dict) -> list[str]:
    """One evaluation as lines: a row per system, a column per metric, mean with interval.

    evaluation: {"rows", "source", "hardware", "undecidable", system: {metric: {"value", "low",
    "high", "method"}}, ...}. The cell of a metric that a system lacks stays empty.
    """
    systems = {who: metrics for who, metrics in evaluation.items() if isinstance(metrics, dict)}
    names = list(dict.fromkeys(name for metrics in systems.values() for name in metrics))
    rows = []
    for who, metrics in systems.items():
        rows.append([who, *(_interval(metrics[name]) if name in metrics else "" for name in names)])
    measured = f", measured on {evaluation['hardware']}" if evaluation.get("hardware") else ""
    methods = {metric.get("method") for metrics in systems.values() for metric in metrics.values()}
    interval = "interval (Wilson's for shares)" if "wilson" in methods else "bootstrap interval"
    left_out = ""
    if evaluation.get("undecidable"):
        left_out = (f" Left out of execution: {evaluation['undecidable']} (no test database "
                    "distinguishes their query from wrong ones).")
    return [f"On {evaluation['rows']:,} validation rows of {evaluation['source']}{measured}, "
            f"greedy decoding; mean with 95% {interval}.{left_out}", "",
            *markdown_table(["", *names], rows, numbers_from=1)]


def _interval(metric: dict) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**metric)


def tried(folders: list[Path]) -> list[dict]:
    """What `model_card` shows of runs, from the metrics.json that notebook 04 left in each
    folder."""
    runs = []
    for folder in folders:
        record = read_json(Path(folder) / METRICS)
        config, adapter = record["config"], record["evaluation"]["adapter"]
        runs.append({
            "learning rate": f"{config['learning_rate']:g}", "epochs": f"{config['epochs']:g}",
            "rank": config["rank"], "steps": record["steps"],
            "minutes": f"{record['training_seconds'] / 60:.1f}",
            "validation rows": record["evaluation"]["rows"],
            **{name: _interval(metric) for name, metric in adapter.items()}})
    return runs
