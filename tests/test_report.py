"""Charts and page from made-up results, and that the committed ones are up to date."""

import base64
import io
import json
import re
import sys
import xml.etree.ElementTree
from urllib.parse import unquote

import PIL.Image
import pytest

import experiments
from report import charts, page, records, tables

# The pictures of the made-up results, by a part of what the page says below them.
DRAWN = {"ladder": "schnell: seconds of each row", "stages": "schnell: milliseconds",
         "error": "schnell: seconds against", "psnr": "seconds against PSNR", "drift": "error of the latents",
         "dev cache": "dev: residual differences", "tiny cache": "residual differences of",
         "sheet": "pictures of each row"}


def drawn(text: str) -> dict[str, bytes]:
    """A page's pictures by the names in DRAWN."""
    found = {}
    for uri, alt in re.findall(r'<img src="([^"]+)" alt="([^"]+)"', text):
        name, = (name for name, part in DRAWN.items() if alt.removeprefix("FLUX.1-").startswith(part))
        content = uri.partition(",")[2]
        found[name] = unquote(content).encode() if "svg" in uri[:20] else base64.b64decode(content)
    return found


def speed(seconds: float, error: float) -> dict:
    on = {"on": True, "how": "bf16"}
    return {
        "model": "black-forest-labs/FLUX.1-schnell", "random_weights": "full", "cached_steps": None,
        "settings": {"height": 1024, "width": 1024, "num_inference_steps": 4, "max_sequence_length": 256,
                     "num_images_per_prompt": 1},
        "techniques": {"bf16": on, "quantisation": on | {"on": False}, "attention": on},
        "seconds": {"median": seconds, "min": seconds - 0.01, "max": seconds + 0.01},
        "stages_ms": {"prompt_encoding": 10.0, "denoising_step": 200 * seconds, "decoding": 40.0},
        "step_relative_error": error, "cold_start_s": {}, "peak_memory": {"image": {"reserved_gib": 26.6}},
        "environment": {"packages": {"torch": "2.11.0"}, "gpu": "Made-up <GPU>", "gpu_memory_gib": 79.2,
                        "power_limit": "700 W", "driver": "1.2"}}


def pictures(psnr: float, error: float) -> dict:
    part = {"psnr_mean": psnr, "psnr_min": psnr - 9, "ssim": 0.9, "identical": float(psnr == 100)}
    return {"argv": ["--num_inference_steps", "2"], "given": part, "open": part, "prompts": 6, "seconds": 3.0,
            "judge": {"top5": 1.0}, "twin": None,
            "latents": {"median": error, "max": 2 * error, "by_step": [error / 2, error]},
            "broken": {"black": 0.0, "not_finite": 0.0},
            "perceptual": {"lpips": None, "clip_score": None, "not_available": {"lpips": "LPIPS needs weights"}},
            "shown": [part | {"prompt": f"3d {name}"} for name in ("cat", "dog")]}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    folder = tmp_path / "made-up"
    written = {"schnell/1_eager": speed(0.8, 0.014), "schnell/2_compile": speed(0.5, 0.013),
               "schnell/6_float8": speed(0.4, 0.017), "schnell/6_float8.2": speed(0.32, 0.017),
               "schnell/7_flags": {"error": "timeout", "output_end": ["still <autotuning>"]},
               "tiny/eager": pictures(100, 0.0), "tiny/compile": pictures(52, 0.01), "tiny/int8": pictures(42, 0.03),
               "dev/cache_fast": speed(0.3, None) | {"cached_steps": [2], "residual_diffs": {}},
               "tiny/cache": pictures(40, 0.02) | {
                   "cached_steps": 0.5, "computed_steps": 1.56, "cached_share": [0.0, 0.5],
                   "residual_diffs": {"1": 0.08}, "twin": pictures(44, 0.01) | {"argv": ["--x"]}},
               "ceilings": {"matmul": {"a": {"bf16": 700.0}}, "attention": {"sdpa_cudnn": 600.0}}}
    for name, record in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(record))
    for row in ("eager", "cache"):
        PIL.Image.new("RGB", (160, 80), "teal").save(folder / "tiny" / f"{row}.webp")
    (folder / "of_an_older_report.svg").write_text("")
    page.write("made-up")
    return folder, (folder / "report.html").read_text()


