"""What many workers bring, measured. Every command writes JSON; the same commands run on GPUs (one worker a GPU, NCCL).

    python tests/benchmarks/workers.py scaling --workers 2    tokens/s of one worker and of N, interleaved
    python tests/benchmarks/workers.py scaling --suite llama8b    the same of the compiled and recorded steps of training.py's suite
    python tests/benchmarks/workers.py shared --workers 2    GPUs: Llama-3.1-70B's shape in 4 bits, on one GPU and shared by N
    python tests/benchmarks/workers.py losses --workers 2     N workers x b rows against 1 worker x N b rows: loss by step
    python tests/benchmarks/workers.py kills --cycles 20      kill a worker, resume, compare with a run that was left alone

Nothing else may run meanwhile: two threads that share a core with a third process measure the third process.
"""

import argparse
import datetime
import functools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import WorkbookError, workers  # noqa: E402

MODULE = "tests.benchmarks.workers"


def measure(out: str, asked: int, steps: int, rows: int, length: int, what: str, shape: str) -> None:
    """One worker: LoRA (what="lora") or full fine-tuning (what="full") steps on `rows` random rows of `length` tokens.

    Rank 0 writes tokens/s of the whole group, the seconds of every step, and the bytes of gradients that were averaged.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    from helpers import base_models, worker_group

    cuda = torch.cuda.is_available()
    with worker_group.group(asked):
        rank = int(os.environ.get("RANK", "0"))
        model = load(shape)
        device = next(model.parameters()).device
        if what == "lora":
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=8, target_modules=base_models.lora_target_modules(model)))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        averaged, step_model = [0], model
        if asked > 1:
            step_model = DistributedDataParallel(model, device_ids=[device.index] if cuda else None)
            step_model.register_comm_hook(averaged, count_and_average)
        ids = torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(rank)).to(device)
        seconds = []
        warm_up = 2 if steps > 1 else 0
        for step in range(steps + warm_up):
            begin = time.perf_counter()
            averaged[0] = 0
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                loss = step_model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            if step >= warm_up:
                seconds.append(time.perf_counter() - begin)
        result = {"workers": asked, "threads": torch.get_num_threads(), "what": what, "rows": rows, "length": length,
                  "tokens_per_second": asked * rows * length / statistics.median(seconds), "seconds": seconds,
                  "gradient_bytes": sum(p.numel() * p.element_size() for p in trained), "averaged_bytes": averaged[0],
                  "loss": loss.item(), "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None}
        if rank == 0:
            Path(out).write_text(json.dumps(result), encoding="utf-8")


def measure_suite(out: str, asked: int, suite: str, base_model: str, shard: str = "") -> None:
    """One worker of this workbook's steps for a suite of training.py; rank 0 writes tokens/s of the whole group.

    The fastest steps; for llama70b those that need least memory, with the weights shared where `shard` says so.
    """
    from helpers import worker_group
    from tests.benchmarks import training as suites

    settings = suites.SUITES[suite]
    arguments = argparse.Namespace(suite=suite, base_model=base_model, **settings)
    with worker_group.group(asked):
        rows = suites.practice_rows("sql", "train", asked * settings["steps"] * settings["rows"] * settings["width"] // 60)
        chosen = suites.fastest(arguments)
        if suite == "llama70b":
            chosen |= {"compile": False, "gradient_checkpointing": True, "shard": bool(shard)}
        make = functools.partial(suites.ours, **chosen)
        result = suites.measure(make, arguments, rows)
        if os.environ.get("RANK", "0") == "0":
            result["tokens_per_second"] *= asked  # every worker has as many rows
            result["peak_gpu_bytes"] = 1e9 * (result["peak_gpu_gb"] or 0)
            Path(out).write_text(json.dumps(result), encoding="utf-8")


def load(shape: str):
    """The embedded base model in full precision, or a random model of another one's shape ("bloom-1b1")."""
    import torch

    from helpers import base_models

    if shape == "embedded":
        return base_models.load(dtype=torch.float32)[0].train()  # float32 weights; on a GPU autocast computes in bfloat16
    from transformers import AutoModelForCausalLM, BloomConfig

    config = BloomConfig(n_layer=24, hidden_size=1536, n_head=16, vocab_size=250_880)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_config(config, dtype=base_models.best_dtype()).to(device).train()


