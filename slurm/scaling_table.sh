#!/bin/bash
# The whole of the paper's Table 6 on Slurm, from the repository's root: submits what is missing, and the table's job.
#   slurm/scaling_table.sh --dry-run            the plan, with GPU-hours
#   slurm/scaling_table.sh [--seeds 0,1]        submit; give it again after a failure
PATH=$PWD/.venv/bin:$PATH exec mrmae submit slurm/table6.yaml "$@"
