"""Count the launches, bytes and FLOPs of a pre-training micro-batch, and their time by the roofline; no GPU is needed.

    python benchmarks/roofline.py small base large huge --gpu h100-80 --out FILE.json

Names are those of ds_configs/NAME-zero1.json and its recipe. Student and teachers run forward and backward on fake
tensors, as in ``mrmae plan``. An operator takes the longest of its FLOPs, its bytes and the shortest kernel at the
rates that the plan assumes (mrmae_ds/planning/estimates/constants.yaml). **Nothing is measured**: neither host, update
nor communication is part of it, so a step on a GPU takes longer.

Rows: ``eager`` as configured (torch_autocast), ``compiled`` with ``compile.blocks`` and ``compile.teachers``, ``bf16``
with the ``bf16`` section instead, and both. Compiled is the ideal: between two products, attentions or convolutions,
operators that use each other's results are one kernel, which reads each input and writes each result that is needed
later once. Inductor fuses less, and nothing outside of blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from mrmae_ds.doctor.numerics import BF16  # noqa: E402
from mrmae_ds.planning.activation_trace import TRACED_SIZES, TensorRecorder  # noqa: E402
from mrmae_ds.planning.operator_trace import (  # noqa: E402
    ATTENTION,
    CONVOLUTION,
    MATMUL,
    MATMUL_FP32,
    MEMORY,
    VIEW,
    OperatorCost,
    Operators,
    tensor_bytes,
)

SHOWN = {"products": (MATMUL, MATMUL_FP32), "attention": (ATTENTION,), "convolutions": (CONVOLUTION,)}
Bytes = dict[int, float]  # of each tensor, by the number of its storage


class FlowRecorder(TensorRecorder):
    """Recorder of the tensors that each operator reads and writes.

    Attributes:
        flows: tensors read and written by each operator of ``costs``.
    """

    def __init__(self, owned: Iterable[torch.nn.Module]) -> None:
        super().__init__(owned)
        self.flows: list[tuple[Bytes, Bytes]] = []
        self._numbers: dict[int, int] = {}
        self._next = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._flow((args, kwargs))
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        self.flows.append((read, self._flow(outputs)))
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._sizes:
            self._numbers.pop(id(storage), None)  # of a storage that was freed
        super()._count(storage)

    def _flow(self, values: Any) -> Bytes:
        flow: Bytes = {}
        for tensor in tree_iter(values):
            if isinstance(tensor, Tensor):
                key = id(tensor.untyped_storage())
                number = self._numbers.setdefault(key, next(self._next))
                flow[number] = max(flow.get(number, 0.0), tensor_bytes(tensor))
        return flow


def fuse(costs: list[OperatorCost], flows: list[tuple[Bytes, Bytes]]) -> list[OperatorCost]:
    """Return the costs after ideal fusion of operators of the kind ``memory``.

    Args:
        costs: of each operator.
        flows: tensors that it reads and writes.
    """
    last_read: dict[int, int] = {}  # of tensors that are not written afterwards
    for index, (read, written) in enumerate(flows):
        last_read |= dict.fromkeys(read.keys() - written.keys(), index)
        for number in written:
            last_read.pop(number, None)
    fused: list[OperatorCost] = []
    run: list[int] = []
    for index, cost in enumerate(costs):
        if cost.kind == MEMORY:
            run.append(index)
        elif cost.kind != VIEW:
            fused += _kernels(run, flows, last_read)
            fused.append(cost)
            run = []
    return fused + _kernels(run, flows, last_read)


def _kernels(run: list[int], flows: list[tuple[Bytes, Bytes]], last_read: dict[int, int]) -> list[OperatorCost]:
    """Return one cost for each group of operators of a run that use each other's results."""
    groups: list[tuple[Bytes, Bytes]] = []  # external inputs, results
    for index in run:
        read, written = flows[index]
        inputs: Bytes = {}
        results: Bytes = {}
        apart = []
        for group in groups:
            if group[1].keys() & (read.keys() | written.keys()):
                inputs |= group[0]
                results |= group[1]
            else:
                apart.append(group)
        inputs |= {number: size for number, size in read.items() if number not in results}
        groups = [*apart, (inputs, results | written)]
    end = run[-1] if run else 0
    costs = []
    for inputs, results in groups:
        # A result without a later reader is one of the micro-batch: a gradient, or a loss.
        kept = (size for number, size in results.items() if not _inside(number, run, end, last_read))
        costs.append(OperatorCost(MEMORY, 0.0, sum(inputs.values()) + sum(kept)))
    return costs