def test_the_page_holds_everything_and_fetches_nothing(results):
    folder, text = results
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "ceilings.json", "report.html", "schnell_ladder.svg"]
    sources = re.findall(r'(?:src|href)="([^"]+)"', text)
    inline = [source for source in sources if source.startswith("data:")]
    assert len(inline) == len(DRAWN) and not any("//" in source.split(",")[0] for source in sources)
    assert all((folder / source).exists() for source in set(sources) - set(inline))
    found = drawn(text)
    assert found.keys() == DRAWN.keys() and found["ladder"] == (folder / "schnell_ladder.svg").read_bytes()
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_pages_figures_are_those_of_the_newest_results(results):
    _, text = results
    cells = re.findall(r"<td>(?:<a [^>]*>)?([^<]*)", text)
    row = cells[cells.index("+ float8, one scale a row"):][:8]
    assert row[1:3] == ["0.320 (0.310–0.330)", "2.50"] and row[4] == "64.0"
    # 69.47 TFLOP in 64 ms; at the ceilings 56.20 / 700 + 13.27 / 600 s.
    assert row[6:8] == ["1085", "160%"]
    assert 'href="schnell/6_float8.2.json"' in text
    assert "+ inductor flags: timeout. still &lt;autotuning&gt;" in text
    assert "Made-up &lt;GPU&gt;, 79 GiB" in text
    assert "LPIPS needs weights." in text and "step cache, F2B2, against --x" in text


def test_charts_say_what_the_results_say(results):
    found = drawn(results[1])
    assert PIL.Image.open(io.BytesIO(found.pop("sheet"))).width > 100
    found = {name: picture.decode() for name, picture in found.items()}
    assert "0.800 s ×1.00" in found["ladder"] and "0.320 s ×2.50" in found["ladder"]
    assert "690 ms" in found["stages"]  # 10 + 4 * 160 + 40
    for text in found.values():
        xml.etree.ElementTree.fromstring(text)
        assert charts.INK not in text and "currentColor" in text and "prefers-color-scheme:dark" in text


def test_the_blocks_of_a_step_cache_are_counted_in_steps(results):
    _, text = results
    cells = re.findall(r"<td>(?:<a [^>]*>)?([^<]*)", text)
    assert cells[cells.index("step cache, F2B2") + 1] == "1.6" and cells[cells.index("int8, compiled") + 1] == "2"
    compared, forced = (drawn(text)[f"{name} cache"].decode() for name in ("tiny", "dev"))
    assert "step cache, F2B2" in compared and "residual difference" in compared
    assert "step cache, fast" in forced and "residual difference" not in forced
    assert tables.computed_steps({"argv": [], "cached_steps": 8.0}) == "–"
    assert tables.computed_steps({"argv": [], "cached_steps": None}) == "28"


def test_strips_of_other_prompts_are_left_out(results):
    """A row that was measured again with fewer pictures a strip."""
    folder, text = results
    before = PIL.Image.open(io.BytesIO(drawn(text)["sheet"])).size
    record = pictures(30, 0.1)
    (folder / "tiny" / "int8.json").write_text(json.dumps(record | {"shown": record["shown"][:1]}))
    PIL.Image.new("RGB", (80, 80), "red").save(folder / "tiny" / "int8.webp")
    page.write("made-up")
    text = (folder / "report.html").read_text()
    assert PIL.Image.open(io.BytesIO(drawn(text)["sheet"])).size == before


def test_the_same_results_give_the_same_files(results):
    folder, text = results
    before = (folder / "schnell_ladder.svg").read_bytes()
    page.write("made-up")
    assert (folder / "report.html").read_text() == text
    assert (folder / "schnell_ladder.svg").read_bytes() == before


def test_a_start_beside_other_rows_is_not_shown(results, monkeypatch):
    folder, _ = results
    monkeypatch.setattr(tables, "RESULTS", records.RESULTS)
    for row, spent in (("start_compile", {"imports": 9.0, "load": 3.0, "compile": 40.0, "record": 2.0,
                                          "process start to first image": 61.5}), ("start_export", None)):
        (folder / "schnell" / f"{row}.json").write_text(json.dumps(speed(0.5, None) | {"cold_start_s": spent}))
    cells = [line.strip("| ").split(" | ")[1:7] for line in tables.starts_table("made-up/schnell").splitlines()[2:]]
    assert cells == [["9.0", "3.0", "–", "–", "42.0", "**61.5**"], ["–"] * 6]
    record = speed(0.5, None)
    assert page.speed_cells("", "", "", record | {"cold_start_s": None}, None, None)[-1] == "–"
    assert page.speed_cells("", "", "", record | {
        "cold_start_s": {"process start to first image": 61.5}}, None, None)[-1] == "62"