def count_and_average(total: list[int], bucket):
    """DistributedDataParallel's own averaging, with the bytes counted."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    total[0] += bucket.buffer().numel() * bucket.buffer().element_size()
    return allreduce_hook(None, bucket)


def run_measure(count: int, threads: int | None, steps: int, rows: int, length: int, what="lora", shape="embedded") -> dict:
    """`measure` in a fresh group of `count` workers with `threads` threads each; returns what it wrote."""
    return in_group(count, threads, "measure", steps, rows, length, what, shape)


def in_group(count: int, threads: int | None, command: str, *arguments) -> dict:
    """A measuring command in a fresh group of `count` workers with `threads` threads each; returns what it wrote."""
    before = os.environ.get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        out, logs = Path(folder) / "result.json", Path(folder) / "logs"
        try:
            if threads:
                os.environ["OMP_NUM_THREADS"] = str(threads)
            workers.launch(workers.plan(MODULE, [command, str(out), count, *arguments], count, logs), logs)
        finally:
            if threads:
                os.environ.pop("OMP_NUM_THREADS")
                if before:
                    os.environ["OMP_NUM_THREADS"] = before
        return json.loads(out.read_text(encoding="utf-8"))


def scaling(args) -> dict:
    """Interleaved rounds of: 1 worker, N workers, and on a CPU also 1 worker with as many threads as they have together."""
    import torch

    from helpers import base_models
    from tests.benchmarks import training as suites

    cuda = torch.cuda.is_available()
    kinds = {"1 worker": (1, None if cuda else 1), f"{args.workers} workers": (args.workers, None if cuda else 1)}
    if not cuda:
        kinds[f"1 worker of {args.workers} threads"] = (1, args.workers)
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        command, given = "measure", (args.steps, args.rows, args.length, "lora", args.shape)
        if args.suite:
            own = args.suite in suites.SHAPES
            command, given = "suite", (args.suite, suites.random_model(args.suite, folder) if own else base_models.EMBEDDED)
            suites.free_memory()
        for _ in range(args.rounds):
            for name, (count, threads) in kinds.items():
                result = in_group(count, threads, command, *given)
                speeds[name].append(result["tokens_per_second"])
                memory[name] = result["peak_gpu_bytes"]
                print(f"{name:24}{result['tokens_per_second']:10.1f} tokens/s", file=sys.stderr, flush=True)
    one, many = list(speeds.values())[:2]
    efficiency = [b / (args.workers * a) for a, b in zip(one, many, strict=True)]
    return {"tokens_per_second": {name: spread(values) for name, values in speeds.items()}, "efficiency": spread(efficiency),
            "peak_gpu_bytes": memory, "load_before": args.load}


def shared(args) -> dict:
    """Tokens/s and peak memory of one worker that has all the base model's weights, and of N that share them."""
    from tests.benchmarks import training as suites

    found, failed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        base = suites.random_4bit_model("llama70b", folder)
        for name, count, shard in (("1 worker", 1, ""), (f"{args.workers} workers, one copy", args.workers, "shard")):
            try:
                found[name] = in_group(count, None, "suite", "llama70b", base, shard)
            except WorkbookError as error:  # the memory may be too small for a copy
                failed[name] = str(error)
            print(f"{name}: {found.get(name) or failed[name]}", file=sys.stderr, flush=True)
    return {"runs": found, "failed": failed}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


def config_of(args, folder: str, **changes):
    from helpers import recipes

    if args.base_model == "tiny":  # the tests' random model of two small layers
        from tests.conftest import make_tiny

        args.base_model = make_tiny(Path(folder, "tiny-llama"))
    settings = {"task": "sql", "base_model": str(args.base_model), "max_steps": args.steps, "max_rows": args.max_rows,
                "precision": args.precision, "learning_rate": args.learning_rate, "checkpoint_steps": 5, **changes}
    if args.compile:
        settings |= {"packing": "wrapped", "max_length": 256, "compile": True}
    return recipes.FineTuneConfig.from_parameters(**settings)


def losses(args) -> dict:
    """The SQL job's training, N workers x b rows against 1 worker x N b rows (WORKBOOK_DTYPE=float32 keeps rounding small)."""
    from helpers import training

    with tempfile.TemporaryDirectory() as folder:
        small, large = (config_of(args, folder, batch_size=args.rows * n) for n in (1, args.workers))
        many = training.run(small, Path(folder, "many"), workers=args.workers)
        one = training.run(large, Path(folder, "one"))
    pairs = [(a, b) for (_, a), (_, b) in zip(one["loss_log"], many["loss_log"], strict=True)]
    return {"steps": args.steps, "logged": len(pairs), "largest_difference": max(abs(a - b) for a, b in pairs),
            "largest_relative_difference": max(abs(a - b) / abs(a) for a, b in pairs), "losses": pairs,
            "seconds": {"1 worker": one["training_seconds"], f"{args.workers} workers": many["training_seconds"]}}


