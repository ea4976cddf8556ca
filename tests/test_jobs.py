"""Jobs end as they say they end: real kernels, real signals, real full disks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock

from helpers import WorkbookError, jobs, runs

PARAMETERS = """\
rank: int = 16  # width of the update, W = W0 + BA
rate = 2e-4  # learning rate
packed = False
data = "practice"  # practice, hub or a file
limit: int | None = None
run_dir = ""
resume = False
"""
RECIPE = """\
rank: int = None  # r: the adapter's rank (None: as the preset says)
rate: float = None  # peak learning rate
name: str = None  # where to publish = a folder's name
on: bool = None  # compile
'quoted # text'
workers_on = "a # b"  # where
run_dir: str = None
"""
METRICS = "import json, pathlib\npathlib.Path(run_dir, 'metrics.json').write_text(json.dumps({'rank': rank}))"
WARNED = METRICS.replace("rank}", "rank, 'warnings': ['The training loss did not fall.', 'Second sentence.']}")
FAILURES = {  # cells after the parameters, and the sentence
    "sentence": (["from helpers import WorkbookError", "raise WorkbookError('The file is empty:\\nfill it.')", METRICS],
                 r"The file is empty: fill it\."),
    "exception": (["1 / 0", METRICS], r"ZeroDivisionError: division by zero \(in code cell 3\)"),
    "exits": ([METRICS, "raise SystemExit(0)", "print('never')"],
              r"Code cell 5 of 5 never ran: the cell before it ended the notebook, as exit\(\) does\."),
    "killed": ([METRICS, "import os\nos.kill(os.getpid(), 9)"],
               r"The kernel was killed in code cell 4: memory has usually run out; lower rank \(now 16\)\."),
    "quits": (["import os\nos._exit(3)", METRICS], r"The kernel ended with exit code 3 in code cell 3, .*"),
    "segfault": (["import ctypes\nctypes.string_at(0)", METRICS], r"The kernel ended by SIGSEGV in code cell 3, .*"),
    "memory": (["raise MemoryError('512 GB')", METRICS],
               r"Memory ran out in code cell 3: lower rank \(now 16\) \(MemoryError: 512 GB\)\."),
    "allocator": (["import torch\ntorch.empty(10**15)", METRICS],
                  r"Memory ran out in code cell 3: lower rank \(now 16\) \(RuntimeError: .*n't allocate memory.*"),
    "cuda": (["class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA')"], r"Memory ran out .*"),
    "disk": (["open('/dev/full', 'w').write('x' * 99999)", METRICS], r"The disk is full: free some space \(OSErr.*"),
    "silent": (["print('done')"], r"The notebook ran to its end but wrote no readable metrics\.json\."),
    "expected": (["#raises\n1 / 0", METRICS], r"ZeroDivisionError: division by zero.*"),
}
WORKER = """import os, pathlib, psutil, subprocess, sys, time
def lives(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
note = pathlib.Path(run_dir, 'worker')
old = note.exists() and lives(int(note.read_text()))
child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE, start_new_session=True)
if resume:
    print('resumed', rank, 'beside the old worker' if old else 'alone', flush=True)
else:
    note.write_text(str(child.pid))
    print('pids', os.getpid(), child.pid, flush=True)
    time.sleep(600)
