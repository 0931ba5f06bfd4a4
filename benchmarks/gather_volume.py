"""Measure the parameters that ZeRO-3 gathers per optimizer step of Huge, by engine config.

    python benchmarks/gather_volume.py

Two CPU ranks run a narrow Huge (its stages, depths and patches; layers of 1/8 to 1/16 of the width) under
ds_configs/huge.json with one key changed at a time and its sizes scaled like the model. All all-gathers that DeepSpeed
issues in a step are counted, in multiples of the model's parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def settings(elements: int) -> dict[str, tuple[dict[str, Any], int]]:
    """Return changes to huge.json and accumulation steps by name; ``elements`` is the parameter count of Huge."""

    def zero(**values: Any) -> dict[str, Any]:
        return {"zero_optimization": values}

    recomputed = {"activation_checkpointing": {"conv_stages": "all", "transformer": "all", "decoder": "none"}}
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "huge.json": ({}, 1),
        "activation checkpointing": (recomputed, 1),
        "autocast": ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 1),
        "accumulation 2": ({}, 2),
        "no leaf modules": (zero(leaf_module=None), 1),
    }
    for share in (0.0, 0.25, 0.5, 1.0, 1.5):
        reuse = round(share * elements)
        cases[f"reuse distance {share:g} model"] = (zero(stage3_max_reuse_distance=reuse), 1)
        both = zero(stage3_max_reuse_distance=reuse, stage3_max_live_parameters=reuse)
        cases[f"reuse distance and live {share:g} model"] = (both, 1)
    cases["DeepSpeed's defaults (1e9 each)"] = (
        zero(stage3_max_reuse_distance=10**9, stage3_max_live_parameters=10**9),
        1,
    )
    cases["huge-offload.json's (1e8 each)"] = (
        zero(stage3_max_reuse_distance=10**8, stage3_max_live_parameters=10**8),
        1,
    )
    return cases


def run_rank(folder: Path) -> None:
    """Run one rank: all settings in turn; the result is written to FOLDER/result.json."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch

    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
    from tests.training.parity.gathers import elements, gathered, huge

    torch.set_num_threads(1)
    start_process_group(choose_device(launch))
    found = {}
    for name, (changes, accumulation) in settings(elements(huge(narrow=False))).items():
        found[name] = [asdict(step) for step in gathered(changes, accumulation, folder, launch.rank)]
    if launch.rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    end_process_group()


def main() -> None:
    """Run the benchmark on two ranks, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1800, help="time limit in seconds")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of)
        return
    from tests.support.processes import finish, rank_processes
    from tests.training.parity.gathers import elements, huge

    with tempfile.TemporaryDirectory() as folder:
        ended = finish(rank_processes(2, "--rank-of", folder, program=(__file__,)), args.limit)
        if any(process.status for process in ended):
            sys.exit("\n".join(process.stderr[-2000:] for process in ended))
        found = json.loads((Path(folder) / "result.json").read_text())
    print(f"Huge: {elements(huge(narrow=False)):,} parameters; narrow: {elements(huge(narrow=True)):,}\n")
    print("| engine config | models gathered per step | all-gathers | first step |\n|---|---|---|---|")
    for name, steps in found.items():
        print(f"| {name} | {steps[-1]['models']:.2f} | {steps[-1]['calls']} | {steps[0]['models']:.2f} |")
    if args.out:
        write_result(args.out, 2, "cpu", steps=found)


if __name__ == "__main__":
    main()
