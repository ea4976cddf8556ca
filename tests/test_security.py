"""What SECURITY.md promises: no pickle is opened, no code of a model folder runs, nothing listens beyond this machine."""

import ast
import http.client
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import audit
import psutil
import pytest

from helpers import WorkbookError, base_models, recipes, trainer, training

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for pattern in ("helpers/**/*.py", "notebooks/**/*.py", "notebooks/**/*.ipynb")
                 for path in ROOT.glob(pattern) if ".ipynb_checkpoints" not in path.parts)
PICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve")

# ---- sources


def dangerous(source: str) -> list[str]:
    """Calls that can run what they read, that open more than this machine, or that hand a text to a shell."""
    forbidden = {"eval", "exec", "torch.load", "torch.hub.load", "marshal.loads", "yaml.load", "yaml.unsafe_load",
                 "yaml.full_load", "pandas.read_pickle", "pd.read_pickle", "os.system", "os.popen", "runpy.run_path"}
    wrong = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True, "shell": True, "use_safetensors": False,
             "verify": False}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe_load = name == "torch.load" and any(
                k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
            if name in forbidden and not safe_load:
                found.append(f"line {node.lineno}: {name}")
            found += [f"line {node.lineno}: {k.arg}={k.value.value}" for k in node.keywords
                      if k.arg in wrong and isinstance(k.value, ast.Constant) and k.value.value is wrong[k.arg]]
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.search(r"(?<![\d.])0\.0\.0\.0(?![\d.])", text):
            found.append(f"line {node.lineno}: 0.0.0.0")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: import {m}" for m in modules if m in PICKLERS]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_can_run_what_it_reads(path):
    if path.suffix == ".py":
        assert dangerous(path.read_text()) == []
    else:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                code = "".join(cell["source"])
                lines = [line for line in code.splitlines() if not re.match(r"\s*[%!?]", line)]
                assert dangerous("\n".join(lines)) == [] and not re.search(r"^\s*[!]|^%%(bash|sh|script)", code, re.MULTILINE)


@pytest.mark.parametrize("planted", [
    "import torch\ntorch.load(path)", "torch.load(path, weights_only=False)", "import pickle", "from pickle import loads",
    "yaml.load(text)", "eval(text)", "model = load(x, trust_remote_code=True)", "subprocess.run(text, shell=True)",
    "numpy.load(path, allow_pickle=True)", "serve(host='0.0.0.0')", "os.system(text)", "load(x, use_safetensors=False)"])
def test_each_planted_call_is_found(planted):
    assert dangerous(planted)


def test_the_restricted_loader_is_allowed():
    assert dangerous("torch.load(path, weights_only=True)\nyaml.safe_load(x)\nprint('10.0.0.0')") == []


# ---- model folders and checkpoints that would run code


class Payload:
    """Its pickle touches a file when it is opened the ordinary way."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that a payload makes. The payload works: opened the ordinary way, it makes it."""
    path = tmp_path / "owned"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


def evil_folder(tiny: Path, folder: Path, mark: Path, kind: str) -> Path:
    shutil.copytree(tiny, folder)
    code, payload = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n", pickle.dumps(Payload(mark))

    def config(name, **changes):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    if kind in ("code of a model", "code of a new kind of model"):
        (folder / "evil.py").write_text(code + "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n")
        config("config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
               **({"model_type": "brand-new"} if "new" in kind else {}))
    if kind == "code of a tokenizer":
        (folder / "evil.py").write_text(code + "from transformers import PreTrainedTokenizerFast as T\n")
        config("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    if kind == "code of a generation":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code + "def generate(*a, **k): return None\n")
    if kind == "a pickle beside the weights":
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (folder / name).write_bytes(payload)
    if kind == "a pickle in the index":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(payload)
        (folder / "a.safetensors").write_bytes(b"")
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}))
    if kind == "a pickle named safetensors":
        (folder / "model.safetensors").write_bytes(payload)
    if kind == "a chat template":
        config("tokenizer_config.json", chat_template=f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ cycler.__init__"
               f".__globals__.os.system('touch {mark}') }}}}")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(("kind", "loads"), [
    ("code of a model", True), ("code of a new kind of model", False), ("code of a tokenizer", None),
    ("code of a generation", True), ("a pickle beside the weights", True), ("a pickle in the index", False),
    ("a pickle named safetensors", False), ("a chat template", True)])
def test_no_code_of_a_model_folder_runs(tiny, tmp_path, mark, kind, loads):
    """loads: whether the folder can be used, without its code; None: as the library decides."""
    folder = evil_folder(tiny, tmp_path / "evil", mark, kind)
    try:
        model, tokenizer = base_models.load(str(folder))
        ids = tokenizer("a", return_tensors="pt")["input_ids"]
        model.generate(ids, max_new_tokens=1, do_sample=False)
        if kind == "a chat template":
            with pytest.raises(Exception, match="unsafe|undefined"):
                tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        loaded = True
    except WorkbookError as error:
        assert "\n" not in str(error)
        loaded = False
    assert not mark.exists(), "code of the model folder ran"
    assert loads is None or loaded is loads


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(tiny, tmp_path, mark, name):
    config = recipes.FineTuneConfig.from_parameters(task="sql", base_model=str(tiny), max_rows=16, max_steps=2,
                                                        checkpoint_steps=1, batch_size=2)
    training.run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "trained")
    last = trainer.last_checkpoint(tmp_path / "run" / "checkpoints")
    shutil.rmtree(last)
    last = trainer.last_checkpoint(tmp_path / "run" / "checkpoints")
    assert (last / name).exists() and last.name == "checkpoint-1"
    (last / name).write_bytes(pickle.dumps(Payload(mark)))
    try:
        training.run(config, tmp_path / "run", resume=True)
    except (pickle.UnpicklingError, WorkbookError, RuntimeError) as error:
        assert name != "training_args.bin", error  # nobody reads that one back
    assert not mark.exists(), "a checkpoint's pickle ran"


