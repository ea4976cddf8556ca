"""Workers train together as one would, wherever they run; a group that fails ends, says why, leaves nobody, and goes on."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing import errors

from helpers import WorkbookError, data, recipes, training, worker_group, workers

ROOT = Path(__file__).resolve().parent.parent
MEMBER = "tests.group_member"


def planned(tmp_path, scenario="fine", count=2, workers_on=""):
    return workers.plan(MEMBER, [scenario, str(count), str(tmp_path)], count, tmp_path / "logs", workers_on)


def members() -> list[psutil.Process]:
    """Launchers and workers of this project that live, on whatever virtual host."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and (MEMBER in words or "helpers.training" in words):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path):
    yield
    deadline = time.time() + 10
    while left := [p for p in members() if str(tmp_path) in " ".join(p.info["cmdline"])]:
        assert time.time() < deadline, f"left behind: {left}"
        time.sleep(0.2)


# ---- plans


def test_a_plan_says_who_runs_what_where(tmp_path):
    here = planned(tmp_path)
    [one] = here.launches
    assert (one.rank, one.host, here.address) == (0, "this host", "127.0.0.1")
    several = planned(tmp_path, count=4, workers_on="ssh:gpu-a, gpu-b")
    assert [(one.rank, one.host) for one in several.launches] == [(0, "gpu-a"), (2, "gpu-b")]
    for node, one in enumerate(several.launches):
        assert {f"--node-rank={node}", "--nnodes=2", "--nproc-per-node=2", "--master-addr=gpu-a",
                f"--master-port={several.port}", f"--rdzv-id={several.name}", "--max-restarts=0"} <= set(one.command)
        assert one.environment["WORKBOOK_HOST"] == one.host
    words = shlex.split(several.launches[1].line().partition(" && ")[2])
    assert words[0] == "env" and tuple(words[-len(several.launches[1].command):]) == several.launches[1].command
    again = planned(tmp_path, count=4, workers_on="ssh:gpu-a,gpu-b")
    assert again.name != several.name and again.port != several.port, "a relaunch meets at a new place"
    [slurm] = planned(tmp_path, count=4, workers_on="slurm:partition=gpu,gpus-per-task=1").launches
    assert slurm.command[0] == "srun" and {"--ntasks=4", "--partition=gpu", "--gpus-per-task=1"} <= set(slurm.command)
    with mock.patch.dict(os.environ, MASTER_PORT="12345"):
        assert planned(tmp_path, workers_on="print:a,b").port == 12345


@pytest.mark.parametrize(("workers_on", "said"), [
    ("shh:a,b", "workers_on is 'shh:a,b': use"), ("ssh:", "use .*ssh:host,host"), ("slurm:gpu", "workers_on is 'slurm:gpu'"),
    ("cml:cpu=many", "workers_on is 'cml:cpu=many'"),
    ("ssh:-oProxyCommand=id,b", "no host begins with a dash"),
    ("ssh:a,b,c", "4 workers cannot be dealt out evenly to 3 hosts"), ("print:a,b,c,d,e", "to 5 hosts"),
    ("cml", "no session of Cloudera's")])
def test_a_place_that_cannot_be_is_named(tmp_path, workers_on, said):
    with pytest.raises(WorkbookError, match=said):
        workers.launch(planned(tmp_path, count=4, workers_on=workers_on), tmp_path / "logs")
    if "evenly" not in said and workers_on not in ("cml", "print:a,b,c,d,e"):
        with pytest.raises(WorkbookError, match=said):
            recipes.check_parameters({"task": "sql", "workers_on": workers_on})


