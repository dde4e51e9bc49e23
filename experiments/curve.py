"""The losses of a run as RUN/curve.csv, to lay beside assets/curve_*.csv.   python experiments/curve.py out/digits"""

import csv
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    run = Path(sys.argv[1])
    rows = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["it"], {}).update({k: v for k, v in row.items() if isinstance(v, float)})
    columns = ["it", *sorted({k for row in rows.values() for k in row if k.endswith("_loss") or k.startswith("val_")})]
    with open(run / "curve.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"it": it, **row} for it, row in rows.items() if it)
