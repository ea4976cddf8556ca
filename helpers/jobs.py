"""Notebooks as jobs: ``python -m helpers.jobs list | run <job> | status``.

A job is a notebook of ``notebooks/jobs.yaml``. Names and types of its parameters are checked here;
what a value may be is checked by the job's own ``check``. Both come before a kernel starts. Then
helpers.attempts runs the notebook, and helpers.runs tells what became of it.
"""

import argparse
import ast
import contextlib
import json
import os
import pkgutil
import re
import secrets
import shlex
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import yaml

from helpers import KINDS, ROOT, WorkbookError, closest, is_text, read_json
from helpers.runs import find_unfinished, list_runs, seconds_since

COMMANDS = {"list": 1, "run": 3, "status": 2}  # and how many words each takes at most
SET_BY_JOB = ("run_dir", "resume")  # parameters that every notebook is given
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EXIT_CODES = {"succeeded": 0, "failed": 1, "interrupted": 130}
LINE = re.compile(  # name: type = value  # help
    r"""(\w+)\s*(?::(.+?))?\s*=\s*("[^"]*"|.+?)(?:\s+#\s*(.*))?""")


class Parameter(NamedTuple):
    """A line of a notebook's parameters cell. Where the default is None, so can a value be: the
    notebook then chooses (such as: as the preset says)."""

    name: str
    default: object
    kind: type
    help: str


@dataclass(frozen=True)
class Job:
    """An entry of jobs.yaml, where the fields are explained."""

    name: str
    title: str
    notebook: Path
    parameters: dict = field(default_factory=dict)
    positional: str | None = None
    paths: list = field(default_factory=list)
    memory: list = field(default_factory=list)
    check: str | None = None
    metrics: bool = True

    @cached_property
    def declared(self) -> dict[str, Parameter]:
        """The notebook's parameters; the default of one that the job fixes is its value."""
        found = read_parameters(self.notebook)
        return {name: p._replace(default=self.parameters.get(name, p.default))
                for name, p in found.items() if name not in SET_BY_JOB}


@dataclass(frozen=True)
class Plan:
    """A checked run that has not begun. `status` is that of the run to resume, None for a new one.
    `effective` is what the job's check answered: what parameters left at None stand for."""

    job: Job
    parameters: dict
    run_dir: Path
    status: dict | None
    effective: dict = field(default_factory=dict)

    def injected(self) -> dict:
        """What the notebook is given."""
        return self.parameters | {"run_dir": str(self.run_dir), "resume": self.status is not None}

    def command(self) -> str:
        """What to type for the same run. It goes into published model cards: of a path only the
        last part."""
        words = ["python", "-m", "helpers.jobs", "run", self.job.name]
        for name, value in self.parameters.items():
            if value != self.job.declared[name].default:
                is_path = name in self.job.paths and os.path.isabs(str(value))
                words += ["-p", f"{name}={Path(value).name if is_path else value}"]
        return shlex.join(words)


