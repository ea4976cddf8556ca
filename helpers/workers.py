"""A group of workers that train together: who they are, where they run, and what is said when one of them fails.

`plan` says what each host runs; `launch` does it and waits. Each host runs one launcher (``python -m helpers.workers``:
torch.distributed.run, that is torchrun, with its own options), which starts one process a GPU, or gloo processes that
share the CPU's cores evenly. Inside a worker, `group` joins torch.distributed and watches the other workers.

A worker that dies ends the group, and its own error is what the caller sees. Nothing is restarted in place: resuming
is a new launch, with a new rendezvous id and port, from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import random
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from helpers import WorkbookError

ROOT = Path(__file__).resolve().parent.parent
PLACES = ('"" (this host)', "ssh:host,host", "print:host,host", "slurm", "cml")
BEAT, PATIENCE = 2.0, 15.0  # s between two signs of life of a worker; without one for so long it counts as gone
KEPT = ("WORKBOOK_CACHE", "WORKBOOK_JOIN_SECONDS", "HF_HOME", "HF_HUB_OFFLINE", "NCCL_DEBUG", "NCCL_NVLS_ENABLE", "TZ")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
END_WITH_STDIN = {"WORKBOOK_END_WITH_STDIN": "1"}  # a launcher whose caller is killed sees its standard input close
CML_SIZE = {"cpu": 2, "memory": 16, "nvidia_gpu": 0}  # of one CML worker: cores, GiB, GPUs


@dataclass(frozen=True)
class Launch:
    """What one host runs: a launcher of `processes` workers whose ranks begin at `rank`."""

    rank: int
    processes: int
    host: str
    environment: dict[str, str]
    command: tuple[str, ...]

    def line(self) -> str:
        """The launch as a line for a shell, to be typed on its host."""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"cd {shlex.quote(str(ROOT))} && env {settings} {shlex.join(self.command)}"


@dataclass(frozen=True)
class Plan:
    """Who takes part: `workers` processes at `place`, which meet at rank 0's `address` and `port`; `name` is fresh."""

    workers: int
    place: str
    name: str
    address: str
    port: int
    launches: tuple[Launch, ...]
    options: dict[str, str] = field(default_factory=dict)


def read_place(workers_on: str) -> tuple[str, list[str], dict[str, str]]:
    """``workers_on`` as (place, hosts, options); raises WorkbookError for a place that does not exist.

    ``ssh:a,b`` and ``print:a,b`` name hosts, rank 0's first; ``slurm:partition=gpu,time=60`` and ``cml:cpu=4,memory=16``
    name options of srun and of CML's launch_workers.
    """
    place, _, rest = workers_on.strip().partition(":")
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    if place in ("ssh", "print") and parts:
        return place, parts, {}
    option = {"slurm": r"[\w-]+=\S+", "cml": rf"({'|'.join(CML_SIZE)})=\d+"}.get(place)
    if option and all(re.fullmatch(option, part) for part in parts):
        return place, [], dict(part.split("=", 1) for part in parts)
    if workers_on.strip():
        raise WorkbookError(f"workers_on is {workers_on!r}: use {', '.join(PLACES)}; hosts are separated by commas.")
    return "", [], {}


