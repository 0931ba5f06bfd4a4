"""What to make of a plan, in sentences."""

from __future__ import annotations

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.estimate import CountedStage, Estimate, estimate, largest_fitting, micro_batches, with_placement
from mrmae_ds.planning.peak_memory import SAVED

# From this share of a step on, waiting for the network is worth a word; and a cost below it is next to nothing.
WORTH = 0.05


def advise(stage: CountedStage, now: Estimate, zero: ZeroSettings, loader_rate: float | None) -> list[str]:
    """Sentences, most important first.

    Args:
        stage: the stage. now: as the engine config has it. zero: its settings.
        loader_rate: images/s that the loader of a node delivers; None is unknown.
    """
    sentences = _memory(stage, now, zero) + _stages(stage, now, zero) + _teachers(stage, now, zero)
    sentences += _time(now, loader_rate)
    return sentences or ["nothing stands out: it fits, and nothing waits"]


def _memory(stage: CountedStage, now: Estimate, zero: ZeroSettings) -> list[str]:
    best = largest_fitting(stage, zero, now.cluster)
    if best is None:
        smallest = estimate(stage, zero, now.cluster, min(micro_batches(stage, now.cluster.gpus)))
        # Activations, or what is there whatever the micro-batch.
        saved = smallest.fullest.items.get(SAVED, 0.0)
        mend = (
            "checkpoint more blocks" if saved > smallest.fullest.total / 2 else "divide or offload more of the states"
        )
        return [f"not even micro-batch {smallest.micro_batch} fits; {mend}"]
    words = f"train_micro_batch_size_per_gpu {best.micro_batch}"
    then = f"accumulation follows: {best.engine.accumulation}"
    if not now.fits:
        return [f"micro-batch {now.micro_batch} does not fit; {words} does, and {then}"]
    sentences = []
    if best.micro_batch > now.micro_batch:
        sentences.append(f"{words} fits too: larger matrices, fewer collectives; {then}")
    again = sum(part.recomputed for part in stage.cost.parts.values()) / stage.cost.per_image
    free = now.cluster.usable - now.fullest.total
    if again > WORTH and free > now.cluster.usable / 2:
        sentences.append(
            f"{again:.0%} of the operations are recomputed, and {free / 2**30:.0f} GiB of a GPU are free: plan again "
            "with less activation_checkpointing"
        )
    return sentences


def _stages(stage: CountedStage, now: Estimate, zero: ZeroSettings) -> list[str]:
    sentences = _offloading(stage, now, zero)
    if zero.stage == 0 or now.cluster.gpus == 1:
        return sentences
    one = estimate(stage, zero.at_stage(1), now.cluster, now.micro_batch)
    if zero.stage == 3 and one.fits:
        waits = _share(one)
        shorter = waits is not None and (here := _share(now)) is not None and waits < here
        words = "ZeRO-1 would fit: it gathers nothing while it computes"
        sentences.append(words + (", and a step would wait less" if shorter else ""))
    if zero.stage < 3 and not now.fits:
        three = estimate(stage, zero.at_stage(3), now.cluster, now.micro_batch)
        sentences.append(f"ZeRO-3 {'would fit' if three.fits else 'would not fit either'}")
    moving, total = now.engine.gathering, now.engine.census.total
    if moving.gathered > (1 + WORTH) * total:
        more = zero.param_bytes * (total - moving.forward) / 2**30
        sentences.append(
            f"parameters are gathered {moving.gathered / total:.2f} times in a micro-batch; "
            f"stage3_max_live_parameters and stage3_max_reuse_distance of {3 * total:.1e} make that once, for "
            f"{more:.1f} GiB of a GPU"
        )
    return sentences


def _offloading(stage: CountedStage, now: Estimate, zero: ZeroSettings) -> list[str]:
    if not (zero.offload_optimizer or zero.offload_param):
        return []
    here = estimate(stage, zero.at_stage(zero.stage), now.cluster, now.micro_batch)
    if not here.fits:
        return []
    return [f"with nothing offloaded it would fit, in {here.fullest.total / 2**30:.1f} GiB"]


def _teachers(stage: CountedStage, now: Estimate, zero: ZeroSettings) -> list[str]:
    if not stage.teachers:
        return []
    resident = sum(placed.idle for placed in now.placed.values())
    if now.fits or not resident:
        return []
    moved = estimate(stage, zero, now.cluster, now.micro_batch, with_placement(stage.placements, "step"))
    freed = (now.fullest.total - moved.fullest.total) / 2**30
    return [f"placement: step frees {freed:.1f} GiB of a GPU"] if freed >= 0.05 else []


def _time(now: Estimate, loader_rate: float | None) -> list[str]:
    sentences = []
    waits = _share(now)
    if waits is not None and waits > WORTH:
        longest = max(now.flows, key=lambda flow: flow.seconds)
        mend = "" if longest.local else ", fewer GPUs or a faster network"
        sentences.append(
            f"a step waits {waits:.0%} of its time for what travels, most of all for: {longest.name}; a larger "
            f"micro-batch with less accumulation{mend} would make it less"
        )
    if now.images_per_s is not None:
        needed = now.images_per_s / now.cluster.nodes
        words = f"the loader must deliver {needed:,.0f} images/s a node"
        if loader_rate is not None:
            words += f"; it delivers {loader_rate:,.0f}" + (", so it is the limit" if loader_rate < needed else "")
        sentences.append(words)
    return sentences


def waits_for(of: Estimate, loader_rate: float | None) -> str:
    """What keeps a job from being faster: its loaders, its network, its hosts or its GPUs."""
    if loader_rate is not None and of.images_per_s and of.images_per_s > loader_rate * of.cluster.nodes:
        return f"loader ({of.images_per_s / of.cluster.nodes / loader_rate:.1f} times what it delivers)"
    share = _share(of) or 0.0
    if share > WORTH:
        what = "host" if max(of.flows, key=lambda flow: flow.seconds).local else "network"
        return f"{what if share > 0.5 else f'compute; {what}'} {share:.0%}"
    return "compute"


def _share(of: Estimate) -> float | None:
    """Of a step, what waits."""
    if of.waiting_s is None or not of.step_s:
        return None
    return of.waiting_s / of.step_s