def test_configs_are_what_accelerate_reads(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    texts = workers.accelerate_configs(planned(tmp_path, count=4, workers_on="ssh:10.0.0.1,10.0.0.2"), gpus=True)
    for node, text in enumerate(texts):
        (tmp_path / "config.yaml").write_text(text)
        read = load_config_from_file(str(tmp_path / "config.yaml"))
        assert (read.num_processes, read.num_machines, read.machine_rank) == (4, 2, node)
        assert (read.main_process_ip, read.distributed_type, read.mixed_precision) == ("10.0.0.1", "MULTI_GPU", "no")
    [single] = workers.accelerate_configs(planned(tmp_path, count=1))
    assert "distributed_type: 'NO'" in single and "num_processes: 1\n" in single


# ---- groups on this host


@pytest.fixture
def impatient(monkeypatch):
    """A silent worker is noticed after 15 s instead of two minutes."""
    monkeypatch.setenv("WORKBOOK_GROUP_SECONDS", "15")


def launched(tmp_path, scenario, **options) -> str:
    """The error of a group that must fail, within 30 s of its first sign of life (torchrun gives a stopped worker 30 more)."""
    with pytest.raises(WorkbookError) as error:
        workers.launch(planned(tmp_path, scenario, **options), tmp_path / "logs")
    born = max(path.stat().st_mtime for path in tmp_path.glob("*.pid"))
    assert time.time() - born < (70 if scenario == "SIGSTOP" else 30), "it took too long to notice"
    return str(error.value)


def test_workers_form_one_group_and_every_log_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")  # a list, one number a level of nested threads
    workers.launch(planned(tmp_path, count=3), tmp_path / "logs")
    assert capsys.readouterr().out == "rank 0 of 3: the ranks add up to 3\n"
    texts = sorted(path.read_text() for path in (tmp_path / "logs").rglob("stdout.log"))
    assert texts == [f"rank {rank} of 3: the ranks add up to 3\n" for rank in range(3)]


@pytest.mark.parametrize(("scenario", "said"), [
    ("mistake", r"The worker of rank 1 failed: The data are wrong: mend them \(logs of all ranks: logs/"),
    ("bug", r"The worker of rank 1 failed: IndexError: pop from empty list"),
    ("SIGKILL", r"rank 1 was killed by SIGKILL \(memory may have run out, .*\): resume the run"),
    pytest.param("SIGSTOP", r"nothing has been heard of rank 1 for 15 s", marks=pytest.mark.skipif(
        os.geteuid() == 0 and shutil.which("ip") is not None, reason="the cut cable shows the same, in half the time"))])
def test_the_first_failure_is_what_the_caller_sees(tmp_path, capfd, impatient, scenario, said):
    assert re.search(said, launched(tmp_path, scenario))
    assert ("[].pop()" in capfd.readouterr().err) == (scenario == "bug"), "a traceback is for faults of the program"


@pytest.mark.parametrize("victim", ["caller", "launcher"])
def test_nobody_outlives_whoever_started_them(tmp_path, victim):
    code = (f"from helpers import workers; import pathlib; d = pathlib.Path({str(tmp_path)!r})\n"
            f"workers.launch(workers.plan({MEMBER!r}, ['endless', '2', str(d)], 2, d / 'logs'), d / 'logs')")
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 90
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.time() < deadline and caller.poll() is None
        time.sleep(0.1)
    pids = [int(pid) for path in tmp_path.glob("*.pid") for pid in path.read_text().split()]
    listening = [c.laddr.ip for pid in set(pids) for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
    assert listening and set(listening) == {"127.0.0.1"}, "a group on one host listens on the loopback address alone"
    os.kill(caller.pid if victim == "caller" else pids[1], signal.SIGKILL)
    _, error = caller.communicate(timeout=30)
    assert (victim == "caller") or "ended without a report" in error
    psutil.wait_procs([psutil.Process(pid) for pid in set(pids) if psutil.pid_exists(pid)], timeout=15)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_recorded_steps_average_their_gradients(tmp_path):
    """What RecordedTrainer does after each replay in place of DistributedDataParallel."""
    workers.launch(planned(tmp_path, "average"), tmp_path / "logs")
    said = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stdout.log"))]
    assert len(said) == 2 and all("average [[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], [6.0]]" in text for text in said)


def test_too_few_workers_are_noticed(tmp_path):
    """accelerate 1.15 starts one process on a CPU, whatever its configuration asks for."""
    [config] = workers.accelerate_configs(planned(tmp_path))
    assert "num_processes: 2\n" in config
    (tmp_path / "config.yaml").write_text(config)
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "config.yaml", "-m", MEMBER, "fine"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode and "Workers asked for: 2, started: 1" in result.stderr


def test_a_worker_that_torchrun_had_to_kill_is_not_the_cause(tmp_path):
    """torchrun asks the others to end when one has failed, and kills them 30 s later: a stopped one, or one that hangs."""
    failures = {rank: errors.ProcessFailure(0, 1, code, "") for rank, code in enumerate((3, -signal.SIGKILL))}
    failures[1].timestamp += 30
    with mock.patch.dict(os.environ), mock.patch.object(worker_group.torchrun, "run") as run:
        run.side_effect = errors.ChildFailedError("x", failures)
        assert worker_group.main(["--nnodes=1", f"--log-dir={tmp_path}", "-m", MEMBER]) == 1
    [entry] = json.loads((tmp_path / "failure.json").read_text())
    assert entry["message"].startswith("The worker of rank 0") and "exit code 3" in entry["message"]


def test_a_rank_without_a_group_is_alone():
    with mock.patch.dict(os.environ, RANK="1"), worker_group.group(1):
        pass


# ---- hosts that do not come together


def meeting(tmp_path, node, address, port, seconds=2) -> str:
    """What the launcher of one of two hosts reports. It runs here, up to where it would start workers."""
    argv = ["--nnodes=2", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}", "--nproc-per-node=1",
            "--rdzv-id=x", "--max-restarts=0", f"--log-dir={tmp_path / 'x' / '0'}", "-m", MEMBER, "fine"]
    with mock.patch.multiple(worker_group, HOST=f"host-{node}", JOIN_SECONDS=seconds), mock.patch.dict(os.environ):
        assert worker_group.main(argv) == 1
    [entry] = json.loads((tmp_path / "x" / "0" / "failure.json").read_text())
    assert entry["message"].startswith(f"host-{node} did not meet the other hosts at {address}:{port} (")
    assert entry["message"].count("\n") == 0 and "that address of the first host and a free MASTER_PORT" in entry["message"]
    return entry["message"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_and_wrong_addresses_are_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert "Address already in use" in meeting(tmp_path, 0, "127.0.0.1", port)
    assert "Cannot assign requested address" in meeting(tmp_path, 0, "192.0.2.1", free_port())
    assert "timed out" in meeting(tmp_path, 1, "127.0.0.1", free_port())
    assert re.search("Name or service not known|name resolution", meeting(tmp_path, 1, "no-such-host.invalid", 29500))
    assert "1/2 clients joined" in meeting(tmp_path, 0, "127.0.0.1", free_port())


def test_a_printed_command_joins_the_group(tmp_path, capsys):
    chosen = planned(tmp_path, workers_on="print:127.0.0.1,other-host")
    typed = subprocess.Popen(["sh", "-c", chosen.launches[1].line()], stdin=subprocess.DEVNULL)
    workers.launch(chosen, tmp_path / "logs")
    assert typed.wait(30) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Type on other-host, within 300 s:" and lines[2] == "rank 0 of 2: the ranks add up to 1"
    assert lines[1] == f"  {chosen.launches[1].line()}"


def test_a_host_that_ssh_cannot_reach_is_named_with_its_words(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 'ssh: connect to host gpu-b port 22: Connection refused' >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(workers, "PATIENCE", 1.0)  # rank 0's host would wait for the other
    with pytest.raises(WorkbookError, match="on gpu-b ended without a report; the last words were: ssh: connect to host gpu-b"):
        workers.launch(planned(tmp_path, workers_on="ssh:127.0.0.1,gpu-b"), tmp_path / "logs")


# ---- Cloudera's Workers API: only its contract can be tested outside a workspace


@pytest.fixture
def cml(monkeypatch):
    """cml.workers_v1 as it is documented: launch_workers runs a `!command` for each of n workers and returns their ids."""
    started, stopped = {}, []

    def launch_workers(n, cpu, memory, nvidia_gpu=0, code=""):
        assert code.startswith("!") and n == 1 and {type(cpu), type(memory), type(nvidia_gpu)} == {int}
        process = subprocess.Popen(["sh", "-c", code[1:]], stdin=subprocess.DEVNULL, start_new_session=True)
        started[f"id-{len(started)}"] = (process, cpu, memory, nvidia_gpu)
        return [{"id": list(started)[-1], "app_url": "https://…"}]

    def await_workers(workers, wait_for_completion, timeout_seconds):
        for worker in workers if wait_for_completion else ():
            started[worker["id"]][0].wait(timeout_seconds)
        return {"failures": module.failures}

    def stop_workers(*ids):
        for name in ids:
            stopped.append(name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started[name][0].pid, signal.SIGKILL)

    module = types.ModuleType("cml.workers_v1")
    module.launch_workers, module.started, module.stopped, module.failures = launch_workers, started, stopped, []
    module.await_workers = await_workers
    module.stop_workers = stop_workers
    monkeypatch.setitem(sys.modules, "cml", types.ModuleType("cml"))
    monkeypatch.setitem(sys.modules, "cml.workers_v1", module)
    sys.modules["cml"].workers_v1 = module
    monkeypatch.setenv("CDSW_IP_ADDRESS", "127.0.0.1")
    return module


def test_cml_workers_join_the_session_that_launched_them(tmp_path, cml, capsys):
    workers.launch(planned(tmp_path, workers_on="cml:cpu=4,memory=8,nvidia_gpu=0"), tmp_path / "logs")
    assert capsys.readouterr().out == "rank 0 of 2: the ranks add up to 1\n"
    [(process, *size)] = cml.started.values()
    assert (size, cml.stopped, process.wait(10)) == ([4, 8, 0], ["id-0"], 0)


def test_a_workspace_without_room_is_named(tmp_path, cml):
    cml.failures = [{"id": "id-0"}]
    with pytest.raises(WorkbookError, match="CML started 0 of 1 workers: the workspace may lack 2 cores, 16 GiB or 0 GPUs"):
        workers.launch(planned(tmp_path, workers_on="cml"), tmp_path / "logs")
    assert cml.stopped == ["id-0"]


# ---- training


def config(tiny, **changes):
    settings = {"task": "sql", "base_model": str(tiny), "max_rows": 320, "max_steps": 20, "precision": "full", "batch_size": 4,
                "checkpoint_steps": 5, **changes}
    return recipes.FineTuneConfig.from_parameters(**settings)


def adapter(run: Path) -> dict:
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(run / "trained" / "adapter_model.safetensors").items()}


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One worker with twice the batch: what two workers have to compute."""
    run = tmp_path_factory.mktemp("alone") / "run"
    training.run(config(tiny, batch_size=8), run)
    return run


def assert_same(run: Path, alone: Path) -> None:
    logs = [json.loads((path / "trained" / "metrics.json").read_text()) for path in (run, alone)]
    assert [log["workers"] for log in logs] == [2, 1]
    assert [step for step, _ in logs[0]["loss_log"]] == [step for step, _ in logs[1]["loss_log"]] == list(range(1, 21))
    for (step, mine), (_, theirs) in zip(logs[0]["loss_log"], logs[1]["loss_log"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5), f"step {step} saw other rows, or averaged them wrongly"
    trained, expected = adapter(run), adapter(alone)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-4, rtol=1e-2)  # saved in bfloat16: 8 bits of mantissa


def when_checkpointed(run: Path, then) -> list[float]:
    """Call `then` as soon as the run has a complete checkpoint; the time goes into the list that is returned."""
    moments = []

    def wait():
        deadline = time.time() + 120
        while not list(run.glob("checkpoints/checkpoint-*/complete.json")):
            if time.time() > deadline:
                return
            time.sleep(0.01)
        then()
        moments.append(time.time())

    threading.Thread(target=wait, daemon=True).start()
    return moments


@pytest.mark.parametrize("shard", [False, True])
def test_two_workers_compute_what_one_does_also_when_one_is_killed(tiny, tmp_path, alone, shard):
    """Had a batch been lost or seen twice after the kill, the losses would differ."""
    run, chosen = tmp_path / "run", dataclasses.replace(config(tiny), shard=shard)

    def kill():
        next(p for p in members() if str(run) in p.info["cmdline"] and p.environ().get("RANK") == "1").kill()

    moments = when_checkpointed(run, kill)
    with pytest.raises(WorkbookError, match="The worker of rank 1 was killed by SIGKILL .*: resume the run"):
        training.run(chosen, run, workers=2)
    assert time.time() - moments[0] < 30 and not (run / "trained").exists()
    training.run(chosen, run, workers=2, resume=True)
    assert_same(run, alone)
    assert len(list(run.glob("workers/*"))) == 2, "the logs of both attempts are kept"


@pytest.mark.parametrize(("base", "changes"), [
    ("tiny", {"precision": "4bit", "gradient_checkpointing": True, "gradient_accumulation": 2}), ("tiny_bloom", {})])
def test_a_shared_base_model_trains_the_same_adapter(request, tmp_path, capfd, base, changes):
    """The rows differ in number from worker to worker, in the watched rows too; a gather that one worker lacks would hang."""
    chosen = config(request.getfixturevalue(base), max_steps=4, checkpoint_steps=2, **changes)
    watched, weights = data.load_rows("sql", "practice", "validation", 9).rows, []
    for name, shard in (("copied", False), ("shared", True)):
        result = training.run(dataclasses.replace(chosen, shard=shard), tmp_path / name, workers=2, validation=watched)
        weights.append(adapter(tmp_path / name) | {"loss": result["final_loss"], "watched": result["validation"]["kept"]})
    assert weights[0].keys() == weights[1].keys() and any(key.endswith("lora_B.weight") for key in weights[0])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=1e-2)  # saved in bfloat16
    assert "are in 4 bits" not in capfd.readouterr().out, "all of them are, packed or shared"


def test_one_worker_has_nobody_to_share_with(tiny, tmp_path):
    for refuse in (lambda: recipes.check_parameters({"task": "sql", "base_model": str(tiny), "shard": True}),
                   lambda: training.run(config(tiny, shard=True), tmp_path / "run")):
        with pytest.raises(WorkbookError, match="shard is True, and there is one worker: ask for two or more"):
            refuse()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["sql", "instruct", "detox"])
def test_every_job_runs_with_two_workers(task, tiny, tmp_path, jobs):
    given = {"base_model": tiny, "max_steps": 2, "max_rows": 32, "eval_rows": 2, "shard": task == "detox"}
    result = jobs("run", task, "--workers", 2, *(part for n, v in given.items() for part in ("-p", f"{n}={v}")))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    [metrics] = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/metrics.json"))
    assert (metrics["workers"], metrics["steps"]) == (2, 2)
    names = {"exact", "execution", "valid"} if task == "sql" else {"exact", "chrf", "rouge_l"}
    assert set(metrics["evaluation"]["adapter"]) >= names
    assert len(list((tmp_path / "adapters").glob("*/adapter_model.safetensors"))) == 1


# ---- two hosts, each a network namespace with its own address


@pytest.fixture
def two_hosts(tmp_path):
    """The addresses of two hosts joined by a cable, a PATH on which `ssh` enters them, and a way to cut the cable."""
    tag = f"wb{os.getpid() % 10_000}"
    hosts = ["10.77.0.1", "10.77.0.2"]

    def ip(*words, check=True):
        return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)

    if os.name != "posix" or shutil.which("ip") is None or ip("netns", "add", f"{tag}-{hosts[0]}", check=False).returncode:
        pytest.skip("network namespaces need Linux, iproute2 and root")
    try:
        ip("netns", "add", f"{tag}-{hosts[1]}")
        ip("link", "add", "cable1", "netns", f"{tag}-{hosts[0]}", "type", "veth", "peer", "cable2", "netns", f"{tag}-{hosts[1]}")
        for end, address in enumerate(hosts, 1):
            ip("-n", f"{tag}-{address}", "address", "add", f"{address}/24", "dev", f"cable{end}")
            for device in ("lo", f"cable{end}"):
                ip("-n", f"{tag}-{address}", "link", "set", device, "up")
        ssh = tmp_path / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\nexec ip netns exec "{tag}-$1" sh -c "$2"\n')
        ssh.chmod(0o755)
        cable = lambda state: ip("-n", f"{tag}-{hosts[1]}", "link", "set", "cable2", state)
        yield f"{tag}-{hosts[0]}", f"ssh:{','.join(hosts)}", {"PATH": f"{ssh.parent}:{os.environ['PATH']}"}, cable
    finally:
        for address in hosts:
            ip("netns", "delete", f"{tag}-{address}", check=False)


def test_two_hosts_train_together_and_survive_a_cut_cable(tiny, tmp_path, alone, two_hosts, impatient):
    """`ssh` is stood in for by a script that enters the other host's namespace; everything else is as on two hosts."""
    namespace, place, path, cable = two_hosts
    run = tmp_path / "run"

    def fine_tune(resume):
        code = (f"import pathlib, sys; sys.path.insert(0, 'tests')\nfrom test_workers import config, training\n"
                f"training.run(config({str(tiny)!r}), pathlib.Path({str(run)!r}), workers=2,"
                f" workers_on={place!r}, resume={resume})")
        return subprocess.run(["ip", "netns", "exec", namespace, sys.executable, "-c", code], cwd=ROOT, text=True,
                              capture_output=True, timeout=200, env={**os.environ, **path, "OMP_NUM_THREADS": "1"})

    moments = when_checkpointed(run, lambda: cable("down"))
    cut = fine_tune(resume=False)
    took = time.time() - moments[0]
    said = r"WorkbookError: .*nothing has been heard of rank [01] for 15 s.*resume the run"
    assert cut.returncode and re.search(said, cut.stderr), cut.stderr[-1500:]
    assert took < 40, f"{took:.0f} s"
    cable("up")
    assert fine_tune(resume=True).returncode == 0
    assert_same(run, alone)
    launchers = "".join(log.read_text() for log in run.glob("workers/*/host-0.log"))
    assert "Going on from checkpoint-" in launchers


# ---- Slurm, the real one, on this machine


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """munged, slurmctld and slurmd of this test alone, listening on the loopback address."""
    needed = ("munged", "slurmctld", "slurmd", "srun")
    if os.geteuid() or not all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in needed):
        pytest.skip("Slurm is not installed (Debian: apt-get install slurm-wlm), or this is not root")
    folder, name = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for part in ("state", "spool", "munge"):
        (folder / part).mkdir(mode=0o700)
    folder.parent.chmod(0o755)
    munge = folder / "munge"
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o600)
    ports = free_port(), free_port()
    settings = {
        "ClusterName": "workbook", "SlurmctldHost": f"{name}(127.0.0.1)", "SlurmUser": "root", "SlurmctldPort": ports[0],
        "SlurmdPort": ports[1], "AuthType": "auth/munge", "AuthInfo": f"socket={munge}/socket",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny", "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool", "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid", "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log", "ProctrackType": "proctrack/pgid", "TaskPlugin": "task/none",
        "MpiDefault": "none", "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core",
        f"NodeName={name} NodeAddr": f"127.0.0.1 CPUs={os.cpu_count()}", "PartitionName": "all Nodes=ALL Default=YES State=UP"}
    (folder / "slurm.conf").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with mock.patch.dict(os.environ, environment):
        subprocess.run(["munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
                        f"--log-file={munge}/log", f"--seed-file={munge}/seed"], check=True, capture_output=True)
        daemons = [subprocess.Popen([program, "-D", "-c"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                   for program in ("slurmctld", "slurmd")]
        try:
            deadline = time.time() + 60
            while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout:
                assert time.time() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
                time.sleep(0.3)
            yield
        finally:
            for daemon in daemons:
                daemon.terminate()
                daemon.wait(30)
            os.kill(int((munge / "pid").read_text()), signal.SIGTERM)


def queue_is_empty() -> bool:
    return not subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout.strip()


def test_slurm_runs_the_workers(tiny, tmp_path, alone, slurm):
    training.run(config(tiny), tmp_path / "run", workers=2, workers_on="slurm")
    assert_same(tmp_path / "run", alone)
    assert len(list((tmp_path / "run").rglob("stdout.log"))) == 2


def test_a_task_that_slurm_loses_is_named(tmp_path, slurm):
    assert re.search(r"rank 1 on \S+ was killed by SIGKILL", launched(tmp_path, "SIGKILL", workers_on="slurm"))
    deadline = time.time() + 20
    while not queue_is_empty():
        assert time.time() < deadline, "the Slurm job is still there"
        time.sleep(0.3)


def test_a_partition_that_slurm_lacks_is_in_its_own_words(tmp_path, slurm):
    with pytest.raises(WorkbookError, match="the last words were: srun: error: .*[Ii]nvalid partition"):
        workers.launch(planned(tmp_path, workers_on="slurm:partition=gpu"), tmp_path / "logs")
