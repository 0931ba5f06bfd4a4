#!/bin/bash
# One process of a job: slurm/train.sbatch has srun start this once a GPU, with the command to run.
#
# train.py ends with 75 when it was told to stop and has saved. srun would take that for a failure and kill the
# processes that are a moment slower, so here it becomes 0, and a file beside the run's notes. Another file tells which
# process failed first.
STOPPED=75

# Slurm signals every process of a step. train.py answers USR1 and TERM by saving, once it trains; before that USR1 (the
# time limit is near) must not end a process that the others wait for.
trap '' USR1
trap : TERM INT
"$@"
status=$?
if [ "$status" = "$STOPPED" ]; then
    [ "$SLURM_PROCID" != 0 ] || touch "$MRMAE_NOTES.stopped"
    exit 0
fi
if [ "$status" != 0 ]; then
    set -o noclobber
    echo "$status rank $SLURM_PROCID on $SLURMD_NODENAME" 2>/dev/null >"$MRMAE_NOTES.failed"
fi 2>/dev/null
exit "$status"