def test_images_a_minute_against_batch_size(results, monkeypatch):
    folder, _ = results
    monkeypatch.setattr(tables, "RESULTS", records.RESULTS)

    def batch(count, seconds):
        record = speed(seconds, None)
        return record | {"settings": record["settings"] | {"num_images_per_prompt": count}}

    failure = {"error": "out of memory", "output_end": []}
    for name, record in {"8_fused": speed(0.25, 0.02), "eager_batch_2": batch(2, 1.5), "batch_2": failure,
                         "batch_2.2": batch(2, 0.5), "eager_batch_4": failure | {"error": "timeout"},
                         "eager_batch_4.2": failure, "batch_4": batch(4, 1.0),
                         "batch_8": failure | {"error": "crash"}}.items():
        (folder / "schnell" / f"{name}.json").write_text(json.dumps(record))
    text = tables.with_tables("<!-- images_a_minute:made-up/schnell -->\nold\n<!-- end -->\n")
    link = "](results/made-up/schnell/"
    assert [line.strip("| ").split(" | ") for line in text.splitlines()[3:-1]] == [
        ["1", f"[75.0{link}1_eager.json)", "26.6", f"[240.0{link}8_fused.json)", "26.6", "3.20"],
        ["2", f"[80.0{link}eager_batch_2.json)", "26.6", f"[240.0{link}batch_2.2.json)", "26.6", "3.00"],
        ["4", f"[out of memory{link}eager_batch_4.2.json)", "–", f"[240.0{link}batch_4.json)", "26.6", "–"],
        ["8", "–", "–", "–", "–", "–"]]


def test_a_row_is_compared_with_the_default_that_was_measured_beside_it(results, monkeypatch):
    """Of three cards, the last of which measured the default alone."""
    folder, _ = results
    monkeypatch.setattr(tables, "RESULTS", records.RESULTS)
    for name, seconds, hour in (("8_fused", 0.5, 9), ("without_compile", 0.6, 10), ("without_fa3", 0.8, 10),
                                ("8_fused.2", 0.4, 20), ("without_quant", 0.6, 19), ("8_fused.3", 0.3, 23)):
        record = speed(seconds, None)
        record["environment"]["date"] = f"2026-11-24T{hour:02}:00:00Z"
        (folder / "schnell" / f"{name}.json").write_text(json.dumps(record))
    cells = [line.strip("| ").split(" | ") for line in tables.beside_table("made-up/schnell/without").splitlines()[2:]]
    assert [row[0].split("/")[-1] for row in cells] == [
        "8_fused.json)", "without_compile.json)", "without_fa3.json)", "without_quant.json)"]
    assert [row[3] for row in cells] == ["1.00", "0.83", "0.62", "0.67"]

    def of_card(name, **environment):
        path = folder / "schnell" / f"{name}.json"
        record = json.loads(path.read_text())
        record["environment"] |= environment
        path.write_text(json.dumps(record))

    # A card that is known counts for more than the hour; a default without a date is no neighbour.
    of_card("without_quant", gpu_uuid="a")
    of_card("8_fused", gpu_uuid="a")
    of_card("8_fused.3", date=None)
    cells = [line.strip("| ").split(" | ") for line in tables.beside_table("made-up/schnell/without").splitlines()[2:]]
    assert [row[3] for row in cells] == ["1.00", "0.83", "0.62", "0.83"]
    for path in (folder / "schnell").glob("8_fused*"):
        path.unlink()
    cells = [line.strip("| ").split(" | ") for line in tables.beside_table("made-up/schnell/without").splitlines()]
    assert cells[0][1:3] == ["× eager", "step"] and len(cells) == 5