"""


def save(folder: Path, name: str, cells: list[str], parameters: str = PARAMETERS) -> None:
    v4 = nbformat.v4
    notebook = v4.new_notebook(cells=[v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})])
    for source in cells:
        tags = ["raises-exception"] if source.startswith("#raises") else []
        notebook.cells.append(v4.new_code_cell(source, metadata={"tags": tags}))
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    report = "import helpers, os, sys\nprint(repr([sys.executable, os.getcwd(), data, rank, rate, limit]), flush=True)"
    save(folder, "good", [report, "print('a problem', file=sys.stderr)", METRICS])
    save(folder, "worker", [WORKER, METRICS])
    save(folder, "warned", [WARNED])
    fill = "import pathlib\nif not resume:\n    with open(f'{run_dir}/fill', 'wb') as file:\n        file.write(bytes(5_000_000))"
    save(folder, "fills", [fill, METRICS])
    save(folder, "many", ["print('workers', workers, os.environ['NUM_GPU_WORKERS'])"], "import os\nworkers: int = 1")
    save(folder, "recipe", ["print([rank, rate, name, on])", METRICS], RECIPE)
    save(folder, "adapter", ["print(adapter)"], "adapter = ''  # a folder")
    for name, (cells, _) in FAILURES.items():
        save(folder, name, cells)
    entries = {name: {"title": name, "notebook": f"{name}.ipynb", "paths": ["data"], "memory": ["rank"]}
               for name in ("good", "worker", "warned", "fills", *FAILURES)}
    entries["fixed"] = entries["good"] | {"parameters": {"rank": 4}, "check": "test_jobs:refuse_high_rates"}
    entries["preset"] = entries["killed"] | {"memory": ["limit", "rank"], "check": "test_jobs:fill_in"}
    entries["open"] = entries["killed"] | {"memory": ["limit", "rank"]}
    entries["many"] = {"title": "many", "notebook": "many.ipynb", "metrics": False}
    entries["recipe"] = entries["good"] | {"notebook": "recipe.ipynb", "check": "test_jobs:as_the_preset_says"}
    entries["adapter"] = {"title": "adapter", "notebook": "adapter.ipynb", "metrics": False, "positional": "adapter",
                          "paths": ["adapter"]}
    entries["recipe"]["outputs"] = ["name"]
    (folder / "jobs.yaml").write_text(json.dumps({"jobs": entries}))  # JSON is YAML
    return folder


def fill_in(parameters: dict) -> dict:
    return {"limit": 640 if parameters["limit"] is None else parameters["limit"]}


def as_the_preset_says(parameters: dict) -> dict:
    return {name: 16 if value is None else value for name, value in parameters.items()}


def refuse_high_rates(parameters: dict) -> None:
    if parameters["rate"] > 1:
        raise WorkbookError(f"rate is {parameters['rate']}: it must be at most 1 beside {sorted(parameters)}.")


@pytest.fixture
def options(books, tmp_path) -> dict:
    return {"notebooks_dir": books, "runs_dir": tmp_path / "runs"}


@pytest.fixture
def command(options) -> list[str]:
    return [f"--notebooks-dir={options['notebooks_dir']}", f"--runs-dir={options['runs_dir']}"]


def execute(plan) -> dict:
    from helpers import (
        attempts,  # heavy: the checks in this file are called by dry runs, which must be light
    )

    return attempts.execute(plan)


def run_job(name, given=None, resume=False, **options) -> dict:
    return execute(jobs.plan_job(name, given, resume=resume, **options))


@pytest.fixture(autouse=True)
def signals():
    """A run catches signals for the rest of its process: here the process goes on."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def start(*arguments, **more) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(jobs.ROOT)} | more.pop("env", {})
    return subprocess.Popen([sys.executable, "-m", "helpers.jobs", *arguments], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def start_worker(command) -> tuple[subprocess.Popen, list[int]]:
    """A run that has got to its endless cell, with the pids of its kernel and of a worker that ends as launchers do."""
    process = start("worker", "-p", "rank=8", *command)
    pids = next(line for line in process.stdout if line.startswith("pids"))
    return process, [int(word) for word in pids.split()[1:]]


def wait_until_gone(pids, seconds=10) -> None:
    end = time.monotonic() + seconds
    while alive := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.05)


# ---- parameters and bad input: no kernel starts, nothing is created


def test_parameters_are_read_with_their_types_and_help(books):
    found = jobs.read_parameters(books / "good.ipynb")
    assert [(p.name, p.default, p.kind) for p in found.values()] == [
        ("rank", 16, int), ("rate", 2e-4, float), ("packed", False, bool), ("data", "practice", str), ("limit", None, int),
        ("run_dir", "", str), ("resume", False, bool)]
    assert found["rank"].help == "width of the update, W = W0 + BA"  # the sign at which papermill's reader stops


