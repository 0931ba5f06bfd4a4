"""Cases of the parity matrix, their engine configs, and the tolerances of the comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mrmae_ds.config.files import merge

GLOBAL_BATCH = {"pretrain": 8, "finetune": 8, "detect": 4}
STEPS_PER_EPOCH = 10  # of pre-training and fine-tuning; detection has four images
EPOCHS = {"pretrain": 2, "finetune": 1, "detect": 10}
WARMUP = 0.5
LR, MIN_LR = 1e-3, 1e-6
# Of detection: in steps, and as shares of them.
DETECT_WARMUP, MILESTONES = 3, (0.5, 0.8)
LAYER_DECAY = 0.75
BETAS = {"pretrain": (0.9, 0.95), "finetune": (0.9, 0.999), "detect": (0.9, 0.999)}
WEIGHT_DECAY = 0.05
DECAY = (0.5, 0.9)  # of moving averages, rising in the first epoch
# Below the gradient norms. Scaled further down, some gradients of a detector's mask head are near Adam's epsilon.
CLIPPED = {"pretrain": 0.1, "finetune": 0.1, "detect": 1.0}
Stage = Literal["pretrain", "finetune", "detect"]
Precision = Literal["fp32", "autocast", "bf16"]
CHECKPOINTING = {"conv_stages": "all", "transformer": 2, "decoder": "all"}
# Methods whose losses depend on the division of a step into micro-batches: by random draws of the model, or by losses
# over masks of different sizes. Their encoders compute all tokens.
OF_MICRO_BATCHES = ("maskfeat", "simmim_vit", "mvp", "fd", "data2vec")
WITHOUT_TEACHER = ("maskfeat", "simmim_vit", "data2vec")
OF_AVERAGES = ("data2vec",)  # methods whose recipe has a moving average
PRECISIONS: dict[Precision, dict[str, Any]] = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}
# Small buckets, so that a model of half a million parameters needs many of them.
ZERO: dict[int, dict[str, Any]] = {
    0: {"stage": 0},
    1: {"stage": 1, "reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000, "overlap_comm": True},
    2: {"stage": 2, "reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000, "overlap_comm": True},
    3: {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_bucket_size": 50_000,
        "stage3_prefetch_bucket_size": 50_000,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 3_000_000,
        "stage3_max_reuse_distance": 3_000_000,
        "memory_efficient_linear": False,
        "leaf_module": {"classes": ["Block", "ConvBlock"]},
    },
}


def write_engine(path: Path, zero: int = 2, **changes: Any) -> Path:
    """Write an engine config for micro-batches of one image."""
    content = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": ZERO[zero]}
    path.write_text(json.dumps(content | changes))
    return path


@dataclass(frozen=True)
class Case:
    """One engine of the matrix.

    Attributes:
        stage: of the recipe.
        zero: stage of ZeRO.
        checkpointing: activation checkpointing of every part.
        accumulation: A, micro-batches per step.
        world_size: W, number of ranks.
        precision: of the engine.
        placement: of the teacher, in pre-training.
        clipping: largest norm of the gradient, 0 for any.
        engine: laid on the engine config, by what this case is named for.
        label: names ``engine``.
        wide: blocks of several megabytes instead of half of one.
        recipe: of ds_configs; its teacher, if it has one, is named mae.
        average: add an objective whose teacher is a moving average of the encoder.
        dropout: False turns the recipe's dropout of attention off.
    """

    stage: Stage = "pretrain"
    zero: int = 3
    checkpointing: bool = True
    accumulation: int = 1
    world_size: int = 1
    precision: Precision = "fp32"
    placement: str = "device"
    clipping: float = 0.0
    engine: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    wide: bool = False
    recipe: str = "tiny"
    average: bool = False
    dropout: bool = True

    @property
    def method(self) -> str:
        """Name of the recipe, without its folder and size."""
        return Path(self.recipe).name.removesuffix("_tiny")

    @property
    def name(self) -> str:
        """Unique name, usable as a file name."""
        parts = [self.stage, f"zero{self.zero}", f"W{self.world_size}", f"A{self.accumulation}"]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [self.precision] if self.precision != "fp32" else []
        parts += [self.placement] if self.placement != "device" else []
        parts += ["clipped"] if self.clipping else []
        parts += ["wide"] if self.wide else []
        parts += [Path(self.recipe).name] if self.recipe != "tiny" else []
        parts += ["average"] if self.average else []
        parts += ["no_dropout"] if not self.dropout else []
        return "-".join([*parts, *([self.label] if self.label else [])])

    @property
    def reference(self) -> str:
        """Name of the plain run that the case must equal.

        In pre-training a step's results do not depend on its division into micro-batches, except for the rounding of
        bfloat16 and for :data:`OF_MICRO_BATCHES`; in fine-tuning the random draws do, and in detection the means over
        objects.
        """
        world_size, accumulation = self.cut
        rest = ("-clipped" if self.clipping else "") + ("-wide" if self.wide else "")
        rest += "" if self.recipe == "tiny" else f"-{Path(self.recipe).name}"
        rest += "-average" if self.average else ""
        rest += "" if self.dropout else "-no_dropout"
        return f"plain-{self.stage}-{self.precision}-W{world_size}-A{accumulation}{rest}"

    @property
    def cut(self) -> tuple[int, int]:
        """W and A of the plain run: its division of a step into micro-batches."""
        divided = self.method in OF_MICRO_BATCHES
        whole = self.stage == "pretrain" and self.precision == "fp32" and not divided
        return (1, 1) if whole else (self.world_size, self.accumulation)

    @property
    def tolerance(self) -> Difference:
        """Largest differences from the plain run."""
        exact = self.stage != "detect" or self.precision == "fp32"
        return TOLERANCE[self.precision if exact else "detect-bfloat16"]

    def engine_config(self) -> dict[str, Any]:
        """The engine config as in a file."""
        config = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH[self.stage] // (self.world_size * self.accumulation),
            "gradient_clipping": self.clipping,
            "zero_optimization": ZERO[self.zero],
            **PRECISIONS[self.precision],
        }
        if self.checkpointing:
            config["activation_checkpointing"] = CHECKPOINTING
        return merge(config, self.engine)


PLACEMENTS = ("device", "step", "stream", "sharded")


def matrix() -> list[Case]:
    """Return {ZeRO 0 to 3} x {activation checkpointing} x {accumulation 1, 2} x {1, 2 ranks} x {placements}, fp32.

    Placements vary in pre-training; fine-tuning and detection have no teacher.
    """
    stages: list[tuple[Stage, str]] = [("pretrain", placement) for placement in PLACEMENTS]
    stages += [("finetune", "device"), ("detect", "device")]
    return [
        Case(stage, zero, checkpointing, accumulation, world_size, placement=placement)
        for world_size in (1, 2)
        for zero in ZERO
        for checkpointing in (False, True)
        for accumulation in (1, 2)
        for stage, placement in stages
    ]


def beside_the_matrix() -> list[Case]:
    """Return cases beside the matrix: clipping, both kinds of bfloat16, offloading to the host, hpZ."""
    cpu = {"device": "cpu"}
    optimizer, both = {"offload_optimizer": cpu}, {"offload_optimizer": cpu, "offload_param": cpu}
    cases: list[Case] = []
    for stage in get_args(Stage):
        cases += [Case(stage, zero, world_size=2, clipping=CLIPPED[stage]) for zero in ZERO]
        for precision, stages in {"autocast": (0, 1, 2, 3), "bf16": (1, 2, 3)}.items():
            cases += [Case(stage, zero, accumulation=2, world_size=2, precision=precision) for zero in stages]
        for size in (1, 2):
            for zero in (1, 2, 3):
                cases.append(_offloaded(Case(stage, zero, accumulation=2, world_size=size), "optimizer", optimizer))
            cases.append(_offloaded(Case(stage, 3, accumulation=2, world_size=size), "all", both))
        for precision in ("autocast", "bf16"):
            mixed = Case(stage, 3, accumulation=2, world_size=2, precision=precision)
            cases.append(_offloaded(mixed, "all", both))
        hpz = {"zero_optimization": {"zero_hpz_partition_size": 2}}
        cases.append(Case(stage, 3, accumulation=2, world_size=2, engine=hpz, label="hpz"))
    return cases


def method_cases() -> list[Case]:
    """Return {ZeRO 0, 1, 3} x {1, 2 ranks} x {placements} x {methods}, accumulating, with activation checkpointing."""
    return [
        Case("pretrain", zero, True, 2, world_size, placement=placement, recipe=f"methods/{method}_tiny")
        for world_size in (1, 2)
        for zero in (0, 1, 3)
        for placement in PLACEMENTS
        for method in ("milan", "dmae", "maskalign", *OF_MICRO_BATCHES)
        if placement == "device" or method not in WITHOUT_TEACHER
    ]


def average_cases() -> list[Case]:
    """Return {ZeRO 0 to 3} x {1, 2 ranks} x {accumulation 1, 2} with a moving average; offloading; autocast."""
    cases = [
        Case("pretrain", zero, zero == 3, accumulation, world_size, average=True)
        for world_size in (1, 2)
        for zero in ZERO
        for accumulation in (1, 2)
    ]
    kept = {"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}
    cases += [Case("pretrain", 3, True, 2, size, engine=kept, label="offload_all", average=True) for size in (1, 2)]
    return [*cases, *(Case("pretrain", zero, True, 2, 2, "autocast", average=True) for zero in (0, 1, 3))]


def compiled_cases(world_size: int) -> list[Case]:
    """Return cases with compiled blocks and teachers: ZeRO-3 with activation checkpointing, ZeRO-1 without."""
    compiled: dict[str, Any] = {"engine": {"compile": {"blocks": True, "teachers": True}}, "label": "compiled"}
    stages: tuple[tuple[Stage, int], ...] = (("pretrain", 3), ("finetune", 3), ("finetune", 1))
    cases = [Case(stage, zero, zero == 3, 2, world_size, **compiled) for stage, zero in stages]
    # Inductor's dropout draws other numbers than torch's.
    others = [
        Case("pretrain", 3, True, 2, world_size, recipe=f"methods/{method}_tiny", dropout=dropout, **compiled)
        for method, dropout in (("milan", True), ("mvp", True), ("data2vec", False))
    ]
    return [*cases, *others]


def nvme_cases(folder: Path, world_size: int) -> list[Case]:
    """Return cases that offload to files in ``folder``; the model is wide, as DeepSpeed swaps no small tensors."""
    nvme = {"device": "nvme", "nvme_path": str(folder)}
    case = Case("finetune", 3, accumulation=2, world_size=world_size, wide=True)
    sections = {"optimizer": {"offload_optimizer": nvme}, "all": {"offload_optimizer": nvme, "offload_param": nvme}}
    return [_offloaded(case, f"{what}_nvme", section) for what, section in sections.items()]


def _offloaded(case: Case, what: str, section: dict[str, Any]) -> Case:
    return replace(case, engine={"zero_optimization": section}, label=f"offload_{what}")


@dataclass
class Trace:
    """Result of a training run.

    Attributes:
        losses: mean loss of each step.
        norms: of each step's gradient, where it is known.
        weights: float32, by name, at the end.
        seconds: of the steps.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    seconds: float


