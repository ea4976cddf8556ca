"""How packages are installed: uv is told what pip knows, and pip installs where uv cannot."""

import json
import re
import subprocess
import sys

import install
import pytest

LISTED = """\
:env:.find-links='/wheels'
:env:.no-index='1'
global.cert='/corporate.pem'
global.extra-index-url='\\nhttps://one/simple\\nhttps://two/simple'
global.find-links='/old /older'
install.index-url='https://mirror/simple'
global.index-url='https://slow/simple'
"""


def test_uv_is_told_what_pip_knows(monkeypatch):
    for name in ("UV_INDEX", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_INDEX_STRATEGY", "first-index")
    settings = install.pip_settings(LISTED)
    assert settings["index-url"] == "https://mirror/simple" and settings["no-index"] == "1"
    told = install.uv_variables(settings)
    assert told["UV_DEFAULT_INDEX"] == "https://mirror/simple" and told["UV_INDEX"] == "https://one/simple https://two/simple"
    assert told["UV_FIND_LINKS"] == "/wheels" and told["SSL_CERT_FILE"] == "/corporate.pem"
    assert told["UV_INDEX_STRATEGY"] == "first-index", "what uv has been told itself stays"
    assert install.uv_variables({"find-links": "/one /two"})["UV_FIND_LINKS"] == "/one,/two"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A stand-in for pip and for a Python with uv: it notes its arguments, and fails where the first file named `fails` says."""
    fake = tmp_path / "fake.py"
    fake.write_text(f"""import json, pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
with open(here / "calls", "a", encoding="utf-8") as file:
    print(json.dumps(sys.argv[1:]), file=file)
word = (here / "fails").read_text("utf-8")
if word and word in sys.argv:
    sys.exit(f"error: no {{word}} here")
""", encoding="utf-8")
    (tmp_path / "fails").write_text("", encoding="utf-8")
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = false\n", encoding="utf-8")
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "PIP", [sys.executable, str(fake), "pip"])
    monkeypatch.setattr(install, "UV", [sys.executable, str(fake), "uv"])
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text("utf-8").splitlines()]


def test_uv_installs_and_pip_only_fetches_it(calls, capsys):
    install.install(["lab", "dev"])
    fetched, listed, installed = calls()
    assert fetched[-1] == "uv" and listed == ["pip", "config", "list"]
    assert installed[0] == "uv" and installed[-4:] == ["-c", "constraints.txt", "-e", ".[lab,dev]"]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("fails", ["uv", "--python"])
def test_pip_installs_where_uv_cannot_be_had_or_fails(calls, tmp_path, capsys, fails):
    (tmp_path / "fails").write_text(fails, encoding="utf-8")
    install.install([])
    assert calls()[-1] == ["pip", "install", "--quiet", "-c", "constraints.txt", "-e", "."]
    assert capsys.readouterr().out == f"pip installs, which takes minutes (error: no {fails} here).\n"


def test_a_torch_that_the_python_has_is_kept(calls, tmp_path, capsys):
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n", encoding="utf-8")
    install.install([])
    assert calls() == [["pip", "install", "--quiet", "-c", str(tmp_path / "constraints.txt"), "-e", "."]]
    pins = (tmp_path / "constraints.txt").read_text("utf-8")
    assert "torch==" not in pins and "transformers==" in pins and "torch of its own" in capsys.readouterr().out


@pytest.mark.parametrize(("target", "extras"), [("run", [""]), ("lab", ["", " lab"]), ("app", ["", " lab"]), ("notebooks", ["", " lab"]), ("book", ["", " book"]),
                                                ("check", ["", " lab book dev"]), ("test", ["", " lab book dev"])])
def test_a_target_installs_what_it_needs_and_no_more(target, extras):
    plan = subprocess.run(["make", "-n", "-W", "pyproject.toml", target], cwd=install.ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"tests/tools/install\.py((?: \w+)*) && touch", plan.stdout) == extras
