"""Compares two results of run_benchmark.py and tells a difference from noise.

    python -m bench.compare before.json after.json

The last line on stdout is the comparison as one JSON object.

The interval is a percentile bootstrap: it resamples the runs of each result 10,000 times with replacement, and takes
the middle 95 % of the medians and of their ratio. It covers the noise within a process. Two processes of one command
may differ by more.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from utils.common import RecipeError, run_cli

RESAMPLES, LEAST_RUNS = 10_000, 5


def read(path: str) -> dict:
    """Reads a result of run_benchmark.py.

    Raises:
        RecipeError: the file is not a result, or it records a failure.
    """
    try:
        record = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: the file cannot be read as a result ({error}). Give a file of run_benchmark.py "
                          "--output-json.") from error
    if isinstance(record, dict) and "error" in record:
        raise RecipeError(f"{path}: this measurement failed ({record['error']}). Give a successful one.")
    if not isinstance(record, dict) or not isinstance(record.get("seconds"), dict):
        raise RecipeError(f"{path}: the file is not a result. Give a file of run_benchmark.py --output-json.")
    return record


def compare(a: dict, b: dict) -> dict:
    """Compares the seconds of two results.

    Returns:
        Runs, median, min, max and 95 % interval of each result; the ratio of the medians, B to A, and its interval; the
        verdict, of `VERDICTS`; and `differences`.
    """
    raw = [np.asarray(record["seconds"]["raw"]) for record in (a, b)]
    source = np.random.default_rng(0)
    medians = [np.median(source.choice(seconds, (RESAMPLES, len(seconds))), axis=1) for seconds in raw]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    if min(map(len, raw)) < LEAST_RUNS:
        verdict = "too few runs"
    else:
        verdict = "faster" if high < 1 else "slower" if low > 1 else "noise"
    sides = [{"runs": len(seconds), "median": float(np.median(seconds)), "min": float(seconds.min()),
              "max": float(seconds.max()), "interval": np.quantile(found, (0.025, 0.975)).tolist()}
             for seconds, found in zip(raw, medians, strict=True)]
    return {"a": sides[0], "b": sides[1], "ratio": sides[1]["median"] / sides[0]["median"],
            "ratio_interval": [float(low), float(high)], "verdict": verdict, "differs": differences(a, b)}


def differences(a: dict, b: dict) -> dict[str, list]:
    """Returns the differing settings, versions and techniques: {name: [A's value, B's value]}."""
    def facts(record):
        environment = record.get("environment", {})
        return ({name: record.get(name) for name in ("model", "random_weights", "device")} | record.get("settings", {})
                | {name: environment.get(name) for name in ("gpu", "power_limit", "driver", "cpu_threads", "commit")}
                | environment.get("packages", {})
                | {name: how["how"] if how["on"] else "off" for name, how in record.get("techniques", {}).items()})

    first, second = facts(a), facts(b)
    return {name: [first.get(name), second.get(name)] for name in first | second if first.get(name) != second.get(name)}


VERDICTS = {
    "faster": "B is faster by more than the noise within a process",
    "slower": "B is slower by more than the noise within a process",
    "noise": "no difference beyond noise",
    "too few runs": f"too few runs for a verdict: measure both with --runs {LEAST_RUNS} or more",
}


def lines(paths: list[str], a: dict, b: dict, found: dict) -> list[str]:
    """Returns the comparison as lines for people."""
    def row(name, left, right):
        return f"{name:<26}{left:>24}{right:>24}"

    shown = [f"A  {paths[0]}", f"B  {paths[1]}", row("", "A", "B")]
    sides = (found["a"], found["b"])
    shown += [row("median (s)", *(f"{side['median']:.4f}" for side in sides)),
              row("min-max", *(f"{side['min']:.4f}-{side['max']:.4f}" for side in sides)),
              row("95 % interval of median", *(f"{side['interval'][0]:.4f}-{side['interval'][1]:.4f}"
                                               for side in sides)),
              row("runs", *(str(side["runs"]) for side in sides))]
    stages = [record.get("stages_ms", {}) for record in (a, b)]
    shown += [row(f"{name} (ms)", *(f"{one[name]:.2f}" if name in one else "-" for one in stages))
              for name in stages[0] | stages[1]]
    errors = [record.get("step_relative_error") for record in (a, b)]
    shown.append(row("step error", *("-" if error is None else f"{error:.3e}" for error in errors)))
    shown += [f"differs: {name}: {left} | {right}" for name, (left, right) in found["differs"].items()]
    low, high = found["ratio_interval"]
    return [*shown, f"B takes {found['ratio']:.4f} of A's time (95 %: {low:.4f}-{high:.4f}; bootstrap of medians): "
            f"{VERDICTS[found['verdict']]}.",
            "Two processes of one command may differ by more: run both twice before you trust a few percent."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs=2, metavar="RESULT.json", help="two files of run_benchmark.py --output-json")
    parser.add_argument("--debug", action="store_true", help="also print an error's traceback")
    paths = parser.parse_args().results
    a, b = map(read, paths)
    found = compare(a, b)
    print("\n".join([*lines(paths, a, b, found), json.dumps(found)]))


if __name__ == "__main__":
    run_cli(main)
