"""The fidelity report: its rows on several machines, its metrics and files, and which pictures it draws again."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from bench import fidelity
from utils import random_weights
from utils.benchmark_utils import check_args, create_parser
from utils.common import RecipeError
from utils.hardware import Hardware
from utils.images import save_image
from utils.memory import GIB
from utils.plan import make_plan

H100 = Hardware("cuda", (9, 0), False, "NVIDIA H100", 79 * GIB)
RTX4090 = Hardware("cuda", (8, 9), False, "NVIDIA GeForce RTX 4090", 23 * GIB)
A100 = Hardware("cuda", (8, 0), False, "NVIDIA A100", 79 * GIB)
MI300 = Hardware("cuda", (9, 4), True, "AMD Instinct MI300X", 190 * GIB)
LOSSY = ("attention", "quantization", "fused kernels", "text encoder quant", "step cache")


@pytest.fixture
def decide():
    """The plan of a row on a machine with all libraries."""
    def call(row, hardware, model="FLUX.1-dev"):
        args = create_parser().parse_args(["--device", hardware.device, *fidelity.ROWS[row].flags])
        return make_plan(args, random_weights.architecture(model), hardware)
    return call


@pytest.mark.parametrize("row, lossy", [
    ("reference", []), ("compile", []), ("fp8_attention", ["attention"]), ("float8_row", ["quantization"]),
    ("float8_tensor", ["quantization"]),
    ("int8", ["quantization"]), ("text_encoder_quant", ["text encoder quant"]),
    ("fused", ["attention", "quantization", "fused kernels"]),
    ("default", ["attention", "quantization", "fused kernels"]),
    ("default_balanced", ["attention", "quantization", "fused kernels", "step cache"]),
    ("default_fast", ["attention", "quantization", "fused kernels", "step cache"]),
    ("default_taylorseer", ["attention", "quantization", "fused kernels", "step cache"]),
])
def test_row_on_an_h100_has_its_lossy_switches_alone(decide, row, lossy):
    assert [name for name in LOSSY if decide(row, H100).techniques()[name].on] == lossy


def test_reference_has_every_technique_off(decide):
    on = [name for name, technique in decide("reference", H100).techniques().items() if technique.on]
    assert on == ["bf16"]


@pytest.mark.parametrize("hardware, model, refused", [
    (RTX4090, "FLUX.1-dev", {"fp8_attention", "fused"}),
    (A100, "FLUX.1-dev", {"fp8_attention", "float8_row", "float8_tensor", "fused"}),
    (MI300, "FLUX.1-dev", {"fused"}),
    (H100, "FLUX.1-schnell", {"default_safe", "default_balanced", "default_fast", "default_extreme",
                                  "default_taylorseer"}),
    (Hardware("cpu"), "tiny-flux-dev", {"fp8_attention", "float8_row", "float8_tensor", "fused"}),
])
def test_row_that_cannot_run_is_refused_and_not_drawn_without_its_switch(decide, hardware, model, refused):
    found = set()
    for row in fidelity.ROWS:
        try:
            decide(row, hardware, model)
        except RecipeError:
            found.add(row)
    assert found == refused


@pytest.mark.parametrize("row", fidelity.ROWS)
def test_row_flags_do_not_contradict_each_other(row, tmp_path, make_args):
    check_args(make_args("--output-file", str(tmp_path / "x.png"), *fidelity.ROWS[row].flags))


@pytest.fixture
def parse(monkeypatch):
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["fidelity", *map(str, argv)])
        return fidelity.parse()
    return call


def test_flags_after_two_dashes_are_for_all_rows(parse):
    args = parse("--ckpt", "tiny-flux", "--rows", "int8", "default", "--", "--height", "64", "--seed", "7")
    common, recipe = fidelity.shared_flags(args)
    assert common == ["--ckpt", "tiny-flux", "--height", "64", "--seed", "7"]
    assert (recipe.height, recipe.seed, recipe.disable_quant) == (64, 7, True)
    assert fidelity.choose_rows(args.rows) == ["reference", "int8", "default"]
    assert fidelity.choose_rows(None) == list(fidelity.ROWS)


@pytest.mark.parametrize("argv, count", [(["--ckpt", "FLUX.1-dev"], 50), (["--ckpt", "tiny-flux"], 50),
                                         (["--ckpt", "FLUX.1-Kontext-dev", "--image", "x.png"], 50)])
def test_built_in_prompts_are_fifty_with_fixed_seeds(parse, argv, count):
    prompts = fidelity.choose_prompts(parse(*argv), 42)
    assert [one["seed"] for one in prompts] == list(range(42, 42 + count))
    assert len({one["prompt"] for one in prompts}) == count and all(one["prompt"].strip() for one in prompts)
    assert fidelity.choose_prompts(parse(*argv, "--prompts", 3), 42) == prompts[:3]


def test_prompts_file_replaces_the_built_in_prompts(parse, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "seed": 7}\n{"prompt": "a key"}\n')
    args = parse("--prompts-file", tmp_path / "p.jsonl", "--prompts", 2)
    assert fidelity.choose_prompts(args, 5) == [{"prompt": "a cat", "seed": 5}, {"prompt": "a dog", "seed": 7}]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The program on two prompts with drawn rows of one colour; returns the record and the rows that were drawn.
    `brightness` says how bright each row's pictures are; a string is the reason for which a row is skipped."""
    def call(*argv, brightness=None, prompts=2):
        drawn = []

        def draw(name, command):
            drawn.append(name)
            value = (brightness or {}).get(name, 100)
            if isinstance(value, str):
                return value
            args = create_parser().parse_args(command)
            for i, line in enumerate(Path(args.prompts_file).read_text().splitlines()):
                path = fidelity.numbered_path(args.output_file, i, json.loads(line)["seed"])
                path.parent.mkdir(exist_ok=True, parents=True)
                pixels = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] + np.uint8(value), (1, 64, 3))
                save_image(PIL.Image.fromarray(pixels), path, {"techniques": {"bf16": "weights"}})
            return None

        monkeypatch.setattr(fidelity, "draw", draw)
        monkeypatch.setattr(sys, "argv", ["fidelity", "--ckpt", "tiny-flux", "--output-dir", str(tmp_path / "out"),
                                          "--prompts", str(prompts), *map(str, argv)])
        fidelity.main()
        path = capsys.readouterr().out.splitlines()[-1]
        assert path == str(tmp_path / "out" / "fidelity.json")
        return json.loads(Path(path).read_text()), drawn
    return call


