"""Notebooks as jobs: ``python -m helpers.jobs list | run <job> | status``.

A job is a notebook of ``notebooks/jobs.yaml``, executed by papermill in a kernel of its own. A run has a folder,
``runs/<job id>/``: ``status.json``, the executed notebook, ``metrics.json`` (written by the notebook) and ``log.txt``.
Parameters are checked before a kernel starts. A run has succeeded only if every code cell ran without an error;
papermill's own report is not enough: it takes SystemExit for an end, and a killed kernel's notebook for completed.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import importlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import tokenize
import traceback
from datetime import UTC, datetime
from pathlib import Path

import psutil
import yaml
from filelock import FileLock, Timeout

from helpers import WorkbookError, is_text

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("list", "run", "status")
SET_BY_JOB = {"run_dir": "the job sets it", "resume": "use --resume", "workers": "use --workers N or NUM_GPU_WORKERS"}
EXIT_CODES = {"succeeded": 0, "failed": 1, "interrupted": 130}
SCRATCH = "workbook-job-"  # begins the name of a run's folder for sockets, among the system's temporary files
STATUS = {"job": str, "state": str, "created": str, "host": str, "parameters": dict, "attempts": int, "pid": int,
          "error": str | None, "ended": str | None, "seconds": int | float | None}  # types of what a status must hold
MARKER = "WORKBOOK_RUN_DIR"  # in the environment of a run's kernel and so of every process that the kernel starts
KINDS = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a map"}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An assignment of a notebook's parameters cell; ``kind`` is None if neither annotation nor default tells it."""

    name: str
    default: object
    kind: type | None
    optional: bool
    help: str


@dataclasses.dataclass(frozen=True)
class Job:
    """An entry of jobs.yaml, where the fields are explained."""

    name: str
    title: str
    notebook: Path
    parameters: dict = dataclasses.field(default_factory=dict)
    positional: str | None = None
    paths: list = dataclasses.field(default_factory=list)
    outputs: list = dataclasses.field(default_factory=list)
    memory: list = dataclasses.field(default_factory=list)
    check: str | None = None
    metrics: bool = True

    @functools.cached_property
    def declared(self) -> dict[str, Parameter]:
        return read_parameters(self.notebook)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run that has not begun: ``status`` is that of the run to resume, or None for a new one. ``effective`` is
    what the job's check says that parameters left open stand for (a preset's batch size, where 0 was given)."""

    job: Job
    parameters: dict
    run_dir: Path
    status: dict | None
    effective: dict = dataclasses.field(default_factory=dict)

    def command(self) -> str:
        """What to type for the same run: parameters that are not the job's defaults; of a path only its last part."""
        own = {n: v for n, v in self.parameters.items() if n not in SET_BY_JOB and n not in self.job.outputs
               and v != self.job.parameters.get(n, self.job.declared[n].default)}
        given = [f"-p {n}={Path(v).name if n in self.job.paths and Path(str(v)).is_absolute() else v}" for n, v in own.items()]
        workers = self.parameters.get("workers") or 1
        return " ".join(["python -m helpers.jobs run", self.job.name, *given, *([f"--workers {workers}"] if workers > 1 else [])])

    def injected(self) -> dict:
        """The parameters, with run_dir and resume if the notebook declares them."""
        own = {"run_dir": str(self.run_dir), "resume": self.status is not None}
        return self.parameters | {name: value for name, value in own.items() if name in self.job.declared}


# ---- what can be checked without a kernel ----------------------------------------------------------------------------


