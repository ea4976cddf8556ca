"""Write README's table of measured runs from the runs themselves: python tests/measured.py runs/<job id> …"""

import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def row(folder: Path) -> tuple[str, str, int]:
    """A run's line of the table, its hardware and its number of validation rows."""
    status, metrics = (json.loads((folder / name).read_text()) for name in ("status.json", "metrics.json"))
    assert status["state"] == "succeeded", f"{folder} is {status['state']}"
    evaluation = metrics["evaluation"]
    names = [n for n in ("exact", "execution", "chrf") if n in evaluation["adapter"]]

    def cell(who):
        return ", ".join(f"{n} {evaluation[who][n]['value']:.2f} [{evaluation[who][n]['low']:.2f}, "
                         f"{evaluation[who][n]['high']:.2f}]" for n in names)

    data = "practice" if metrics["data_source"].startswith("practice") else metrics["data_source"]
    given = " ".join(f"-p {k}={v}" for k, v in status["parameters"].items()
                     if k in ("max_rows", "epochs", "preset", "eval_rows") and v not in (0, 0.0, "", "default", 100))
    line = (f"| {metrics['config']['task']} {given} | {data}, {metrics['rows']:,} rows | {status['seconds'] / 60:.1f} | "
            f"{metrics['training_seconds'] / 60:.1f} | {cell('base')} | {cell('adapter')} |")
    return line, metrics["hardware"], evaluation["rows"]


def main(folders: list[str]) -> None:
    rows = [row(Path(folder)) for folder in folders]
    counts = ", ".join(sorted({str(r[2]) for r in rows}))
    table = [BEGIN, "",
             f"Measured on {rows[0][1]}, on validation rows ({counts} per task), with 95% bootstrap intervals:", "",
             "| job | training data | minutes in all | of these training | base | adapter |",
             "| --- | --- | ---: | ---: | --- | --- |", *(r[0] for r in rows), "",
             "Made by `python -m helpers.jobs run …` and `python tests/measured.py runs/<job id> …`.", "", END]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + "\n".join(table) + rest.split(END)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
