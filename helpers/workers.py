"""Workers that train together: which command each host runs, and what is said when one fails.

Each host runs one launcher: torchrun (helpers.worker_group), which starts one process a GPU, or
processes that share the CPU's cores evenly. Resuming is a new launch, with a new name and port.
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from helpers import ROOT, WorkbookError, read_json

JOIN_SECONDS = 300  # for all hosts to come together
GROUP_SECONDS = int(os.environ.get("WORKBOOK_GROUP_SECONDS") or 120)  # silence that ends a group
PATIENCE = 15.0  # s that the others have to say why they ended, after the first has
# Settings that go to every host.
KEPT = ("WORKBOOK_CACHE", "WORKBOOK_DTYPE", "WORKBOOK_GROUP_SECONDS", "HF_HOME", "HF_HUB_OFFLINE",
        "NCCL_DEBUG", "NCCL_NVLS_ENABLE", "TZ")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5",
       "-o", "ServerAliveCountMax=3", "--")
END_WITH_STDIN = {"WORKBOOK_END_WITH_STDIN": "1"}  # it closes when a launcher's caller is killed
SRUN = ("srun", "--cpus-per-task=1", "--kill-on-bad-exit=1", "--job-name=lora-workbook")
CML_SIZE = {"cpu": 2, "memory": 16, "nvidia_gpu": 0}  # of one CML worker: cores, GiB, GPUs


@dataclass(frozen=True)
class Launch:
    """What one host runs: a launcher of workers whose ranks begin at `rank`."""

    rank: int
    host: str
    environment: dict[str, str]
    command: tuple[str, ...]

    def line(self) -> str:
        """The launch as a line for a shell, to be typed on its host."""
        settings = shlex.join(f"{name}={value}" for name, value in self.environment.items())
        return f"cd {shlex.quote(str(ROOT))} && env {settings} {shlex.join(self.command)}"


@dataclass(frozen=True)
class Plan:
    """`workers` processes at `place`, which meet at rank 0's `address` and `port`; a new `name`."""

    workers: int
    place: str
    options: dict[str, str]
    name: str
    address: str
    port: int
    launches: tuple[Launch, ...]


def read_place(workers_on: str) -> tuple[str, list[str], dict[str, str]]:
    """``workers_on`` as (place, hosts, options); raises WorkbookError for a place that is unknown.

    ``ssh:a,b`` and ``print:a,b`` name hosts, rank 0's first. ``slurm:partition=gpu,time=60`` and
    ``cml:cpu=4,memory=16`` name options of srun and of CML's launch_workers.
    """
    place, _, rest = workers_on.strip().partition(":")
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    if not workers_on.strip():
        return "", [], {}
    if place in ("ssh", "print") and parts and not any(part.startswith("-") for part in parts):
        return place, parts, {}
    option = {"slurm": r"[\w-]+=\S+", "cml": rf"({'|'.join(CML_SIZE)})=\d+"}.get(place)
    if option and all(re.fullmatch(option, part) for part in parts):
        return place, [], dict(part.split("=", 1) for part in parts)
    raise WorkbookError(f'workers_on is {workers_on!r}: use "" (this host), ssh:host,host, '
                        "print:host,host, slurm or cml; no host begins with a dash.")


def plan(module: str, arguments: list[str], workers: int, log_dir: Path,
         workers_on: str = "") -> Plan:
    """What each host runs so that `workers` processes do ``python -m module arguments…`` together.

    Several hosts need the project, its Python and `log_dir` under the same path. Rank 0's port is
    $MASTER_PORT if that is set. Raises WorkbookError if the hosts would have unequal shares.
    """
    place, hosts, options = read_place(workers_on)
    hosts, start = hosts or ["this host"], []
    address = hosts[0] if place else "127.0.0.1"
    if workers % len(hosts):
        raise WorkbookError(f"{workers} workers cannot be dealt out evenly to {len(hosts)} hosts: "
                            f"ask for a multiple of {len(hosts)}.")
    if place == "cml":
        address = os.environ.get("CDSW_IP_ADDRESS") or socket.gethostbyname(socket.gethostname())
        hosts = [address, *(f"CML worker {rank}" for rank in range(1, workers))]
    elif place == "slurm":  # one launch, of a task a worker
        options = {"ntasks": workers, **options}
        start = [*SRUN, *(f"--{key}={value}" for key, value in options.items())]
        address = "SLURM_FIRST_HOST"  # each task puts this address and its own number there
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    port = int(os.environ.get("MASTER_PORT") or 20_000 + secrets.randbelow(12_000))
    shared = {key: os.environ[key] for key in KEPT if key in os.environ}
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    shared |= {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    shared |= END_WITH_STDIN if place == "ssh" else {}
    nodes, launches = workers if start else len(hosts), []
    for node, host in enumerate(hosts):
        number = "SLURM_PROCID" if start else str(node)
        command = [*start, sys.executable, "-m", "helpers.worker_group", f"--nnodes={nodes}",
                   f"--node-rank={number}", f"--master-addr={address}", f"--master-port={port}",
                   f"--nproc-per-node={workers // nodes}", f"--rdzv-id={name}", "--max-restarts=0",
                   f"--log-dir={Path(log_dir, name, number)}", "--redirects=3", "--tee=0:1",
                   "-m", module, *map(str, arguments)]
        environment = shared | ({} if start else {"WORKBOOK_HOST": host})
        rank = node * workers // len(hosts)
        launches.append(Launch(rank, host, environment, tuple(command)))
    return Plan(workers, place, options, name, address, port, tuple(launches))


def launch(chosen: Plan, log_dir: Path) -> None:
    """Start the plan's workers, pass on what rank 0 prints, and wait for the end of all of them.

    Every rank's output is kept below ``log_dir/<plan's name>``. Raises WorkbookError that says
    which worker failed first and why.
    """
    folder, running = Path(log_dir) / chosen.name, []
    folder.mkdir(parents=True, exist_ok=True)
    mine = chosen.launches if chosen.place == "ssh" else chosen.launches[:1]
    for one in chosen.launches[1:] if chosen.place == "print" else ():
        print(f"Type on {one.host}, within {JOIN_SECONDS} s:\n  {one.line()}", flush=True)
    with _cml_workers(chosen) if chosen.place == "cml" else contextlib.nullcontext():
        try:
            for node, one in enumerate(mine):
                running.append(_start(one, chosen.place, folder / f"host-{node}.log"))
            failed = _wait(running, folder / "host-0.log")
        finally:  # also for Ctrl-C, and when the notebook's kernel is told to end
            for process in running:
                _end(process)
        if failed is not None:
            if len(running) < len(chosen.launches):
                time.sleep(3)  # the cause may be on a host whose launcher is not seen from here
            raise WorkbookError(_explain(chosen, folder, failed))


def accelerate_configs(chosen: Plan, gpus: bool = False) -> list[str]:
    """The plan as accelerate's YAML files, one a launch, in the words of ``accelerate config``.

    On GPUs ``accelerate launch --config_file <file> -m …`` does what a launch's own command does.
    On CPUs accelerate 1.15 starts one process whatever such a file says, which `group` notices.
    """
    kind = "NO" if chosen.workers == 1 else "MULTI_GPU" if gpus else "MULTI_CPU"
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind,
              "use_cpu": not gpus, "mixed_precision": "no",  # the trainer casts by itself
              "num_processes": chosen.workers, "num_machines": len(chosen.launches),
              "main_process_ip": chosen.address, "main_process_port": chosen.port}
    return [yaml.safe_dump(config | {"machine_rank": node}) for node in range(len(chosen.launches))]