def load_jobs(folder: Path | None = None) -> dict[str, Job]:
    """The jobs of jobs.yaml in a folder (default: the project's notebooks), by name. Raises
    WorkbookError if it cannot be understood."""
    path = Path(folder or ROOT / "notebooks") / "jobs.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        return {name: Job(name=name, **entry | {"notebook": path.parent / entry["notebook"]})
                for name, entry in entries.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise WorkbookError(f"The list of jobs {path} cannot be read: {why}.") from error


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters cell of a notebook, by name; each is one line. papermill's own reader takes
    seconds to import and loses a line whose comment holds an equals sign. Raises WorkbookError."""
    source, found = "", {}
    try:
        for cell in read_json(notebook)["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                source = "".join(cell["source"])
        for line in source.splitlines():
            if match := LINE.fullmatch(line.rstrip()):
                name, hint, value, text = match.groups(default="")
                default = ast.literal_eval(value)
                named = re.search(rf"\b({'|'.join(KINDS)})\b", hint or type(default).__name__)
                found[name] = Parameter(name, default, KINDS[named[1]][0] if named else str, text)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise WorkbookError(f"The notebook {notebook} of a job cannot be read: {error}.") from error
    return found


def convert(parameter: Parameter, text: str) -> object:
    """The text of a -p in the parameter's type. Raises WorkbookError with what is expected."""
    kind, optional = parameter.kind, parameter.default is None
    if optional and text.lower() in ("none", "null"):
        return None
    with contextlib.suppress(ValueError, RecursionError):  # what does not convert is refused below
        if kind is bool:
            value = SWITCH.get(text.lower())
        else:
            value = kind(text) if kind in (int, float, str) else json.loads(text)
        infinite = value in (float("inf"), -float("inf")) or value != value
        if type(value) is kind and is_text(text) and not infinite:
            return value
    expected = KINDS[kind.__name__][1] + (" or none" if optional else "")
    example = f", such as {json.dumps(parameter.default)}" if parameter.default else ""
    raise WorkbookError(f"{parameter.name} is {text!r}: it must be {expected}{example}.")


def check_parameters(job: Job, given: dict[str, str]) -> dict:
    """`given` converted, and paths that exist made absolute. Raises WorkbookError."""
    checked = {}
    for name, text in given.items():
        if name not in job.declared:
            near = closest(name, job.declared)
            raise WorkbookError(f"The job {job.name} has no parameter {name!r}; {near}")
        value, default = convert(job.declared[name], text), job.declared[name].default
        if name in job.parameters and value != default:
            raise WorkbookError(f"{name} is always {default} in the job {job.name}: choose another "
                                "job.")
        if name in (*job.paths, job.positional) and value and value != default:
            path = os.path.expanduser(value)
            value = str(Path(path).resolve()) if os.path.exists(path) else value
        checked[name] = value
    return checked


def plan_job(name, given=None, path=None, resume=False, runs_dir=None, notebooks_dir=None) -> Plan:
    """A checked run of the job `name`; creates nothing. Raises WorkbookError for what is wrong.

    given: the text of parameters by name, as -p takes it; path: that of the job's `positional`;
    resume: True (the newest unfinished run) or a job id.
    """
    jobs, runs_dir = load_jobs(notebooks_dir), Path(runs_dir or ROOT / "runs").resolve()
    if name not in jobs:
        raise WorkbookError(f"There is no job {name!r}; {closest(name, [*jobs, *COMMANDS])}")
    job, given = jobs[name], given or {}
    if path is not None:
        given = given | {job.positional or path: path}  # a job without one has no such parameter
    values = check_parameters(job, given)
    if resume:
        status = find_unfinished(name, resume, runs_dir)
        before, job_id = status["parameters"], status["id"]
        for n, value in values.items():
            if before.get(n) != value:
                raise WorkbookError(f"{job_id} was started with {n} {before.get(n)!r}, not "
                                    f"{value!r}: leave it out to resume.")
        plan = Plan(job, before, runs_dir / job_id, status)
    else:
        defaults = {n: p.default for n, p in job.declared.items()}
        if "workers" in defaults and (count := os.environ.get("NUM_GPU_WORKERS")):
            named = job.declared["workers"]._replace(name="NUM_GPU_WORKERS")
            defaults["workers"] = convert(named, count)
        job_id = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        plan = Plan(job, defaults | values, runs_dir / job_id, None)
    if (count := plan.parameters.get("workers", 1)) < 1:
        raise WorkbookError(f"workers is {count}: --workers or NUM_GPU_WORKERS must be a whole "
                            "number of at least 1.")
    if job.positional and not plan.parameters[job.positional]:
        raise WorkbookError(f"The job {name} needs its {job.positional}: "
                            f"python -m helpers.jobs {name} <path>.")
    if job.check:
        plan.effective.update(pkgutil.resolve_name(job.check)(plan.injected()) or {})
    return plan


