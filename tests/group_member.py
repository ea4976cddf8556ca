"""A worker for the tests: `python -m tests.group_member <scenario>` joins its group and then does as the scenario says."""

import os
import signal
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from helpers import WorkbookError, worker_group


def sum_of_ranks() -> float:
    import torch

    value = torch.tensor([float(os.environ["RANK"])])
    torch.distributed.all_reduce(value)
    return value.item()


@record
def main(scenario: str, asked: int = 2) -> None:
    rank = int(os.environ.get("RANK", "0"))
    with worker_group.group(asked):
        print(f"rank {rank} of {asked}: the ranks add up to {sum_of_ranks():g}", flush=True)
        if len(sys.argv) > 3:  # the test reads who takes part, and what listens
            Path(sys.argv[3], f"{rank}.pid").write_text(f"{os.getpid()} {os.getppid()}", encoding="utf-8")
        if rank == 1 and scenario == "mistake":
            raise WorkbookError("The data are wrong: mend them.")
        if rank == 1 and scenario == "bug":
            [].pop()
        if rank == 1 and scenario in ("SIGKILL", "SIGSEGV", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, scenario))
        if scenario == "average":
            import torch

            from helpers.fast import recorded

            gradients = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank + 1])]
            recorded.average(gradients)
            print(f"average {[gradient.tolist() for gradient in gradients]}", flush=True)
        if scenario == "endless":
            time.sleep(600)
        sum_of_ranks()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
