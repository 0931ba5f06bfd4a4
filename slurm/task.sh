#!/bin/bash
# Wrapper of one rank: slurm/train.sbatch has srun start this once per GPU, with the command to run.
#
# train.py exits with 75 when a signal stopped it after a checkpoint. srun would treat that as a failure and kill the
# ranks that are a moment slower, so this script exits with 0 and leaves the file PREFIX.stopped instead. The file
# PREFIX.failed names the rank that failed first.
STOPPED=75

# Slurm signals every process of a step. train.py handles USR1 and TERM by saving a checkpoint, once it trains; before
# that, USR1 (the time limit is near) must not end a process that the others wait for.
trap '' USR1
trap : TERM INT
"$@"
status=$?
if [ "$status" = "$STOPPED" ]; then
    [ "$SLURM_PROCID" != 0 ] || touch "$MRMAE_STATUS_PREFIX.stopped"
    exit 0
fi
if [ "$status" != 0 ]; then
    set -o noclobber
    echo "$status rank $SLURM_PROCID on $SLURMD_NODENAME" 2>/dev/null >"$MRMAE_STATUS_PREFIX.failed"
fi 2>/dev/null
exit "$status"
