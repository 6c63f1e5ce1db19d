"""The ablation's rows, and what becomes of one that fails, is repeated or interrupted."""

import json
import subprocess
import sys

import pytest

import experiments
from report import records, tables
from tiny_flux.pictures import prompts
from utils import benchmark_utils
from utils.benchmark_utils import check_args, create_parser


def test_every_row_is_accepted_and_no_two_are_the_same(tmp_path, monkeypatch):
    """Each command line parses and passes the checks of its arguments, as on a GPU machine."""
    monkeypatch.setattr(benchmark_utils.torch.cuda, "is_available", lambda: True)
    (tmp_path / "reference.png").write_bytes(b"")
    seen = set()
    for suite, row in experiments.choose(None, None):
        *before, line = experiments.commands("h100", suite, row, tmp_path)
        assert bool(before) == (suite == "tiny" or row in experiments.AFTER)
        flags = (["--ckpt", "tiny-flux-dev", *line[line.index("--") + 1:]] if suite == "tiny" else
                 line[line.index("run_benchmark.py") + 1:])
        monkeypatch.setenv("WORLD_SIZE", "2" if "torch.distributed.run" in line else "1")
        args = create_parser().parse_args(["--device", "cuda", *flags])
        args.warmup, args.runs = args.warmup or 0, args.runs or 1
        check_args(args)
        seen.add((len(before), str(sorted(vars(args).items(), key=str))))
    assert len(seen) == sum(map(len, experiments.ROWS.values())), "two rows are the same"


def test_every_row_has_a_name():
    assert set(experiments.TINY) == {*tables.QUALITY, "eager"}
    named = {row for names in tables.GROUPS.values() for row in names} | set(tables.STARTS)
    measured = {row for suite in ("schnell", "dev", "kontext") for row in experiments.ROWS[suite]}
    assert measured - named == {"attention_scaled", "attention_unscaled", "kernels_unfused"} and not named - measured


def test_the_prompts_name_style_and_background_in_the_first_half():
    texts, wanted = prompts(100)
    assert len(set(texts)) == 100 and all(one.colour in text and one.style in text
                                          for text, one in zip(texts[:50], wanted, strict=False))
    assert not any("background" in text for text in texts[50:])


def test_a_twin_is_the_same_recipe_without_its_cache(tmp_path):
    for row, twin in experiments.TWINS.items():
        assert experiments.TINY[row] == [*experiments.TINY[twin], "--enable_cache_dit"]
    first, second, last = experiments.commands("cpu", "tiny", "cache_defaults", tmp_path)
    assert first[first.index("--keep") + 1] == last[last.index("--reference") + 1]
    assert second[second.index("--keep") + 1] == last[last.index("--twin") + 1]


@pytest.mark.parametrize("argv, choices", [(["--suite", "nonsense"], "choose from schnell, dev, kontext, tiny"),
                                           (["--rows", "9_nothing"], "choose from 1_eager, 2_compile"),
                                           (["--suite", "tiny", "--rows", "1_eager"], "choose from eager, float32")])
def test_names_that_do_not_exist_are_refused_with_the_choices(argv, choices, capsys):
    with pytest.raises(SystemExit) as error:
        experiments.main(["run", "h100", *argv])
    assert error.value.code == 2 and choices in capsys.readouterr().err


def test_rows_are_picked_by_pattern():
    assert experiments.choose(["dev"], ["cache_*", "1_eager"]) == [
        ("dev", "1_eager"), ("dev", "cache_default"), ("dev", "cache_safe"), ("dev", "cache_balanced"),
        ("dev", "cache_fast"), ("dev", "cache_extreme")]


