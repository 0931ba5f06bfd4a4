"""Human-readable recommendations for a plan."""

from __future__ import annotations

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.step import StepEstimate, estimate_step, largest_fitting
from mrmae_ds.planning.peak_memory import SAVED
from mrmae_ds.planning.stage import CountedStage, with_placement
from mrmae_ds.units import GIB


def advise(stage: CountedStage, step: StepEstimate, zero: ZeroSettings) -> list[str]:
    """Return recommendations, most important first.

    Args:
        stage: the stage.
        step: estimate with the engine config's settings.
        zero: these settings.
    """
    advice = [
        *_micro_batch(stage, step, zero),
        *_zero(stage, step, zero),
        *_teachers(stage, step, zero),
        *_time(step),
    ]
    return advice or ["no bottleneck found: the job fits, and neither the loader nor communication limits it"]


def _micro_batch(stage: CountedStage, step: StepEstimate, zero: ZeroSettings) -> list[str]:
    best = largest_fitting(stage, zero, step.cluster)
    if best is None:
        smallest = estimate_step(stage, zero, step.cluster, min(stage.micro_batches(step.cluster.gpus))).memory
        activations = smallest.peak.items.get(SAVED, 0.0)
        fix = (
            "checkpoint more blocks"
            if activations > smallest.peak.total / 2
            else "partition or offload more of the states"
        )
        return [f"micro-batch {smallest.micro_batch} does not fit either; {fix}"]
    current, largest = step.memory.micro_batch, best.memory.micro_batch
    setting = f"train_micro_batch_size_per_gpu {largest}"
    accumulation = f"accumulation becomes {best.memory.zero.accumulation}"
    if not step.fits:
        return [f"micro-batch {current} does not fit; {setting} does, and {accumulation}"]
    advice = []
    if largest > current:
        advice.append(f"{setting} fits too{_faster(best, step)}; {accumulation}")
    recomputed = sum(part.recomputed for part in stage.cost.parts.values()) / stage.cost.per_image
    if recomputed > CONSTANTS.threshold and step.free_memory > step.cluster.usable_memory / 2:
        advice.append(
            f"{recomputed:.0%} of the operations are recomputed, while {step.free_memory / GIB:.0f} GiB per GPU are "
            "free: try less activation_checkpointing"
        )
    return advice


def _zero(stage: CountedStage, step: StepEstimate, zero: ZeroSettings) -> list[str]:
    advice, micro_batch = [], step.memory.micro_batch
    if zero.offload_optimizer or zero.offload_param:
        resident = estimate_step(stage, zero.at_stage(zero.stage), step.cluster, micro_batch)
        if resident.fits:
            advice.append(f"without offloading it would fit too, in {resident.memory.peak.total / GIB:.1f} GiB")
    if zero.stage == 0 or (step.cluster.gpus == 1 and zero.stage < 3):
        return advice
    if zero.stage == 3:
        one = estimate_step(stage, zero.at_stage(1), step.cluster, micro_batch)
        if one.fits:
            advice.append(f"ZeRO-1 would fit: it gathers no parameters during computation{_faster(one, step)}")
    elif not step.fits:
        three = estimate_step(stage, zero.at_stage(3), step.cluster, micro_batch)
        advice.append(f"ZeRO-3 {'would fit' if three.fits else 'would not fit either'}")
    gathers, total = step.memory.zero.gathers, step.memory.zero.counts.total
    if gathers.gathered > (1 + CONSTANTS.threshold) * total:
        extra = zero.param_bytes * (total - gathers.forward) / GIB
        advice.append(
            f"parameters are gathered {gathers.gathered / total:.2f} times per micro-batch; "
            f"stage3_max_live_parameters and stage3_max_reuse_distance of {3 * total:.1e} reduce that to once, for "
            f"{extra:.1f} GiB per GPU"
        )
    return advice


def _teachers(stage: CountedStage, step: StepEstimate, zero: ZeroSettings) -> list[str]:
    if step.fits or not any(weights.idle for weights in step.memory.teachers.values()):
        return []
    placements = with_placement(stage.task.placements, "step")
    offloaded = estimate_step(stage, zero, step.cluster, step.memory.micro_batch, placements)
    freed = (step.memory.peak.total - offloaded.memory.peak.total) / GIB
    return [f"placement: step frees {freed:.1f} GiB per GPU"] if freed >= 0.05 else []


def _time(step: StepEstimate) -> list[str]:
    advice, compute = [], step.compute
    if compute is not None and compute.waits_for_host:
        advice.append(
            f"the GPU waits for the host, which issues a micro-batch in {1000 * compute.mean_host_s:.0f} ms, while the "
            f"GPU computes it in {1000 * compute.gpu_s:.0f}; a larger micro-batch, ZeRO-1 or less recomputation would "
            "reduce that"
        )
    share = step.waiting_share
    if share is not None and share > CONSTANTS.threshold:
        longest = max(step.transfers, key=lambda transfer: transfer.seconds)
        fix = "" if longest.local else ", fewer GPUs or a faster network"
        advice.append(
            f"a step waits {share:.0%} of its time for transfers, mostly for: {longest.name}; a larger micro-batch "
            f"with less accumulation{fix} would reduce that"
        )
    if (needed := step.node_demand) is not None:
        sentence = f"the loader must deliver {needed:,.0f} images/s per node"
        if (delivered := step.cluster.node_loader) is not None:
            limit = ", so it is the bottleneck" if delivered < needed else ""
            sentence += f"; it delivers {delivered:,.0f}{limit}"
        advice.append(sentence)
    return advice


def _faster(other: StepEstimate, step: StepEstimate) -> str:
    """Compare the throughput of another estimate; empty if it is unknown or the same."""
    if other.images_per_s is None or step.images_per_s is None:
        return ""
    ratio = other.images_per_s / step.images_per_s
    return f", {ratio:.2f} times as fast" if abs(ratio - 1) > CONSTANTS.threshold else ""
