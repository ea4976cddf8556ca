"""Write README's tables of measured runs from the runs themselves: python tests/measured.py runs/<job id> …

The table of shipped adapters comes from their metrics.json, and is written every time.
"""

import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
PREBUILT = README.parent / "adapters" / "prebuilt"
SHOWN = {"sql": ("exact", "execution"), "detox": ("style", "similarity", "joint"), "instruct": ("rouge_l", "loss")}


def replace(text: str, name: str, lines: list[str]) -> str:
    """The text with `lines` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return before + "\n".join([begin, "", *lines, "", end]) + rest.split(end)[1]


def shipped() -> list[str]:
    """A line per shipped adapter and set of rows: base, base in its own chat, adapter."""
    table = ["| adapter | validation rows | base | base, own chat template | adapter |", "| --- | --- | --- | --- | --- |"]
    trained = []
    for folder in sorted(PREBUILT.iterdir()):
        record = json.loads((folder / "metrics.json").read_text())
        trained.append(f"{folder.name} {record['training_seconds'] / 60:.1f} minutes on {record['hardware']}")
        for evaluation in (record["evaluation"], *record.get("more", [])):
            def cell(who, found=evaluation, shown=SHOWN[folder.name]):
                names = [name for name in (*shown, "passed") if name in found.get(who, {})]
                return ", ".join(f"{n} {found[who][n]['value']:.2f} [{found[who][n]['low']:.2f}, {found[who][n]['high']:.2f}]"
                                 for n in names)

            table.append(f"| [{folder.name}](adapters/prebuilt/{folder.name}/README.md) | {evaluation['rows']:,} of "
                         f"{evaluation['source']} | {cell('base')} | {cell('base, own chat template')} | {cell('adapter')} |")
    return [*table, "", f"Trained with `preset=full_data`: {'; '.join(trained)}. Made by `python -m helpers.jobs evaluate "
            "adapters/prebuilt/<name> -p data=… -p update_card=True` and `python tests/measured.py`."]


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
    line = (f"| {metrics['config']['task']} {given} | {data}, {metrics['rows']:,} rows | {metrics['hardware']} | "
            f"{status['seconds'] / 60:.1f} | "
            f"{metrics['training_seconds'] / 60:.1f} | {cell('base')} | {cell('adapter')} |")
    return line, metrics["hardware"], evaluation["rows"]


def main(folders: list[str]) -> None:
    text = README.read_text()
    if folders:
        rows = [row(Path(folder)) for folder in folders]
        counts = ", ".join(sorted({str(r[2]) for r in rows}))
        text = replace(text, "measured", [
            f"Measured on validation rows ({counts} per task), with 95% bootstrap intervals:", "",
            "| job | training data | hardware | minutes in all | of these training | base | adapter |",
            "| --- | --- | --- | ---: | ---: | --- | --- |", *(r[0] for r in rows), "",
            "Made by `python -m helpers.jobs run …` and `python tests/measured.py runs/<job id> …`."])
    README.write_text(replace(text, "shipped", shipped()))


if __name__ == "__main__":
    main(sys.argv[1:])
