"""The losses of a run as RUN/curve.csv, to compare with assets/curve_*.csv.

python experiments/curve.py out/digits
"""

import csv
import json
import sys
from pathlib import Path


def read_log(path: Path) -> dict[int, dict[str, float]]:
    """The numbers of log.jsonl, lines of one iteration merged.  -> {iteration: {name: value}}"""
    rows = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        rows.setdefault(values["it"], {}).update(numbers)
    return rows


def is_curve(name: str) -> bool:
    return name.endswith("_loss") or name.startswith("val_")


def main(run: Path) -> None:
    rows = read_log(run / "log.jsonl")
    names = {name for row in rows.values() for name in row}
    columns = ["it", *sorted(filter(is_curve, names))]
    with open(run / "curve.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        for it, row in rows.items():
            if it:
                writer.writerow({"it": it, **row})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
