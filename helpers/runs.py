"""The truth about runs: ``runs/<job id>/status.json``.

`state` is queued, running, succeeded, failed or interrupted. A process that was killed cannot write
its own end: who reads "running" looks whether it lives, and writes it.
"""

import json
import socket
from datetime import UTC, datetime
from pathlib import Path

import psutil

from helpers import ROOT, WorkbookError, closest, read_json, write_json


def list_runs(runs_dir: Path | None = None) -> list[dict]:
    """The status of every run, oldest first. Raises WorkbookError for one that cannot be read."""
    found = Path(runs_dir or ROOT / "runs").glob("*/status.json")
    return sorted((read_run(path.parent) for path in found), key=lambda status: status["created"])


def read_run(run_dir: Path) -> dict:
    """The status of a run, rewritten as interrupted if its process is gone."""
    status = read_status(run_dir)
    if is_abandoned(status):
        status = read_status(run_dir)  # its last word may have come between reading and looking
    if not is_abandoned(status):
        return status
    why = f"Its process {status['pid']} is gone (killed, or the machine stopped); resume with: "
    return write_status(run_dir, status | {"state": "interrupted", "ended": now(),
                                           "error": why + resume_command(status)})


def find_unfinished(job: str, resume: str | bool, runs_dir: Path) -> dict:
    """The newest failed or interrupted run of a job (`resume` is True), or the one with this id.
    Raises WorkbookError if there is none."""
    runs = {status["id"]: status for status in list_runs(runs_dir) if status["job"] == job}
    unfinished = [run for run in runs.values() if run["state"] in ("failed", "interrupted")]
    if resume is True:
        if not unfinished:
            raise WorkbookError(f"There is no unfinished run of {job} in {runs_dir}: start one "
                                "without --resume.")
        return unfinished[-1]
    if resume not in runs:
        near = closest(resume, runs)
        raise WorkbookError(f"There is no run {resume!r} of {job} in {runs_dir}; {near}")
    status = runs[resume]
    if status not in unfinished:
        raise WorkbookError(f"{resume} cannot be resumed: its state is {status['state']} (process "
                            f"{status['pid']} on {status['host']}).")
    return status


def write_status(run_dir: Path, status: dict) -> dict:
    """Write status.json and return it. On a full disk it is written in place, into the blocks that
    the file has: a status that lies would be worse than one that is half written."""
    path = run_dir / "status.json"
    try:
        write_json(path, status)
    except OSError:
        if not path.exists():
            raise
        with path.open("r+", encoding="utf-8") as file:
            json.dump(status, file)
            file.truncate()
    return status


def read_status(run_dir: Path) -> dict:
    """What status.json says. Raises WorkbookError for a file that is damaged."""
    try:
        return read_json(run_dir / "status.json") | {"id": run_dir.name}
    except (ValueError, TypeError) as error:
        why = f"{run_dir}/status.json cannot be read ({error!r}): remove that folder."
        raise WorkbookError(why) from error


def is_abandoned(status: dict) -> bool:
    """Whether a status says running but its process, known by pid and time of creation (s since
    1970), is gone. Processes of other hosts cannot be seen."""
    if status["state"] not in ("queued", "running") or status["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(status["pid"]).create_time() - status["pid_created"]) >= 2
    except psutil.NoSuchProcess:
        return True


def resume_command(status: dict) -> str:
    return f"python -m helpers.jobs run {status['job']} --resume {status['id']}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_since(started: str) -> float:
    return round((datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds(), 1)
