"""What decides an adapter's quality: rank, layers, rsLoRA, DoRA, learning rate, rows, batches.

    python tests/benchmarks/variants.py --suite variants --suite rows --json variants.json
    python tests/benchmarks/variants.py --suite recipes --json recipes.json

Every run starts from the same base model and trains on the SQL task's practice rows: same order for
the same seed, cosine schedule after 5% warm-up, AdamW, full precision (on a GPU computed in
bfloat16). The held-out loss is that of 200 validation rows, per scored token; execution is the
share of 100 of them whose answer returns the right rows. Runs share one GPU, so their times say nothing.
Runs that the JSON file holds already are not repeated.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from helpers import base_models, data, scoring, tasks, trainer

STEPS, BATCH, VALIDATION, ANSWERED = 200, 8, 200, 100
PLAIN = "LoRA, rank 16"
VARIANTS = {
    "LoRA, rank 4": dict(r=4), PLAIN: dict(r=16), "LoRA, rank 64": dict(r=64),
    "rsLoRA, rank 64": dict(r=64, use_rslora=True), "DoRA, rank 16": dict(r=16, use_dora=True),
    "LoRA, rank 16, attention only": dict(r=16, only=("q_proj", "k_proj", "v_proj", "o_proj")),
}
LOADED = {}


def cases(suite: str, seeds: int) -> list[dict]:
    """The runs of a suite: what differs from `run`'s defaults."""
    if suite == "variants":
        found = [dict(variant=name, learning_rate=rate)
                 for name in VARIANTS for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)]
    elif suite == "rows":
        found = [dict(variant=PLAIN, learning_rate=1e-3, rows=rows) for rows in (40, 160, 640, 1600)]
    else:  # the main job's: fewer or smaller batches at several learning rates
        found = [dict(variant=PLAIN, learning_rate=rate, batch_size=batch, steps=steps,
                      rows=batch * steps, precision="4bit")
                 for batch, steps in ((8, 80), (4, 80), (4, 120), (2, 160))
                 for rate in (5e-4, 1e-3, 2e-3, 3e-3)]
    return [dict(suite=suite, seed=seed, **case) for case in found for seed in range(seeds)]


def inputs(precision: str):
    """Base model, tokenizer and encoded rows, loaded once in each process."""
    if precision not in LOADED:
        torch.set_num_threads(2)
        model, tokenizer = base_models.load(precision=precision)
        task = tasks.TASKS["sql"]
        held_out = data.load_rows("sql", split="validation", n=VALIDATION).rows
        LOADED[precision] = (model, tokenizer, data.encode_rows(tokenizer, task, held_out, 512)[0],
                             held_out)
    return LOADED[precision]


def run(case: dict) -> dict:
    """Train one adapter and judge it."""
    case = dict(steps=STEPS, batch_size=BATCH, rows=STEPS * BATCH, precision="full") | case
    base, tokenizer, held_out, questions = inputs(case["precision"])
    chosen = data.load_rows("sql", n=case["rows"], seed=case["seed"]).rows
    rows = data.encode_rows(tokenizer, tasks.TASKS["sql"], chosen, 512)[0]
    settings = dict(VARIANTS[case["variant"]])
    layers = base_models.lora_target_modules(base)
    only = settings.pop("only", None)
    torch.manual_seed(case["seed"])
    model = get_peft_model(base, LoraConfig(
        lora_alpha=32, target_modules=[name for name in layers if not only or name.endswith(only)],
        **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    before = loss(model, held_out)
    train(model, rows, case)
    after = loss(model, held_out)
    judged = questions[:ANSWERED]
    answers = scoring.evaluate(tasks.TASKS["sql"], model.eval(), tokenizer, judged)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.unload()
    return case | {"hardware": base_models.hardware(), "parameters": parameters, "loss_before": before, "loss": after,
                   "execution": answers["metrics"]["execution"].value,
                   "exact": answers["metrics"]["exact"].value}


def train(model, rows: list[dict], case: dict) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=case["learning_rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, case["steps"] // 20, case["steps"])
    sampler = trainer.LengthSampler([len(row["input_ids"]) for row in rows], case["batch_size"],
                                    case["seed"])
    model.train()
    step = 0
    while step < case["steps"]:
        order = list(sampler)
        for first in range(0, len(order), case["batch_size"]):
            if step == case["steps"]:
                break
            batch_loss(model, [rows[i] for i in order[first:first + case["batch_size"]]]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
        sampler.epoch += 1


def batch_loss(model, rows: list[dict], count=None) -> torch.Tensor:
    batch = {name: tensor.to(model.device) for name, tensor in data.Collator(0)(rows).items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        return trainer.completion_loss(model, batch, count)


@torch.no_grad()
def loss(model, rows: list[dict]) -> float:
    """The mean loss of a scored token."""
    model.eval()
    total = sum(batch_loss(model, rows[first:first + 50], 1).item()
                for first in range(0, len(rows), 50))
    return total / sum(label != -100 for row in rows for label in row["labels"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--suite", action="append", choices=["variants", "rows", "recipes"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at once on one GPU")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    suites = arguments.suite or ["variants", "rows"]
    chosen = [case for suite in suites for case in cases(suite, arguments.seeds)]
    runs = []
    if arguments.json.exists():
        runs = json.loads(arguments.json.read_text(encoding="utf-8"))["runs"]
    chosen = [case for case in chosen if not any(case.items() <= done.items() for done in runs)]
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        for one in pool.map(run, chosen):
            runs.append(one)
            print(*(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in one.items()), flush=True)
            arguments.json.write_text(json.dumps({
                "command": "python tests/benchmarks/variants.py "
                           + " ".join(f"--suite {suite}" for suite in suites),
                "hardware": " and ".join(sorted({run["hardware"] for run in runs})),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
                "validation_rows": VALIDATION, "answered_rows": ANSWERED, "runs": runs}, indent=1),
                encoding="utf-8")


if __name__ == "__main__":
    main()