@dataclass(frozen=True)
class Difference:
    """Largest differences between an engine and the plain process.

    Attributes:
        loss: relative. norm: of the gradient, relative; 0 where the engine does not report it.
        weights: absolute, at the end. Left out is the bias of the keys: softmax does not feel it, so its true gradient
            is 0, and Adam makes whole steps of the rounding noise.
    """

    loss: float
    norm: float
    weights: float

    def within(self, bound: Difference) -> bool:
        """Return True if no value exceeds that of ``bound``."""
        return self.loss <= bound.loss and self.norm <= bound.norm and self.weights <= bound.weights


# bfloat16 has 8 significant bits; the differences measured after twenty steps are a fifth of these bounds. In detection
# its rounding also decides which proposals are kept: losses jump, measured by a third of the bound.
TOLERANCE: dict[str, Difference] = {
    "fp32": Difference(loss=1e-6, norm=1e-6, weights=1e-6),
    "autocast": Difference(loss=1e-3, norm=5e-3, weights=5e-3),
    "bf16": Difference(loss=1e-3, norm=5e-3, weights=5e-3),
    "detect-bfloat16": Difference(loss=0.1, norm=0.1, weights=2e-2),
}


def difference(found: Trace, expected: Trace) -> Difference:
    """Compare two trainings.

    Raises:
        AssertionError: if they have not the same steps or weights.
    """
    assert len(found.losses) == len(expected.losses) and found.weights.keys() == expected.weights.keys()
    worst = []
    for name, tensor in expected.weights.items():
        distance = (found.weights[name] - tensor).abs()
        if name.endswith("attn.qkv.bias"):
            query, _, value = distance.chunk(3)
            distance = torch.cat([query, value])
        if name.endswith("attn.kv.bias"):
            distance = distance.chunk(2)[1]
        worst.append(distance.max())
    weights = torch.stack(worst).max().item()
    return Difference(_relative(found.losses, expected.losses), _relative(found.norms, expected.norms), weights)


def _relative(found: list[float], expected: list[float]) -> float:
    """Return the largest value; NaN if any is NaN."""
    if not found:
        return 0.0
    ours, theirs = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return ((ours - theirs).abs() / theirs.abs()).max().item()
