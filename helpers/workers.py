"""Several workers on this host: torch.distributed's own launcher, with every rank's log kept.

One process a GPU, or gloo processes that share the CPU's cores evenly (more threads than cores would make every worker
wait for every other). A failing worker ends the group, and its own error is what the caller sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import WorkbookError


def launch_local(module: str, arguments: list[str], workers: int, log_dir: Path) -> None:
    """Run ``python -m module arguments…`` in `workers` processes that form one group, and wait for them.

    Rank 0's output is passed on as it comes; every rank's is kept below `log_dir`. Raises WorkbookError with the first
    error found in the ranks' logs when the group fails, or when this host has fewer GPUs than workers.
    """
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < workers:
        raise WorkbookError(f"{workers} workers were asked for and this host has {gpus} GPU{'s' * (gpus > 1)}: one process "
                            f"needs a GPU of its own, so ask for at most {gpus}.")
    log_dir.mkdir(parents=True, exist_ok=True)
    before = set(log_dir.rglob("stderr.log"))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--max-restarts=0", f"--log-dir={log_dir}",
               "--redirects=3", "--tee=0:1", "-m", module, *arguments]
    threads = max(1, (os.cpu_count() or 1) // workers)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as group:
        try:
            for line in group.stdout:
                if line.startswith("[default0]:"):
                    print(line.removeprefix("[default0]:").rstrip(), flush=True)
            code = group.wait()
        except BaseException:  # Ctrl-C, or the notebook's kernel going away: no worker outlives its caller
            group.terminate()
            raise
    if code:
        raise WorkbookError(f"A worker failed: {_first_error(set(log_dir.rglob('stderr.log')) - before)} (logs of all ranks: "
                            f"{log_dir.name}/).")


def _first_error(logs: set[Path]) -> str:
    """The last line of the oldest log that ends in an error, without the exception's module name."""
    errors = []
    for log in logs:
        text = log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        if lines:
            errors.append((log.stat().st_mtime, lines[-1]))
    if not errors:
        return "it ended without a message; it may have been killed for lack of memory"
    return min(errors)[1].removeprefix("helpers.WorkbookError: ").rstrip(".")