@pytest.mark.parametrize(("name", "given", "value"), [
    ("rank", "8", 8), ("rate", "1e-3", 1e-3), ("rate", "1", 1.0), ("packed", "true", True), ("packed", "True", True),
    ("packed", "no", False), ("data", "8", "8"), ("data", " a=b\n'\"{x}", " a=b\n'\"{x}"), ("limit", "none", None),
    ("limit", "3", 3)])
def test_values_take_the_type_of_the_default(books, name, given, value):
    converted = jobs.convert(jobs.read_parameters(books / "good.ipynb")[name], given)
    assert converted == value and type(converted) is type(value)


BAD = [
    (["good", "-p", "rnak=8"], "The job good has no parameter 'rnak'; did you mean rank (there are: {given})?"),
    (["good", "-p", "rank=abc"], "rank is 'abc': it must be a whole number, such as 16."),
    (["good", "-p", "rank=2.5"], "rank is '2.5': it must be a whole number, such as 16."),
    (["good", "-p", "rank=none"], "rank is 'none': it must be a whole number, such as 16."),
    (["good", "-p", "rate=nan"], "rate is 'nan': it must be a number, such as 0.0002."),
    (["good", "-p", "rate=-inf"], "rate is '-inf': it must be a number, such as 0.0002."),
    (["good", "-p", "packed=2"], "packed is '2': it must be true or false."),
    (["good", "-p", "=8"], "The job good has no parameter ''; there are: {given}."),
    (["good", "-p", "limit=many"], "limit is 'many': it must be a whole number or none."),
    (["good", "-p", "run_dir=/tmp"], "The job good has no parameter 'run_dir'; there are: {given}."),
    (["good", "-p", "resume=1"], "The job good has no parameter 'resume'; there are: {given}."),
    (["recipe", "-p", "rank=8.5"], "rank is '8.5': it must be a whole number or none."),
    (["fixed", "-p", "rank=8"], "rank is always 4 in fixed: choose another job."),
    (["fixed", "-p", "rate=2"], "rate is 2.0: it must be at most 1 beside "
                                "['data', 'limit', 'packed', 'rank', 'rate', 'resume', 'run_dir']."),
    (["godo"], "There is no job 'godo'; did you mean good (there are: {jobs}, list, run, status, check, export, doctor)?"),
    (["staus"], "There is no job 'staus'; did you mean status (there are: {jobs}, list, run, status, check, export, doctor)?"),
    (["good", "--workers", "2"], "The job good has no parameter 'workers'; there are: {given}."),
    (["many", "--workers", "0"], "workers is '0': --workers or NUM_GPU_WORKERS must be a whole number above 0."),
    (["many", "--workers", "two"], "workers is 'two': --workers or NUM_GPU_WORKERS must be a whole number above 0."),
    (["good", "--resume"], "There is no unfinished run of good in {runs}: start one without --resume."),
    (["good", "--resume", "good-1"], "There is no run 'good-1' of good in {runs}; there are: none."),
    (["good", "/"], "The job good has no parameter '/'; there are: {given}."),
    (["adapter"], "The job adapter needs the path of its adapter: add it."),
]


@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_bad_input_is_one_sentence_and_nothing_is_created(options, command, capsys, words, sentence):
    assert jobs.main([*words, *command]) == 2
    known = jobs.load_jobs(options["notebooks_dir"])
    names = {"jobs": ", ".join(known), "given": ", ".join(known["good"].declared), "runs": options["runs_dir"]}
    assert capsys.readouterr() == ("", sentence.format(**names) + "\n")
    assert not options["runs_dir"].exists()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_the_number_of_workers_in_the_environment(options, command, capsys, monkeypatch, value):
    monkeypatch.setenv("NUM_GPU_WORKERS", value)
    assert jobs.main(["many", *command]) == 2
    said = capsys.readouterr().err
    assert "NUM_GPU_WORKERS" in said and value in said and "must be a whole number" in said and said.count("\n") == 1
    assert not options["runs_dir"].exists()


@pytest.mark.parametrize("words", [[], ["run"], ["good", "--wat"], ["list", "it"], ["status", "good-1"],
                                   ["run", "good", "/", "/"], ["good", "-p", "rank"]])
