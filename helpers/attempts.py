"""One attempt at a run: papermill executes the notebook in a kernel of its own."""

import contextlib
import logging
import os
import re
import signal
import socket
import tempfile
import textwrap
import traceback

import papermill
import psutil
from filelock import FileLock, Timeout
from jupyter_client import AsyncKernelManager, kernelspec

from helpers import METRICS, ROOT, WorkbookError, read_json, runs

SCRATCH = "workbook-job-"  # begins the name of a run's temporary folder
logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it warns about is checked here


def execute(plan) -> dict:
    """Run a helpers.jobs.Plan to its end; returns the final status, which is on the disk by then.
    Raises WorkbookError if another process runs it, and OSError."""
    run_dir, received = plan.run_dir, catch_signals()
    run_dir.mkdir(parents=True, exist_ok=plan.status is not None)
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            if plan.status is not None:  # another process may just have ended it
                runs.find_unfinished(plan.job.name, run_dir.name, run_dir.parent)
            status, attempt = begin(plan), Attempt(plan)
            try:
                status |= {"warning": attempt.run(), "state": "succeeded"}
            except (Exception, KeyboardInterrupt) as error:  # it becomes the status
                status |= {"state": "failed", "error": attempt.explain(error)}
            if received:
                why = f"Stopped by {received[0]} in code cell {attempt.cell}; resume with: "
                status |= {"state": "interrupted", "error": why + runs.resume_command(status)}
            received.append("end of the run")  # a later signal then raises no KeyboardInterrupt
            status |= {"ended": runs.now(), "seconds": runs.seconds_since(status["started"])}
            return runs.write_status(run_dir, status)
    except Timeout:
        raise WorkbookError(f"{run_dir.name} is being run by another process.") from None


def catch_signals() -> list[str]:
    """The names of the signals that this process gets from now on. The first raises
    KeyboardInterrupt, so the kernel ends in good order; later ones change nothing. Those that the
    caller ignores (nohup) stay ignored."""
    received = []

    def handle(number, _frame):
        received.append(signal.Signals(number).name)
        if len(received) == 1:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)
    return received


def begin(plan) -> dict:
    """Clear away the attempt before this one; write the status of this one and return it."""
    (plan.run_dir / METRICS).unlink(missing_ok=True)
    status = plan.status or {"created": runs.now(), "attempts": 0}
    status |= {
        "job": plan.job.name, "id": plan.run_dir.name, "notebook": plan.job.notebook.name,
        "parameters": plan.parameters, "state": "queued", "error": None, "warning": None,
        "pid": os.getpid(), "pid_created": psutil.Process().create_time(),
        "host": socket.gethostname(), "attempts": status["attempts"] + 1,
        "started": runs.now(), "ended": None, "seconds": None}
    runs.write_status(plan.run_dir, status)
    return runs.write_status(plan.run_dir, status | {"state": "running"})


class JobKernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels the user has installed. Its sockets are files
    in a temporary folder, as ports can collide. papermill takes a class: each attempt has its own.
    """

    attempt = None

    async def start_kernel(self, **options):
        attempt = self.attempt
        self.kernel_spec_manager = kernelspec.KernelSpecManager(kernel_dirs=[])  # ipykernel's own
        self.transport = "ipc" if len(attempt.scratch) < 80 else "tcp"  # socket paths: <= 107
        self.connection_file = os.path.join(attempt.scratch, "kernel.json")
        options |= {"stdout": attempt.log, "stderr": attempt.log, "cwd": str(ROOT)}
        await super().start_kernel(**options, env=attempt.environment())
        attempt.kernel = self.provisioner.process


class Attempt:
    """One execution of a plan's notebook, and the file to which papermill writes what it prints.
    cell: the number of the code cell that runs; kernel: the kernel's process."""

    def __init__(self, plan):
        self.plan, self.cell = plan, 0
        self.kernel = self.log = self.scratch = None

    def run(self) -> str | None:
        """Execute the notebook; returns its metrics' warnings. Raises whatever went wrong."""
        notebook, run_dir = self.plan.job.notebook, self.plan.run_dir
        paths = [str(path).replace("{", "{{").replace("}", "}}")  # papermill formats them
                 for path in (notebook, run_dir / notebook.name)]
        log = open(run_dir / "log.txt", "a", encoding="utf-8")
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True)
        with log as self.log, scratch as self.scratch:
            self.write(f"== {run_dir.name}, {runs.now()}\n")
            try:
                return self.check(papermill.execute_notebook(
                    *paths, self.plan.injected(), kernel_name="python3", language="python",
                    progress_bar=False, stdout_file=self, stderr_file=self, start_timeout=300,
                    iopub_timeout=120, on_cell_execute=self.cell_starts,
                    kernel_manager_class=type("Kernel", (JobKernel,), {"attempt": self})))
            except Exception:
                self.log.write(traceback.format_exc())
                raise

    def environment(self) -> dict[str, str]:
        """Of the kernel and all that it starts."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        workers = self.plan.parameters.get("workers", os.environ.get("NUM_GPU_WORKERS", 1))
        return os.environ | {
            "WORKBOOK_RUN_DIR": str(self.plan.run_dir), "WORKBOOK_COMMAND": self.plan.command(),
            "NUM_GPU_WORKERS": str(workers), "PYTHONPATH": path, "IPYTHONDIR": self.scratch,
            "JUPYTER_RUNTIME_DIR": self.scratch, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}

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

    def check(self, notebook) -> str | None:
        """The warnings in the metrics. Raises WorkbookError unless these are there and every code
        cell ran: to papermill a notebook that exit() ended halfway is a success."""
        counts = [cell.execution_count for cell in notebook.cells
                  if cell.cell_type == "code" and cell.source.strip()]
        if None in counts:
            number = counts.index(None) + 1
            raise WorkbookError(f"Code cell {number} of {len(counts)} never ran: the cell before "
                                "it ended the notebook, as exit() does.")
        if not self.plan.job.metrics:
            return None
        try:
            return " ".join(read_json(self.plan.run_dir / METRICS).get("warnings", [])) or None
        except (FileNotFoundError, ValueError, AttributeError, TypeError) as error:
            raise WorkbookError("The notebook ran to its end but wrote no readable "
                                "metrics.json.") from error

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
        if "Kernel died" not in text or not self.kernel:
            return f"{name}: {text} ({where})"
        code = self.kernel.poll()
        if code == -signal.SIGKILL:
            return f"The kernel was killed {where}: memory has usually run out; {self.advice()}."
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"The kernel ended {how} {where}, before the notebook was done: see log.txt."

    def advice(self) -> str:
        """What to lower, with the value that counts: the preset's where none was given."""
        values = self.plan.parameters | self.plan.effective
        knobs = [f"{name} (now {values[name]})" if values.get(name) else name
                 for name in self.plan.job.memory]
        return f"lower {' or '.join(knobs) or 'what the job holds at once'}"
