"""Joules of images and steps, with a driver that is made up."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from bench import energy, timing
from bench.energy import EnergyCounter
from utils.pipeline_utils import load_pipeline, optimize


class Driver:
    """Stands in for libnvidia-ml: the counter of one GPU in millijoules.

    Attributes:
        used: what the counter shows.
        status: what reading it returns; 0 is success.
    """

    def __init__(self):
        self.used, self.status, self.asked = 5_000, 0, None

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        self.asked, handle._obj.value = uuid, 77
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, into):
        assert handle.value == 77
        into._obj.value = self.used
        return self.status


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab-1"))
    return made


def test_counter_reads_joules_of_this_gpu(driver):
    counter = EnergyCounter("cuda")
    before = counter.joules()
    driver.used += 2_500
    assert (driver.asked, before, counter.since(before)) == (b"GPU-ab-1", 5.0, 2.5)


def test_counter_without_one_gives_none(driver, monkeypatch):
    counter = EnergyCounter("cuda")
    driver.status = 3  # not supported
    assert counter.joules() is None and counter.since(1.0) is None and counter.since(None) is None
    assert EnergyCounter("cpu").joules() is None

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(energy.ctypes, "CDLL", absent)
    assert EnergyCounter("cuda").joules() is None


@pytest.mark.parametrize("argv, joules", [([], 3.0), (["--step_cache", "taylorseer"], None)])
def test_step_energy_is_the_mean_of_whole_steps(make_args, driver, monkeypatch, argv, joules):
    args = make_args("--ckpt", "tiny-flux-dev", "--random_weights", "1+1", "--height", "32", "--width", "32", *argv)
    pipeline = optimize(load_pipeline(args), args)
    monkeypatch.setattr(timing, "STEP_SECONDS", 0.04)

    def use(*_):
        driver.used += 3_000

    pipeline.transformer.register_forward_hook(use)
    assert timing.step_energy(pipeline, args, EnergyCounter("cuda"), milliseconds=4.0) == joules
