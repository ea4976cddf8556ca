"""The same tests with the newest releases that pyproject.toml allows: `make canary` says which library broke what.

    make canary                          drift test and unit tests
    make canary ARGS="tests/test_data.py"  only these

The releases go into an environment of their own (.venv-canary); torch stays at the pinned version, because a newer one can
bring gigabytes of CUDA. When something fails, each newer library that a traceback goes through is put back to its pinned
version, alone, and what failed is run again: what then passes was broken by that library.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".venv-canary"
PYTHON = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {plain(name): version for name, version in pinned}


def plain(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments], cwd=ROOT, check=True)


def installed() -> dict[str, str]:
    out = subprocess.run([PYTHON, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"], check=True,
                         capture_output=True, text=True).stdout
    return {plain(entry["name"]): entry["version"].split("+")[0] for entry in json.loads(out)}


def distributions() -> dict[str, list[str]]:
    """Import name -> distributions, in the canary's environment."""
    code = "import json; from importlib.metadata import packages_distributions as p; print(json.dumps(p()))"
    return json.loads(subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout)


def run_tests(arguments: list[str]) -> dict[str, str]:
    """Run pytest in the canary's environment. Returns the text of each failure by the test's id; raises if none ran."""
    report = FOLDER / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "--tb=long", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([PYTHON, "-m", "pytest", *options, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if not report.exists():
        raise SystemExit("The canary's tests gave no report: see above.")
    return failures(report.read_text(encoding="utf-8"))


def failures(xml: str) -> dict[str, str]:
    found = {}
    cases = list(ElementTree.fromstring(xml).iter("testcase"))
    for case in cases:
        for kind in ("failure", "error"):
            for element in case.findall(kind):
                file = case.get("classname", "").replace(".", "/") + ".py"
                name = f"{file}::{case.get('name')}" if case.get("classname") else case.get("name", "").replace(".", "/") + ".py"
                found[name] = f"{element.get('message', '')}\n{element.text or ''}"
    if not cases:
        raise SystemExit("The canary ran no test: that is no pass.")
    return found


def suspects(text: str, newer: dict[str, tuple[str, str]], names: dict[str, list[str]]) -> list[str]:
    """Newer libraries that a failure's traceback goes through or that its message names, the innermost first."""
    imports = re.findall(r"site-packages/(\w+)", text)[::-1] + re.findall(r"\b(\w+)\b", text)
    found = [plain(d) for name in imports for d in names.get(name, [name])]
    return [name for name in dict.fromkeys(found) if name in newer]


def explain(failed: dict[str, str], newer: dict[str, tuple[str, str]], names: dict[str, list[str]], retry) -> list[str]:
    """One line per library that explains failures. ``retry(library, tests)``: the tests that still fail with it put back."""
    lines, open_tests = [], dict(failed)
    order = list(dict.fromkeys(name for text in failed.values() for name in suspects(text, newer, names)))
    for library in order:
        mine = [test for test, text in open_tests.items() if library in suspects(text, newer, names)]
        if mine and (mended := [test for test in mine if test not in retry(library, mine)]):
            old, new = newer[library]
            lines += [f"{library} {new} breaks {test} (passes with {old})" for test in mended]
            open_tests = {test: text for test, text in open_tests.items() if test not in mended}
    return lines + [f"no single newer library explains {test}" for test in open_tests]


def main(arguments: list[str]) -> int:
    pinned = pins()
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), []), f"torch=={pinned['torch']}"]
    pip("install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", *wanted)
    newer = {name: (pinned[name], version) for name, version in installed().items() if name in pinned and version != pinned[name]}
    for name, (old, new) in sorted(newer.items()):
        print(f"newer: {name} {old} -> {new}")
    print(f"{len(newer)} of {len(pinned)} pinned packages differ.", flush=True)

    def retry(library: str, tests: list[str]) -> set[str]:
        pip("install", "--quiet", "--no-deps", f"{library}=={newer[library][0]}")
        try:
            return set(run_tests(tests))
        finally:
            pip("install", "--quiet", "--no-deps", f"{library}=={newer[library][1]}")

    failed = run_tests(arguments or ["tests/test_api_drift.py", "tests"])
    if not failed:
        print("The newest releases break nothing that is tested.")
        return 0
    print("\n".join(explain(failed, newer, distributions(), retry)))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
