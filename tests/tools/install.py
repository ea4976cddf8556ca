"""Makes .venv and installs the project at the versions of constraints.txt. Only the standard library is needed.

    python tests/tools/install.py                 what the jobs need
    python tests/tools/install.py lab             JupyterLab and Voila too
    python tests/tools/install.py lab book dev    what the book and the tests need too

uv installs, as it needs less time; pip fetches it and stays for where it cannot be had or fails. uv reads none of pip's
settings, so it is told the index, the wheel folders, the certificates and the proxy that pip knows.
"""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
UV = [str(PYTHON), "-m", "uv", "pip"]
FOR_UV = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
          "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE", "client-cert": "SSL_CLIENT_CERT",
          "proxy": "ALL_PROXY", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}
JOBS = "import helpers.attempts, helpers.evaluation, helpers.training"
TRUE = ("1", "true", "yes", "on")


def pip_settings(listed: str) -> dict[str, str]:
    """pip's settings from what `pip config list` prints: variables before files, [install] before [global]."""
    found = {}
    for section in ("global.", "install.", ":env:."):
        for line in listed.splitlines():
            if line.startswith(section):
                name, value = line.removeprefix(section).split("=", 1)
                found[name] = ast.literal_eval(value)
    return found


def uv_variables(settings: dict[str, str]) -> dict[str, str]:
    """The same for uv, with pip's rule that the best version of all indexes is taken. What uv has been told itself stays."""
    told = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_SYSTEM_CERTS": "true"}
    for name, variable in FOR_UV.items():
        if values := settings.get(name, "").split():
            told[variable] = ("," if name == "find-links" else " ").join(values)
    return told | os.environ


def uv_install(what: list[str]) -> str:
    """Install with uv. Returns why it could not, or nothing."""
    result = subprocess.run([*PIP, "install", "--quiet", "-c", "constraints.txt", "uv"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0:
        listed = subprocess.run([*PIP, "config", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        settings = pip_settings(listed)
        offline = ["--no-index"] if settings.get("no-index", "").lower() in TRUE else []
        result = subprocess.run([*UV, "install", "--quiet", "--python", str(PYTHON), *offline, *what], cwd=ROOT,
                                env=uv_variables(settings), capture_output=True, text=True)
    return "" if result.returncode == 0 else (result.stderr.strip().splitlines() or ["no reason given"])[-1].strip()


def install(extras: list[str]) -> None:
    """The project and its extras. A torch that the Python has (a GPU machine's own build) is used: pip sees it, uv does not."""
    project = f".[{','.join(extras)}]" if extras else "."
    if "include-system-site-packages = true" in (VENV / "pyvenv.cfg").read_text(encoding="utf-8"):
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints = VENV / "constraints.txt"
        constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("torch==")), encoding="utf-8")
        why_pip = "this Python has a torch of its own, which uv would not see"
    else:
        constraints = "constraints.txt"
        why_pip = uv_install(["-c", constraints, "-e", project])
    if why_pip:
        print(f"pip installs, which takes minutes ({why_pip}).", flush=True)
        subprocess.run([*PIP, "install", "--quiet", "-c", str(constraints), "-e", project], cwd=ROOT, check=True)


def main(extras: list[str]) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (nothing has checked it yet)
        sys.exit("error: Python 3.11 or newer is needed: run this with one.")
    if not PYTHON.exists():
        own = ["--system-site-packages"] if find_spec("torch") else []
        subprocess.run([sys.executable, "-m", "venv", *own, str(VENV)], check=True)
    print(f"Installing {' and '.join(extras) or 'what the jobs need'} ...", flush=True)
    try:
        install(extras)
        # Bytecode of what jobs import is written now, even where Python is told to write none: else every start is slow.
        writes = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        for command in (["-c", JOBS], ["-m", "helpers.base_models"]):
            subprocess.run([str(PYTHON), *command], cwd=ROOT, env=writes, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