# ---- servers, as the Makefile starts them


def listening(process: psutil.Process) -> list:
    found = []
    for one in [process, *process.children(recursive=True)]:
        try:
            found += [c.laddr for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            pass
    return found


def status_of(port: int, path: str, token: str = "") -> int:
    """The HTTP status that a path is answered with, or 599 while nobody listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path + (f"?token={token}" if token else ""))
        return connection.getresponse().status
    except ConnectionRefusedError:
        return 599
    finally:
        connection.close()


@pytest.mark.parametrize("target", ["lab", "app"])
def test_servers_listen_on_this_machine_only_and_ask_for_a_token(target, tmp_path):
    if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
        pytest.skip(f"the Makefile has no target {target} yet")
    (tmp_path / "config").mkdir()
    for name in ("jupyter_server_config.json", "voila.json"):  # what a container needs; nothing about addresses or tokens
        (tmp_path / "config" / name).write_text(json.dumps({"ServerApp": {"allow_root": True, "open_browser": False},
                                                            "Voila": {"open_browser": False}}))
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "BROWSER": "true", "PYTHONUNBUFFERED": "1",
                   "JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_DATA_DIR": str(tmp_path)}
    for name in ("JUPYTER_TOKEN", "DISPLAY"):
        environment.pop(name, None)
    log = open(tmp_path / "log", "w", encoding="utf-8")
    made = subprocess.Popen(["make", "-o", ".venv/.lab", target], cwd=ROOT, env=environment, stdout=log, stderr=log,
                            start_new_session=True)
    try:
        end, process = time.monotonic() + 120, psutil.Process(made.pid)
        address = None
        while not address:
            text = (tmp_path / "log").read_text()
            assert made.poll() is None and time.monotonic() < end, text[-2000:]
            address = re.search(r"http://(127\.0\.0\.1|localhost):(\d+)/\S*?token=([\w-]{24,})", text)
            time.sleep(0.3)
        port, token = int(address[2]), address[3]
        while status_of(port, "/api/status" if target == "lab" else "/voila/static/main.js", token) == 599:
            assert time.monotonic() < end
            time.sleep(0.5)
        sockets = listening(process)
        assert port in {socket.port for socket in sockets}
        assert {socket.ip for socket in sockets} <= {"127.0.0.1", "::1"}, sockets
        paths = {"lab": ["/api/contents", "/api/kernels", "/lab", "/files/glossary.md"], "app": ["/", "/api/kernels"]}[target]
        for path in paths:
            assert status_of(port, path) in (302, 401, 403), f"{path} is open to anybody"
            assert status_of(port, path, "0" * 48) in (302, 401, 403), f"{path} takes any token"
        if target == "lab":
            assert status_of(port, "/api/contents", token) == 200
    finally:
        os.killpg(made.pid, signal.SIGTERM)
        try:
            made.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(made.pid, signal.SIGKILL)
        log.close()


# ---- the audit says what it could not do


def answers(*vulnerable: str, skip: tuple = (), control: bool = True):
    def ask(requirements: str) -> list[dict]:
        if requirements.startswith(audit.CONTROL):
            return [{"name": "pyyaml", "version": "5.3", "vulns": [{"id": "CVE-2020-1747"}] if control else []}]
        found = []
        for line in requirements.split():
            name, _, version = line.partition("==")
            vulns = [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["9"]}] if name in vulnerable else []
            found.append({"name": name, "skip_reason": "not found"} if name in skip else
                         {"name": name, "version": version, "vulns": vulns})
        return found
    return ask


def test_the_audit_fails_passes_and_says_when_it_did_neither(capsys, monkeypatch):
    assert audit.audit(answers()) == 0 and "packages looked up" in capsys.readouterr().out
    assert audit.audit(answers("torch")) == 1
    assert re.search(r"^torch [\d.]+: PYSEC-1 CVE-1, mended in 9$", capsys.readouterr().out, re.MULTILINE)
    assert audit.audit(answers(skip=("peft",))) == 3 and "NOT AUDITED: 1 of " in capsys.readouterr().out
    assert audit.audit(answers(control=False)) == 3 and "NOT AUDITED: the vulnerability database" in capsys.readouterr().out
    monkeypatch.setitem(audit.IGNORED, "CVE-1", "of a part that is not used")
    assert audit.audit(answers("torch")) == 0


def test_the_audit_without_its_tool_says_so(capsys, monkeypatch):
    monkeypatch.setattr(audit.sys, "executable", shutil.which("false"))
    assert audit.audit() == 3 and "NOT AUDITED" in capsys.readouterr().out


def test_security_md_names_what_is_trusted():
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("safetensors", "trust_remote_code", "127.0.0.1", "token", "make audit", "weights_only"):
        assert word in text