def plan(module: str, arguments: list[str], workers: int, log_dir: Path, workers_on: str = "") -> Plan:
    """Plan `workers` processes of ``python -m module arguments…``; starts nothing.

    Several hosts need the project, its Python and `log_dir` under the same path: a file system that they share. Rank 0's
    port is $MASTER_PORT if that is set, for firewalls. Raises WorkbookError if the workers cannot be dealt out evenly.
    """
    place, hosts, options = read_place(workers_on)
    if hosts and (workers % len(hosts) or workers < len(hosts)):
        raise WorkbookError(f"{workers} workers cannot be dealt out evenly to {len(hosts)} hosts: ask for a multiple of "
                            f"{len(hosts)}.")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    port = int(os.environ.get("MASTER_PORT") or random.SystemRandom().randrange(20_000, 32_000))
    if place == "cml":
        hosts = [os.environ.get("CDSW_IP_ADDRESS") or socket.gethostbyname(socket.gethostname()),
                 *(f"CML worker {rank}" for rank in range(1, workers))]
    hosts = hosts or ["this host"]
    address = hosts[0] if place in ("ssh", "print", "cml") else "" if place == "slurm" else "127.0.0.1"
    nodes = workers if place == "slurm" else len(hosts)
    each = workers // nodes
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

    def launch_of(node: int, host: str) -> Launch:
        folder = Path(log_dir) / name / ("%t" if place == "slurm" else str(node))
        if nodes == 1:  # a file and a socket on the loopback address: nothing listens to the network
            where = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file",
                     f"--rdzv-endpoint={folder / 'rendezvous'}", "--local-addr=127.0.0.1"]
        elif place == "slurm":  # each task asks Slurm which one it is
            where = [f"--nnodes={nodes}", f"--master-port={port}"]
        else:
            where = [f"--nnodes={nodes}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
        environment = {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(ROOT), *paths])), "PYTHONUNBUFFERED": "1",
                       "WORKBOOK_HOST": host,
                       **{key: os.environ[key] for key in KEPT if key in os.environ}}
        command = [sys.executable, "-m", "helpers.workers", *where, f"--nproc-per-node={each}", f"--rdzv-id={name}",
                   "--max-restarts=0", f"--log-dir={folder}", "--redirects=3", *(["--tee=0:1"] if node == 0 else []),
                   "-m", module, *map(str, arguments)]
        return Launch(node * each, each, host, environment, tuple(command))

    launches = [launch_of(node, host) for node, host in enumerate(hosts)]
    if place == "slurm":
        [one] = launches
        tasks = {"ntasks": str(workers), "cpus-per-task": "1", "kill-on-bad-exit": "1", "job-name": "lora-workbook", **options}
        srun = ["srun", *(f"--{key}={value}" for key, value in tasks.items())]
        environment = {key: value for key, value in one.environment.items() if key != "WORKBOOK_HOST"}
        launches = [Launch(0, workers, "Slurm", environment, (*srun, *one.command))]
    return Plan(workers, place, name, address, port, tuple(launches), options)


def accelerate_configs(chosen: Plan, gpus: bool = False) -> list[str]:
    """The plan as accelerate's configuration files, one a launch, in the words that ``accelerate config`` writes.

    For GPUs, ``accelerate launch --config_file <file> -m …`` on each host does what the launch's own command does. On
    CPUs accelerate 1.15 starts one process whatever such a file says, which `group` notices.
    """
    import tempfile

    from accelerate.commands.config.config_args import ClusterConfig

    texts = []
    for node in range(len(chosen.launches)):
        several = len(chosen.launches) > 1
        kind = "NO" if chosen.workers == 1 else "MULTI_GPU" if gpus else "MULTI_CPU"
        config = ClusterConfig(
            compute_environment="LOCAL_MACHINE", distributed_type=kind, mixed_precision="no",  # the trainer casts by itself
            use_cpu=not gpus, debug=False, num_processes=chosen.workers, num_machines=len(chosen.launches), machine_rank=node,
            main_process_ip=chosen.address if several else None, main_process_port=chosen.port if several else None,
            rdzv_backend="static", same_network=True, main_training_function="main", enable_cpu_affinity=False)
        with tempfile.TemporaryDirectory() as folder:
            config.to_yaml_file(Path(folder, "config.yaml"))
            texts.append(Path(folder, "config.yaml").read_text())
    return texts


# -------------------------------------------------------------------------------------------------------- the caller


def launch(chosen: Plan, log_dir: Path) -> None:
    """Start the plan's workers, pass on what rank 0 prints, and wait for the end of all of them.

    Every rank's output is kept below ``log_dir/<plan's name>``. Raises WorkbookError that says which worker failed first
    and why; its traceback is printed if it was no WorkbookError. No process outlives this call, nor the caller.
    """
    folder = Path(log_dir) / chosen.name
    folder.mkdir(parents=True, exist_ok=True)
    lines: queue.Queue[str] = queue.Queue()
    running, failed, end_others = [], 0, _start_elsewhere(chosen)
    try:
        for node, one in enumerate(chosen.launches):
            if command := _command_here(chosen, node):
                running.append(_start(one, command, folder / f"host-{node}.log", lines if node == 0 else None))
        failed = _wait(running, lines)
    finally:  # also for Ctrl-C, and when the notebook's kernel is told to end
        for process in running:
            _end(process)
        end_others(failed is None)
        for process in running:
            process.reader.join(timeout=5)
    _print_rank_0(lines)
    if failed is not None:
        raise WorkbookError(_explain(_failures(folder), chosen, folder, failed))