@contextlib.contextmanager
def _cml_workers(chosen: Plan):
    """While the block runs, workers of the CML workspace run all launches but the first."""
    try:
        from cml import workers_v1  # exists in a workspace alone
    except ImportError:
        raise WorkbookError("workers_on is 'cml', and this is no session of Cloudera's machine "
                            "learning workspace: choose another place.") from None
    size, started = CML_SIZE | {key: int(value) for key, value in chosen.options.items()}, []
    try:
        for one in chosen.launches[1:]:
            started += workers_v1.launch_workers(n=1, code=f"!{one.line()}", **size)
        failed = workers_v1.await_workers(started, wait_for_completion=False,
                                          timeout_seconds=JOIN_SECONDS)["failures"]
        if failed:
            raise WorkbookError(f"CML started {len(started) - len(failed)} of {len(started)} "
                                f"workers: the workspace may lack {size['cpu']} cores, "
                                f"{size['memory']} GiB or {size['nvidia_gpu']} GPUs for each.")
        yield
        # They have met rank 0 at the end of their work, and only have to exit.
        workers_v1.await_workers(started, wait_for_completion=True, timeout_seconds=60)
    finally:
        workers_v1.stop_workers(*(worker["id"] for worker in started))


def _start(one: Launch, place: str, log: Path) -> subprocess.Popen:
    """Execute a launch here, or by ssh if its host is another."""
    command, mine = list(one.command), {"localhost", socket.gethostname()}
    for addresses in psutil.net_if_addrs().values():
        mine.update(entry.address for entry in addresses)
    if place == "ssh" and one.host not in mine:
        command = [*SSH, one.host, one.line()]
    if not shutil.which(command[0]):
        raise WorkbookError(f"The command {command[0]} is not on this host: install it or choose "
                            "another place.")
    with log.open("wb") as file:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file,
                                stderr=subprocess.STDOUT,
                                env=os.environ | one.environment | END_WITH_STDIN)


def _wait(running: list[subprocess.Popen], log: Path) -> int | None:
    """Pass on what rank 0 says until all have ended, or one has failed and the others had time to
    notice. Returns the number of the first that failed."""
    failed, deadline = None, float("inf")
    with log.open("rb") as lines:
        while True:
            time.sleep(0.2)
            codes = [process.poll() for process in running]
            while (line := lines.readline()).endswith(b"\n"):  # torchrun marks rank 0's
                print(line.decode(errors="replace").partition("[rank 0]: ")[2], end="", flush=True)
            lines.seek(-len(line), os.SEEK_CUR)  # half a line: the rest comes
            if failed is None and any(codes):
                failed = [bool(code) for code in codes].index(True)
                deadline = time.monotonic() + PATIENCE
            if None not in codes or time.monotonic() > deadline:
                return failed


def _end(process: subprocess.Popen) -> None:
    for step in (process.stdin.close, process.terminate, process.kill):
        step()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


def _explain(chosen: Plan, folder: Path, failed: int) -> str:
    """The cause in one sentence, from what the launchers left in failure.json."""
    found = [entry for path in folder.glob("*/failure.json") for entry in read_json(path)]
    if found:
        first = min(found, key=lambda entry: (entry["order"], entry["time"]))
        print(first["traceback"], end="", file=sys.stderr, flush=True)
        message = first["message"]
    else:  # a launcher was killed, or never began: its last words are all there is
        words = (folder / f"host-{failed}.log").read_text("utf-8", errors="replace").strip()
        message = (f"The workers on {chosen.launches[failed].host} ended without a report; the "
                   f"last words were: {words.rpartition(chr(10))[2] or 'none'}")
    return f"{message} (logs of all ranks: {folder.parent.name}/{folder.name})."
