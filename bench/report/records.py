"""The records in results/: one JSON a measurement, <gpu>/<date>_<commit>/<suite>/<row>.json.

A folder <date>_<commit> holds the measurements of one card, one clean commit and one day. A row that is measured again
there is <row>.2.json, then <row>.3.json. A measurement that failed has the key "error". Readers take the newest that
did not. The folders 2026-11 are older than this rule; their README says what they hold.
"""

import json
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
CURRENT = {"h100": "2026-11", "h200": "2026-11", "cpu": "2026-11"}  # the folder that the pages show, by GPU


def current(where: str) -> str:
    """<gpu>/<suite> with the folder that the pages show between the two; of an unknown GPU unchanged."""
    gpu, _, rest = where.partition("/")
    return "/".join(filter(None, (gpu, CURRENT.get(gpu), rest)))


def attempts(folder: Path, row: str) -> list[Path]:
    """The files of `row` in the order in which they were measured."""
    found = {1: folder / f"{row}.json"} if (folder / f"{row}.json").exists() else {}
    for path in folder.glob(f"{row}.*.json"):
        number = path.name.removeprefix(f"{row}.").removesuffix(".json")
        if number.isdigit():
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def next_path(folder: Path, row: str) -> Path:
    """Where the next measurement of `row` belongs: nothing is there yet."""
    before = attempts(folder, row)
    if not before:
        return folder / f"{row}.json"
    last = before[-1].name.removeprefix(f"{row}.").removesuffix("json").rstrip(".")
    return folder / f"{row}.{int(last or 1) + 1}.json"


def newest(folder: Path, row: str) -> tuple[Path, dict] | None:
    """File and record of the newest finished measurement of `row`."""
    for path in reversed(attempts(folder, row)):
        record = json.loads(path.read_text())
        if "error" not in record:
            return path, record
    return None


def beside(folder: Path, row: str, others: list[dict]) -> tuple[Path, dict] | None:
    """File and record of that finished measurement of `row` that is nearest in time to most of the `others`, of their
    card if it is known: cards differ by some percent, and a ratio is to be one card's."""
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
