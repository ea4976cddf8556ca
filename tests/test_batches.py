"""Notebooks as batches with parameters that are not the defaults: each one is used, and two jobs at once share nothing."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import attempts, jobs

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"toxic": f"this silly text number {i} is bad", "neutral": f"text number {i} is not good", "split": split}
        for i in range(24) for split in ("train", "validation")]
# Parameters that a batch here leaves alone, and where they are tried instead.
ELSEWHERE = {"04_fine_tune.ipynb": {"compile": "needs a C compiler and minutes; the benchmarks use it",
                                    "workers_on": "tests/test_workers.py launches in every place",
                                    "run_dir": "the job sets it", "resume": "tests/test_training.py",
                                    "workers": "--workers, below"}}


def given(notebook: str, tiny: Path, folder: Path) -> dict:
    """Values for a notebook's parameters, each another than its default."""
    if notebook == "04_fine_tune.ipynb":
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return {"task": "detox", "base_model": str(tiny), "data": str(rows), "preset": "reference", "precision": "full",
                "rank": 3, "alpha": 5, "dropout": 0.2, "target_modules": "q_proj, down_proj", "learning_rate": 1e-3,
                "schedule": "linear",
                "epochs": 2.0, "max_steps": 2, "max_rows": 20, "data_fraction": 0.9, "batch_size": 3, "gradient_accumulation": 2,
                "max_length": 200, "packing": "none", "optimizer": "adamw_torch", "gradient_checkpointing": True,
                "shard": True, "checkpoint_steps": 1, "validation_rows": 3, "patience": 2, "eval_rows": 2, "seed": 7,
                "adapter_dir": str(folder / "mine")}
    raise AssertionError(f"{notebook} has parameters: say here which it is to be run with as a batch")


OTHER_TESTS = {"05_evaluate.ipynb": "test_judges.py"}  # run as a batch with other parameters there
NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))
             if jobs.read_parameters(path) and path.name not in OTHER_TESTS]
JOB = {job.notebook.name: job for job in jobs.load_jobs().values()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_notebook_with_parameters_is_a_job_and_is_tried_with_others(path, tiny, tmp_path):
    """If a parameter is added, it must be given here too."""
    assert path.name in JOB, "a notebook with a parameters cell has an entry in jobs.yaml"
    declared, values = jobs.read_parameters(path), given(path.name, tiny, tmp_path)
    assert set(values) | set(ELSEWHERE.get(path.name, {})) == set(declared)
    fixed = JOB[path.name].parameters
    assert not [name for name, value in values.items() if value == declared[name].default and name not in fixed]
    assert not set(values) & set(ELSEWHERE.get(path.name, {}))


def test_what_is_left_to_other_tests_is_there():
    for notebook, file in OTHER_TESTS.items():
        job = next((job for job in jobs.load_jobs().values() if job.notebook.name == notebook), None)
        assert job is None or re.search(rf'jobs\("{job.name}".*"-p"', (ROOT / "tests" / file).read_text())


def start(job: str, values: dict, folder: Path, *more: str) -> subprocess.Popen:
    words = [word for name, value in values.items() if name != "task" for word in ("-p", f"{name}={value}")]
    environment = {**os.environ, "CUSTOM_LORA_ADAPTERS_DIR": str(folder / "adapters"), "OMP_NUM_THREADS": "1",
                   "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-m", "helpers.jobs", "run", job, *words, *more, "--runs-dir", str(folder / "runs")],
                            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_jobs_at_once_use_their_own_parameters_ports_and_folders(tiny, tmp_path):
    """Both train with two workers, from the same cache, started in the same second."""
    values = given("04_fine_tune.ipynb", tiny, tmp_path)
    other = {"base_model": str(tiny), "max_steps": 3, "max_rows": 40, "batch_size": 4, "eval_rows": 3, "seed": 1, "rank": 5}
    with tempfile.TemporaryDirectory() as short:  # socket paths are at most 107 characters
        both = [start("detox", values, Path(short), "--workers", "2"), start("sql", other, Path(short), "--workers", "2")]
        outs = [process.communicate(timeout=400)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], "\n".join(out[-1500:] for out in outs)
        runs = {path.parent.name.split("-")[0]: path.parent for path in Path(short).glob("runs/*/status.json")}
        assert set(runs) == {"detox", "sql"}
        for job, wanted in (("detox", values), ("sql", other)):
            result = json.loads((runs[job] / "trained" / "metrics.json").read_text())
            metrics = json.loads((runs[job] / "metrics.json").read_text())
            used = {**result["config"], "eval_rows": metrics["evaluation"]["rows"]}
            same = {name: value for name, value in wanted.items() if name not in ("adapter_dir", "data", "base_model")}
            assert {name: used[name] for name in same} == same
            assert (result["workers"], result["steps"], metrics["steps"]) == (2, wanted["max_steps"], wanted["max_steps"])
            logs = list((runs[job] / "workers").rglob("*.log"))
            assert logs, "the log of every rank is kept in the run's own folder"
        assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["r"] == 3
        [published] = Path(short).glob("adapters/*")
        assert json.loads((published / "adapter_config.json").read_text())["r"] == 5
        left = [path.name for path in Path(short, "tmp").iterdir() if path.name.startswith(attempts.SCRATCH)]
        assert left == [], "a run removes its sockets"
