"""bench.compare: the verdict on samples whose truth is known."""

import json
import sys

import numpy as np
import pytest

from bench.compare import compare, main, read
from bench.environment import summarize
from utils.common import RecipeError


def result(seconds, **facts) -> dict:
    return {"seconds": summarize(list(map(float, seconds))), "stages_ms": {"denoising_step": 100.0}, **facts}


def noisy(median: float, runs: int = 10, seed: int = 0) -> dict:
    return result(median * (1 + 0.01 * np.random.default_rng(seed).standard_normal(runs)))


def test_compare_says_faster_slower_noise_or_too_few():
    a = noisy(0.50)
    assert compare(a, noisy(0.40, seed=1))["verdict"] == "faster"
    assert compare(noisy(0.40, seed=1), a)["verdict"] == "slower"
    assert compare(a, a)["verdict"] == "noise" and compare(a, a)["ratio"] == 1
    assert compare(a, noisy(0.40, runs=3))["verdict"] == "too few runs"


def test_compare_of_equal_distributions_is_mostly_noise():
    found = [compare(noisy(0.5, seed=2 * i), noisy(0.5, seed=2 * i + 1))["verdict"] for i in range(40)]
    assert found.count("noise") >= 34


def test_compare_intervals_hold_the_median_and_lie_in_the_range():
    found = compare(noisy(0.5), noisy(0.45, seed=1))
    for side in (found["a"], found["b"]):
        low, high = side["interval"]
        assert side["min"] <= low <= side["median"] <= high <= side["max"]
    low, high = found["ratio_interval"]
    assert low < found["ratio"] < high


def test_compare_names_settings_that_differ():
    a = result([1.0] * 5, model="dev", environment={"gpu": "H100", "packages": {"torch": "2.11.0"}},
               techniques={"float8": {"on": False, "how": "--disable_quant"}})
    b = result([1.0] * 5, model="dev", environment={"gpu": "H200", "packages": {"torch": "2.11.0"}},
               techniques={"float8": {"on": True, "how": "row"}})
    assert compare(a, b)["differs"] == {"gpu": ["H100", "H200"], "float8": ["off", "row"]}


def test_main_prints_the_verdict_as_json_last(tmp_path, monkeypatch, capsys):
    for name, median in (("a", 0.5), ("b", 0.4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(noisy(median)))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"] == "faster"


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": 58.1}', '{"error": "timeout"}'])
def test_read_refuses_a_file_that_is_no_result(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecipeError, match=r"x\.json"):
        read(str(tmp_path / "x.json"))
