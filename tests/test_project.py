"""The project holds together: dependency lists agree, imports point one way. Its notebooks: test_notebook_rules.py."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements():
    return [*project()["dependencies"], *(text for extra in project()["optional-dependencies"].values() for text in extra)]


def test_constraints_pin_every_dependency_inside_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for text in requirements():
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not pinned in constraints.txt: run `make lock`"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement.specifier}"


def test_conda_installs_the_same_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[lab,book,dev]"], "environment.yml installs through pyproject.toml alone"


def test_every_dependency_has_its_reason():
    lines = [line for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines() if re.match(r'\s+"[\w-]+[>=]=', line)]
    assert len(lines) == len(requirements())
    assert all("#" in line for line in lines)


def test_every_text_file_is_opened_with_an_encoding():
    """ruff's PLW1514 sees only paths whose type is plain; this sees every call of these names in what a reader runs."""
    paths = [path for folder in ("helpers", "notebooks", "tests/tools", "tests/benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 30
    assert not [f"{path.name}:{line}" for path in paths for line in without_encoding(path.read_text(encoding="utf-8"))]


def without_encoding(source: str) -> list[int]:
    """Lines that read or write a text without saying its encoding, by name or as the last positional argument."""
    most = {"read_text": 0, "write_text": 1}  # positional arguments without one
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and len(node.args) <= most.get(node.func.attr, -1) and "encoding" not in {keyword.arg for keyword in node.keywords}]


def test_a_text_without_an_encoding_is_seen():
    source = "a.read_text()\na.read_text('utf-8')\na.write_text(x)\na.write_text(x, encoding='utf-8')\nread_text()"
    assert without_encoding(source) == [1, 3]


def test_imports_point_one_way():
    """No helper imports another that (directly or not) imports it, and the cheap ones stay cheap."""
    graph = {}
    for path in (ROOT / "helpers").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "helpers").with_suffix("").parts)
        found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom) and node.module]
        graph[name] = {node.module.removeprefix("helpers.") for node in found if node.module.startswith("helpers.")}
        graph[name] |= {f"{node.module.removeprefix('helpers.')}.{alias.name}" for node in found
                        if node.module.startswith("helpers.") for alias in node.names}
        graph[name] |= {alias.name for node in found if node.module == "helpers" for alias in node.names}

    def reaches(start, goal, seen=()):
        return any(step == goal or (step not in seen and reaches(step, goal, (*seen, step))) for step in graph.get(start, ()))

    assert not [name for name in graph if reaches(name, name)]


def test_helpers_import_without_heavy_libraries():
    code = ("import sys, helpers.jobs, helpers.tasks, helpers.data, helpers.registry\n"
            "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ci_runs_the_same_commands_as_a_person():
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in ci["jobs"].items()}
    for name in ("test", "audit", "canary", "soak"):
        assert any(command.startswith(f"make {name}") for command in runs[name]), name
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert ci["permissions"] == {"contents": "read"} and set(ci[True]) >= {"push", "pull_request"}  # YAML reads `on` as true
    assert all(job.get("continue-on-error") is None for job in ci["jobs"].values())


def test_hooks_and_container_are_those_that_contributing_describes():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    names = [hook["id"] for repository in hooks for hook in repository["hooks"]]
    assert "ruff-check" in names and "notebook-rules" in names and not any("nbstripout" in name for name in names)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
    assert hooks[0]["rev"] == f"v{pins['ruff']}"
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert container["postCreateCommand"] == "make setup"


def test_helpers_stay_small():
    """Files, functions, lines and inner imports within their limits: `python tests/tools/size.py` shows the figures."""
    result = subprocess.run([sys.executable, "tests/tools/size.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
