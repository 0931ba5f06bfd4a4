"""Mutation check: remove each guard, and check that its test fails.

    python -m tests.support.without_guards [NAME ...] [--list]

Works on a copy of the tracked files in a temporary folder: the text of a guard is replaced by the code without it, its
tests are run, and at least one of them must fail. With all guards in place they must pass. The exit status is 1 if a
test passes without its guard. Takes minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import REPOSITORY, environment, run

LIMIT_S = 600.0


@dataclass(frozen=True)
class Guard:
    """A guard, and its replacement.

    Attributes:
        path: of the file below ``mrmae_ds``.
        guard: text that occurs there once.
        without: text that replaces it.
        tests: arguments of pytest.
    """

    path: str
    guard: str
    without: str
    tests: tuple[str, ...]


def _faults(words: str) -> tuple[str, ...]:
    return ("tests/test_faults.py", "-k", words)


BAD_STEPS = ("tests/training/engine/test_nonfinite.py", "-k", "changes_no_state")
TRAPS = "tests/training/engine/test_traps.py"
RESUMING = "tests/training/checkpoint/test_resume.py"
UNIVERSAL = ("tests/training/checkpoint/test_universal.py", "-k", "resumes_two_ranks or resumes_any_zero")
GUARDS = {
    # non-finite steps
    "non-finite loss": Guard(
        "training/step_sync.py",
        "bad_loss = self.bad_loss()",
        "bad_loss = torch.zeros_like(self.bad_loss())",
        BAD_STEPS,
    ),
    "non-finite gradient": Guard(
        "training/step_sync.py",
        "any_nonfinite(local_gradients(engine), device)",
        "torch.zeros((), device=device)",
        BAD_STEPS,
    ),
    "the norm of a bad step": Guard(
        "training/step_sync.py",
        "        spoil_norm(engine, exchange.bad)\n",
        "",
        BAD_STEPS,
    ),
    "all ranks skip": Guard(
        "training/step_sync.py", "        dist.all_reduce(flags, dist.ReduceOp.MAX)\n", "", _faults("not_finite")
    ),
    "only bad steps end a run": Guard(
        "training/loop.py", "if state.bad_in_row >= MAX_BAD_STEPS:", "if False:", _faults("bad_batches")
    ),
    # ranks
    "a hung rank": Guard("distributed/watchdog.py", "if idle > self.timeout_s:", "if False:", _faults("hang")),
    "an exception on one rank": Guard(
        "distributed/watchdog.py",
        "if error is not None and not isinstance(error, RaisedOnAllRanks):",
        "if False:",
        ("tests/distributed/test_watchdog.py", "-k", "first_failed"),
    ),
    "a killed rank": Guard(
        "distributed/watchdog.py",
        "if dead := self._local.dead():",
        "if dead := None:",
        ("tests/distributed/test_watchdog.py", "-k", "killed_rank"),
    ),
    "a signal to one rank": Guard(
        "training/loop.py",
        "if status.signal and state.step < schedule.total_steps:",
        "if False:",
        _faults("signal_to_one"),
    ),
    # checkpoints
    "checksums": Guard(
        "training/checkpoint/resume.py",
        "problems = problems or check_contents(checkpoint, manifest, own)",
        "pass",
        _faults("damaged_checkpoint"),
    ),
    "sizes": Guard(
        "training/checkpoint/run_dir.py",
        'problems = "; ".join(check_sizes(checkpoint, manifest))',
        'problems = ""',
        ("tests/training/checkpoint/test_run_dir.py", "-k", "truncated"),
    ),
    "a problem on one rank is shared": Guard(
        "training/checkpoint/resume.py",
        "reports = gather((identity, problems))",
        "reports = [(identity, problems)]",
        (RESUMING, "-k", "reported_by_all"),
    ),
    "no start from zero: sizes": Guard(
        "training/checkpoint/run_dir.py",
        "if folders and not candidates:",
        "if False:",
        ("tests/training/checkpoint/test_run_dir.py", "-k", "none_is_complete"),
    ),
    "no start from zero: contents": Guard(
        "training/checkpoint/resume.py",
        "raise CollectiveError(no_complete_checkpoint(stage_dir, damaged))",
        'return RunStart("fresh", (), tuple(damaged))',
        _faults("complete"),
    ),
    "newer checkpoints are set aside": Guard(
        "training/checkpoint/resume.py",
        "            _set_aside_newer_checkpoints(checkpoint, stage_dir)\n",
        "",
        (RESUMING, "-k", "passes_over or sets_newer"),
    ),
    "a failed write is shared": Guard(
        "training/checkpoint/save.py",
        "first, error = dist.get_rank() == 0, written.error",
        "first, error = dist.get_rank() == 0, None",
        ("tests/training/checkpoint/test_save.py",),
    ),
    "half a save is removed": Guard(
        "training/checkpoint/save.py",
        "            shutil.rmtree(snapshot.staging.parent, ignore_errors=True)\n",
        "            pass\n",
        ("tests/training/checkpoint/test_save.py",),
    ),
    "other images, teachers, recipes": Guard(
        "training/checkpoint/run_dir.py",
        "if differences := before.differences(current):",
        "if differences := []:",
        _faults("other_images"),
    ),
    # resuming
    "random states": Guard(
        "training/checkpoint/train_state.py",
        '    restore_random_state(own["random"], device)\n',
        "",
        (RESUMING, "-k", "restores_counters"),
    ),
    "the position in an epoch": Guard(
        "training/loop.py",
        "context.loader.epoch(epoch, step_in_epoch * schedule.accumulation)",
        "context.loader.epoch(epoch)",
        _faults("mid_epoch"),
    ),
    "no line twice": Guard(
        "training/run_logger.py",
        "resume_step=start - 1 if start else None",
        "resume_step=10**9 if start else None",
        _faults("repeated_kills or mid_epoch"),
    ),
    "learning rate and decay of each group": Guard(
        "training/checkpoint/universal.py", "    _restore_groups(engine, groups)\n", "", UNIVERSAL
    ),
    "step counter of each parameter": Guard(
        "training/checkpoint/universal.py", "    _separate_steps(engine)\n", "", UNIVERSAL
    ),
    "frozen parameters and buffers": Guard(
        "training/checkpoint/universal.py",
        '    _load_fixed(engine, torch.load(folder / FIXED, map_location="cpu", weights_only=True))\n',
        "",
        UNIVERSAL,
    ),
    # the engine
    "missing gradient clipping": Guard(
        "config/engine.py",
        'if "gradient_clipping" not in raw:',
        "if False:",
        ("tests/config/test_engine.py",),
    ),
    "parameters without gradient": Guard(
        "training/engine/missing_gradients.py",
        "        if missing:\n",
        "        if False:\n",
        (TRAPS, "-k", "without_gradient"),
    ),
    "the mask head on no boxes": Guard(
        "detection/roi_heads.py",
        "        masks = self._masks(levels, [image.boxes[: len(image.objects)] for image in drawn])\n",
        "        masks = logits.new_zeros(0, logits.shape[1], 28, 28)\n"
        "        if any(len(image.objects) for image in drawn):\n"
        "            masks = self._masks(levels, [image.boxes[: len(image.objects)] for image in drawn])\n",
        ("tests/detection/test_zero.py",),
    ),
    "decay by the unsharded shape": Guard(
        "training/param_groups.py",
        'getattr(parameter, "ds_shape", parameter.shape)',
        "parameter.shape",
        ("tests/training/test_param_groups.py",),
    ),
    "torch's linear": Guard(
        "config/engine_rules.py",
        'if stage == 3 and zero.get("memory_efficient_linear") is not False:',
        "if False:",
        ("tests/config/test_engine.py",),
    ),
}


def copy_of_the_repository(folder: Path) -> Path:
    """Copy the tracked files to ``folder``."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    for name in listed.stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def passes(copy: Path, tests: tuple[str, ...]) -> bool:
    """Return True if the tests pass in the copy.

    Raises:
        RuntimeError: if they could not be run.
    """
    env = environment(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = run(["env", "-C", str(copy), *command], LIMIT_S, env)
    except TimeoutError:
        return False
    if done.status not in (0, 1):
        raise RuntimeError(f"{' '.join(tests)}: pytest ended with {done.status}\n{done.stdout}{done.stderr}")
    return done.status == 0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of guards; default: all")
    parser.add_argument("--list", action="store_true", help="print the names")
    args = parser.parse_args()
    if args.list:
        print("\n".join(GUARDS))
        return
    missed = 0
    print("| guard | its tests | with it | without it |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_repository(Path(folder).resolve())
        sound: dict[tuple[str, ...], bool] = {}
        for name in args.names or GUARDS:
            guard = GUARDS[name]
            path = copy / "mrmae_ds" / guard.path
            text = path.read_text(encoding="utf-8")
            if guard.tests not in sound:
                sound[guard.tests] = passes(copy, guard.tests)
            path.write_text(text.replace(guard.guard, guard.without), encoding="utf-8")
            without = passes(copy, guard.tests)
            path.write_text(text, encoding="utf-8")
            missed += without or not sound[guard.tests]
            words = ["pass" if ok else "fail" for ok in (sound[guard.tests], without)]
            print(f"| {name} | {' '.join(guard.tests)} | {words[0]} | {words[1]} |", flush=True)
    sys.exit(int(missed > 0))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