def closest(name: str, names) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}."


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters cell of a notebook, by name. Read with ``ast``: papermill's own reader takes two seconds to import
    and loses a line whose comment holds an equals sign. Raises WorkbookError for a notebook that cannot be read."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
        statements = ast.parse(source).body
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise WorkbookError(f"The notebook {notebook} of a job cannot be read: {error}.") from error
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in statements:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        name = ast.unparse(getattr(node, "target", None) or node.targets[0])
        hint = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise WorkbookError(f"The default of {name} in {notebook.name} must be a plain value.") from None
        named = re.search(rf"\b({'|'.join(KINDS)})\b", hint)
        kind = KINDS[named[1]] if named else KINDS.get(type(default).__name__)
        optional = default is None or re.search(r"\b(None|Optional)\b", hint) is not None
        found[name] = Parameter(name, default, kind, optional, comments.get(node.end_lineno, ""))
    return found


def load_jobs(path: Path | None = None) -> dict[str, Job]:
    """The jobs of a jobs.yaml (default: the project's) by name. Raises WorkbookError if it cannot be understood."""
    path = Path(path or ROOT / "notebooks" / "jobs.yaml")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        return {n: Job(name=n, **(e | {"notebook": path.parent / e["notebook"]})) for n, e in entries.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise WorkbookError(f"The list of jobs {path} cannot be read: {' '.join(str(error).split())}.") from error


def convert(parameter: Parameter, value: object) -> object:
    """``value`` (text, as from -p, or typed) in the parameter's type. Raises WorkbookError with what is expected."""
    kind, given = parameter.kind, value
    if parameter.optional and (value is None or value in ("none", "None", "null")):
        return None
    with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):  # what does not convert is refused below
        if isinstance(value, str) and not is_text(value):
            raise ValueError
        if kind in (int, float) and isinstance(value, str) or kind is float and type(value) is int:
            value = kind(value)
        elif kind is not str and isinstance(value, str):
            value = yaml.safe_load(value)
        if (kind is None or type(value) is kind) and value not in (float("inf"), -float("inf")) and value == value:
            return value
    shown = f", such as {json.dumps(parameter.default)}" if parameter.default else ""  # 0 can stand for "as the preset"
    raise WorkbookError(f"{parameter.name} is {given!r}: it must be {EXPECTED.get(kind, 'a value')}{shown}.")


def worker_count(given: object, source: str = "--workers") -> int:
    if re.fullmatch(r"[1-9][0-9]*", str(given)) is None:
        raise WorkbookError(f"{source} is {str(given)!r}: it must be a whole number of at least 1, such as 2.")
    return int(given)


def check_parameters(job: Job, given: dict) -> dict:
    """``given`` converted, with relative paths made absolute. Raises WorkbookError for a wrong name or value."""
    checked = {}
    for name, value in given.items():
        if name in SET_BY_JOB:
            raise WorkbookError(f"{name} cannot be given as a parameter: {SET_BY_JOB[name]}.")
        if name not in job.declared:
            known = [n for n in job.declared if n not in SET_BY_JOB]
            raise WorkbookError(f"The job {job.name} has no parameter {name!r}; {closest(name, known)}")
        value = convert(job.declared[name], value)
        if value != job.parameters.get(name, value):
            raise WorkbookError(f"{name} is always {job.parameters[name]} in the job {job.name}: choose another job.")
        if name in (*job.paths, *job.outputs, job.positional) and value and value != job.declared[name].default:
            path = os.path.expanduser(value)  # leaves the home folder of a user who does not exist as it is
            value = str(Path(path).resolve()) if os.path.exists(path) or name in job.outputs else value
        checked[name] = value
    return checked


