"""What a fresh clone must hold."""

import re
from pathlib import Path

import pytest

from bench.report import tables

ROOT = Path(__file__).parent.parent


def test_licence_is_apaches():
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_requirements_are_exact_and_not_vulnerable():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
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