def _command_here(chosen: Plan, node: int) -> list[str] | None:
    """What this host executes for a launch: the command itself, ssh, or nothing if somebody else starts it."""
    one = chosen.launches[node]
    if node == 0 and chosen.place != "ssh" or _is_here(one.host):
        return list(one.command)
    there = replace(one, environment={**one.environment, **END_WITH_STDIN})
    return [*SSH, one.host, there.line()] if chosen.place == "ssh" else None


def _is_here(host: str) -> bool:
    import psutil

    addresses = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return host in {"localhost", socket.gethostname(), *addresses}


def _start_elsewhere(chosen: Plan):
    """Have the launches that this host cannot execute started by CML or by a person; returns what ends them again."""
    others = chosen.launches[1:]
    if chosen.place == "print" and others:
        print(f"Type on the other {'host' if len(others) == 1 else 'hosts'}, within {_join_seconds()} s:")
        for one in others:
            print(f"  {one.host}:  {one.line()}", flush=True)
    if chosen.place != "cml":
        return lambda succeeded: None
    try:
        from cml import workers_v1
    except ImportError:
        raise WorkbookError("workers_on is 'cml', and this is no session of Cloudera's machine learning workspace: choose "
                            "another place.") from None
    size = CML_SIZE | {name: int(value) for name, value in chosen.options.items()}
    started = [worker for one in others for worker in workers_v1.launch_workers(n=1, code=f"!{one.line()}", **size)]
    ids = [worker["id"] for worker in started]
    failed = workers_v1.await_workers(started, wait_for_completion=False, timeout_seconds=_join_seconds())["failures"]
    if failed or len(ids) != len(others):
        workers_v1.stop_workers(*ids)
        raise WorkbookError(f"CML started {len(ids) - len(failed)} of {len(others)} workers: the workspace may lack "
                            f"{size['cpu']} cores, {size['memory']} GiB or {size['nvidia_gpu']} GPUs for each.")

    def end(succeeded: bool) -> None:
        if succeeded:  # they have met rank 0 at the end of their work, and only have to exit
            workers_v1.await_workers(started, wait_for_completion=True, timeout_seconds=60)
        workers_v1.stop_workers(*ids)

    return end


def _join_seconds() -> int:
    return int(os.environ.get("WORKBOOK_JOIN_SECONDS") or 300)


def _start(one: Launch, command: list[str], log: Path, lines: queue.Queue | None) -> subprocess.Popen:
    environment = {**os.environ, **one.environment, **END_WITH_STDIN}
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=environment)
    except FileNotFoundError:
        raise WorkbookError(f"The command {command[0]} is not on this host: install it or choose another place.") from None

    def read() -> None:
        with log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if lines is not None and "[default0]:" in line:
                    lines.put(line.split("[default0]:", 1)[1].rstrip())

    process.reader = threading.Thread(target=read, daemon=True)
    process.reader.start()
    return process


def _print_rank_0(lines: queue.Queue, seconds: float = 0.0) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            print(lines.get(timeout=seconds) if seconds else lines.get_nowait(), flush=True)


def _wait(running: list[subprocess.Popen], lines: queue.Queue) -> int | None:
    """Wait until all have ended, or one has failed and the others had time to notice. Returns the first that failed."""
    failed, deadline = None, None
    while True:
        _print_rank_0(lines, 0.2)
        codes = [process.poll() for process in running]
        if failed is None and any(codes):
            failed, deadline = next(node for node, code in enumerate(codes) if code), time.monotonic() + PATIENCE
        if None not in codes or deadline and time.monotonic() > deadline:
            return failed


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()
    for step in (lambda: None, process.terminate, process.kill):
        step()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