ROWS = ["--rows", "int8", "default", "--", "--device", "cpu"]


def test_report_has_metrics_of_each_picture_and_over_all(run, tmp_path):
    record, drawn = run(*ROWS, brightness={"int8": 110, "default": "no such GPU"})
    assert drawn == ["reference", "int8", "default"]
    assert record["schema_version"] == 1 and record["settings"]["model"] == "tiny-flux"
    assert [one["seed"] for one in record["prompts"]] == [42, 43]
    assert record["skipped"] == {"default": "no such GPU"} and list(record["rows"]) == ["reference", "int8"]
    row, psnr = record["rows"]["int8"], 20 * math.log10(255 / 10)
    assert row["flags"] == fidelity.ROWS["int8"].flags and row["techniques"] == {"bf16": "weights"}
    assert [row[name] for name in ("psnr_mean", "psnr_min")] == pytest.approx([psnr, psnr])
    assert [one["psnr"] for one in row["pictures"]] == pytest.approx([psnr, psnr])
    assert [one["file"] for one in row["pictures"]] == ["image_000_42.png", "image_001_43.png"]
    assert 0.5 < row["ssim"] < 1 and row["identical"] == 0
    assert row["lpips"] is None and set(row["not_available"]) == {"lpips", "clip_score"}
    assert record["rows"]["reference"]["identical"] == 1

    lines = (tmp_path / "out" / "fidelity.md").read_text().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if line.startswith("|")}
    assert cells["int8"][1:3] == ["28.1", "28.1"] and "reference" in cells
    assert any("no such GPU" in line for line in lines)
    assert PIL.Image.open(tmp_path / "out" / "sheet.png").format == "PNG"


def test_report_second_run_draws_only_rows_with_missing_pictures(run, tmp_path):
    first, _ = run(*ROWS)
    second, drawn = run(*ROWS)
    assert drawn == [] and second["rows"] == first["rows"]
    (tmp_path / "out/int8/image_001_43.png").unlink()
    assert run(*ROWS)[1] == ["int8"]
    record, drawn = run("--rows", "text_encoder_quant", "--", "--device", "cpu")
    assert drawn == ["text_encoder_quant"] and list(record["rows"]) == [
        "reference", "int8", "text_encoder_quant", "default"]


