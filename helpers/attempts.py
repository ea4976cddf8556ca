"""One attempt at a run: papermill executes the notebook in a kernel of its own.

A run has succeeded only if every code cell ran without an error and metrics.json is there. To
papermill a notebook that exit() ended halfway is a success.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import tempfile
import textwrap
import traceback
from pathlib import Path

import papermill
import psutil
from filelock import FileLock, Timeout
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

from helpers import METRICS, ROOT, WorkbookError, read_json, runs

SCRATCH = "workbook-job-"  # begins the name of a run's temporary folder
MARKER = "WORKBOOK_RUN_DIR"  # in the environment of a run's kernel, and so of all that it starts
logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it warns about is checked here


def execute(plan) -> dict:
    """Run a helpers.jobs.Plan to its end; returns the final status, which is on the disk by then.
    Raises WorkbookError if another process runs it, OSError if nothing can be written at all."""
    run_dir, received = plan.run_dir, catch_signals()
    run_dir.mkdir(parents=True, exist_ok=plan.status is not None)
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            status, attempt = begin(plan), Attempt(plan)
            try:
                attempt.run(f"== {status['id']}, attempt {status['attempts']}, {status['started']}")
                status["state"] = "succeeded"
            except (Exception, KeyboardInterrupt) as error:  # it becomes the status
                status |= {"state": "failed", "error": attempt.explain(error)}
            if received:
                why = f"Stopped by {received[0]} in code cell {attempt.cell}; resume with: "
                status |= {"state": "interrupted", "error": why + runs.resume_command(status)}
            received.append("the end")  # no signal keeps the last word from being written
            status |= {"ended": runs.now(), "seconds": runs.seconds_since(status["started"])}
            return runs.write_status(run_dir, status)
    except Timeout:
        raise WorkbookError(f"{run_dir.name} is being run by another process: wait for its "
                            "end.") from None


def catch_signals() -> list[str]:
    """The names of the signals that this process gets from now on. The first SIGINT, SIGTERM or
    SIGHUP raises KeyboardInterrupt, upon which the kernel has seconds to end in good order; later
    ones change nothing. Those that the caller ignores (nohup) stay ignored."""
    received = []

    def handle(number, _frame):
        received.append(signal.Signals(number).name)
        if len(received) == 1:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)
    return received


def begin(plan) -> dict:
    """Write the status of an attempt that runs and return it; clear away the attempt before it."""
    status = {"created": runs.now(), "attempts": 0}
    if plan.status is not None:
        status = plan.status
        stop_processes(plan.run_dir)  # workers that outlived their kernel would write into this run
        (plan.run_dir / METRICS).unlink(missing_ok=True)
    status |= {
        "job": plan.job.name, "id": plan.run_dir.name, "state": "queued", "error": None,
        "parameters": plan.parameters, "notebook": plan.job.notebook.name, "pid": os.getpid(),
        "pid_created": psutil.Process().create_time(), "host": socket.gethostname(),
        "started": runs.now(), "ended": None, "seconds": None, "attempts": status["attempts"] + 1}
    runs.write_status(plan.run_dir, status)
    return runs.write_status(plan.run_dir, status | {"state": "running"})


def stop_processes(run_dir: Path) -> None:
    """Kill the kernel of a run and all that it started, workers in sessions of their own too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.pid != os.getpid() and process.environ().get(MARKER) == str(run_dir):
                process.kill()


class JobKernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels the user has installed. Its sockets are files
    in a temporary folder, as ports can collide. Each run has a subclass, which knows its attempt:
    papermill takes a class."""

    attempt = None

    async def start_kernel(self, **options):
        attempt = self.attempt
        self.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # leaves ipykernel's own
        self.transport = "ipc" if len(attempt.scratch) < 80 else "tcp"  # socket paths: <= 107
        self.connection_file = os.path.join(attempt.scratch, "kernel.json")
        options |= {"stdout": attempt.log, "stderr": attempt.log, "cwd": str(ROOT)}
        await super().start_kernel(**options, env=attempt.environment())
        attempt.kernel = self.provisioner.process


class Attempt:
    """One execution of a plan's notebook. `cell` is the number of the code cell that runs, `kernel`
    the kernel's process. papermill writes what the notebook prints to it, as to a file."""

    def __init__(self, plan):
        self.plan, self.run_dir = plan, plan.run_dir
        self.kernel, self.cell, self.log, self.scratch = None, 0, None, None

    def run(self, header: str) -> None:
        """Execute the notebook; raises whatever went wrong. (A runner that is killed leaves its
        temporary folder, some kB.)"""
        log = open(self.run_dir / "log.txt", "a", encoding="utf-8")
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True)
        with log as self.log, scratch as self.scratch:
            self.write(header + "\n")
            try:
                self.check(self.papermill())
            except Exception:
                self.log.write(traceback.format_exc())
                raise
            finally:
                stop_processes(self.run_dir)

    def papermill(self):
        notebook = self.plan.job.notebook
        paths = [str(notebook), str(self.run_dir / notebook.name)]
        paths = [path.replace("{", "{{").replace("}", "}}") for path in paths]  # it formats them
        return papermill.execute_notebook(
            *paths, self.plan.injected(), kernel_name="python3", language="python",
            progress_bar=False, stdout_file=self, stderr_file=self, start_timeout=300,
            iopub_timeout=120, kernel_manager_class=type("Kernel", (JobKernel,), {"attempt": self}),
            on_cell_execute=self.cell_starts)

    def environment(self) -> dict[str, str]:
        """Of the kernel and all that it starts."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {MARKER: str(self.run_dir), "WORKBOOK_COMMAND": self.plan.command(),
               "PYTHONPATH": path, "IPYTHONDIR": self.scratch, "JUPYTER_RUNTIME_DIR": self.scratch,
               "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        if "workers" in self.plan.parameters:
            own["NUM_GPU_WORKERS"] = str(self.plan.parameters["workers"])
        return os.environ | own

    def write(self, text: str) -> None:
        """To log.txt and the terminal. A terminal that is closed does not end a job."""
        self.log.write(text)
        self.log.flush()
        with contextlib.suppress(OSError, ValueError):
            print(text, end="", flush=True)

    def flush(self) -> None:
        """papermill calls it; every write is flushed already."""

    def cell_starts(self, cell, cell_index) -> None:
        self.cell += 1
        self.write(f"[code cell {self.cell}] {cell.source.strip().splitlines()[0]}\n")

    def check(self, notebook) -> None:
        """Raises WorkbookError unless every code cell ran and the metrics are there."""
        cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
        for number, cell in enumerate(cells, 1):
            if cell.execution_count is None:
                raise WorkbookError(f"Code cell {number} of {len(cells)} never ran: the cell "
                                    "before it ended the notebook, as exit() does.")
        try:
            if self.plan.job.metrics:
                read_json(self.run_dir / METRICS)
        except (FileNotFoundError, ValueError):
            raise WorkbookError("The notebook ran to its end but wrote no readable "
                                "metrics.json.") from None

    def explain(self, error: BaseException) -> str:
        """One sentence for an error: what happened, where, and what to do."""
        name, where = getattr(error, "ename", type(error).__name__), f"in code cell {self.cell}"
        text = textwrap.shorten(getattr(error, "evalue", str(error)), 500)
        if name == "WorkbookError":
            return text
        if re.search("No space left on device|Disk quota exceeded", text):
            return f"The disk is full: free some space ({name}: {text})."
        if "MemoryError" in name or re.search(r"out of memory|n.t allocate memory", text):
            return f"Memory ran out {where}: {self.advice()} ({name}: {text})."
        if "Kernel died" in text and self.kernel:
            code = self.kernel.poll()
            if code == -signal.SIGKILL:
                return (f"The kernel was killed {where}: memory has usually run out; "
                        f"{self.advice()}.")
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return f"The kernel ended {how} {where}, before the notebook was done: see log.txt."
        return f"{name}: {text} ({where})"

    def advice(self) -> str:
        """What to lower, with the value that counts: the preset's where none was given."""
        known, knobs = self.plan.parameters | self.plan.effective, []
        for name in self.plan.job.memory:
            if name in known:
                knobs.append(f"{name} (now {known[name]})" if known[name] else name)
        return f"lower {' or '.join(knobs)}" if knobs else "give the job less to hold at once"
