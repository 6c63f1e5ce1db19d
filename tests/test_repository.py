"""What a fresh clone must hold."""

import json
import re
from pathlib import Path

import pytest

from bench.report import tables

ROOT = Path(__file__).parent.parent


def test_licence_is_apaches():
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def pins_of(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("==") for line in lines)


def test_requirements_for_hopper_are_what_was_measured():
    pins = pins_of("requirements-hopper.txt")
    for folder in {path.parent.name for path in (ROOT / "results" / "h200").glob("2026-11-29_*/*/")}:
        for path in (ROOT / "results" / "h200" / folder).rglob("*.json"):
            measured = json.loads(path.read_text())["environment"]["packages"]
            assert {name: pins[name] for name in measured if name != "triton"} == {
                name: version.partition("+")[0] for name, version in measured.items() if name != "triton"}
    assert dict(pins.items() - pins_of("requirements.txt").items()).keys() == {
        "torch", "fa3-fwd", "transformers", "huggingface_hub"}


def test_requirements_are_exact_and_not_vulnerable():
    pins = pins_of("requirements.txt")
    assert {"torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "torchao", "cache-dit", "pillow",
            "torchmetrics"} <= set(pins)
    assert tuple(map(int, pins["transformers"].split("."))) >= (5, 3), "CVE-2026-4372"


@pytest.mark.parametrize("script", ["gen_image.py", "run_benchmark.py", "experiments.py"])
def test_scripts_import_neither_each_other_nor_private_names(script):
    """flux-fast's gen_image took a private function from its benchmark."""
    text = (ROOT / script).read_text()
    assert not re.search(r"(import|from) (gen_image|run_benchmark)", text)
    assert not re.search(r"import .*\b_\w+", text)


@pytest.mark.parametrize("flag", ["--disable_fa3", "--disable_quant", "--text_encoder_quant", "--step_cache"])
def test_lossy_techniques_are_called_lossy(flag):
    """flux-fast called all but quantization lossless, its unscaled fp8 attention included."""
    rows = [line for page in tables.pages() for line in page.read_text().splitlines() if line.startswith("|")]
    assert any(flag in row and "lossy" in row for row in rows)