FINE = "import json, sys; json.dump({'seconds': {'median': 0.5}}, open(sys.argv[1], 'w'))"
PROGRAMS = {
    "fine": FINE,
    "crash": "raise ZeroDivisionError('of the row')",
    "refused": "import sys; print('error: not here', file=sys.stderr); sys.exit(2)",
    "memory": "raise RuntimeError('torch.OutOfMemoryError: CUDA out of memory')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "slow": "import time; time.sleep(60)",
    "silent": "pass",
    "last": FINE,
}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A suite of small programs in place of the benchmark; results go to a folder of the test's."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "ROWS", {"fake": {row: [] for row in PROGRAMS}})
    monkeypatch.setattr(experiments, "commands", lambda gpu, suite, row, scratch, metrics=False: [
        [sys.executable, "-S", "-c", PROGRAMS[row], str(scratch / "result.json")]])
    folder = tmp_path / "results" / "here" / "fake"

    def run(*argv):
        code = experiments.main(["run", "here", *argv])
        return code, {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return run


def test_a_failure_is_the_rows_result_and_the_others_go_on(stand_ins, capsys):
    code, found = stand_ins("--timeout", "2")
    assert code == 1 and [found[f"{row}.json"].get("error") for row in PROGRAMS] == [
        None, "crash", "refused", "out of memory", "killed by SIGKILL", "timeout", "no result", None]
    assert found["crash.json"]["exit_code"] == 1 and found["slow.json"]["exit_code"] is None
    assert "ZeroDivisionError: of the row" in found["crash.json"]["output_end"][-1]
    assert found["fine.json"]["suite"] == "fake" and found["fine.json"]["seconds"] == {"median": 0.5}
    shown = capsys.readouterr()
    assert "[1/8] fake/fine: median 0.500 s an image" in shown.out and "; 7 left, about" in shown.out
    assert "failed: fake/crash" in shown.err


def test_nothing_finished_is_overwritten(stand_ins):
    stand_ins("--rows", "fine", "crash")
    _, found = stand_ins("--rows", "fine", "crash")
    assert list(found) == ["crash.2.json", "crash.json", "fine.2.json", "fine.json"]
    _, found = stand_ins("--rows", "fine")
    assert "fine.3.json" in found and records.newest(records.RESULTS / "here" / "fake", "fine")[0].name == "fine.3.json"


def test_resuming_skips_what_is_finished_and_repeats_what_failed(stand_ins, monkeypatch, capsys):
    _, before = stand_ins("--rows", "fine", "crash")
    monkeypatch.setitem(PROGRAMS, "crash", FINE)
    monkeypatch.setitem(PROGRAMS, "fine", "raise ValueError('measured again')")
    code, after = stand_ins("--rows", "fine", "crash", "--resume")
    assert code == 0 and "1 of 2 rows to measure" in capsys.readouterr().out
    assert after["fine.json"] == before["fine.json"] and "error" not in after["crash.json"] and len(after) == 2


def test_a_failed_repetition_does_not_hide_a_finished_result(stand_ins, monkeypatch):
    stand_ins("--rows", "fine")
    monkeypatch.setitem(PROGRAMS, "fine", "raise ValueError")
    stand_ins("--rows", "fine")
    folder = records.RESULTS / "here" / "fake"
    assert records.newest(folder, "fine")[0].name == "fine.json" and records.failures(folder) == {}
    assert experiments.where(folder, "fine", resume=True) is None


def test_an_interruption_keeps_what_is_done(stand_ins, monkeypatch, capsys):
    execute = experiments.execute

    def interrupted(command, timeout):
        if PROGRAMS["crash"] in command:
            raise KeyboardInterrupt
        return execute(command, timeout)

    monkeypatch.setattr(experiments, "execute", interrupted)
    code, found = stand_ins()
    assert code == 130 and list(found) == ["fine.json"] and "1 rows are kept" in capsys.readouterr().err


def test_a_process_that_runs_too_long_is_ended_with_its_children(tmp_path):
    child = f"import subprocess; subprocess.run(['sleep', '61.25']); open({str(tmp_path / 'x')!r}, 'w')"
    assert experiments.execute([sys.executable, "-S", "-c", child], 1)[0] is None
    assert "sleep\x0061.25" not in subprocess.run("cat /proc/[0-9]*/cmdline", shell=True, capture_output=True,
                                                  text=True).stdout


def test_a_dry_run_runs_nothing(stand_ins, capsys):
    assert stand_ins("--dry-run") == (0, {})
    assert "[8/8] fake/last -> results/here/fake/last.json: -S -c" in capsys.readouterr().out
