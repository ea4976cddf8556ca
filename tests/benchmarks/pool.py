"""How many batches should the length sampler sort at once? The default SQL recipe, trained and judged once a seed and pool.

    python tests/benchmarks/pool.py --pools 50 4 --seeds 4 --json pool.json

Larger pools waste less padding; long rows of one kind then share batches. Prints a line a run, and means at the end.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from peft import PeftModel

from helpers import base_models, data, evaluation, recipes, tasks, trainer, training


def run(pool: int, seed: int, judged: int = 200) -> dict:
    trainer.POOL = pool
    config = recipes.FineTuneConfig.from_parameters(task="sql", seed=seed)
    rows = data.load_rows("sql", n=config.max_rows, seed=seed)
    held_out = data.load_rows("sql", split="validation", n=judged + config.validation_rows, seed=seed).rows
    model, tokenizer = base_models.load(config.base_model, config.precision)
    with tempfile.TemporaryDirectory() as folder:
        record = training.train(config, rows, model, tokenizer, Path(folder) / "run", validation=held_out[judged:])
        adapted = PeftModel.from_pretrained(model, Path(folder) / "run" / "trained").eval()
        scores = evaluation.evaluate(tasks.get_task("sql"), adapted, tokenizer, held_out[:judged])["metrics"]
    return {"pool": pool, "seed": seed, "seconds": record["training_seconds"], "validation_log": record["validation_log"],
            "highest_loss_after_6_steps": max(loss for _, loss in record["loss_log"][6:]),
            "execution": scores["execution"].value, "hardware": record["hardware"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", type=int, nargs="+", default=[50, 4])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = [run(pool, seed) for seed in range(args.seeds) for pool in args.pools]
    for one in found:
        print(one)
    for pool in args.pools:
        some = [one for one in found if one["pool"] == pool]
        lowest = [min(loss for _, loss in one["validation_log"]) for one in some]
        print(f"pool {pool}: validation loss {statistics.mean(lowest):.3f}, execution "
              f"{statistics.mean(one['execution'] for one in some):.3f}, highest training loss after 6 steps "
              f"{max(one['highest_loss_after_6_steps'] for one in some):.2f} (means and maximum of {len(some)} seeds)")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
