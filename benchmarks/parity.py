"""Compare every engine of the parity matrix with a single plain torch process.

    python benchmarks/parity.py                              # the matrix, bfloat16, clipping, offloading, hpZ
    python benchmarks/parity.py --compiled --nvme /scratch   # torch.compile of every block; files on a disk
    python benchmarks/parity.py --stage detect               # one stage of the matrix

Twenty steps of pre-training, ten of fine-tuning and ten of detection on real images, on the CPU
(tests/training/parity). A number is the largest relative difference of a step's loss; ! marks one that exceeds the
tolerance of the tests (1e-6 in float32). The numbers do not depend on other load on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.training.parity.cases import (  # noqa: E402
    PLACEMENTS,
    TOLERANCE,
    ZERO,
    Case,
    Difference,
    Stage,
    beside_the_matrix,
    compiled_cases,
    difference,
    matrix,
    nvme_cases,
)


def compare(cases: list[Case], folder: Path, limit_s: float) -> dict[str, Difference]:
    """Return the differences by name of the case."""
    from tests.training.parity.engine import run_cases
    from tests.training.parity.job import write_workspace
    from tests.training.parity.plain import run_plain

    write_workspace(folder)
    traces = run_cases(cases, folder, limit_s)
    plain: dict[str, Any] = {}
    for case in cases:
        if case.reference not in plain:
            plain[case.reference] = run_plain(case, folder)
    return {case.name: difference(traces[case.name], plain[case.reference]) for case in cases}


def cell(case: Case, found: dict[str, Difference]) -> str:
    """Format the difference of the loss."""
    value = found[case.name]
    return f"{value.loss:.1e}{'' if value.within(case.tolerance) else ' !'}"


def matrix_table(found: dict[str, Difference]) -> str:
    """Format as Markdown: one row per engine; a column per placement, and one per stage without a teacher."""
    head = ["processes", "ZeRO", "checkpointing", "accumulation", *PLACEMENTS, "finetune", "detect"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for world_size in (1, 2):
        for zero in ZERO:
            for checkpointing in (False, True):
                for accumulation in (1, 2):
                    engine = (zero, checkpointing, accumulation, world_size)
                    cases = [Case("pretrain", *engine, placement=placement) for placement in PLACEMENTS]
                    cases += [Case("finetune", *engine), Case("detect", *engine)]
                    cells = [cell(case, found) if case.name in found else "" for case in cases]
                    on = "on" if checkpointing else "off"
                    lines.append("| " + " | ".join([str(world_size), str(zero), on, str(accumulation), *cells]) + " |")
    return "\n".join(lines)


def other_table(cases: list[Case], found: dict[str, Difference]) -> str:
    """Format as Markdown: one row per case."""
    lines = ["| engine | loss | gradient norm | weights |", "|---|---|---|---|"]
    for case in cases:
        value = found[case.name]
        lines.append(f"| {case.name} | {cell(case, found)} | {value.norm:.1e} | {value.weights:.1e} |")
    return "\n".join(lines)


def main() -> None:
    """Run all cases, print the tables, write the JSON; return 1 if any case exceeds its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="run only the cases of torch.compile")
    parser.add_argument("--nvme", type=Path, help="folder on a disk: run only the cases that offload to it")
    parser.add_argument("--stage", choices=get_args(Stage), help="run only the cases of one stage")
    parser.add_argument("--limit", type=float, default=7200, help="time limit in seconds per number of ranks")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    special = [case for size in (1, 2) for case in (compiled_cases(size) if args.compiled else [])]
    special += [case for size in (1, 2) for case in (nvme_cases(args.nvme, size) if args.nvme else [])]
    others = special or beside_the_matrix()
    others = [case for case in others if args.stage in (None, case.stage)]
    cases = others if special else [*(case for case in matrix() if args.stage in (None, case.stage)), *others]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(cases, Path(folder), args.limit)
    if not special:
        print(matrix_table(found), end="\n\n")
    print(other_table(others, found))
    wrong = [case.name for case in cases if not found[case.name].within(case.tolerance)]
    print(f"\n{len(cases)} engines, {len(wrong)} exceed their tolerance: {' '.join(wrong)}")
    if args.out:
        write_result(
            args.out,
            2,
            "cpu",
            tolerance={name: asdict(bound) for name, bound in TOLERANCE.items()},
            differences={name: asdict(value) for name, value in found.items()},
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
