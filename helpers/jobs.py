"""Notebooks as jobs: ``python -m helpers.jobs list | run <job> | status | check | export | …``.

A job is a notebook of ``notebooks/jobs.yaml``. Names and types of its parameters are checked here,
values by the job's own ``check``; then helpers.attempts runs the notebook.
"""

import argparse
import ast
import contextlib
import json
import math
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
from helpers.export_plan import plan_export
from helpers.runs import find_unfinished, list_runs, seconds_since

SET_BY_JOB = ("run_dir", "resume")  # parameters that every notebook is given
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EXIT_CODES = {"succeeded": 0, "failed": 1, "interrupted": 130}
LINE = re.compile(r"""(\w+)\s*(?::(.+?))?\s*=\s*("[^"]*"|.+?)(?:\s+#\s*(.*))?""")  # see Parameter


class Parameter(NamedTuple):
    """A line of a notebook's parameters cell: ``name: type = default  # help``. Where the default
    is None, the notebook chooses (such as: as the preset says); "none" says so, but for a text."""

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
    paths: tuple | list = ()
    outputs: tuple | list = ()
    memory: tuple | list = ()
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
    """A checked run that has not begun. status: of the run to resume, None for a new one.
    effective: what parameters left at None stand for, as the job's check answers."""

    job: Job
    parameters: dict
    run_dir: Path
    status: dict | None
    effective: dict = field(default_factory=dict)

    def injected(self) -> dict:
        """What the notebook is given."""
        return self.parameters | {"run_dir": str(self.run_dir), "resume": self.status is not None}

    def command(self) -> str:
        """What to type for the same run; of a path only its last part, as model cards show it."""
        words = ["python", "-m", "helpers.jobs", "run", self.job.name]
        for name, parameter in self.job.declared.items():
            value = self.parameters.get(name, parameter.default)
            if value != parameter.default:
                shown = Path(value).name if os.path.isabs(str(value)) else value
                words += ["-p", f"{name}={shown}"]
        return shlex.join(words)


def load_jobs(folder: Path | None = None) -> dict[str, Job]:
    """The jobs of jobs.yaml in a folder (default: notebooks/), by name. Raises WorkbookError."""
    path = Path(folder or ROOT / "notebooks") / "jobs.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        return {name: Job(name=name, **entry | {"notebook": path.parent / entry["notebook"]})
                for name, entry in entries.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise WorkbookError(f"The list of jobs {path} cannot be read: {why}.") from error


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters cell of a notebook, by name. Raises WorkbookError. papermill's own reader
    takes seconds to import and loses a line whose comment holds an equals sign."""
    lines, found = [], {}
    try:
        for cell in read_json(notebook)["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                lines = "".join(cell["source"]).splitlines()
        for match in filter(None, map(LINE.fullmatch, map(str.rstrip, lines))):
            name, hint, value, text = match.groups(default="")
            default = ast.literal_eval(value)
            named = re.search(rf"\b({'|'.join(KINDS)})\b", hint or type(default).__name__)
            found[name] = Parameter(name, default, KINDS[named[1]][0] if named else str, text)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise WorkbookError(f"The notebook {notebook} of a job cannot be read: {error}.") from error
    return found


def convert(parameter: Parameter, text: str) -> object:
    """The text of a -p in the parameter's type. Raises WorkbookError with what is expected."""
    kind = parameter.kind
    optional = parameter.default is None and kind is not str  # packing=none is a text
    if optional and text.lower() in ("none", "null"):
        return None
    with contextlib.suppress(ValueError, RecursionError):  # what does not convert is refused below
        read = kind if kind in (int, float, str) else json.loads
        value = SWITCH.get(text.lower()) if kind is bool else read(text)
        if type(value) is kind and is_text(text) and (kind is not float or math.isfinite(value)):
            return value
    expected = KINDS[kind.__name__][1] + (" or none" if optional else "")
    example = f", such as {json.dumps(parameter.default)}" if parameter.default else ""
    raise WorkbookError(f"{parameter.name} is {text!r}: it must be {expected}{example}.")