def _failures(folder: Path) -> list[dict]:
    """What the launchers left in failure.json, the cause before its consequences: a lost connection has a reason elsewhere."""
    found = [entry for path in folder.glob("*/failure.json") for entry in json.loads(path.read_text())]

    def order(entry: dict) -> tuple:
        if entry["signal"]:
            kind = {"SIGTERM": 2, "SIGABRT": 1}.get(entry["signal"], 0)  # ended by its launcher; by NCCL's watchdog
        else:
            kind = 1 if re.search(r"Connection (closed|reset|refused)|Broken pipe|[Gg]loo|NCCL|Dist\w+Error|lost touch",
                                  entry["message"]) else 0
        return kind, entry["time"], entry["rank"]

    return sorted(found, key=order)


def _explain(failures: list[dict], chosen: Plan, folder: Path, failed: int) -> str:
    logs = f"(logs of all ranks: {folder.parent.name}/{folder.name})"
    told_to_end = [entry for entry in failures if entry["rank"] < 0 and entry["signal"]]
    if failures == told_to_end:  # a launcher was killed, or never began: its own last words are all there is
        log = folder / f"host-{failed}.log"
        words = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        return (f"The workers on {chosen.launches[failed].host} ended without a report; the last words were: "
                f"{words[-1] if words else 'none'} {logs}.")
    first = failures[0]
    message = first["message"].removeprefix("WorkbookError: ").rstrip(".")
    if first["rank"] < 0:  # the launcher's own
        return f"{message} {logs}."
    where = f" on {first['host']}" if first["host"] != "this host" else ""
    who = f"The worker of rank {first['rank']}{where}"
    if first["signal"]:
        why = {"SIGKILL": " (memory may have run out, or somebody ended it)"}.get(first["signal"], "")
        return f"{who} was killed by {first['signal']}{why}: resume the run to go on from its last checkpoint {logs}."
    if not first["message"].startswith("WorkbookError"):
        print(first["traceback"], file=sys.stderr, flush=True)
    return f"{who} failed: {message} {logs}."


# ---------------------------------------------------------------------------------------------- the launcher of a host


