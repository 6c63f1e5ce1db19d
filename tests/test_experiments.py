"""The ablation's rows, and what becomes of one that fails, is repeated or interrupted."""

import json
import signal
import sys
import time

import pytest
from conftest import pretend_world_size

import experiments
from bench.report import records, tables
from tiny_flux.pictures import prompts
from utils.benchmark_utils import check_args, create_parser


def test_commands_of_every_row_pass_the_checks_and_differ(tmp_path, monkeypatch):
    """As on a GPU machine."""
    (tmp_path / "reference.png").write_bytes(b"")
    seen = set()
    for suite, row in experiments.choose(None, None):
        *before, line = experiments.commands("h100", suite, row, tmp_path)
        assert bool(before) == (suite == "tiny" or row in experiments.AFTER)
        flags = (["--ckpt", "tiny-flux-dev", *line[line.index("--") + 1:]] if suite == "tiny" else
                 line[line.index("run_benchmark.py") + 1:])
        processes = line[line.index("--nproc_per_node") + 1] if "torch.distributed.run" in line else "1"
        assert processes == (row.split("_")[1] if row.startswith("gpus_") else "1")
        pretend_world_size(monkeypatch, processes)
        args = create_parser(measure=True).parse_args(["--device", "cuda", *flags])
        check_args(args)
        seen.add((len(before), processes, str(sorted(vars(args).items(), key=str))))
    assert len(seen) == sum(map(len, experiments.ROWS.values())), "two rows are the same"


def test_commands_of_batches_are_the_ends_of_the_ladder_without_a_float32_step(tmp_path):
    for count in (2, 4, 8):
        for row, end in ((f"batch_{count}", "8_fused"), (f"eager_batch_{count}", "1_eager")):
            [line] = experiments.commands("h100", "schnell", row, tmp_path)
            assert "--step_error" not in line and line[line.index("--num_images_per_prompt") + 1] == str(count)
            assert experiments.ROWS["schnell"][row][:len(experiments.LADDER[end])] == experiments.LADDER[end]


def test_rows_all_have_a_name_in_the_tables():
    assert set(experiments.TINY) == {*tables.QUALITY, "eager"}
    named = {row for names in tables.GROUPS.values() for row in names} | set(tables.STARTS)
    measured = {row for suite in ("schnell", "dev", "kontext") for row in experiments.ROWS[suite]}
    assert measured - named == {"attention_scaled", "attention_unscaled", "kernels_unfused"} and not named - measured


def test_prompts_name_style_and_background_in_the_first_half():
    texts, wanted = prompts(100)
    assert len(set(texts)) == 100 and all(one.colour in text and one.style in text
                                          for text, one in zip(texts[:50], wanted, strict=False))
    assert not any("background" in text for text in texts[50:])


def test_twin_is_the_same_recipe_without_its_cache(tmp_path):
    for row, twin in experiments.TWINS.items():
        assert experiments.TINY[row] == [*experiments.TINY[twin], "--step_cache", "f12b12"]
    first, second, last = experiments.commands("cpu", "tiny", "cache_defaults", tmp_path)
    assert first[first.index("--keep") + 1] == last[last.index("--reference") + 1]
    assert second[second.index("--keep") + 1] == last[last.index("--twin") + 1]


@pytest.mark.parametrize("argv, choices", [(["--suite", "nonsense"], "schnell, dev, kontext, tiny"),
                                           (["--rows", "9_nothing"], "1_eager, 2_compile"),
                                           (["--suite", "tiny", "--rows", "1_eager"], "eager, float32")])
def test_run_of_an_unknown_name_is_refused_with_the_choices(argv, choices, capsys):
    with pytest.raises(SystemExit) as error:
        experiments.main(["run", "h100", *argv])
    assert error.value.code == 2 and choices in capsys.readouterr().err