def plan_job(name, parameters=None, workers=None, resume=False, runs_dir=None, notebooks_dir=None) -> Plan:
    """The arguments of ``run_job`` as a checked plan; creates nothing. Raises WorkbookError for what is wrong."""
    jobs = load_jobs(notebooks_dir and Path(notebooks_dir, "jobs.yaml"))
    runs_dir = Path(runs_dir or ROOT / "runs").resolve()
    if name not in jobs:
        raise WorkbookError(f"There is no job {name!r}; {closest(name, [*jobs, *COMMANDS])}")
    job = jobs[name]
    if lacking := [n for n in (*job.parameters, job.positional) if n and n not in job.declared]:
        raise WorkbookError(f"jobs.yaml gives {name} the parameter {lacking[0]}, which {job.notebook.name} lacks.")
    given, many = check_parameters(job, parameters or {}), "workers" in job.declared
    count = worker_count(os.environ.get("NUM_GPU_WORKERS") or 1, "NUM_GPU_WORKERS")
    if workers is not None:
        count = worker_count(workers)
        if count > 1 and not many:
            raise WorkbookError(f"--workers is {count}, but the job {name} runs on one worker: leave --workers out.")
        given |= {"workers": count} if many else {}
    if resume:
        status = find_unfinished(job, resume, runs_dir)
        final, run_dir = status["parameters"], runs_dir / status["id"]
        if differ := [n for n, value in given.items() if final.get(n) != value]:
            n, was, value = differ[0], final.get(differ[0]), given[differ[0]]
            raise WorkbookError(f"{status['id']} was started with {n} {was!r}, not {value!r}: leave it out to resume.")
        if lost := [n for n in final if n not in job.declared]:
            raise WorkbookError(f"{status['id']} cannot be resumed: {job.notebook.name} no longer has {lost[0]}.")
    else:
        status, run_dir = None, runs_dir / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        final = {n: p.default for n, p in job.declared.items() if n not in ("run_dir", "resume")}
        final |= ({"workers": count} if many else {}) | job.parameters | given
        if job.positional and not final[job.positional]:
            raise WorkbookError(f"The job {name} needs its {job.positional}: python -m helpers.jobs {name} <path>.")
    plan = Plan(job, final, run_dir, status)
    if job.check:
        module, _, function = job.check.partition(":")
        effective = getattr(importlib.import_module(module), function)(plan.injected())
        plan = dataclasses.replace(plan, effective=effective or {})
    return plan


