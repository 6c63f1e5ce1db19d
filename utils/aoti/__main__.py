"""Lists, verifies and cleans exported packages: `python -m utils.aoti list`."""

import argparse
import sys
from importlib import metadata

import torch

from utils.aoti.export import machine
from utils.aoti.store import KEY, open_store, read_manifest, remove, verify
from utils.benchmark_utils import DEFAULT_CACHE_DIR
from utils.common import RecipeError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["list", "verify", "clean"])
    parser.add_argument("--cache-dir", default=DEFAULT_CACHE_DIR)
    args = parser.parse_args()
    here = machine("cuda" if torch.cuda.is_available() else "cpu"), metadata.version("torch")
    damaged = False
    for folder in sorted(path for path in open_store(args.cache_dir).iterdir() if KEY.fullmatch(path.name)):
        size, fits = sum(path.lstat().st_size for path in folder.rglob("*")), False
        try:
            fields = (read_manifest if args.action == "list" else verify)(folder)["fields"]
            made_for = fields["machine"], fields["versions"]["torch"]
            fits = made_for == here
            state = "fits this machine" if fits else "made for {}, torch {}".format(*made_for)
        except RecipeError as error:
            state, damaged = str(error), True
        if args.action == "clean" and not fits:
            remove(folder)
            state = f"removed ({state})"
        print(f"{folder.name}  {size / 1e6:7.1f} MB  {state}")
    if args.action == "verify" and damaged:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