def test_report_new_reference_pictures_are_compared_with_kept_rows(run, tmp_path):
    assert run(*ROWS)[0]["rows"]["int8"]["psnr_mean"] == 100
    (tmp_path / "out/reference/image_000_42.png").unlink()
    record, drawn = run(*ROWS, brightness={"reference": 110})
    assert drawn == ["reference"]
    assert record["rows"]["int8"]["psnr_mean"] == pytest.approx(20 * math.log10(255 / 10))


def test_report_skipped_row_is_tried_again_and_others_stay_skipped(run):
    skip = {"int8": "no compiler", "default": "no GPU"}
    assert run(*ROWS, brightness=skip)[0]["skipped"] == skip
    record, drawn = run("--rows", "int8", "--", "--device", "cpu")
    assert drawn == ["int8"] and record["skipped"] == {"default": "no GPU"}


def test_report_more_prompts_may_be_added_to_a_folder(run):
    run(*ROWS)
    record, drawn = run(*ROWS, prompts=3)
    assert drawn == ["reference", "int8", "default"] and len(record["rows"]["int8"]["pictures"]) == 3


@pytest.mark.parametrize("argv, named", [
    (["--ckpt", "tiny-flux-dev", *ROWS], "model"),
    ([*ROWS, "--height", "64"], "flags"),
    (["--prompts-file", "{}/other.txt", *ROWS], "prompts"),
])
def test_report_folder_of_other_settings_is_refused_before_drawing(run, tmp_path, argv, named):
    (tmp_path / "other.txt").write_text("a key\na cat\n")
    run(*ROWS)
    before = (tmp_path / "out" / "fidelity.json").read_bytes()
    with pytest.raises(RecipeError, match=named):
        run(*(str(one).format(tmp_path) for one in argv), brightness={"reference": "drawn in vain"})
    assert (tmp_path / "out" / "fidelity.json").read_bytes() == before


def test_report_other_weights_of_the_same_name_are_refused(run, monkeypatch):
    run(*ROWS)
    monkeypatch.setattr(fidelity.weight_files, "identity", lambda folder, *_: "other")
    with pytest.raises(RecipeError, match="--output-dir"):
        run(*ROWS)


def test_report_foreign_sheet_is_refused_and_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sheet.png").write_text("mine")
    with pytest.raises(RecipeError, match=r"sheet\.png"):
        run(*ROWS)
    assert (tmp_path / "out/sheet.png").read_text() == "mine"