# ---- status.json -----------------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_since(started: str) -> float:
    return round((datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds(), 1)


def resume_command(status: dict) -> str:
    return f"python -m helpers.jobs run {status['job']} --resume {status['id']}"


def write_status(run_dir: Path, status: dict) -> dict:
    """Atomically; on a full disk in place, in the blocks that the file has: a status that lies would be worse."""
    path, text = run_dir / "status.json", json.dumps(status, indent=2) + "\n"
    temporary = path.with_name(f".status.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
    return status


def process_is_there(status: dict) -> bool:
    """Whether the process of a run lives: its pid and its time of creation (s since 1970), as pids are used again."""
    try:
        return abs(psutil.Process(status["pid"]).create_time() - status["pid_created"]) < 2
    except psutil.NoSuchProcess:
        return False


def read_run(run_dir: Path) -> dict:
    """The truthful status of a run: one whose process is gone is rewritten as interrupted. A runner holds the folder's
    lock until its last word is written, so that a run which has just ended is not overwritten. Raises WorkbookError."""

    def read() -> tuple[dict, bool]:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8")) | {"id": run_dir.name}
        seconds_since(status["started"])  # raises for what is no time
        for name, kind in STATUS.items():
            if not isinstance(status[name], kind):
                raise TypeError(f"{name} is {status[name]!r}")
        here = status["host"] == socket.gethostname()  # a process of another host cannot be looked up
        return status, status["state"] in ("queued", "running") and here and not process_is_there(status)

    try:
        status, gone = read()
        if gone:
            with contextlib.suppress(Timeout), FileLock(run_dir / ".lock", timeout=0):  # locked: somebody runs it
                status, gone = read()
                if gone:
                    why = f"Its process {status['pid']} is gone (killed, or the machine stopped); resume with: "
                    status |= {"state": "interrupted", "error": why + resume_command(status), "ended": now()}
                    write_status(run_dir, status)
        return status
    except (ValueError, KeyError, TypeError) as error:
        raise WorkbookError(f"{run_dir}/status.json cannot be read ({error!r}): remove that folder.") from error


def list_runs(runs_dir: Path | None = None) -> list[dict]:
    """The truthful status of every run, oldest first. Raises WorkbookError for a status that cannot be read."""
    found = Path(runs_dir or ROOT / "runs").glob("*/status.json")
    return sorted((read_run(path.parent) for path in found), key=lambda status: status["created"])


def find_unfinished(job: Job, resume: str | bool, runs_dir: Path) -> dict:
    """The newest failed or interrupted run of a job, or the named one. Raises WorkbookError if there is none."""
    runs = {status["id"]: status for status in list_runs(runs_dir) if status["job"] == job.name}
    if resume is True:
        resume = next((i for i, s in reversed(runs.items()) if s["state"] in ("failed", "interrupted")), None)
        if resume is None:
            raise WorkbookError(f"There is no unfinished run of {job.name} in {runs_dir}: start one without --resume.")
    if resume not in runs:
        raise WorkbookError(f"There is no run {resume!r} of {job.name} in {runs_dir}; {closest(resume, runs)}")
    return require_unfinished(runs[resume])


def require_unfinished(status: dict) -> dict:
    if status["state"] == "succeeded":
        raise WorkbookError(f"{status['id']} has succeeded: there is nothing to resume.")
    if status["state"] in ("queued", "running"):
        raise WorkbookError(f"{status['id']} is still running (process {status['pid']} on {status['host']}).")
    return status


# ---- running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch_folder():
    """A short-named temporary folder for a run's sockets and IPython profile, gone with the run. Folders of runners that
    were killed, and so could not remove theirs, go first; each says whose it is."""
    for note in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/owner.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # another user's, or removed meanwhile
            owner = json.loads(note.read_text(encoding="utf-8"))
            if owner["host"] == socket.gethostname() and not process_is_there(owner):
                shutil.rmtree(note.parent)
    me = {"pid": os.getpid(), "pid_created": psutil.Process().create_time(), "host": socket.gethostname()}
    with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
        Path(scratch, "owner.json").write_text(json.dumps(me), encoding="utf-8")
        yield scratch


def stop_processes(run_dir: Path) -> None:
    """Kill the kernel of a run and all that it started, workers in sessions of their own too: they carry the marker."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.pid != os.getpid() and process.environ().get(MARKER) == str(run_dir):
                process.kill()


@contextlib.contextmanager
def interruptible(run_dir: Path):
    """Yields the list of signals received. The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, upon which the
    kernel is shut down in good order; a further one kills it. Signals that the caller ignores (nohup) stay ignored."""
    received, previous = [], {}

    def handle(number, _frame):
        received.append(signal.Signals(number).name)
        if len(received) == 1:
            raise KeyboardInterrupt
        stop_processes(run_dir)

    for name in ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Attempt:
    """One execution of a plan's notebook: its log, its kernel's process and the number of the code cell that runs."""

    def __init__(self, plan: Plan, timeout: float | None):
        self.plan, self.timeout, self.timed_out = plan, timeout, False
        self.kernel, self.cell, self.unwritten, self.terminal = None, 0, None, sys.stdout

    def write(self, text: str, echo: bool = True) -> None:
        """To log.txt and the terminal. A full disk is reported at the end; a closed terminal does not end a job."""
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:
            self.unwritten = error
        try:
            print(text if echo else "", end="", file=self.terminal, flush=True)
        except (OSError, ValueError):
            self.terminal = io.StringIO()

    def flush(self) -> None:
        """papermill calls it; every write is flushed already."""

    def cell_starts(self, cell, cell_index) -> None:
        self.cell += 1
        lines = cell.source.strip().splitlines()
        first = next((line for line in lines if not line.startswith(("#", "%"))), lines[0])
        self.write(f"[code cell {self.cell}] {first}\n")

    def cell_ended(self, cell, cell_index, execute_reply) -> None:
        """Log what streams do not carry: values and displays with a text of their own, and tracebacks."""
        for output in cell.outputs:
            text = "".join(output.get("data", {}).get("text/plain", ""))
            if text and not re.fullmatch(r"<.*>", text):
                self.write(text + "\n")
            if output.output_type == "error":
                self.write(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output.traceback)) + "\n", echo=False)

    def time_out(self) -> None:
        self.timed_out = True
        stop_processes(self.plan.run_dir)

    def kernel_class(self, scratch: str) -> type:
        """A kernel manager for this interpreter, whatever kernels the user has installed. Connection file and IPython
        profile are in ``scratch``, not in the home folder; so are the sockets: files cannot collide as ports can."""
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpecManager

        attempt, env = self, os.environ | {MARKER: str(self.plan.run_dir), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        env |= {"IPYTHONDIR": scratch, "JUPYTER_RUNTIME_DIR": scratch}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env["WORKBOOK_COMMAND"] = self.plan.command()
        if "workers" in self.plan.parameters:
            env["NUM_GPU_WORKERS"] = str(self.plan.parameters["workers"])

        class JobKernel(AsyncKernelManager):
            async def start_kernel(self, **options):
                self.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # leaves ipykernel's own: sys.executable
                self.transport = "ipc" if os.name == "posix" and len(scratch) < 80 else "tcp"  # socket paths: <= 107
                self.connection_file = os.path.join(scratch, "kernel.json")
                options |= {"env": env, "cwd": str(ROOT), "stdout": attempt.file, "stderr": attempt.file}
                await super().start_kernel(**options)
                attempt.kernel = self.provisioner.process

        return JobKernel

    def run(self, header: str) -> None:
        """Execute the notebook; raises whatever went wrong, WorkbookError for what papermill took for a success."""
        with (self.plan.run_dir / "log.txt").open("a", encoding="utf-8") as self.file:
            self.write(header)
            try:
                self.verify(self.papermill())
            except Exception:
                self.write(traceback.format_exc(), echo=False)
                raise

    def papermill(self):
        import papermill

        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it warns about is checked here
        paths = (self.plan.job.notebook, self.plan.run_dir / self.plan.job.notebook.name)
        paths = [str(path).replace("{", "{{").replace("}", "}}") for path in paths]  # papermill formats them
        timer = threading.Timer(self.timeout or threading.TIMEOUT_MAX, self.time_out)
        timer.daemon = True
        timer.start()
        try:
            with scratch_folder() as scratch:
                return papermill.execute_notebook(
                    *paths, self.plan.injected(), kernel_name="python3", language="python", progress_bar=False,
                    stdout_file=self, stderr_file=self, start_timeout=300, iopub_timeout=120,
                    kernel_manager_class=self.kernel_class(scratch), on_cell_execute=self.cell_starts,
                    on_cell_executed=self.cell_ended)
        finally:
            timer.cancel()
            stop_processes(self.plan.run_dir)

    def verify(self, notebook) -> None:
        """Raises WorkbookError unless every code cell ran without an error and the metrics are there."""
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        for number, cell in enumerate(cells, 1):
            for output in cell.outputs:
                if output.output_type == "error":
                    end = f"Code cell {number} of {len(cells)} ended the notebook with {output.ename}({output.evalue})"
                    raise WorkbookError(f"{end}: the cells after it never ran.")
            if cell.execution_count is None:
                raise WorkbookError(f"Code cell {number} of {len(cells)} never ran: the kernel left it out.")
        if self.unwritten:
            raise self.unwritten
        try:
            if self.plan.job.metrics:
                json.loads((self.plan.run_dir / "metrics.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise WorkbookError("The notebook ran to its end but wrote no readable metrics.json.") from None

    def explain(self, error: BaseException) -> str:
        """One sentence for ``error``: what happened, where, and what to do."""
        name, where = getattr(error, "ename", type(error).__name__), f"in code cell {self.cell}"
        text = textwrap.shorten(getattr(error, "evalue", str(error)), 500)
        known = self.plan.parameters | self.plan.effective
        knobs = [n + (f" (now {known[n]})" if known[n] else "") for n in self.plan.job.memory if n in known]
        advice = f"lower {' or '.join(knobs)}" if knobs else "give the job less to hold at once"
        if self.timed_out:
            return f"The run was stopped {where}: it took longer than its timeout of {self.timeout:g} s."
        if name == "WorkbookError":
            return text
        if re.search("No space left on device|Disk quota exceeded", text):
            return f"The disk is full: free some space ({name}: {text})."
        if name in ("MemoryError", "OutOfMemoryError") or re.search(r"out of memory|n.t allocate memory", text):
            return f"Memory ran out {where}: {advice} ({name}: {text})."
        if isinstance(error, RuntimeError) and "Kernel died" in text and self.kernel:
            code = self.kernel.poll()
            if code == -signal.SIGKILL:
                return f"The kernel was killed {where}: memory has usually run out; {advice}."
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return f"The kernel ended {how} {where}, before the notebook was done: see log.txt."
        return f"{name}: {text} ({where})"


def run_job(name, parameters=None, workers=None, resume=False, runs_dir=None, notebooks_dir=None, timeout=None) -> dict:
    """Run a job to its end and return its status, as in status.json. ``parameters`` are typed values or text,
    ``resume`` is True or a job id, ``timeout`` is for the whole run, in s. Raises WorkbookError for bad input, before
    anything is created."""
    return execute(plan_job(name, parameters, workers, resume, runs_dir, notebooks_dir), timeout)


def execute(plan: Plan, timeout: float | None = None) -> dict:
    """Run a plan under the lock of its folder; returns the final status, which is on the disk by then."""
    run_dir, new = plan.run_dir, plan.status is None
    run_dir.mkdir(parents=True, exist_ok=not new)
    try:
        with FileLock(run_dir / ".lock", timeout=0), interruptible(run_dir) as received:
            status = {"job": plan.job.name, "id": run_dir.name, "created": now(), "attempts": 0}
            if not new:
                status = require_unfinished(read_run(run_dir))
                stop_processes(run_dir)  # workers that outlived a killed kernel would write into this run
                (run_dir / "metrics.json").unlink(missing_ok=True)  # of the attempt before
            status |= {
                "state": "queued", "error": None, "parameters": plan.parameters, "notebook": plan.job.notebook.name,
                "pid": os.getpid(), "pid_created": psutil.Process().create_time(), "host": socket.gethostname(),
                "started": now(), "ended": None, "seconds": None, "attempts": status["attempts"] + 1}
            attempt = Attempt(plan, timeout)
            try:
                write_status(run_dir, status)
                write_status(run_dir, status | {"state": "running"})
                attempt.run(f"== {status['id']}, attempt {status['attempts']}, {status['started']}\n")
                status["state"] = "succeeded"
            except (Exception, KeyboardInterrupt) as error:  # it becomes the status
                status |= {"state": "failed", "error": attempt.explain(error)}
            if received:
                why = f"Stopped by {received[0]} in code cell {attempt.cell}; resume with: {resume_command(status)}"
                status |= {"state": "interrupted", "error": why}
            received.append("the end")  # from here on no signal keeps the last word from being written
            return write_status(run_dir, status | {"ended": now(), "seconds": seconds_since(status["started"])})
    except Timeout:
        raise WorkbookError(f"{run_dir.name} is being run by another process: wait for its end.") from None
    finally:
        if new and not (run_dir / "status.json").exists():  # the disk is full: leave nothing half-written
            shutil.rmtree(run_dir)


# ---- the command line ------------------------------------------------------------------------------------------------


def print_jobs(jobs: dict[str, Job]) -> None:
    for job in jobs.values():
        print(f"{job.name} - {job.title} ({job.notebook.name})")
        for p in job.declared.values():
            if p.name not in SET_BY_JOB:
                fixed = " (fixed)" if p.name in job.parameters else ""
                print(f"    {f'{p.name} = {job.parameters.get(p.name, p.default)!r}{fixed}':<34} {p.help}".rstrip())


def print_status(runs: list[dict]) -> None:
    print(f"{'job':<36} {'state':<12} {'started (UTC)':<20} {'seconds':>8}  error")
    for s in runs:
        seconds = s["seconds"] if s["ended"] else seconds_since(s["started"])
        line = f"{s['id']:<36} {s['state']:<12} {s['started'][:19]:<20} {seconds or '?':>8}  {s['error'] or ''}"
        print(line.rstrip())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.jobs", allow_abbrev=False, description="Run notebooks as jobs.",
        usage="%(prog)s list | [run] JOB [PATH] [options] | status [JOB_ID]")
    parser.add_argument("words", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="name=value", help="see list")
    parser.add_argument("--workers", metavar="N", help="worker processes in all (default: NUM_GPU_WORKERS, or 1)")
    parser.add_argument("--resume", nargs="?", const=True, default=False, metavar="JOB_ID",
                        help="go on with the newest unfinished run of the job, or with this one")
    parser.add_argument("--dry-run", action="store_true", help="check everything, create nothing")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for the whole run")
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", help="where runs are kept (default: runs/)")
    parser.add_argument("--notebooks-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    args.words = args.words if args.words[0] in COMMANDS else ["run", *args.words]
    if len(args.words) > {"list": 1, "run": 3, "status": 2}[args.words[0]] or args.words == ["run"]:
        parser.error(f"{' '.join(args.words)}: a word too many, or no job")
    if args.timeout is not None and not 0 < args.timeout <= threading.TIMEOUT_MAX:
        parser.error(f"--timeout is {args.timeout:g}: it must be a number of seconds above 0")
    return args


def run(args: argparse.Namespace, name: str, path: str | None = None) -> int:
    pairs, given = [text.partition("=") for text in args.parameters], {}
    if path is not None:
        job = load_jobs(args.notebooks_dir and args.notebooks_dir / "jobs.yaml").get(name)
        if job and not (job.positional and os.path.exists(os.path.expanduser(path))):
            wrong = f"its {job.positional} does not exist" if job.positional else "it takes no path"
            raise WorkbookError(f"The job {name} cannot be run with {path!r}: {wrong}.")
        pairs.append((job and job.positional, "=", path))
    for key, equals, value in pairs:
        if not (key and equals):
            raise WorkbookError(f"-p takes name=value, such as -p rank=8, not {key!r}.")
        if key in given:
            raise WorkbookError(f"{key} is given twice: give it once.")
        given[key] = value
    plan = plan_job(name, given, args.workers, args.resume, args.runs_dir, args.notebooks_dir)
    if args.dry_run:
        folder = plan.run_dir if plan.status else plan.run_dir.with_name(f"{name}-YYYYmmdd-HHMMSS-xxxx")
        print(f"notebook: {plan.job.notebook}\nfolder: {folder}\nparameters:")
        print("\n".join(f"    {key} = {value!r}" for key, value in plan.parameters.items()))
        return 0
    status = execute(plan, args.timeout)
    print(f"{status['id']} {status['state']} after {status['seconds']} s: {plan.run_dir}")
    if status["error"]:
        print(f"{status['error']}\nMore is in log.txt and {status['notebook']} there.", file=sys.stderr)
    return EXIT_CODES[status["state"]]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        command, *words = args.words
        if command == "run":
            return run(args, *words)
        if command == "list":
            print_jobs(load_jobs(args.notebooks_dir and args.notebooks_dir / "jobs.yaml"))
        elif not words:
            print_status(list_runs(args.runs_dir))
        else:
            runs = {status["id"]: status for status in list_runs(args.runs_dir)}
            if words[0] not in runs:
                raise WorkbookError(f"There is no run {words[0]!r}; {closest(words[0], runs)}")
            print(json.dumps(runs[words[0]], indent=2))
        return 0
    except WorkbookError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]
    except OSError as error:
        print(f"{error.filename or 'The output'} could not be written or read: {error.strerror}.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