def test_choose_by_pattern_keeps_the_tables_order():
    assert experiments.choose(["dev"], ["cache_*", "1_eager"]) == [
        ("dev", "1_eager"), ("dev", "cache_default"), ("dev", "cache_safe"), ("dev", "cache_balanced"),
        ("dev", "cache_fast"), ("dev", "cache_extreme"), ("dev", "cache_taylorseer"), ("dev", "cache_taylorseer_2"),
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
    monkeypatch.setattr(experiments, "commands", lambda gpu, suite, row, scratch: [
        [sys.executable, "-S", "-c", PROGRAMS[row], str(scratch / "result.json")]])

    def run(*argv):
        code = experiments.main(["run", "here", *argv])
        files = sorted(records.RESULTS.glob("here/20??-??-??_abc/fake/*.json"))
        return code, {path.name: json.loads(path.read_text()) for path in files}
    return run


def of_commit(commit):
    """The one folder of the suite that was measured at a commit."""
    [folder] = (records.RESULTS / "here").glob(f"*_{commit}/fake")
    return folder


def test_run_with_failing_rows_records_them_and_goes_on(stand_ins, capsys):
    code, found = stand_ins("--timeout", "2")
    assert code == 1 and [found[f"{row}.json"].get("error") for row in PROGRAMS] == [
        None, "crash", "refused", "out of memory", "killed by SIGKILL", "timeout", "no result", None]
    assert found["crash.json"]["exit_code"] == 1 and found["slow.json"]["exit_code"] is None
    assert "ZeroDivisionError: of the row" in found["crash.json"]["output_end"][-1]
    assert found["fine.json"]["suite"] == "fake" and found["fine.json"]["seconds"] == {"median": 0.5}
    shown = capsys.readouterr()
    assert "fake/fine" in shown.out and "0.500" in shown.out and "fake/crash" in shown.err


def test_run_again_overwrites_nothing(stand_ins):
    stand_ins("--rows", "fine", "crash")
    _, found = stand_ins("--rows", "fine", "crash")
    assert list(found) == ["crash.2.json", "crash.json", "fine.2.json", "fine.json"]
    _, found = stand_ins("--rows", "fine")
    assert "fine.3.json" in found and records.newest(of_commit("abc"), "fine")[0].name == "fine.3.json"


def test_resume_skips_finished_rows_and_repeats_failed_ones(stand_ins, monkeypatch):
    _, before = stand_ins("--rows", "fine", "crash")
    monkeypatch.setitem(PROGRAMS, "crash", FINE)
    monkeypatch.setitem(PROGRAMS, "fine", "raise ValueError('measured again')")
    code, after = stand_ins("--rows", "fine", "crash", "--resume")
    assert code == 0
    assert after["fine.json"] == before["fine.json"] and "error" not in after["crash.json"] and len(after) == 2


def test_resume_measures_again_what_another_commit_finished(stand_ins, monkeypatch):
    _, before = stand_ins("--rows", "fine")
    monkeypatch.setenv("GIT_COMMIT", "def")
    _, after = stand_ins("--rows", "fine", "--resume")
    assert after == before
    assert records.newest(of_commit("def"), "fine")[1]["environment"]["commit"] == "def"


def test_resume_on_another_day_goes_on_in_the_folder_of_its_commit(stand_ins):
    _, before = stand_ins("--rows", "fine")
    of_commit("abc").parent.rename(records.RESULTS / "here" / "2026-01-01_abc")
    _, after = stand_ins("--rows", "fine", "last", "--resume")
    assert list(after) == ["fine.json", "last.json"] and after["fine.json"] == before["fine.json"]
    assert [path.name for path in (records.RESULTS / "here").iterdir()] == ["2026-01-01_abc"]


def test_newest_after_a_failed_repetition_is_the_finished_result(stand_ins, monkeypatch):
    stand_ins("--rows", "fine")
    monkeypatch.setitem(PROGRAMS, "fine", "raise ValueError")
    stand_ins("--rows", "fine")
    folder = of_commit("abc")
    assert records.newest(folder, "fine")[0].name == "fine.json"
    assert experiments.where(folder, "fine", resume=True) is None


def test_run_of_a_row_that_starts_from_another_runs_that_one_once(stand_ins, monkeypatch, tmp_path):
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
    monkeypatch.setattr(experiments, "commands", lambda gpu, suite, row, scratch: [
        [sys.executable, "-S", "-c", program, str(scratch / "result.json"), str(ran), one]
        for one in (experiments.AFTER.get(row), row) if one])
    _, found = stand_ins()
    assert ran.read_text().split() == ["first", "second", "failing", "failing"]
    assert found["first.json"]["log"] == ["first"] and found["second.json"]["log"] == ["first", "second"]
    assert found["failing.json"]["exit_code"] == found["fourth.json"]["exit_code"] == 1
    _, found = stand_ins("--rows", "second")
    assert found["second.2.json"]["log"] == ["first", "second"]


def test_run_interrupted_keeps_finished_rows(stand_ins, monkeypatch):
    execute = experiments.execute

    def interrupted(command, timeout):
        if PROGRAMS["crash"] in command:
            raise KeyboardInterrupt
        return execute(command, timeout)

    monkeypatch.setattr(experiments, "execute", interrupted)
    code, found = stand_ins()
    assert code == 130 and list(found) == ["fine.json"]


def test_execute_gives_exit_code_and_output():
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert experiments.execute([sys.executable, "-S", "-u", "-c", program], 60) == (3, "out\nerr\n")


@pytest.fixture
def brood(tmp_path, monkeypatch):
    """A command whose child appends to a file for as long as it lives, and a check that the child is dead."""
    def command(on_sigterm):
        child = f"""if True:
            import signal, time
            signal.signal(signal.SIGTERM, signal.{on_sigterm})
            while True:
                open({str(tmp_path / "alive")!r}, "a").write(".")
                time.sleep(0.02)"""
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
        return [sys.executable, "-S", "-c", parent]

    def assert_dead():
        time.sleep(0.1)  # a process that is killed takes a moment to go
        size = (tmp_path / "alive").stat().st_size
        time.sleep(0.2)
        assert (tmp_path / "alive").stat().st_size == size

    monkeypatch.setattr(experiments, "GRACE_S", 0.2)
    return command, assert_dead


@pytest.mark.parametrize("on_sigterm", ["SIG_DFL", "SIG_IGN"])
def test_execute_past_the_timeout_ends_the_children_too(brood, on_sigterm):
    command, assert_dead = brood
    assert experiments.execute(command(on_sigterm), 1.5)[0] is None
    assert_dead()


def test_execute_interrupted_ends_the_children_too(brood):
    command, assert_dead = brood
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            experiments.execute(command("SIG_DFL"), 60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_dead()


def test_dry_run_measures_nothing(stand_ins, monkeypatch, capsys):
    monkeypatch.setenv("GIT_COMMIT", "abc-dirty")
    assert stand_ins("--dry-run") == (0, {})
    lines = capsys.readouterr().out.splitlines()
    assert all(any(f"_abc-dirty/fake/{row}.json" in line for line in lines) for row in PROGRAMS)


@pytest.mark.parametrize("commit", ["abc-dirty", None])
def test_run_of_code_that_no_commit_holds_is_refused(stand_ins, monkeypatch, capsys, commit):
    monkeypatch.setattr(experiments, "current_commit", lambda: commit)
    with pytest.raises(SystemExit) as error:
        stand_ins("--rows", "fine")
    assert error.value.code == 2 and not records.RESULTS.exists()
    assert "commit" in capsys.readouterr().err
