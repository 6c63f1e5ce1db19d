"""What a fresh clone must hold."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_there_is_a_licence():
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_requirements_are_exact_and_not_vulnerable():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "torchao", "cache-dit", "pillow",
            "torchmetrics"} <= set(pins)
    assert tuple(map(int, pins["transformers"].split("."))) >= (5, 3), "CVE-2026-4372"


def test_scripts_do_not_import_from_each_other():
    """flux-fast's gen_image took a private function from its benchmark."""
    for script in ("gen_image.py", "run_benchmark.py", "experiments.py"):
        text = (ROOT / script).read_text()
        assert not re.search(r"(import|from) (gen_image|run_benchmark)", text)
        assert not re.search(r"import .*\b_\w+", text)


def test_lossy_techniques_are_called_lossy():
    """flux-fast called all but quantisation lossless, its unscaled fp8 attention included."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    lossy = [row for row in rows if "**lossy**" in row]
    assert len(lossy) == 4
    for name in ("fp8 attention", "float8", "text encoder quant", "step cache"):
        assert any(name in row.split("|")[1] for row in lossy), name
