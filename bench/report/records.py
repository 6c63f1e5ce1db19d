"""Reads the records in results/: one JSON file for each measurement, <gpu>/<date>_<commit>/<suite>/<row>.json.

A folder <date>_<commit> holds the measurements of one card, one clean commit and one day. A repeated row is
<row>.2.json, then <row>.3.json. A failed measurement has the key "error", and readers take the newest successful one.
The folders 2026-11 are older than this rule; their README describes them.
"""

import json
import re
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
FOLDER = re.compile(r"\d{4}-\d\d-\d\d_")  # how the name of a folder of records begins
CURRENT = {"h100": "2026-11", "h200": "2026-11", "cpu": "2026-11"}  # by GPU: the folder that the pages show


def current(where: str) -> str:
    """Inserts the folder that the pages show: <gpu>/<suite> -> <gpu>/<folder>/<suite>. An unknown GPU has none.

    A path that names its folder stays as it is.
    """
    gpu, _, rest = where.partition("/")
    if FOLDER.match(rest):
        return where
    return "/".join(filter(None, (gpu, CURRENT.get(gpu), rest)))


def attempts(folder: Path, row: str) -> list[Path]:
    """Returns the files of `row`, oldest first."""
    found = {1: folder / f"{row}.json"} if (folder / f"{row}.json").exists() else {}
    for path in folder.glob(f"{row}.*.json"):
        number = path.name.removeprefix(f"{row}.").removesuffix(".json")
        if number.isdigit():
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def next_path(folder: Path, row: str) -> Path:
    """Returns the path, still unused, of the next measurement of `row`."""
    before = attempts(folder, row)
    if not before:
        return folder / f"{row}.json"
    last = before[-1].name.removeprefix(f"{row}.").removesuffix("json").rstrip(".")
    return folder / f"{row}.{int(last or 1) + 1}.json"


def newest(folder: Path, row: str) -> tuple[Path, dict] | None:
    """Returns the file and the record of the newest successful measurement of `row`, or None."""
    for path in reversed(attempts(folder, row)):
        record = json.loads(path.read_text())
        if "error" not in record:
            return path, record
    return None


def beside(folder: Path, row: str, others: list[dict]) -> tuple[Path, dict] | None:
    """Returns the file and the record of the measurement of `row` that compares best with the records `others`.

    A measurement on the same card wins, because cards differ by a few percent. Among those, the nearest in time to the
    median of `others` wins. Without dates it is the newest. None without a successful measurement.
    """
    environments = sorted((one for record in others if (one := record.get("environment", {})).get("date")),
                          key=lambda one: one["date"])
    records = [(path, json.loads(path.read_text())) for path in attempts(folder, row)]
    found = [(path, record) for path, record in records if "error" not in record and record["environment"].get("date")]
    if not (environments and found):
        return newest(folder, row)
    middle = environments[len(environments) // 2]

    def distance(one: tuple[Path, dict]) -> tuple:
        here = one[1]["environment"]
        cards = here.get("gpu_uuid"), middle.get("gpu_uuid")
        return (None in cards or len(set(cards)) > 1,
                abs(datetime.fromisoformat(here["date"]) - datetime.fromisoformat(middle["date"])))

    return min(reversed(found), key=distance)