def main(argv: list[str]) -> int:
    """torchrun on one host, with its own options; why it failed is left in ``<log dir>/failure.json``."""
    task = os.environ.get("SLURM_PROCID")
    if task is not None and "--node-rank" not in " ".join(argv):  # torchrun reads options from PET_ variables too
        os.environ["PET_NODE_RANK"] = task
        os.environ["PET_MASTER_ADDR"] = subprocess.run(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
                                                       capture_output=True, text=True, check=True).stdout.split()[0]
        argv = [word.replace("%t", task) if word.startswith("--log-dir=") else word for word in argv
                if task == "0" or word != "--tee=0:1"]
    if os.environ.get("WORKBOOK_END_WITH_STDIN") == "1":
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = torchrun.parse_args(argv)
    folder = Path(options.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _prepare_host(options)
        torchrun.run(options)
        return 0
    except ChildFailedError as error:
        entries = [_entry(rank, failure) for rank, failure in error.failures.items()]
    except WorkbookError as error:
        entries = [_own(str(error))]
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        entries = [{**_own(f"{_host()}: the launcher was told to end ({name})"), "signal": name}]
    except Exception as error:  # torchrun's own: the group never came together
        entries = [_own(_meeting_failed(error, options))]
    temporary = folder / ".failure.json"
    temporary.write_text(json.dumps(entries, indent=1))
    os.replace(temporary, folder / "failure.json")
    print("\n".join(entry["message"] for entry in entries), file=sys.stderr)
    return 1


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun ends its workers upon it


def _host() -> str:
    return os.environ.get("WORKBOOK_HOST") or socket.gethostname()


def _own(message: str) -> dict:
    return {"rank": -1, "host": _host(), "signal": "", "message": message, "traceback": "", "time": time.time()}


def _entry(rank: int, failure) -> dict:
    """A worker's end, from torchrun's record of it and from the error file that the worker wrote."""
    name = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else ""
    data = failure.error_file_data.get("message", {})
    text = data if isinstance(data, str) else data.get("message", "")
    if name == "SIGABRT" and text:  # an error that the worker reported, and a library that aborts on the way out
        name = ""
    trace = "" if isinstance(data, str) else data.get("extraInfo", {}).get("py_callstack", "")
    return {"rank": rank, "host": _host(), "signal": name, "message": text or f"it ended with exit code {failure.exitcode}",
            "traceback": trace, "time": failure.timestamp}


def _prepare_host(options) -> None:
    """Threads, network interface and GPUs of this host's workers. Raises WorkbookError for what cannot work."""
    import torch

    each, gpus = int(options.nproc_per_node), torch.cuda.device_count()
    if 0 < gpus < each:
        raise WorkbookError(f"{each} workers were asked for and {_host()} has {gpus} GPU{'s' * (gpus > 1)}: one process "
                            f"needs a GPU of its own, so ask for at most {gpus}.")
    # More threads than cores would make every worker wait for every other.
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or here // each)
    os.environ["OMP_NUM_THREADS"] = str(min(max(1, cores), int(os.environ.get("OMP_NUM_THREADS") or cores or 1)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # one host: rank 0 serves the store, on the loopback address
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast needs rights that containers seldom have
    if int(options.nnodes) == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = _interface("127.0.0.1")
        return
    options.rdzv_conf = f"timeout={_join_seconds()}"
    address, port = options.master_addr, int(options.master_port)
    try:
        if int(options.node_rank) == 0:
            socket.create_server((address, port)).close()
        own = _meet(address, port, int(options.node_rank))
    except socket.gaierror:
        raise WorkbookError(f"{_host()} knows no address of {address!r}, the first host: correct its name, or give its IP "
                            "address.") from None
    except OSError as error:
        raise WorkbookError(_meeting_failed(error, options)) from error
    # Gloo and NCCL would otherwise take the host name's address, which is often a loopback address.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, _interface(own))


def _meet(address: str, port: int, node: int) -> str:
    """This host's own address towards rank 0; other hosts wait here until rank 0's launcher listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing: it only looks up the route
        own = probe.getsockname()[0]
    deadline = time.monotonic() + _join_seconds()
    while node > 0:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    return own


def _interface(address: str) -> str:
    import psutil

    return next(name for name, entries in psutil.net_if_addrs().items() if any(e.address == address for e in entries))


def _meeting_failed(error: Exception, options) -> str:
    """Why the hosts did not come together, in one sentence."""
    text, at = str(error).splitlines()[0], f"{options.master_addr}:{options.master_port}"
    if "EADDRINUSE" in str(error) or "Address already in use" in text:
        return f"Port {options.master_port} of {_host()} is in use by another program: start again, or choose a free MASTER_PORT."
    if "Cannot assign requested address" in text:
        return f"{options.master_addr} is no address of {_host()}, which was to run rank 0: name an address of the first host."
    if "waiting for clients" in text or "clients joined" in text:
        joined = re.search(r"(\d+)/(\d+) clients", text)
        count = f"only {joined[1]} of {joined[2]} hosts" if joined else "not all hosts"
        return f"{count} came to {at} within {_join_seconds()} s: see whether the others run and can reach that address."
    if isinstance(error, OSError) or "timed out" in text:
        return (f"{_host()} could not reach {at}, the first host, for {_join_seconds()} s ({text}): correct the address, or "
                "open the port in the firewall.")
    return f"{_host()}: {type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------------------ a worker


@contextlib.contextmanager
def group(asked: int, facts: dict[str, str] | None = None):
    """Be one of `asked` workers while the block runs: torch.distributed is initialised, and the others are watched.

    facts: what must be the same on all workers, beside versions. Raises WorkbookError if another number of workers
    started than was asked for, or if a host differs from rank 0's. When a worker is silent for 15 s, or this one's
    launcher is gone, the process ends itself: a collective operation would wait for half an hour.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != asked:
        raise WorkbookError(f"{asked} worker{'s were' if asked > 1 else ' was'} asked for and {world} started: the launcher "
                            "did not do what it was told; start with python -m helpers.jobs, or torchrun.")
    if world == 1:
        yield
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # Unlike a port, a socket can be bound to one address.
    listener = socket.create_server((address, port)).detach() if serve else None
    store = dist.TCPStore(address, port, is_master=serve, master_listen_fd=listener, wait_for_workers=False,
                          timeout=timedelta(seconds=_join_seconds()))
    store = dist.PrefixStore(_prefix(), store)
    _compare(store, rank, {**_versions(), **(facts or {})})
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else None
    if cuda:
        torch.cuda.set_device(device)
    store.set(f"host/{rank}", _host())
    store.set(f"beat/{rank}", "0")
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, device_id=device)
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(address, port, rank, world, done), daemon=True)
    watch.start()
    try:
        yield
        dist.barrier()  # whoever is done waits here for the others, still watched
    finally:
        done.set()
        watch.join()
    dist.barrier()  # rank 0 may serve the store that the others' watches read
    dist.destroy_process_group()


def _prefix() -> str:
    return f"workbook/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def _versions() -> dict[str, str]:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "helpers").glob("*.py")):
        digest.update(path.read_bytes())
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
    return {**{name: importlib.metadata.version(name).split("+")[0] for name in packages},
            "this project's helpers": digest.hexdigest()[:12]}


def _compare(store, rank: int, mine: dict[str, str]) -> None:
    import torch

    mine = {**mine, "devices of the kind": "GPU" if torch.cuda.is_available() else "CPU"}
    if rank == 0:
        store.set("facts", json.dumps({"host": _host(), **mine}))
        return
    theirs = json.loads(store.get("facts"))
    if theirs["host"] == _host():  # the same files; they may have been edited since
        del mine["this project's helpers"]
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise WorkbookError(f"{_host()} has {name} {value} and {theirs['host']}, where rank 0 runs, has {theirs.get(name)}:"
                                " every host needs the same project and versions (pip install -c constraints.txt).")


def _watch(address: str, port: int, rank: int, world: int, done: threading.Event) -> None:
    """End this process when another worker shows no sign of life, rank 0's store is silent, or the launcher is gone."""
    launcher, seen = os.getppid(), {"contact": time.monotonic(), "others": {}}
    # Beside this thread, as a store whose network is cut can keep its caller for ever.
    beat = threading.Thread(target=_beat, args=(address, port, rank, world, done, seen), daemon=True)
    beat.start()
    woke, patience = time.monotonic(), PATIENCE
    while not done.wait(BEAT / 2):
        now, again = time.monotonic(), "resume the run to go on from its last checkpoint"
        # On a machine so busy that this thread itself comes late, the others' silence means little for as long.
        patience = max(PATIENCE, patience - BEAT / 4) + max(0.0, now - woke - BEAT)
        woke = now
        if os.getppid() != launcher:
            _leave("the launcher of this worker is gone")
        if now - seen["contact"] > patience:
            _leave(f"it lost touch with rank 0 at {address}:{port} for {PATIENCE:.0f} s; {again}")
        for other, (when, host) in seen["others"].items():
            if now - when > patience:
                _leave(f"nothing has been heard of rank {other} on {host} for {PATIENCE:.0f} s: its process, its host or the "
                       f"network is down; {again}")
    beat.join(timeout=5)  # a thread that is in torch's code when Python ends would abort the process


def _beat(address: str, port: int, rank: int, world: int, done: threading.Event, seen: dict) -> None:
    """Show a sign of life every 2 s, and note in `seen` when the others' last one was and when the store last answered."""
    import torch.distributed as dist

    # A connection of its own: the process group's is held by whatever operation waits.
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    store, count = dist.PrefixStore(_prefix(), store), 0
    last = {other: b"" for other in range(world) if other != rank}
    hosts = {other: store.get(f"host/{other}").decode() for other in last}
    with contextlib.suppress(dist.DistError):  # then `contact` grows old, and _watch says so
        while not done.wait(BEAT):
            count += 1
            store.set(f"beat/{rank}", str(count))
            for other, before in last.items():
                last[other] = store.get(f"beat/{other}")
                if last[other] != before:
                    seen["others"] = {**seen["others"], other: (time.monotonic(), hosts[other])}
            seen["contact"] = time.monotonic()


def _leave(message: str) -> None:
    """End this process from a thread, with the message where torchrun looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise WorkbookError(message)
    except WorkbookError as error:
        get_error_handler().record_exception(error)
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