def test_a_command_line_that_makes_no_sense(command, capsys, words):
    with pytest.raises(SystemExit) as end:
        jobs.main([*words, *command])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_relative_paths_are_those_of_the_caller(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "practice"):
        (tmp_path / name).write_text("")
    for job, given, planned in (("good", "rows", f"{tmp_path}/rows"), ("good", "some/hub-id", "some/hub-id"),
                                ("good", "practice", "practice")):
        assert jobs.plan_job(job, {"data": given}, **options).parameters["data"] == planned
    plan = jobs.plan_job("recipe", {"name": "new/folder"}, **options)  # an output: nothing is there yet
    assert plan.parameters["name"] == f"{tmp_path}/new/folder" and plan.command().endswith(" -p name=folder")
    assert jobs.plan_job("sql", {"adapter_dir": "mine"}, runs_dir=tmp_path).parameters["adapter_dir"] == f"{tmp_path}/mine"


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name, why in (("a" * 300, "name too long"), ("file", "Not a directory"), (".", "already exists and is not empty")):
        assert jobs.main(["sql", "--dry-run", f"--runs-dir={tmp_path / 'runs'}", "-p", f"adapter_dir={tmp_path / name}"]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1


def test_broken_files_are_named(tmp_path, capsys):
    (tmp_path / "jobs.yaml").write_text("jobs: {one: {title: One, notebook: one.ipynb, wat: 1}}")
    assert jobs.main(["list", f"--notebooks-dir={tmp_path}"]) == 2
    assert "jobs.yaml cannot be read" in capsys.readouterr().err
    (tmp_path / "jobs.yaml").write_text("jobs: {one: {title: One, notebook: one.ipynb}}")
    for content in (None, "not JSON", "{}"):
        if content:
            (tmp_path / "one.ipynb").write_text(content)
        assert jobs.main(["one", f"--notebooks-dir={tmp_path}"]) == 2
        assert "one.ipynb of a job cannot be read" in capsys.readouterr().err
    save(tmp_path, "one", [], "size = 2 ** 4")
    assert jobs.main(["one", f"--notebooks-dir={tmp_path}"]) == 2
    assert "one.ipynb of a job cannot be read: malformed" in capsys.readouterr().err


def test_none_is_as_the_preset_says(books, options, command, capsys):
    assert [(p.name, p.default, p.kind) for p in jobs.read_parameters(books / "recipe.ipynb").values()] == [
        ("rank", None, int), ("rate", None, float), ("name", None, str), ("on", None, bool), ("workers_on", "a # b", str),
        ("run_dir", None, str)]
    plan = jobs.plan_job("recipe", {"rank": "8", "rate": "none", "name": "/a=b", "on": "yes"}, **options)
    assert plan.parameters == {"rank": 8, "rate": None, "name": "/a=b", "on": True, "workers_on": "a # b"}
    assert plan.effective.items() >= {"rank": 8, "rate": 16}.items()
    given = {"preset": "reference", "packing": "none", "rank": "none"}  # packing: a text, which the preset would not choose
    assert jobs.plan_job("sql", given, runs_dir=options["runs_dir"]).effective.items() >= {"packing": "none", "rank": 16}.items()
    assert jobs.main(["list", *command]) == 0
    assert re.search(r"\n    rank: int = None +r: the adapter's rank \(None: as the preset says\)\n", capsys.readouterr().out)


def test_the_command_of_a_run_can_be_typed(options, tmp_path):
    given = {"data": f"{tmp_path}/it's", "rank": "8", "limit": "3"}
    assert jobs.plan_job("good", given, **options).command() == (
        "python -m helpers.jobs run good -p rank=8 -p 'data=it'\"'\"'s' -p limit=3")
    assert jobs.plan_job("many", {"workers": "2"}, **options).command().endswith("many -p workers=2")


def test_a_terminal_that_lacks_a_character_shows_the_rest(command, books, tmp_path):
    save(tmp_path, "good", ["print('Käufer')", METRICS, "print('later')"])
    (tmp_path / "jobs.yaml").write_text((books / "jobs.yaml").read_text())
    process = start("good", f"--notebooks-dir={tmp_path}", command[1], env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert process.returncode == 0 and "K?ufer\n" in out and "later\n" in out, err


def test_a_dry_run_checks_and_creates_nothing_and_needs_no_heavy_library(options, command):
    code = ("import sys\nfrom helpers import jobs\ncode = jobs.main(sys.argv[1:])\n"
            "print(code, [name for name in ('papermill', 'torch', 'transformers') if name in sys.modules])")
    dry = ["fixed", "--dry-run", "-p", "rate=0.5"]
    for words, expected in ((dry, "    rank = 4\n    rate = 0.5\n"), (["list"], "rank = 4 (fixed)")):
        result = subprocess.run([sys.executable, "-c", code, *words, *command], capture_output=True, text=True,
                                env=os.environ | {"PYTHONPATH": f"{jobs.ROOT}:{Path(__file__).parent}"})
        assert expected in result.stdout and result.stdout.endswith("0 []\n"), result
    assert not options["runs_dir"].exists()


def test_the_project_s_own_jobs_can_be_planned_and_papermill_sees_the_same_parameters(tmp_path):
    import papermill

    for name, job in jobs.load_jobs().items():
        seen = set(papermill.inspect_notebook(job.notebook)) - set(jobs.SET_BY_JOB)
        assert seen == set(job.declared), "is a help comment holding a '='?"
        assert all(p.help for p in job.declared.values() if p.name not in jobs.SET_BY_JOB)
        if not job.positional:
            assert jobs.plan_job(name, runs_dir=tmp_path).parameters.items() >= job.parameters.items()


# ---- runs


def test_a_run_from_elsewhere_with_a_hostile_home(books, tmp_path):
    """The kernel is this interpreter whatever kernels the user has; data are the caller's; home stays clean."""
    home, folder = tmp_path / "home", tmp_path / "runs {x}"
    spec = home / ".local/share/jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    hostile = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    spec.write_text(json.dumps(hostile))
    (tmp_path / "it's \"rows\".jsonl").write_text("{}")
    env = {"HOME": str(home), "JUPYTER_PATH": str(home / ".local/share/jupyter"), "NUM_GPU_WORKERS": "2"}
    words = ["-p", "data=it's \"rows\".jsonl", "-p", "rank=8", f"--notebooks-dir={books}", "--runs-dir", folder.name]
    process = start("run", "good", *words, cwd=tmp_path, env=env)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), out
    seen = [sys.executable, str(jobs.ROOT), str(tmp_path / "it's \"rows\".jsonl"), 8, 2e-4, None]
    for text in (repr(seen), "a problem"):
        assert text in out
    [status] = runs.list_runs(folder)
    run_dir = folder / status["id"]
    assert re.fullmatch(r"good-\d{8}-\d{6}-[0-9a-f]{4}", status["id"])
    assert status.items() >= {"job": "good", "state": "succeeded", "error": None, "attempts": 1, "pid": process.pid,
                              "notebook": "good.ipynb", "host": socket.gethostname()}.items()
    assert status["parameters"] == {"rank": 8, "rate": 2e-4, "packed": False, "data": seen[2], "limit": None}
    assert status["created"] <= status["started"] < status["ended"] and 0 < status["seconds"] < 60
    assert json.loads((run_dir / "metrics.json").read_text()) == {"rank": 8}
    assert repr(seen) in (run_dir / "log.txt").read_text()
    cells = nbformat.read(run_dir / "good.ipynb", 4).cells
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in run_dir.iterdir()) == [".lock", "good.ipynb", "log.txt", "metrics.json", "status.json"]
    assert [p for p in home.rglob("*") if p.is_file()] == [spec]
    with pytest.raises(WorkbookError, match="cannot be resumed: its state is succeeded"):
        run_job("good", resume=status["id"], runs_dir=folder, notebooks_dir=books)


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_says_so(options, name, capsys):
    status = run_job(name, **options)
    assert status["state"] == "failed"
    assert re.fullmatch(FAILURES[name][1], status["error"])
    assert [status] == runs.list_runs(options["runs_dir"])
    assert "Traceback" not in capsys.readouterr().out
    assert "Traceback" in (options["runs_dir"] / status["id"] / "log.txt").read_text()