# ---- the command line


def run(args: argparse.Namespace, name: str, path: str | None = None) -> int:
    given = {}
    for pair in args.pairs:
        key, equals, given[key] = pair.partition("=")
        if not (key and equals):
            raise WorkbookError(f"-p takes name=value, such as -p rank=8, not {key!r}.")
    if args.workers is not None:
        given["workers"] = args.workers
    plan = plan_job(name, given, path, args.resume, args.runs_dir, args.notebooks_dir)
    if args.dry_run:
        folder = plan.run_dir if plan.status else plan.run_dir.with_name(f"{name}-<time>-xxxx")
        print(f"notebook: {plan.job.notebook}\nfolder: {folder}\nparameters:")
        for key, value in plan.parameters.items():
            print(f"    {key} = {value!r}")
        return 0
    from helpers.attempts import execute  # it imports papermill, which takes seconds

    status = execute(plan)
    print(f"{status['id']} {status['state']} after {status['seconds']} s: {plan.run_dir}")
    if status["error"]:
        print(status["error"], file=sys.stderr)
        print(f"More is in log.txt and {status['notebook']} there.", file=sys.stderr)
    return EXIT_CODES[status["state"]]


def show_jobs(args: argparse.Namespace) -> int:
    for job in load_jobs(args.notebooks_dir).values():
        print(f"{job.name} - {job.title} ({job.notebook.name})")
        for name, p in job.declared.items():
            kind = f": {p.kind.__name__}" if p.default is None else ""
            fixed = " (fixed)" if name in job.parameters else ""
            print(f"    {f'{name}{kind} = {p.default!r}{fixed}':<34} {p.help}".rstrip())
    return 0


def show_status(args: argparse.Namespace, run_id: str | None = None) -> int:
    runs = {status["id"]: status for status in list_runs(args.runs_dir)}
    if run_id in runs:
        print(json.dumps(runs[run_id], indent=2))
        return 0
    if run_id is not None:
        raise WorkbookError(f"There is no run {run_id!r}; {closest(run_id, runs)}")
    print(f"{'job':<36} {'state':<12} {'started (UTC)':<20} {'seconds':>8}  error")
    for s in runs.values():
        seconds = s["seconds"] if s["ended"] else seconds_since(s["started"])
        print(f"{s['id']:<36} {s['state']:<12} {s['started'][:19]:<20} {seconds or '?':>8}  "
              f"{s['error'] or ''}".rstrip())
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.jobs", allow_abbrev=False, description="Run notebooks as jobs.",
        usage="%(prog)s list | [run] JOB [PATH] [options] | status [JOB_ID]")
    add = parser.add_argument
    add("words", nargs="+", help=argparse.SUPPRESS)
    add("-p", dest="pairs", action="append", default=[], metavar="name=value", help="see list")
    add("--workers", metavar="N", help="processes in all (default: NUM_GPU_WORKERS, or 1)")
    add("--resume", nargs="?", const=True, default=False, metavar="JOB_ID",
        help="go on with the newest unfinished run of the job, or with this one")
    add("--dry-run", action="store_true", help="check everything, create nothing")
    add("--runs-dir", type=Path, metavar="DIR", help="where runs are kept (default: runs/)")
    add("--notebooks-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.words[0] not in COMMANDS:
        args.words.insert(0, "run")
    if len(args.words) > COMMANDS[args.words[0]] or args.words == ["run"]:
        parser.error(f"{' '.join(args.words)}: a word too many, or no job")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    command, *words = args.words
    try:
        return {"list": show_jobs, "run": run, "status": show_status}[command](args, *words)
    except WorkbookError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]
    except OSError as error:
        where = error.filename or "The output"
        print(f"{where} could not be written or read: {error.strerror}.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # an ASCII terminal shows ? for what it lacks
    sys.exit(main())