def check_parameters(job: Job, given: dict[str, str]) -> dict:
    """`given` converted; paths that exist, and outputs, made absolute. Raises WorkbookError."""
    checked = {}
    for name, text in given.items():
        if name not in job.declared:
            near = closest(name, job.declared)
            raise WorkbookError(f"The job {job.name} has no parameter {name!r}; {near}")
        value, default = convert(job.declared[name], text), job.declared[name].default
        if name in job.parameters and value != default:
            raise WorkbookError(f"{name} is always {default} in {job.name}: choose another job.")
        if value and value != default and name in (*job.paths, *job.outputs):
            path = os.path.abspath(os.path.expanduser(value))
            value = path if name in job.outputs or os.path.exists(path) else value
        checked[name] = value
    return checked


def plan_job(name, given=None, path=None, resume=False, runs_dir=None, notebooks_dir=None) -> Plan:
    """A checked run of the job `name`; creates nothing. Raises WorkbookError for what is wrong.

    given: texts by parameter, as -p takes them; path: of the job's `positional`; resume: True (the
    newest unfinished run) or a job id.
    """
    jobs, runs_dir = load_jobs(notebooks_dir), Path(runs_dir or ROOT / "runs").resolve()
    if name not in jobs:
        raise WorkbookError(f"There is no job {name!r}; {closest(name, [*jobs, *COMMANDS])}")
    job, given, status = jobs[name], dict(given or {}), None
    if path is not None:
        given[job.positional or path] = path  # a job without one has no such parameter
    if "workers" in job.declared and not resume:
        count = given["workers"] = given.get("workers") or os.environ.get("NUM_GPU_WORKERS") or "1"
        if not re.fullmatch("[1-9][0-9]*", count):
            raise WorkbookError(f"workers is {count!r}: --workers or NUM_GPU_WORKERS must be a "
                                "whole number above 0.")
    values = check_parameters(job, given)
    if resume:
        status = find_unfinished(name, resume, runs_dir)
        job_id, before = status["id"], status["parameters"]
        for key in values:
            if before.get(key) != values[key]:
                raise WorkbookError(f"{job_id} was started with {key} {before.get(key)!r}, not "
                                    f"{values[key]!r}: leave it out to resume.")
    else:
        job_id = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        before = {key: parameter.default for key, parameter in job.declared.items()}
    plan = Plan(job, before | values, runs_dir / job_id, status)
    if job.positional and not plan.parameters[job.positional]:
        raise WorkbookError(f"The job {name} needs the path of its {job.positional}: add it.")
    if job.check:
        plan.effective.update(pkgutil.resolve_name(job.check)(plan.injected()) or {})
    return plan


def run(args: argparse.Namespace) -> int:
    """Run a job: a notebook, with checked parameters, in a folder of its own."""
    plan = plan_job(args.job, _pairs(args), args.path, args.resume, args.runs_dir,
                    args.notebooks_dir)
    if args.dry_run:
        print(f"notebook: {plan.job.notebook}\nfolder: {plan.run_dir}\nparameters:")
        for key, value in plan.parameters.items():
            print(f"    {key} = {value!r}")
        return 0
    from helpers.attempts import execute  # slow: it imports papermill

    status = execute(plan)
    print(f"{status['id']} {status['state']} after {status['seconds']} s: {plan.run_dir}")
    if status["warning"]:
        print(f"Warning: {status['warning']}", file=sys.stderr)
    if status["error"]:
        print(status["error"], file=sys.stderr)
        print(f"More is in log.txt and {status['notebook']} there.", file=sys.stderr)
    return EXIT_CODES[status["state"]]


def show_jobs(args: argparse.Namespace) -> None:
    """Show the jobs, their parameters and what they mean."""
    for job in load_jobs(args.notebooks_dir).values():
        print(f"{job.name} - {job.title} ({job.notebook.name})")
        for name, default, kind, text in job.declared.values():
            hint = f": {kind.__name__}" if default is None else ""
            fixed = " (fixed)" if name in job.parameters else ""
            print(f"    {f'{name}{hint} = {default!r}{fixed}':<34} {text}".rstrip())