def test_a_ladder_ends_with_the_default_of_its_eager_rows_card(results, monkeypatch):
    """A faster card's default would be a speed-up of cards. What several GPUs take stays what was measured last."""
    folder, _ = results
    monkeypatch.setattr(tables, "RESULTS", records.RESULTS)
    for name, seconds, card in (("1_eager.2", 1.2, "a"), ("8_fused", 0.4, "a"), ("8_fused.2", 0.3, "b"),
                                ("gpus_2_ulysses", 0.2, "b")):
        record = speed(seconds, None)
        record["environment"] |= {"date": "2026-11-24T09:00:00Z", "gpu_uuid": card}
        for suite in ("schnell", "dev"):
            (folder / suite).mkdir(exist_ok=True)
            (folder / suite / f"{name}.json").write_text(json.dumps(record))
    assert "**0.400** (0.390–0.410) | 3.00 |" in tables.table("made-up/schnell").splitlines()[-1]
    monkeypatch.setattr(tables, "GLANCE", {"dev": tables.GLANCE["dev"]})
    cells = [line.split(" | ")[-2:] for line in tables.glance_table("made-up").splitlines()[2:]]
    found = [(cell.split("**")[1], ratio.strip(" |")) for cell, ratio in cells]
    assert found[:2] == [("0.400", "3.00"), ("0.200", "6.00")]


def test_kernels_by_kind():
    """Of the committed results: each part adds up to the whole, and the fused step has no other kinds of kernel."""
    cells = [line.split(" | ") for line in tables.kernel_table("h100/schnell").splitlines()[2:]]
    for column in (1, 2):
        shown = [float(line[column].split()[0]) for line in cells]
        assert abs(sum(shown[:-1]) - shown[-1]) < 0.2 and min(shown) > 1
    assert tables._kind("void cutlass::device_kernel<flash::x>") == "attention"
    assert tables._kind("_adaln_kernel") == "everything else"
    assert tables._kind("_gemm_kernel") == tables._kind("_product_kernel") == "matrix products"


def test_kernels_beside_what_cublas_takes():
    """Of the committed results: every product of the fused blocks has cuBLAS' times beside it, nothing else has."""
    cells = [line.strip("| ").split(" | ") for line in tables.roofline_table("h100/schnell").splitlines()[2:]]
    assert len(cells) == 15
    for name, _, ms, flops, *_, loaded, _, cublas, cublas_loaded in cells:
        assert ("product" in name or "gemm" in name) == (cublas != "–") == (cublas_loaded != "–"), name
        assert (flops != "–") == (loaded != "–"), name
        assert cublas == "–" or all(0.5 < float(ms) / float(other) < 2 for other in cublas.split(", "))


@pytest.mark.parametrize("suite", ["dev", "kontext"])
def test_several_gpus_beside_one_of_them(suite):
    """Of the committed results: from the step of the default measured nearest to them, each number of GPUs takes more
    than its share of it, by what is exchanged, and what was measured is above what is expected."""
    pytest.importorskip("torch")
    cells = [line.strip("| ").split(" | ") for line in tables.expected_table(f"h100/{suite}").splitlines()[2:]]
    _, two = records.newest(records.RESULTS / "h100" / suite, "gpus_2_ulysses")
    _, one = records.beside(records.RESULTS / "h100" / suite, "8_fused", [two])
    assert float(cells[0][3].split()[0]) == pytest.approx(one["stages_ms"]["denoising_step"], abs=0.05)
    assert [row[0] for row in cells] == ["1", "2", "4", "8"]
    exchanged = [float(row[2].split()[0]) - one["stages_ms"]["denoising_step"] / int(row[0]) for row in cells[1:]]
    assert all(0.5 < ms < 5 for ms in exchanged) and exchanged == sorted(exchanged, reverse=True)
    for row in cells[1:3]:  # two and four
        assert float(row[2].split()[0]) < float(row[3].split()[0])


def test_pareto_front():
    costs, errors = [1.0, 2.0, 3.0, 2.0, 4.0], [5.0, 3.0, 3.0, 4.0, 1.0]
    assert charts.pareto(costs, errors) == [0, 1, 4]


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(tables, "write", lambda: None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "report.page")
    monkeypatch.delattr("report.page")
    with pytest.raises(SystemExit, match=r"jinja2 is missing\. pip install jinja2=="):
        experiments.main(["report"])


def test_results_of_an_unknown_gpu_are_refused(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["report", "b200"])
    assert "choose from cpu, h100" in capsys.readouterr().err


def test_the_committed_reports_are_up_to_date_and_small():
    """Written anew by `python experiments.py report` whenever a result is added."""
    for folder in (path for path in records.RESULTS.iterdir() if path.is_dir()):
        text = (folder / "report.html").read_text()
        assert f'name="results" content="{page.fingerprint(folder)}"' in text, folder.name
        written = [path for path in folder.iterdir() if path.suffix in (".html", ".svg", ".webp")]
        assert sum(path.stat().st_size for path in written) < 300_000, folder.name
