"""Model cards: an adapter's README.md, every number in it taken from its metrics.json, and both brought up to date together."""

from __future__ import annotations

import json
import os
from pathlib import Path

from helpers import WorkbookError, base_models, tasks

METRICS, CARD = "metrics.json", "README.md"


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write(folder: Path, record: dict) -> None:
    """metrics.json and the card made from it."""
    card = model_card(record)  # before anything is written: a record that makes no card changes nothing
    write_json(Path(folder) / METRICS, record)
    write_text(Path(folder) / CARD, card)


def update(folder: Path, **changes) -> dict:
    """Change what an adapter's metrics.json says (an evaluation, examples, the data's licence) and its card with it.

    Returns the new record. Raises WorkbookError when the folder has no metrics.json of this project, or the disk is full.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise WorkbookError(f"{folder} has no {METRICS}, so its card cannot be kept up: publish it with notebook 04.")
    record = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    with base_models.disk_errors(Path(folder), "the card"):
        write(folder, record)
    return record


def model_card(record: dict) -> str:
    """The text of a card. record: the content of metrics.json."""
    config = record["config"]
    task = tasks.get_task(config["task"])
    base = base_models.resolve(config["base_model"])
    packed = f" packed into rows of {config['max_length']} tokens" if config.get("packing", "none") != "none" else ""
    rows_a_step = config["batch_size"] * config["gradient_accumulation"] * record["workers"]
    lines = ["---", f"base_model: {base.hub_id or base.name}", "library_name: peft", "pipeline_tag: text-generation",
             "tags: [lora]", "---", "",
             f"# {task.title}: a LoRA adapter for {base.name}", "",
             f"Trained by the LoRA Workbook. Prompt: `{task.template.encode('unicode_escape').decode()}`", "",
             "| | |", "| --- | --- |",
             f"| base model | {base.hub_id or base.name}, revision {record['base_revision']}, licence {base.licence} |",
             f"| data | {record['data_source']}: {record['rows']:,} training rows{packed}. {record['data_licence']} |",
             f"| LoRA | rank {config['rank']}, alpha {config['alpha']}, dropout {config['dropout']:g}, "
             f"{record['trained_parameters']:,} parameters |",
             f"| training | {record['steps']:,} steps of {rows_a_step} rows, learning rate {config['learning_rate']:g} "
             f"{config['schedule']}, {config['optimizer']}, base weights {config['precision']}, computing in "
             f"{record['dtype'].removeprefix('torch.')}, seed {config['seed']} |",
             f"| hardware | {record['hardware']}, {record['workers']} worker(s), {record['training_seconds'] / 60:.1f} minutes |",
             "| adapter licence | Apache-2.0 for the weights; the base model's and the data's licences apply too |"]
    if record.get("command"):
        lines.append(f"| command | `{record['command']}` |")
    lines += ["", "## Measured", ""]
    tables = [one for one in (record.get("evaluation"), *record.get("more", [])) if one]
    for one in tables:
        lines += [*table(one), ""]
    if not tables:
        lines += ["Not evaluated.", ""]
    if record.get("tried"):
        lines += ["## What was tried", "", *_tried(record["tried"]), ""]
    for example in record.get("examples", []):
        lines += [f"**Prompt** ({example['note']})", "", "```", example["prompt"].strip(), "```", "",
                  "adapter:", "", "```", example["adapter"], "```", "", "expected:", "", "```", example["reference"], "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(evaluation: dict) -> list[str]:
    """One evaluation: a line per system, a column per metric, mean with interval; a metric that a system lacks stays empty."""
    systems = {who: metrics for who, metrics in evaluation.items() if isinstance(metrics, dict)}
    names = list(dict.fromkeys(name for metrics in systems.values() for name in metrics))

    def cell(metrics, name):
        if name not in metrics:
            return ""
        return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**metrics[name])

    measured = f", measured on {evaluation['hardware']}" if evaluation.get("hardware") else ""
    return [f"On {evaluation['rows']:,} validation rows of {evaluation['source']}{measured}, greedy decoding; mean with 95% "
            "bootstrap interval.", "", "| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names),
            *("| " + " | ".join([who, *(cell(metrics, name) for name in names)]) + " |" for who, metrics in systems.items())]


def _tried(runs: list[dict]) -> list[str]:
    """The runs that the choice was made from: their settings, and the adapter's metrics on validation rows."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    return ["| " + " | ".join(names) + " |", "| " + " | ".join("---:" for _ in names) + " |",
            *("| " + " | ".join(str(run.get(name, "")) for name in names) + " |" for run in runs)]


def tried(folders: list[Path]) -> list[dict]:
    """What `model_card` shows of runs, from the metrics.json that notebook 04 left in each folder."""
    runs = []
    for folder in folders:
        record = json.loads((Path(folder) / METRICS).read_text(encoding="utf-8"))
        config, adapter = record["config"], record["evaluation"]["adapter"]
        runs.append({"learning rate": f"{config['learning_rate']:g}", "epochs": f"{config['epochs']:g}", "rank": config["rank"],
                     "steps": record["steps"], "minutes": f"{record['training_seconds'] / 60:.1f}",
                     "validation rows": record["evaluation"]["rows"],
                     **{name: f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for name, m in adapter.items()}})
    return runs
