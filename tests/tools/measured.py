"""Write README's tables of measured runs from the runs themselves: python tests/tools/measured.py runs/<job id> …

The table of shipped adapters comes from their metrics.json, that of speed from tests/benchmarks/*.json: both are written every
time.
"""

import json
import sys
from pathlib import Path

import readme

PREBUILT, BENCHMARKS = readme.ROOT / "adapters" / "prebuilt", readme.ROOT / "tests" / "benchmarks"
# What README shows of each task, and the baseline that needs no model: systems of helpers.comparing.
MAIN = {"sql": ("execution", None), "detox": ("joint", "listed words deleted"), "instruct": ("rouge_l", None)}


def figures(metrics: dict, names: tuple[str, ...]) -> str:
    """Those of a system's metrics that are named, each with its interval."""
    return ", ".join(f"{name} {interval(metrics[name])}" for name in names if name in metrics)


def interval(metric: dict) -> str:
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**metric)


def shipped() -> list[str]:
    """A line per shipped adapter: its task's main metric, and the same of the systems it is compared with."""
    table = ["| adapter | metric, validation rows | base | base, own chat template | without a model | adapter |",
             "| --- | --- | --- | --- | --- | --- |"]
    trained = []
    for folder in sorted(PREBUILT.iterdir()):
        record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        trained.append(f"{folder.name} {record['training_seconds'] / 60:.1f} minutes on {record['hardware']}")
        evaluation, (metric, baseline) = record["evaluation"], MAIN[folder.name]
        cells = [interval(evaluation[who][metric]) if who else ""
                 for who in ("base", "base, own chat template", baseline, "adapter")]
        cells[2] += f" ({baseline})" if baseline else ""
        # The record of most rows, where it says which: rows that chose the checkpoint cannot judge it.
        all_rows = max([evaluation, *(record.get("more") or [])], key=lambda one: one["rows"])
        if all_rows is not evaluation:
            cells[3] = f"{interval(all_rows['adapter'][metric])} ({all_rows['rows']:,} rows, {all_rows['source'].split(', ')[1]})"
        table.append(f"| [{folder.name}](adapters/prebuilt/{folder.name}/README.md) | {metric}, {evaluation['rows']:,} rows | "
                     f"{' | '.join(cells)} |")
    return [*table, "", f"Trained with `preset=full_data`: {'; '.join(trained)}. The cards have all metrics, sources, baselines "
            "and commands. Made by `python tests/tools/measured.py` from what `python -m helpers.jobs evaluate "
            "adapters/prebuilt/<name> -p data=… -p update_card=True` wrote."]


def speed() -> list[str]:
    """A line per variant of the training benchmarks: the first of each file is what the others are compared with."""
    table = ["| benchmark | way to train | tokens/s, median [range] | ratio | runs |", "| --- | --- | ---: | ---: | ---: |"]
    files = {name: json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8")) for name in ("training", "packed", "bloom", "llama8b", "qwen8b")}
    for found in files.values():
        for way, one in found["variants"].items():
            speeds = [run["tokens_per_second"] for run in one["runs"]]
            share = one.get("share_of_matrix_rate")
            kind = "bfloat16" if "NVIDIA" in found["hardware"] else "float32"
            share = f"; {share:.0%} of the rate of {kind} matrix products" if share else ""
            memory = f", {one['runs'][0]['peak_gpu_gb']:.1f} GB" if found["arguments"]["suite"].endswith("8b") else ""
            spread = f" [{min(speeds):,.0f}, {max(speeds):,.0f}]" if len(speeds) > 1 else ""
            table.append(f"| {found['arguments']['suite']}, {found['hardware']} | {way}{memory} | {one['median']:,.0f}{spread}"
                         f"{share} | x{one['ratio']:.2f} | {len(speeds)} |")
    unsloth = files["packed"]["variants"]["Unsloth"]["runs"][0]["versions"]
    return [*table, "", "Made by `python tests/benchmarks/training.py --suite …` and `python tests/tools/measured.py`: *rows* "
            "trains short rows of the SQL task on the embedded base model, *packed* 32 rows of 1,024 tokens a step on the "
            "same, *bloom* 4 such rows on a model of bloom-1b1's shape, *llama8b* and *qwen8b* 2 rows of 2,048 tokens on models of "
            "Llama-3.1-8B's and Qwen3-8B's shapes in 4 bits, all weights random. A ratio is to the first line of its benchmark. "
            "*packed* and *bloom* ran side by side on two GPUs of one host, which may have "
            f"slowed the lines that wait for Python (TRL's). Unsloth is release {unsloth['unsloth']} with torch {unsloth['torch']}, without xformers, its "
            "activation checkpointing off."]


def row(folder: Path) -> tuple[str, int]:
    """A run's line of the table, and its number of validation rows."""
    status, metrics = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("status.json", "metrics.json"))
    assert status["state"] == "succeeded", f"{folder} is {status['state']}"
    evaluation = metrics["evaluation"]
    base, adapter = (figures(evaluation[who], ("exact", "execution", "chrf")) for who in ("base", "adapter"))
    data = "practice" if metrics["data_source"].startswith("practice") else metrics["data_source"]
    given = " ".join(f"-p {k}={v}" for k, v in status["parameters"].items()
                     if k in ("max_rows", "epochs", "preset", "eval_rows") and v not in (None, "default", 100))
    line = (f"| {metrics['config']['task']} {given} | {data}, {metrics['rows']:,} rows | {metrics['hardware']} | "
            f"{status['seconds'] / 60:.1f} | "
            f"{metrics['training_seconds'] / 60:.1f} | {base} | {adapter} |")
    return line, evaluation["rows"]


def main(folders: list[str]) -> None:
    if folders:
        rows = [row(Path(folder)) for folder in folders]
        counts = ", ".join(sorted({str(count) for _, count in rows}))
        readme.put("measured", "\n".join([
            f"Measured on validation rows ({counts} per task), with 95% intervals:", "",
            "| job | training data | hardware | minutes in all | of these training | base | adapter |",
            "| --- | --- | --- | ---: | ---: | --- | --- |", *(line for line, _ in rows), "",
            "Made by `python -m helpers.jobs run …` and `python tests/tools/measured.py runs/<job id> …`."]))
    readme.put("shipped", "\n".join(shipped()))
    readme.put("speed", "\n".join(speed()))


if __name__ == "__main__":
    main(sys.argv[1:])