@pytest.mark.parametrize("text", ["no json", "[]", '{"settings": {}}'])
def test_report_folder_with_another_fidelity_json_is_refused(run, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fidelity.json").write_text(text)
    with pytest.raises(RecipeError, match=r"fidelity\.json"):
        run(*ROWS)


@pytest.mark.parametrize("argv, named", [
    (["--rows", "int9"], "text_encoder_quant"),
    (["--prompts", "0"], "--prompts 0"),
    (["--prompts", "51"], "--prompts 51"),
    (["--prompts-file", "{}/missing.txt"], "missing.txt"),
    (["--prompts-file", "{}"], "--prompts-file"),
    (["--prompts-file", "{}/empty.txt"], "empty.txt"),
    (["--output-dir", "{}/empty.txt/out"], "--output-dir"),
    (["--image", "{}/missing.png"], "missing.png"),
    (["--ckpt", "FLUX.1-dev", "--block_shares", "--", "--device", "cpu"], "--block-shares"),
    (["--", "--height", "65"], "--height 65"),
    (["--", "--ckpt", "tiny-flux-dev"], "--ckpt"),
    (["--", "--output-file", "x.png"], "--output_file"),
    (["--", "--num_images_per_prompt", "2"], "--num_images_per_prompt"),
])
def test_report_wrong_argument_is_refused_before_drawing(run, tmp_path, argv, named):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(RecipeError, match=named):
        run(*(one.format(tmp_path) for one in argv), brightness={"reference": "drawn in vain"})


def test_report_output_dir_is_required_but_not_for_the_list(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fidelity", "--ckpt", "tiny-flux"])
    with pytest.raises(RecipeError, match="--output-dir"):
        fidelity.main()
    monkeypatch.setattr(sys, "argv", ["fidelity", "--list"])
    fidelity.main()
    shown = capsys.readouterr().out
    assert all(name in shown and " ".join(row.flags) in shown for name, row in fidelity.ROWS.items())


def test_report_refused_reference_ends_it_and_a_crashed_row_does_not(run, tmp_path):
    with pytest.raises(RecipeError, match="no memory"):
        run(*ROWS, brightness={"reference": "no memory"})
    assert not (tmp_path / "out" / "fidelity.json").exists()
    with pytest.raises(RecipeError, match="int8"):
        run(*ROWS, brightness={"int8": f"{fidelity.CRASHED} (exit code 1): RuntimeError"})
    record = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert list(record["rows"]) == ["reference", "default"] and list(record["skipped"]) == ["int8"]


@pytest.mark.parametrize("code, expected", [
    ("pass", None),
    ("print('load 1 s\\nerror: a flag is wrong (HTTP error: 404).\\nDrop it.', file=sys.stderr); sys.exit(2)",
     "a flag is wrong (HTTP error: 404). Drop it."),
    ("print('gen_image.py: error: unknown flag', file=sys.stderr); sys.exit(2)", "unknown flag"),
    ("raise ValueError('boom')", f"{fidelity.CRASHED} (exit code 1): ValueError: boom"),
    ("import os; os.kill(os.getpid(), 9)", f"{fidelity.CRASHED} (exit code -9): no output"),
])
def test_draw_end_of_the_child_is_one_line(monkeypatch, tmp_path, code, expected):
    (tmp_path / "gen_image.py").write_text(f"import sys\n{code}\n")
    monkeypatch.setattr(fidelity, "ROOT", tmp_path)
    assert fidelity.draw("int8", []) == expected


def test_perceptual_scores_are_means_over_chunks(monkeypatch, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        PIL.Image.new("RGB", (8, 8), (i, 0, 0)).save(file)

    def perceptual(images, reference, prompts, download):
        assert len(images) == len(reference) == len(prompts) and download
        mean = sum(image.getpixel((0, 0))[0] for image in images) / len(images)
        return {"lpips": mean, "clip_score": None, "not_available": {} if len(images) > 1 else {"clip_score": "gone"}}

    monkeypatch.setattr(fidelity, "perceptual", perceptual)
    monkeypatch.setattr(fidelity, "CHUNK", 2)
    assert fidelity.perceptual_scores(files, files, list("abcde"), True) == {
        "lpips": pytest.approx(2), "clip_score": None, "not_available": {"clip_score": "gone"}}


def test_seconds_per_image_is_the_median_of_the_last_lines(tmp_path):
    manifest, files = tmp_path / "image.jsonl", [Path("a.png"), Path("b.png")]
    assert fidelity.seconds_per_image(manifest, files) is None
    lines = [("a.png", 9), ("a.png", 1), ("b.png", 2), ("of_other_prompts.png", 50)]
    manifest.write_text("".join(json.dumps({"file": file, "seconds": value}) + "\n" for file, value in lines))
    assert fidelity.seconds_per_image(manifest, files) == 1.5


def test_make_sheet_has_a_line_for_each_row_and_a_column_for_each_prompt():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    rows = {name: [PIL.Image.new("RGB", (64, 32), colour) for colour in colours] for name in ("reference", "int8")}
    sheet = fidelity.make_sheet(rows, {"reference": "reference", "int8": "int8\nPSNR"}, ["a cat", "日本", "long " * 40])
    step, height = fidelity.SIDE + fidelity.GAP, fidelity.SIDE // 2 + fidelity.GAP
    top = sheet.height - 2 * height
    assert sheet.width == fidelity.LABEL_WIDTH + 3 * step
    centres = [(fidelity.LABEL_WIDTH + column * step + 80, top + line * height + 40)
               for line in range(2) for column in range(3)]
    assert [sheet.getpixel(centre) for centre in centres] == colours * 2
    for line in range(2):  # something is written left of each row
        label = sheet.crop((0, top + line * height, fidelity.LABEL_WIDTH, top + (line + 1) * height))
        assert label.getextrema()[0][0] < 128


def synthetic_shares(count, **special):
    """Healthy blocks "single 0" and so on; `special` replaces {"below", "saturated"} of one tensor in a block."""
    rows = [{"block": f"single {i}", **{name: {"below": 0.001 * i, "zero": 0.0, "saturated": 0.0}
                                        for name in fidelity.TENSORS}} for i in range(count)]
    for name, (index, below, saturated) in special.items():
        rows[index][name] = {"below": below, "zero": 0.0, "saturated": saturated}
    return rows


def test_block_lines_have_the_median_and_the_worst_blocks():
    rows = synthetic_shares(7, hidden=(0, 0.9, 0.0), v=(2, 0.001, 0.5))
    lines = fidelity.block_lines({"shares": rows, "commit": "abc123"})
    assert any("abc123" in line for line in lines)
    found = [re.findall(r"single (\d) ([\d.]+) \+ ([\d.]+)", line) for line in lines if "median" in line]
    small = [("6", "0.60", "0.00"), ("5", "0.50", "0.00"), ("4", "0.40", "0.00"), ("3", "0.30", "0.00")]
    assert found == [[("4", "0.40", "0.00"), ("0", "90.00", "0.00"), *small],
                     [("4", "0.40", "0.00"), ("2", "0.10", "50.00"), *small],
                     [("3", "0.30", "0.00"), *small, ("2", "0.20", "0.00")]]
    assert "no GPU" in " ".join(fidelity.block_lines({"not_measured": "no GPU", "commit": None}))


def test_report_blocks_on_a_cpu_are_measured_on_request_alone(run, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    flags = ["--", "--device", "cpu", "--random_weights", "1+2"]
    record, _ = run("--rows", "int8", *flags)
    assert set(record["blocks"]) == {"not_measured", "commit"} and "no GPU" in record["blocks"]["not_measured"]
    record, drawn = run("--rows", "int8", "--block_shares", *flags)
    assert drawn == [] and [row["block"] for row in record["blocks"]["shares"]] == ["double 0", "single 0", "single 1"]
    text = (tmp_path / "out" / "fidelity.md").read_text()
    assert all(f"- {meaning}: median " in text for meaning in fidelity.TENSORS.values())


def test_report_measured_blocks_are_kept_and_others_are_tried_again(run, monkeypatch):
    found = [{"not_measured": "no memory"}, {"shares": synthetic_shares(1)}]
    monkeypatch.setattr(fidelity, "measure_blocks", lambda *_: found.pop(0))
    assert run(*ROWS)[0]["blocks"]["not_measured"] == "no memory"
    measured = run(*ROWS)[0]["blocks"]
    assert measured["shares"] == synthetic_shares(1)
    assert run(*ROWS)[0]["blocks"] == measured and not found


@pytest.mark.parametrize("hardware, quality, expected", [
    (H100, "fast", "OutOfMemoryError: CUDA out of memory."), (H100, "high", "int8"),
    (RTX4090, "fast", "NVIDIA GeForce RTX 4090")])
def test_measure_blocks_without_memory_or_fp8_kernels_returns_the_reason(decide, monkeypatch, hardware, quality,
                                                                         expected):
    """`decide` stands in for the libraries of a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

    def load_pipeline(recipe):
        raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation.")

    monkeypatch.setattr(fidelity, "load_pipeline", load_pipeline)
    monkeypatch.setattr(fidelity, "detect", lambda *_: hardware)
    recipe = create_parser().parse_args(["--ckpt", "tiny-flux-dev", "--device", "cuda", "--quality", quality])
    found = fidelity.measure_blocks(recipe, {"prompt": "a cat", "seed": 42}, False)
    assert set(found) == {"not_measured"} and expected in found["not_measured"] and "\n" not in found["not_measured"]


@pytest.mark.slow
def test_program_draws_a_deleted_picture_again_and_no_other(tmp_path):
    """The real program on tiny-flux, twice."""
    command = [sys.executable, "-m", "bench.fidelity", "--ckpt", "tiny-flux", "--output-dir", str(tmp_path / "out"),
               "--prompts", "2", "--rows", "text_encoder_quant", "fp8_attention", "--", "--device", "cpu",
               "--num_inference_steps", "2"]

    def run():
        done = subprocess.run(command, cwd=fidelity.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(Path(done.stdout.splitlines()[-1]).read_text())

    def times():
        return {path.relative_to(tmp_path): path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("image_*.png")}

    first, before = run(), times()
    assert list(first["rows"]) == ["reference", "text_encoder_quant"] and list(first["skipped"]) == ["fp8_attention"]
    assert first["rows"]["reference"]["identical"] == 1 and len(before) == 4
    row = first["rows"]["text_encoder_quant"]
    assert 20 < row["psnr_min"] <= row["psnr_mean"] < 100 and 0.7 < row["ssim"] < 1 and row["seconds_per_image"] > 0
    assert "text encoder quant" in row["techniques"] and "quantization" not in row["techniques"]

    deleted = Path("out/text_encoder_quant/image_001_43.png")
    (tmp_path / deleted).unlink()
    second, after = run(), times()
    assert [path for path in after if after[path] != before[path]] == [deleted]
    assert second["rows"]["text_encoder_quant"]["psnr_mean"] == pytest.approx(row["psnr_mean"], rel=0.05)
