"""The benchmark of one process that draws several sizes and LoRAs."""

import argparse
import json
import tempfile
from types import SimpleNamespace

import pytest

from bench import one_process
from utils.checkpoint import model_shapes, read_configs
from utils.lora import read_lora


@pytest.mark.parametrize("spelling", one_process.FORMATS)
def test_random_lora_fits_every_linear_of_the_blocks(tmp_path, spelling):
    configs = read_configs("tiny-flux", random_layers="1+2")
    path = one_process.random_lora(tmp_path / "lora.safetensors", 3, spelling, configs["transformer"])
    lora = read_lora(str(path), model_shapes(configs))
    changed = {rows.module for change in lora.changes for rows in change.rows}
    linears = {name.removesuffix(".weight") for name, shape in model_shapes(configs)["transformer"].items()
               if "transformer_blocks" in name and len(shape) == 2 and not name.endswith("linear.weight")}
    assert lora.left_out == "" and changed == linears and {change.rank for change in lora.changes} == {3}


def test_order_has_each_place_twice_and_loras_in_turn():
    args = argparse.Namespace(sizes=["32x16", "16x16"], images=["a", "b"], order=0, swaps=4)
    found = one_process.order_of(args, [])
    assert all(found.count(place) == 2 for place in found) and len(found) == 8
    assert {"width": 32, "height": 16, "image": "b"} in found
    assert any(one_process.order_of(argparse.Namespace(**vars(args) | {"order": seed}), [])[:4] != one_process.order_of(
        argparse.Namespace(**vars(args) | {"order": seed}), [])[4:] for seed in range(5))  # each pass is shuffled
    args.sizes = args.images = []
    assert one_process.order_of(args, ["x", "y"]) == [{"lora": one} for one in ((), ("x",), ("y",), (), ("x",))]


def test_visits_draw_what_a_start_with_their_settings_draws(tmp_path, monkeypatch):
    """With the same program in the place of a process of its own."""
    def run_here(command, **_):
        monkeypatch.setattr("sys.argv", command[2:])
        one_process.main()
        return SimpleNamespace(returncode=0)

    path = tmp_path / "record.json"
    monkeypatch.setattr(one_process, "subprocess", SimpleNamespace(run=run_here, DEVNULL=None, PIPE=None))
    monkeypatch.setattr("sys.argv", [
        "one_process", "--output-json", str(path), "--sizes", "96x64", "--random_loras", "2", "--swaps", "2", "--alone",
        "--", "--ckpt", "tiny-flux", "--random_weights", "1+2", "--height", "64", "--width", "64", "--device", "cpu",
        "--quiet", "--cache-dir", str(tmp_path / "cache")])
    one_process.main()
    record = json.loads(path.read_text())
    alone = {json.dumps(one["settings"]): one["sha256"] for one in record["alone"]}
    assert len(record["visits"]) == 5 and len(alone) == len(set(alone.values())) == 3
    for one in record["visits"]:
        assert one["sha256"] == alone[json.dumps(one["settings"])] and one["same_pixels"]
        assert len(one["later_s"]) == one_process.RUNS and one["first_s"] > 0
    assert not any(tempfile.gettempdir() in str(one["settings"]) for one in record["visits"] + record["alone"])