@pytest.mark.parametrize(("name", "given", "advice"), [
    ("preset", {}, "lower limit (now 640) or rank (now 16)."),
    ("preset", {"limit": "9"}, "lower limit (now 9) or rank (now 16)."),
    ("open", {"rank": "0"}, "lower limit or rank."), ("gpu", {}, "lower batch_size (now 8) or max_length (now 512).")])
def test_what_to_lower_is_said_with_the_value_that_counts(options, tiny, name, given, advice):
    """A parameter at none (or 0) stands for the preset's value: that one is named, or none, but never 'now 0'."""
    from helpers.attempts import Attempt

    where = options if name != "gpu" else {"runs_dir": options["runs_dir"]}
    plan = jobs.plan_job(name if name != "gpu" else "sql", given | ({"base_model": str(tiny)} if name == "gpu" else {}), **where)
    attempt = Attempt(plan)
    attempt.cell = 4
    error = MemoryError("at once")
    assert attempt.explain(error) == f"Memory ran out in code cell 4: {advice[:-1]} (MemoryError: at once)."


def test_a_failed_command_prints_the_sentence_and_no_traceback(command):
    process = start("sentence", *command)
    out, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in out
    assert err == "The file is empty: fill it.\nMore is in log.txt and sentence.ipynb there.\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_run_is_interrupted_and_leaves_no_process(options, command, name):
    process, pids = start_worker(command)
    [status] = runs.list_runs(options["runs_dir"])
    assert status["state"] == "running" and "pids" in (options["runs_dir"] / status["id"] / "log.txt").read_text()
    with pytest.raises(WorkbookError, match=f"its state is running .process {process.pid} "):
        run_job("worker", resume=status["id"], **options)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=20)
    [status] = runs.list_runs(options["runs_dir"])
    assert process.returncode == 130 and status["state"] == "interrupted" and status["seconds"] > 0
    assert status["error"] == f"Stopped by {name} in code cell 3; resume with: {runs.resume_command(status)}"
    assert err.startswith(status["error"]) and "Traceback" not in err
    wait_until_gone(pids)


