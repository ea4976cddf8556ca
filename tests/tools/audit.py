"""Audit the pinned dependencies for known vulnerabilities: `make audit`.

    exit 0  every package of constraints.txt was looked up, and nothing is known against it
    exit 1  something is known: it is printed with the release that mends it
    exit 3  NOT AUDITED: the database could not be asked, or not about every package. That is no pass.

pip-audit alone ends with 0 when it could look nothing up. So a release that is known to be vulnerable is asked about
first: a database that does not name it is not there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from canary import pins, plain

CONTROL = "pyyaml==5.3"  # CVE-2020-1747, mended in 5.3.1
# A vulnerability that does not concern the workbook may be listed here with its reason, until a release mends it.
IGNORED: dict[str, str] = {}


def pip_audit(requirements: str) -> list[dict]:
    """What pip-audit says about pinned requirements: per dependency its name, version, vulns or skip_reason.

    Raises OSError with the tool's last words when it gives no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text(requirements, encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "-r", str(path), "--no-deps", "--disable-pip", "--format", "json",
                   "--progress-spinner", "off", "--timeout", "30"]
        result = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise OSError((result.stderr.strip().splitlines() or ["no answer"])[-1]) from None


def audit(ask=pip_audit) -> int:
    pinned = pins()
    try:
        if not any(dependency.get("vulns") for dependency in ask(CONTROL + "\n")):
            raise OSError(f"it knows nothing of {CONTROL}, which is vulnerable")
        answers = ask("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    except OSError as error:
        print(f"NOT AUDITED: the vulnerability database cannot be asked from here ({error}). Run `make audit` where the "
              "network reaches it; CI does.")
        return 3
    found = [(d, vuln) for d in answers for vuln in d.get("vulns", [])
             if not {vuln["id"], *vuln.get("aliases", [])} & set(IGNORED)]
    for dependency, vuln in found:
        print(f"{dependency['name']} {dependency['version']}: {vuln['id']} {' '.join(vuln.get('aliases', []))}, mended in "
              f"{', '.join(vuln.get('fix_versions', [])) or 'no release yet'}")
    unanswered = set(pinned) - {plain(d["name"]) for d in answers if "skip_reason" not in d}
    if found:
        return 1
    if unanswered:
        print(f"NOT AUDITED: {len(unanswered)} of {len(pinned)} packages could not be looked up: {', '.join(sorted(unanswered))}")
        return 3
    print(f"{len(pinned)} packages looked up: nothing is known against them.")
    return 0


if __name__ == "__main__":
    sys.exit(audit())
