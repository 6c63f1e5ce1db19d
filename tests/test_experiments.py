"""The ablation's rows, and what becomes of one that fails, is repeated or interrupted."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import pretend_launched

import experiments
from report import records, tables
from tiny_flux.pictures import prompts
from utils import benchmark_utils, processes, step_cache
from utils.benchmark_utils import create_parser
from utils.checks import check_args


def test_every_row_is_accepted_and_no_two_are_the_same(tmp_path, monkeypatch):
    """Each command line parses and passes the checks of its arguments, as on a GPU machine."""
    monkeypatch.setattr(benchmark_utils.torch.cuda, "is_available", lambda: True)
    for name in ("reference.png", "balanced.yaml"):
        (tmp_path / name).write_bytes(b"")
    seen = set()
    for suite, row in experiments.choose(None, None):
        *before, line = experiments.commands("h100", suite, row, tmp_path)
        assert bool(before) == (suite == "tiny" or row in experiments.AFTER)
        flags = (["--ckpt", "tiny-flux-dev", *line[line.index("--") + 1:]] if suite == "tiny" else
                 line[line.index("run_benchmark.py") + 1:])
        processes = line[line.index("--nproc_per_node") + 1] if "torch.distributed.run" in line else "1"
        assert processes == (row.split("_")[1] if row.startswith("gpus_") else "1")
        pretend_launched(monkeypatch, processes)
        args = create_parser().parse_args(["--device", "cuda", *flags])
        args.warmup, args.runs = args.warmup or 0, args.runs or 1
        check_args(args)
        seen.add((len(before), processes, str(sorted(vars(args).items(), key=str))))
    assert len(seen) == sum(map(len, experiments.ROWS.values())), "two rows are the same"


def test_batches_are_the_ends_of_the_ladder_without_a_float32_step(tmp_path):
    for count in (2, 4, 8):
        for row, end in ((f"batch_{count}", "8_fused"), (f"eager_batch_{count}", "1_eager")):
            [line] = experiments.commands("h100", "schnell", row, tmp_path)
            assert "--step_error" not in line and line[line.index("--num_images_per_prompt") + 1] == str(count)
            assert experiments.ROWS["schnell"][row][:len(experiments.LADDER[end])] == experiments.LADDER[end]


@pytest.mark.parametrize("row, least", [("cache_deciding", 0.9), ("cache_deciding_ahead", 5)])
def test_rows_that_decide_cache_the_steps_of_the_preset(tmp_path, row, least):
    job = experiments.Job("", "dev", row, tmp_path)
    [line] = experiments.lines_of(job, tmp_path / "it", argparse.Namespace(gpu="h100", download_metrics=False, jobs=1))
    options = step_cache.from_yaml(line[line.index("--cache_dit_config") + 1])
    assert step_cache.pattern(options, 28) == step_cache.PRESETS["balanced"].steps_computation_mask
    assert options.steps_computation_policy == "dynamic" and options.residual_diff_threshold > least
    # With 1 and more cache-dit decides nothing.
    assert ("--cache_decide_ahead" in line) == (options.residual_diff_threshold >= 1)


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
        ("dev", "cache_fast"), ("dev", "cache_extreme"), ("dev", "cache_deciding"),
        ("dev", "cache_deciding_ahead"), ("dev", "cache_taylorseer"), ("dev", "cache_taylorseer_2"),
        ("dev", "cache_taylorseer_4")]


FINE = ("import json, os, sys; json.dump({'seconds': {'median': 0.5}, "
        "'environment': {'commit': os.environ['GIT_COMMIT']}}, open(sys.argv[1], 'w'))")
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
    monkeypatch.setenv("GIT_COMMIT", "abc")
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


def test_resuming_measures_again_what_another_commit_finished(stand_ins, monkeypatch):
    _, before = stand_ins("--rows", "fine")
    monkeypatch.setenv("GIT_COMMIT", "def")
    _, after = stand_ins("--rows", "fine", "--resume")
    assert after["fine.json"] == before["fine.json"] and after["fine.2.json"]["environment"]["commit"] == "def"
    _, again = stand_ins("--rows", "fine", "--resume")
    assert list(again) == list(after)


def test_a_failed_repetition_does_not_hide_a_finished_result(stand_ins, monkeypatch):
    stand_ins("--rows", "fine")
    monkeypatch.setitem(PROGRAMS, "fine", "raise ValueError")
    stand_ins("--rows", "fine")
    folder = records.RESULTS / "here" / "fake"
    assert records.newest(folder, "fine")[0].name == "fine.json" and records.failures(folder) == {}
    assert experiments.where(folder, "fine", resume=True) is None


def test_what_a_row_leaves_the_next_one_starts_from(stand_ins, monkeypatch, tmp_path):
    """Run once for both if they follow each other, and again if only the second is asked for or the first failed."""
    program = """if True:
        import json, pathlib, sys
        logs = [pathlib.Path(sys.argv[1]).with_name("log"), pathlib.Path(sys.argv[2])]
        for log in logs:
            log.open("a").write(sys.argv[3] + " ")
        json.dump({"seconds": {"median": 0.5}, "log": logs[0].read_text().split()}, open(sys.argv[1], "w"))
        sys.exit("failing" in sys.argv[3])"""
    ran = tmp_path / "ran"
    monkeypatch.setattr(experiments, "ROWS", {"fake": {"first": [], "second": [], "failing": [], "fourth": []}})
    monkeypatch.setattr(experiments, "AFTER", {"second": "first", "fourth": "failing"})
    monkeypatch.setattr(experiments, "commands", lambda gpu, suite, row, scratch, metrics=False: [
        [sys.executable, "-S", "-c", program, str(scratch / "result.json"), str(ran), one]
        for one in (experiments.AFTER.get(row), row) if one])
    _, found = stand_ins()
    assert ran.read_text().split() == ["first", "second", "failing", "failing"]
    assert found["first.json"]["log"] == ["first"] and found["second.json"]["log"] == ["first", "second"]
    assert found["failing.json"]["exit_code"] == found["fourth.json"]["exit_code"] == 1
    _, found = stand_ins("--rows", "second")
    assert found["second.2.json"]["log"] == ["first", "second"]


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


# In place of the benchmark: a log of what it does at what time. It loads until others do, so that tests succeed only if
# rows are prepared side by side.
STAND_IN = """
import json, os, signal, subprocess, sys, time
row, log, output, *flags = sys.argv[1:]
written = open(log, "w", buffering=1)
def note(phase, times=1):
    for _ in range(times):
        written.write(f"{time.monotonic()} {phase}\\n")
        time.sleep(0.02)