def test_a_killed_run_is_told_and_resumed_in_its_folder(options, command, capfd):
    """SIGKILL leaves a status that says running, and a lock file."""
    process, pids = start_worker(command)
    process.kill()
    process.communicate()
    wait_until_gone(pids[:1])
    [path] = options["runs_dir"].glob("*/status.json")
    assert json.loads(path.read_text())["state"] == "running" and (path.parent / ".lock").exists()
    assert jobs.main(["status", *command]) == 0
    assert re.search(r"worker-\S+ +interrupted .* Its process \d+ is gone ", capfd.readouterr().out)
    assert json.loads(path.read_text())["state"] == "interrupted"

    with pytest.raises(WorkbookError, match="was started with rank 8, not 16: leave it out to resume"):
        run_job("worker", {"rank": "16"}, resume=True, **options)
    with FileLock(path.parent / ".lock"), pytest.raises(WorkbookError, match="is being run by another process"):
        run_job("worker", resume=True, **options)
    status = run_job("worker", {"rank": "8"}, resume=True, **options)
    assert (status["id"], status["state"], status["attempts"]) == (path.parent.name, "succeeded", 2)
    assert "resumed 8 alone\n" in capfd.readouterr().out
    wait_until_gone(pids)
    assert len(runs.list_runs(options["runs_dir"])) == 1


def test_two_at_once_have_folders_and_workers_of_their_own(options, command):
    both = [start("many", "--workers", str(count), *command) for count in (2, 3)]
    for count, process in zip((2, 3), both, strict=True):
        out, err = process.communicate()
        assert process.returncode == 0 and f"workers {count} {count}\n" in out, err
    assert [status["state"] for status in runs.list_runs(options["runs_dir"])] == ["succeeded"] * 2


