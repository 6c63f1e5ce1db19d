"""run_benchmark.py --compare: the verdict on samples whose truth is known."""

import json
import sys

import numpy as np
import pytest

import run_benchmark
from utils.benchmark_utils import RecipeError, summarize
from utils.compare import compare, read


def result(seconds, **facts) -> dict:
    return {"seconds": summarize(list(map(float, seconds))), "stages_ms": {"denoising_step": 100.0}, **facts}


def noisy(median: float, runs: int = 10, seed: int = 0) -> dict:
    return result(median * (1 + 0.01 * np.random.default_rng(seed).standard_normal(runs)))


def test_verdicts():
    a = noisy(0.50)
    assert compare(a, noisy(0.40, seed=1))["verdict"] == "faster"
    assert compare(noisy(0.40, seed=1), a)["verdict"] == "slower"
    assert compare(a, a)["verdict"] == "noise" and compare(a, a)["ratio"] == 1
    assert compare(a, noisy(0.40, runs=3))["verdict"] == "too few runs"


def test_two_samples_of_one_thing_are_rarely_called_different():
    found = [compare(noisy(0.5, seed=2 * i), noisy(0.5, seed=2 * i + 1))["verdict"] for i in range(40)]
    assert found.count("noise") >= 34


def test_the_interval_holds_the_median_and_lies_within_the_range():
    found = compare(noisy(0.5), noisy(0.45, seed=1))
    for side in (found["a"], found["b"]):
        low, high = side["interval"]
        assert side["min"] <= low <= side["median"] <= high <= side["max"]
    low, high = found["ratio_interval"]
    assert low < found["ratio"] < high


def test_what_else_differs_is_named():
    a = result([1.0] * 5, model="dev", environment={"gpu": "H100", "packages": {"torch": "2.11.0"}},
               techniques={"float8": {"on": False, "how": "--disable_quant"}})
    b = result([1.0] * 5, model="dev", environment={"gpu": "H200", "packages": {"torch": "2.11.0"}},
               techniques={"float8": {"on": True, "how": "row"}})
    assert compare(a, b)["differs"] == {"gpu": ["H100", "H200"], "float8": ["off", "row"]}


def test_from_the_command_line_without_a_model(tmp_path, monkeypatch, capsys):
    for name, median in (("a", 0.5), ("b", 0.4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(noisy(median)))
    monkeypatch.setattr(run_benchmark, "load_pipeline", None)
    monkeypatch.setattr(sys, "argv", ["x", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    run_benchmark.main()
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1])["verdict"] == "faster" and "B is faster by more than the noise" in shown[-3]


@pytest.mark.parametrize("text, said", [("{", "cannot be read"), ("[]", "not a result"),
                                        ('{"seconds": 58.1}', "not a result"), ('{"error": "timeout"}', "timeout")])
def test_what_is_no_result_is_refused(text, said, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read(str(tmp_path / "x.json"))