note("load")
while flags and len(os.listdir(os.path.dirname(log))) < (4 if "ender" in row else 2):
    note("load")
if "crash" in row:
    raise ZeroDivisionError("of the row")
if "slow" in row:
    subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(60)", log])
note("load", 10)
if flags == ["--stop_before_timing"]:
    print("READY", file=sys.stderr, flush=True)
    note("late", 15 if "late" in row else 0)
    os.kill(os.getpid(), signal.SIGSTOP)
note("time", 10)
if "ender" in row:
    os.kill(os.getppid(), signal.SIGTERM)
    note("time", 3000)
json.dump({"seconds": {"median": 0.5}, "cold_start_s": {"load": 1.0}}, open(output, "w"))
""".replace("READY", processes.READY)


@pytest.fixture
def side_by_side(tmp_path, monkeypatch):
    """Runs rows of the stand-in; exit code, results by row, and of each row (time, phase) from its log."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(processes, "DRAIN_S", 0.1)
    monkeypatch.setattr(experiments, "commands", lambda gpu, suite, row, scratch, metrics=False: [
        [sys.executable, "-S", "-c", STAND_IN, row, str(tmp_path / "logs" / row), str(scratch / "result.json")]])
    (tmp_path / "logs").mkdir()

    def run(rows, *argv):
        monkeypatch.setattr(experiments, "ROWS", {"fake": {row: [] for row in rows}})
        code = experiments.main(["run", "here", "--timeout", "60", *argv])
        found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("results/here/fake/*.json")}
        lines = {path.name: path.read_text().splitlines() for path in (tmp_path / "logs").iterdir()}
        return code, found, {row: [(float(line.split()[0]), line.split()[1]) for line in log]
                             for row, log in lines.items()}
    return run


def assert_nothing_ran_beside(logs, row, *phases):
    times = [at for at, phase in logs[row] if phase in phases]
    beside = {other for other, log in logs.items() if other != row and any(
        min(times) < at < max(times) for at, _ in log)}
    assert times and not beside, f"{beside} ran while {row} was timed"