def test_a_path_as_a_bare_word(options, command, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert jobs.main(["adapter", *command, "mine"]) == 0
    assert f"\n{tmp_path / 'mine'}\n" in capsys.readouterr().out


def test_an_id_that_exists_is_never_overwritten(options):
    plan = jobs.plan_job("good", **options)
    plan.run_dir.mkdir(parents=True)
    with pytest.raises(FileExistsError):
        execute(plan)
    assert plan.run_dir.exists() and not list(plan.run_dir.iterdir())


# ---- status


@pytest.fixture
def run_dir(options) -> Path:
    folder = options["runs_dir"] / "good-20260101-000000-abcd"
    folder.mkdir(parents=True)
    me = psutil.Process()
    status = {"job": "good", "id": folder.name, "state": "running", "error": None, "attempts": 1, "parameters": {},
              "pid": me.pid, "pid_created": me.create_time(), "host": socket.gethostname(), "notebook": "good.ipynb",
              "created": runs.now(), "started": runs.now(), "ended": None, "seconds": None}
    return runs.write_status(folder, status) and folder


def change(folder: Path, **values) -> None:
    runs.write_status(folder, json.loads((folder / "status.json").read_text()) | values)


def test_a_pid_that_is_used_again_is_not_the_run(run_dir):
    assert runs.read_run(run_dir)["state"] == "running"
    change(run_dir, pid_created=psutil.Process().create_time() - 60)
    change(run_dir, host="elsewhere")
    assert runs.read_run(run_dir)["state"] == "running"  # cannot be known from here
    change(run_dir, host=socket.gethostname(), state="queued")
    assert runs.read_run(run_dir)["state"] == "interrupted"
    assert json.loads((run_dir / "status.json").read_text())["state"] == "interrupted"


def test_a_status_that_cannot_be_read_is_named(run_dir, command, capsys):
    (run_dir / "status.json").write_text("{")
    assert jobs.main(["status", *command]) == 2
    assert f"{run_dir}/status.json cannot be read" in capsys.readouterr().err


def test_a_warning_of_the_training_is_shown(options, command, capsys):
    """training puts the sentences into the metrics; a run without them, or one that failed, has none."""
    assert jobs.main(["warned", *command]) == 0
    said = "The training loss did not fall. Second sentence."
    assert capsys.readouterr().err == f"Warning: {said}\n"
    assert jobs.main(["good", *command]) == 0 and "Warning" not in capsys.readouterr().err
    assert [status["warning"] for status in runs.list_runs(options["runs_dir"])] == [said, None]
    assert jobs.main(["status", *command]) == 0
    assert re.search(rf"\nwarned-\S+ +succeeded .*  {said}\n", capsys.readouterr().out)


def test_a_full_disk_fails_the_run_and_the_status_says_so(run_dir, options):
    """/dev/full answers every write with ENOSPC: the notebook cannot be saved, nor a status beside the old one."""
    change(run_dir, state="failed")
    (run_dir / "good.ipynb").symlink_to("/dev/full")
    status = run_job("good", resume=True, **options)
    assert status["state"] == "failed" and status["error"].startswith("The disk is full: free some space (OSError: ")
    (run_dir / f".status.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    runs.write_status(run_dir, status | {"error": "short"})
    assert json.loads((run_dir / "status.json").read_text()) == status | {"error": "short"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_during_a_run(books, tmp_path):
    """A real disk of 1 MB, filled by the run itself: notebook and log can no longer be written, the status still can."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine cannot mount a tmpfs")
    try:
        status = run_job("fills", runs_dir=disk, notebooks_dir=books)
        assert status["state"] == "failed" and status["error"].startswith("The disk is full: free some space (")
        assert runs.list_runs(disk) == [status]
        (disk / status["id"] / "fill").unlink()
        status = run_job("fills", resume=True, runs_dir=disk, notebooks_dir=books)
        assert (status["state"], status["attempts"]) == ("succeeded", 2)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_at_the_start_is_told(options, command, capsys, monkeypatch):
    def on_full_disk(path, content):
        path.with_name("full").symlink_to("/dev/full")
        path.with_name("full").write_text("x" * 99999)

    monkeypatch.setattr(runs, "write_json", on_full_disk)
    assert jobs.main(["good", *command]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert runs.list_runs(options["runs_dir"]) == []


def test_a_parameter_given_twice_is_refused(tmp_path, jobs):
    result = jobs("run", "sql", "-p", "rank=8", "-p", "rank=16", "--dry-run")
    assert result.returncode == 2 and "given twice" in result.stderr