def kills(args) -> dict:
    """SIGKILL for a random worker at a random moment, then resume, `cycles` times; every loss must be as if undisturbed."""
    import psutil

    from helpers import trainer, training

    rng, outcomes = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        chosen = config_of(args, folder, batch_size=args.rows, dropout=0.1)
        alone = training.run(chosen, Path(folder, "alone"), workers=args.workers)["loss_log"]
        for cycle in range(args.cycles):
            run, victim, moment = Path(folder, f"run-{cycle}"), rng.randrange(args.workers), []
            pause = rng.uniform(0, args.until)

            def kill(run=run, victim=victim, moment=moment, after=pause):
                while not list(run.glob("checkpoints/*/complete.json")):
                    time.sleep(0.02)
                time.sleep(after)
                for process in psutil.process_iter(["cmdline"]):
                    if "helpers.training" in (process.info["cmdline"] or []) and str(run) in process.info["cmdline"]:
                        if process.environ().get("RANK") == str(victim):
                            process.kill()
                            moment.append(time.time())

            threading.Thread(target=kill, daemon=True).start()
            said = "it was not killed"
            try:
                training.run(chosen, run, workers=args.workers)
            except WorkbookError as error:
                said = str(error)
            ended = time.time() - moment[0] if moment else None
            done = trainer.last_checkpoint(run / "checkpoints").name
            again = training.run(chosen, run, workers=args.workers, resume=True)["loss_log"] if ended else []
            good = bool(ended and ended < 30 and f"rank {victim} was killed by SIGKILL" in said and again == alone)
            shutil.rmtree(run)
            outcomes.append({"rank": victim, "ended_after_s": ended, "resumed_from": done, "said": said.split(" (logs")[0],
                             "same_losses": again == alone, "good": good})
            print(f"cycle {cycle}: {outcomes[-1]}", file=sys.stderr, flush=True)
    return {"good": sum(o["good"] for o in outcomes), "cycles": args.cycles, "outcomes": outcomes}


def in_words(command: str, result: dict) -> str:
    """A result as one sentence, every number in it from the JSON."""
    if command == "scaling":
        speeds = "; ".join(f"{name}: {s['median']:.0f} tokens/s ({s['low']:.0f} to {s['high']:.0f})"
                           for name, s in result["tokens_per_second"].items())
        e = result["efficiency"]
        return (f"{speeds}. Efficiency {e['median']:.1%} ({e['low']:.1%} to {e['high']:.1%}), median and range of "
                f"{len(e['values'])} interleaved rounds." + (
                    f" The machine was busy with other work (load average {result['load_before']:.0f}), which also slowed this."
                    if result["load_before"] > result["cores"] / 2 else ""))
    if command == "shared":
        return "; ".join(f"{name}: {one['tokens_per_second']:.0f} tokens/s, {one['peak_gpu_gb']:.1f} GB a GPU"
                         for name, one in result["runs"].items()) + "."
    if command == "losses":
        return (f"The losses of {result['logged']} steps differ by at most {result['largest_difference']:.1e} "
                f"({result['largest_relative_difference']:.1e} relative).")
    slowest = max(o["ended_after_s"] or 0 for o in result["outcomes"])
    return (f"{result['good']} of {result['cycles']} killed runs ended (after {slowest:.1f} s at most), said which worker was "
            "killed, and were resumed with every loss as in a run that was left alone.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, doc in (("scaling", scaling), ("shared", shared), ("losses", losses), ("kills", kills)):
        sub = commands.add_parser(name, help=doc.__doc__.splitlines()[0])
        sub.add_argument("--workers", type=int, default=2)
        sub.add_argument("--json", type=Path, help="put the result to this file, under the command's name")
        if name == "shared":
            continue
        sub.add_argument("--rows", type=int, default=4, help="per worker and step")
        sub.add_argument("--steps", type=int, default={"scaling": 6, "losses": 20, "kills": 40}[name])
        if name == "scaling":
            sub.add_argument("--rounds", type=int, default=5)
            sub.add_argument("--length", type=int, default=64, help="tokens a row")
            sub.add_argument("--shape", choices=["embedded", "bloom-1b1"], default="embedded")
            sub.add_argument("--suite", choices=["packed", "bloom", "llama8b", "qwen8b"])
        else:
            sub.add_argument("--compile", action="store_true", help="packed rows, compiled, on GPUs recorded")
            sub.add_argument("--base-model", default="smollm2-135m-instruct", help="or tiny")
            sub.add_argument("--precision", choices=["full", "4bit"], default="full")
            sub.add_argument("--max-rows", type=int, default=320)
            sub.add_argument("--learning-rate", type=float, help="a large one makes differences of rounding grow")
        if name == "kills":
            sub.add_argument("--cycles", type=int, default=20)
            sub.add_argument("--until", type=float, default=2.0, help="seconds after the first checkpoint, at most")
            sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from helpers import base_models

    args.load = os.getloadavg()[0]
    result = {"command": "python tests/benchmarks/workers.py " + " ".join(w for w in sys.argv[1:] if "json" not in w),
              "hardware": base_models.hardware(), "cores": os.cpu_count(),
              "date": datetime.date.today().isoformat(), **globals()[args.command](args)}
    if args.json:
        known = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps({**known, args.command: result}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    in_workers = {"measure": measure, "suite": measure_suite}
    if sys.argv[1:2] and sys.argv[1] in in_workers:
        from torch.distributed.elastic.multiprocessing.errors import record

        given = [int(word) if word.isdigit() else word for word in sys.argv[3:]]
        record(in_workers[sys.argv[1]])(sys.argv[2], *given)
    else:
        main()
