"""Clock and power while a GPU works, from a made-up nvidia-smi."""

import os
import time

import pytest
import torch

from bench import environment
from bench.environment import medians, monitor_gpu


def test_medians_of_lines_that_are_no_samples_are_without_them():
    lines = "1980, 300.5\n1410, 699.0\n1395, 698.0\n[N/A], [N/A]\n\n13"
    assert medians(lines) == {"sm_clock_mhz": 1410, "power_w": 698.0, "samples": 3}
    assert medians("") == medians("Field is not a valid field to query.") == {}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a script into nvidia-smi's place, and a GPU into PyTorch's."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("GPU", (), {"uuid": "12-34"}))

    def write(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\n{script}")
        path.chmod(0o755)
        return tmp_path / "asked"
    return write


def test_watching_load_of_a_short_block_waits_for_a_sample(smi):
    """However short it is: nvidia-smi is waited for, and what it says of the GPU before is left out."""
    asked = smi("sleep 0.5; echo 345, 70; while true; do sleep 0.02; echo 1400, 690.5; done")
    with monitor_gpu("cuda") as found:
        assert found == {}
        time.sleep(0.2)
    assert found.pop("samples") >= 1 and found == {"sm_clock_mhz": 1400, "power_w": 690.5}
    assert "--id=GPU-12-34" in asked.read_text()


def test_watching_load_of_a_failing_block_ends_nvidia_smi(smi, monkeypatch):
    monkeypatch.setattr(environment, "START_S", 0.1)
    smi("exec sleep 1000")
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError), monitor_gpu("cuda"):
        raise ZeroDivisionError
    assert time.monotonic() - start < 100


def test_watching_load_without_an_answer_stays_empty(smi, monkeypatch):
    smi("echo 'Field is not a valid field to query.'; exit 2")
    with monitor_gpu("cuda") as found, monitor_gpu("cpu") as none:
        pass
    assert found == none == {}
    monkeypatch.setenv("PATH", "")
    with monitor_gpu("cuda") as found:
        pass
    assert found == {}