def assert_no_process_is_left(folder):
    """With a path in `folder` among its arguments. What is killed takes a moment to go."""
    for _ in range(100):
        found = subprocess.run("cat /proc/[0-9]*/cmdline", shell=True, capture_output=True).stdout
        if str(folder).encode() not in found:
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


def test_rows_are_prepared_side_by_side_and_timed_alone(side_by_side, capsys):
    rows = ["a", "b_late", "c_crash", "d", "start_e", "f"]
    code, found, logs = side_by_side(rows, "--jobs", "3")
    assert code == 1 and set(found) == set(rows) == set(logs)
    for row in ("a", "b_late", "d", "f"):
        assert_nothing_ran_beside(logs, row, "time")
        assert found[row]["jobs"] == 3 and found[row]["cold_start_s"] is None
        assert found[row]["row"] == row and found[row]["seconds"] == {"median": 0.5}
    assert found["c_crash"]["error"] == "crash" and found["c_crash"]["jobs"] == 3
    assert "ZeroDivisionError: of the row" in found["c_crash"]["output_end"][-1]
    assert_nothing_ran_beside(logs, "start_e", "load", "time")
    assert "jobs" not in found["start_e"] and found["start_e"]["cold_start_s"] == {"load": 1.0}
    shown = capsys.readouterr()
    assert "[2/6] fake/b_late: median 0.500 s an image" in shown.out and "; 0 left, about" in shown.out
    assert "failed: fake/c_crash" in shown.err


@pytest.mark.slow
def test_a_row_that_takes_too_long_is_ended_among_others(side_by_side, tmp_path):
    code, found, _ = side_by_side(["a", "b_slow", "c"], "--jobs", "2", "--timeout", "5")
    assert code == 1 and found["b_slow"]["error"] == "timeout" and found["b_slow"]["exit_code"] is None
    assert "error" not in found["a"] | found["c"]
    assert_no_process_is_left(tmp_path)


def test_sigterm_ends_stopped_processes_too(side_by_side, tmp_path, capsys):
    """One is timed, the others are stopped: by themselves, or from outside while they load or wait for a process."""
    code, found, logs = side_by_side(["a_ender", "b", "c_slow", "d"], "--jobs", "4")
    assert code == 130 and "interrupted" in capsys.readouterr().err and set(found) <= {"b", "d"}
    assert len(logs) == 4
    assert_no_process_is_left(tmp_path)


def test_the_time_in_which_a_process_is_held_does_not_count():
    child = processes.Child([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        child.hold()
        before = child.seconds()
        time.sleep(0.2)
        child.hold()
        assert child.seconds() == before and child.held
        child.go_on()
        time.sleep(0.2)
        assert before + 0.2 <= child.seconds() and not child.held
        child.hold()
    finally:
        assert child.end() is None


def test_what_stopped_itself_is_not_sent_on_with_those_that_were_held():
    child = processes.Child([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 19); print('sent on')"])

    def state():
        return Path(f"/proc/{child._process.pid}/stat").read_text().rpartition(") ")[2][0]

    try:
        deadline = time.monotonic() + 60
        while state() != "T" and time.monotonic() < deadline:
            time.sleep(0.02)
        processes._resume([child])
        assert state() == "T"
        child.hold()
        processes._resume([child])
        assert child.end(60) == 0 and child.output() == "sent on\n"
    finally:
        child.end()


def test_what_is_timed_as_a_whole_is_run_alone(tmp_path):
    """What runs beside others has one command, which takes the flag."""
    for suite, row in experiments.choose(None, None):
        lines = experiments.commands("h100", suite, row, tmp_path)
        assert experiments.Job("", suite, row, tmp_path).is_alone() or (
            len(lines) == 1 and "torch.distributed.run" not in lines[0])


def test_with_one_job_nothing_stops(stand_ins, capsys):
    stand_ins("--dry-run")
    assert "--stop_before_timing" not in capsys.readouterr().out
    assert stand_ins("--dry-run", "--jobs", "2") == (0, {})
    assert capsys.readouterr().out.count("--stop_before_timing") == len(PROGRAMS)
    _, found = stand_ins("--rows", "fine")
    assert "jobs" not in found["fine.json"]
    with pytest.raises(SystemExit):
        stand_ins("--jobs", "0")