def show_status(args: argparse.Namespace) -> None:
    """Show every run and how it ended."""
    row = "{:<36} {:<12} {:<20} {:>8}  {}"
    print(row.format("job", "state", "started (UTC)", "seconds", "error or warning"))
    for status in list_runs(args.runs_dir):
        seconds = status["seconds"] if status["ended"] else seconds_since(status["started"])
        print(row.format(status["id"], status["state"], status["started"][:19], seconds or "?",
                         status["error"] or status.get("warning") or ""))


def check_rows(args: argparse.Namespace) -> None:
    """Say what the rows of a source are like, before anything is trained on them."""
    given = _pairs(args, "base_model", "max_length")
    if "max_length" in given:
        given["max_length"] = convert(Parameter("max_length", 512, int, ""), given["max_length"])
    from helpers.preflight import check_source  # slow: it imports transformers

    print("\n".join(check_source(args.task, args.rows, **given)))


def export_adapter(args: argparse.Namespace) -> None:
    """Write an adapter in a form that other tools read."""
    plan = plan_export(args.adapter, args.to, args.quantize, args.out,
                       **_pairs(args, "base_model", "task"))
    from helpers.export import export  # slow: it imports transformers

    print(f"Exported: {export(plan)}")


def examine_adapter(args: argparse.Namespace) -> None:
    """Say what an adapter is and whether it runs; with --convert, write what it can become."""
    from helpers.doctor import convert, diagnose  # slow: it imports transformers

    print("\n".join(diagnose(args.adapter, args.base)))
    if args.convert:
        print(f"Converted: {convert(args.adapter, args.convert, args.base)}")


COMMANDS = {"list": show_jobs, "run": run, "status": show_status, "check": check_rows,
            "export": export_adapter, "doctor": examine_adapter}


def _pairs(args: argparse.Namespace, *allowed: str) -> dict[str, str]:
    """The -p by name; of a command that is no job only the allowed ones. Raises WorkbookError."""
    given = dict(pair.split("=", 1) for pair in args.pairs)
    if len(given) < len(args.pairs):
        raise WorkbookError("A parameter is given twice with -p: give it once.")
    for name in given if allowed else ():
        if name not in allowed:
            raise WorkbookError(f"{args.command} has no parameter {name!r}; "
                                f"{closest(name, allowed)}")
    return given


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; words that begin with no command are those of `run`."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in COMMANDS else "run"
    parser = argparse.ArgumentParser(
        prog=f"python -m helpers.jobs {command}", allow_abbrev=False,
        description=COMMANDS[command].__doc__,
        epilog=f"Commands: {', '.join(COMMANDS)}; each has a --help. A job may stand without run.")
    add = parser.add_argument
    if command in ("run", "check", "export"):
        add("-p", dest="pairs", action="append", metavar="name=value", help="see list")
    if command == "run":
        add("job", help="a name that list shows")
        add("path", nargs="?", help="what the job works on, such as an adapter's folder")
        add("--workers", dest="pairs", action="append", type="workers={}".format, metavar="N",
            help="the same as -p workers=N (default: NUM_GPU_WORKERS, or 1)")
        add("--resume", nargs="?", const=True, default=False, metavar="JOB_ID",
            help="go on with the newest unfinished run of the job, or with this one")
        add("--dry-run", action="store_true", help="check everything, create nothing")
    if command == "check":
        add("rows", help="a file, practice or hub")
        add("--task", required=True, help="the task that the rows are for, such as sql")
    if command in ("export", "doctor"):
        add("adapter", help="an adapter's folder")
    if command == "export":
        add("--to", help="merged, gguf, gguf-lora, modelfile or hub-folder")
        add("--quantize", help="the weights of a GGUF file: f16 (default), f32 or q8_0")
        add("--out", type=Path, help="a new folder (default: below runs/exports)")
    if command == "doctor":
        add("--base", help="the base model to judge by (default: the adapter's, if it is here)")
        add("--convert", type=Path, metavar="OUT", help="write plain LoRA to a new folder")
    add("--runs-dir", type=Path, metavar="DIR", help="where runs are kept (default: runs/)")
    add("--notebooks-dir", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(command=command, pairs=[])
    args = parser.parse_intermixed_args(words)
    if not all("=" in pair for pair in args.pairs):
        parser.error("-p takes name=value, such as -p rank=8")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return COMMANDS[args.command](args) or 0
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
