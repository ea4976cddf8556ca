"""What runs on each host: torchrun with this host's settings, and in its workers `group`.

``python -m helpers.worker_group`` takes torchrun's own options; helpers.workers.plan writes them.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from helpers import WorkbookError, write_json
from helpers.workers import END_WITH_STDIN, GROUP_SECONDS, JOIN_SECONDS

# An error that says this is a consequence: its cause is in another worker.
BROKEN = r"Connection (closed|reset|refused)|Broken pipe|[Gg]loo|NCCL|Dist\w+Error|been heard of"
HOST = os.environ.get("WORKBOOK_HOST") or socket.gethostname()


@contextlib.contextmanager
def group(asked: int):
    """Join a group of `asked` workers for the block, in which torch.distributed is initialised.

    Raises WorkbookError if another number of workers started, or after GROUP_SECONDS of waiting
    for another (on GPUs NCCL's watchdog aborts the process then).
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != asked:
        raise WorkbookError(f"Workers asked for: {asked}, started: {world}; start them with "
                            "python -m helpers.jobs, or torchrun.")
    if world == 1:
        yield
        return
    end_with_stdin()
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    file = os.environ.get("WORKBOOK_STORE")  # torch's own store would listen to the network
    store = dist.FileStore(file, world) if file else next(dist.rendezvous("env://"))[0]
    store.set(f"joined/{rank}", "")  # one that loads slowly has longer to come than to answer
    store.wait([f"joined/{other}" for other in range(world)], timedelta(seconds=JOIN_SECONDS))
    dist.init_process_group("nccl" if device else "gloo", store=dist.PrefixStore("group", store),
                            rank=rank, world_size=world, device_id=device,
                            timeout=timedelta(seconds=GROUP_SECONDS))
    try:
        yield
        dist.barrier()
    except RuntimeError as error:
        if not re.search("timed? ?out", str(error), re.IGNORECASE):
            raise
        other = f"rank {1 - rank}" if world == 2 else "another rank"
        raise WorkbookError(f"nothing has been heard of {other} for {GROUP_SECONDS} s "
                            "(WORKBOOK_GROUP_SECONDS): its process, its host or the network is "
                            "down; resume the run to go on from its last checkpoint.") from error
    dist.destroy_process_group()


def end_with_stdin() -> None:
    """End this process when the caller of its launcher closes the standard input, or is killed."""
    def wait():
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun ends its workers upon it

    if END_WITH_STDIN.items() <= os.environ.items():  # not where a person typed the command
        threading.Thread(target=wait, daemon=True).start()


def main(argv: list[str]) -> int:
    """torchrun on one host. Why it failed is left in ``<log dir>/failure.json``."""
    if "--node-rank=SLURM_PROCID" in argv:  # Slurm starts the same command in every task
        first = subprocess.check_output(["scontrol", "show", "hostnames"], text=True).split()[0]
        task = os.environ["SLURM_PROCID"]
        argv = [w.replace("SLURM_PROCID", task).replace("SLURM_FIRST_HOST", first) for w in argv]
    end_with_stdin()
    options = torchrun.parse_args(argv)
    folder, at = Path(options.log_dir), f"{options.master_addr}:{options.master_port}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _prepare_host(options, folder)
        torchrun.run(options)
        return 0
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        # torchrun kills the remaining workers 30 s after the first failure: no failures of theirs.
        failures = [_worker_failure(rank, failure) for rank, failure in error.failures.items()
                    if failure.timestamp < first + 29]
    except SignalException:  # whoever sent the signal knows why
        return 1
    except WorkbookError as error:
        failures = [_failure(str(error))]
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        failures = [_failure(f"{HOST} did not meet the other hosts at {at} ({reason}): see whether "
                             "all run, and can reach that address of the first host and a free "
                             "MASTER_PORT there")]
    write_json(folder / "failure.json", failures)
    print("\n".join(failure["message"] for failure in failures), file=sys.stderr)
    return 1


def _failure(message: str, order: int = 0, traceback: str = "", when: float | None = None) -> dict:
    """order: 0 for a cause, 1 for what may follow from one, 2 for what torchrun ended."""
    return {"message": message, "order": order, "traceback": traceback, "time": when or time.time()}


def _worker_failure(rank: int, failure: ProcessFailure) -> dict:
    """Why a worker ended, in a sentence."""
    who, said = f"The worker of rank {rank}", failure.message
    who += f" on {HOST}" if HOST != "this host" else ""
    if isinstance(said, dict):  # from the error file that the worker's main wrote, under @record
        text = said["message"].rstrip(".")
        message = f"{who} failed: {text.removeprefix('WorkbookError: ')}"
        trace = "" if text.startswith("WorkbookError: ") else said["extraInfo"]["py_callstack"]
        return _failure(message, int(bool(re.search(BROKEN, text))), trace, failure.timestamp)
    if failure.exitcode > 0:
        message = f"{who} failed: it ended with exit code {failure.exitcode}"
        return _failure(message, 1, when=failure.timestamp)
    name = failure.signal_name()
    why = {"SIGKILL": " (memory may have run out, or somebody ended it)",
           "SIGABRT": f" (on GPUs NCCL does so after {GROUP_SECONDS} s of waiting for another)"}
    message = (f"{who} was killed by {name}{why.get(name, '')}: resume the run to go on from its "
               "last checkpoint")
    order = {"SIGTERM": 2, "SIGABRT": 1}.get(name, 0)  # torchrun ends the others by SIGTERM
    return _failure(message, order, when=failure.timestamp)


def _prepare_host(options, folder: Path) -> None:
    """Threads, network interface and GPUs of this host's workers."""
    each, gpus = int(options.nproc_per_node), torch.cuda.device_count()
    if 0 < gpus < each:
        raise WorkbookError(f"{each} workers need a GPU each, and {HOST} has {gpus}: ask for at "
                            f"most {gpus}.")
    # More threads than cores would make every worker wait for every other.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    share = int(os.environ.get("SLURM_CPUS_PER_TASK") or cores // each)
    os.environ["OMP_NUM_THREADS"] = str(max(1, min(share, torch.get_num_threads())))
    os.environ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}]: "
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast needs rights that containers lack
    own, several = "127.0.0.1", options.nnodes != "1"
    if several:
        options.rdzv_conf = f"timeout={JOIN_SECONDS}"
        at = options.master_addr, int(options.master_port)
        if int(options.node_rank) == 0:
            socket.create_server(at).close()  # is that address this host's, and its port free?
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(at)  # sends nothing: it only looks up the route
            own = probe.getsockname()[0]
    else:  # meet in files and on the loopback address: nothing listens to the network
        options.rdzv_backend, options.rdzv_conf = "c10d", "store_type=file"
        options.rdzv_endpoint, options.local_addr = str(folder / "rendezvous"), own
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.environ["WORKBOOK_STORE"] = str(folder / "store")
    # Gloo and NCCL would otherwise take the host name's address, which may be another network's.
    interface = next(name for name, entries in psutil.net_if_addrs().items()
                     if own in [entry.address for entry in entries])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = (several and os.environ.get(name)) or interface


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