def _inside(number: int, run: list[int], end: int, last_read: dict[int, int]) -> bool:
    """Return True if a result's last reader is in the run, so that it stays in registers."""
    return run[0] <= last_read.get(number, -1) <= end


def trace(name: str, changes: dict[str, Any]) -> tuple[int, dict[str, Operators]]:
    """Trace a size's pre-training; return its micro-batch, and its operators eager and compiled."""
    from mrmae_ds.config.engine import default_recipe
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.doctor.workload import write_engine_config
    from mrmae_ds.imagenet import IMAGENET_CLASSES
    from mrmae_ds.planning.fake_step import build_meta_task, trace_micro_batch

    source = REPOSITORY / "ds_configs" / f"{name}-zero1.json"
    content = json.loads(source.read_text())
    if changes:
        content = {key: value for key, value in content.items() if key != "torch_autocast"} | changes
    with tempfile.TemporaryDirectory() as folder:
        config = write_engine_config(Path(folder), name, 0, content)
    task = build_meta_task(load_recipe(default_recipe(source)), "pretrain", config, IMAGENET_CLASSES)
    runs: list[FlowRecorder] = []

    def record(owned: Iterable[torch.nn.Module]) -> FlowRecorder:
        runs.append(FlowRecorder(owned))
        return runs[-1]

    eager = trace_micro_batch(task, config, make_recorder=record).operators
    compiled = Operators.fit(TRACED_SIZES, [fuse(run.costs, run.flows) for run in runs[-len(TRACED_SIZES) :]])
    return config.micro_batch, {"eager": eager, "compiled": compiled}


def price(operators: Operators, images: int, rates: Any) -> dict[str, Any]:
    """Return launches, bytes, FLOPs and milliseconds of a micro-batch, by kind of operator."""
    seconds, kinds = operators.seconds(images, rates), list(operators.kinds)
    sizes = operators.sizes[0] + operators.sizes[1] * images
    by_kind = {
        label: 1e3 * sum(float(s) for s, kind in zip(seconds, kinds, strict=True) if kind in members)
        for label, members in {**SHOWN, "memory": (MEMORY,)}.items()
    }
    return {
        "launches": len(operators),
        "gb": float(sizes.sum()) / 1e9,
        "tflop": operators.total_flops(images) / 1e12,
        "ms": by_kind,
        "total_ms": 1e3 * float(seconds.sum()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown."""
    kinds = list(rows[0]["ms"])
    head = [
        "size",
        "micro-batch",
        "variant",
        "launches",
        "GB",
        "TFLOP",
        *(f"{kind}, ms" for kind in kinds),
        "total, ms",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["size"], f"{row['micro_batch']}", row["variant"], f"{row['launches']:,}", f"{row['gb']:.0f}"]
        cells += [f"{row['tflop']:.1f}", *(f"{row['ms'][kind]:.1f}" for kind in kinds), f"{row['total_ms']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trace all sizes, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", default=["small", "base", "large", "huge"], help="ds_configs/NAME-zero1.json"
    )
    parser.add_argument("--gpu", default="h100-80", help="key in mrmae_ds/profiling/gpus.py")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    from mrmae_ds.planning.estimates.rates import device_rates
    from mrmae_ds.profiling.gpus import find_gpu
    from mrmae_ds.profiling.measured_node import MeasuredNode

    rates = device_rates(find_gpu(args.gpu), MeasuredNode())
    rows: list[dict[str, Any]] = []
    for name in args.names:
        for changes in ({}, BF16):
            micro_batch, traced = trace(name, changes)
            for variant, operators in traced.items():
                label = {"eager": "bf16", "compiled": "bf16, compiled"}[variant] if changes else variant
                priced = price(operators, micro_batch, rates)
                rows.append({"size": name, "micro_batch": micro_batch, "variant": label, **priced})
    print(table(rows))
    if args.out:
        from result_file import write_result

        write_result(
            args.out, 1, "cpu", note="roofline by assumed rates; nothing was measured", gpu=args.gpu, rows=rows
        )


if __name__ == "__main__":
    main()
