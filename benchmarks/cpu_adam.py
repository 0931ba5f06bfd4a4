"""Compare AdamW implementations for optimizer states on the host: torch's, its fused one, DeepSpeed's.

    python benchmarks/cpu_adam.py

One flat float32 tensor, as ZeRO-3 keeps a rank's partition of a group on the host. The three run in turn, so that other
load on the machine affects all equally; a time is the median. DeepSpeed's is compiled at its first use, which takes
minutes; if compilation fails, its row stays blank.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
BETAS, DECAY, RATE = (0.9, 0.95), 0.05, 1e-3


def deepspeeds(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam with AdamW's decay."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=RATE, betas=BETAS, weight_decay=DECAY, adamw_mode=True)


def torchs(fused: bool) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """torch.optim.AdamW."""
    return lambda p: torch.optim.AdamW(p, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=fused)


KINDS = {"torch": torchs(fused=False), "torch, fused": torchs(fused=True), "DeepSpeedCPUAdam": deepspeeds}


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    from mrmae_ds.distributed.launch import prepare_environment

    prepare_environment()
    torch.set_num_threads(args.threads)
    start = torch.randn(args.elements, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(args.elements, generator=torch.Generator().manual_seed(1))
    made, times = {}, {kind: [] for kind in KINDS}
    for kind, make in KINDS.items():
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient
        try:
            made[kind] = (parameter, make([parameter]))
        except RuntimeError as error:
            print(f"{kind}: {error}", file=sys.stderr)
    for step in range(args.rounds + 1):
        for kind, (_, optimizer) in made.items():
            began = time.perf_counter()
            optimizer.step()
            if step:
                times[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(values) for kind, values in times.items() if values}
    apart = {kind: (p - made["torch"][0]).abs().max().item() for kind, (p, _) in made.items()}
    print(f"{args.elements:,} elements, {args.threads} threads\n")
    print("| AdamW | ms per step | ratio to torch's | difference of weights |\n|---|---|---|---|")
    for kind in KINDS:
        cells = (
            (f"{1e3 * medians[kind]:.0f} | {medians[kind] / medians['torch']:.2f} | {apart[kind]:.1e}")
            if kind in medians
            else " | | "
        )
        print(f"| {kind} | {cells} |")
    if args.out:
        write_result(args.out, 1, "cpu", elements=args.elements, threads=args.threads, seconds=medians, apart=apart)


if __name__ == "__main__":
    main()
