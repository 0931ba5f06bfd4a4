# shellcheck shell=bash disable=SC2034
# What differs between clusters, in one file. Copy it to slurm/site.sh, which git ignores, and edit the copy:
#
#   cp slurm/site.example.sh slurm/site.sh
#   source slurm/site.sh           in the shell that submits, because sbatch reads SBATCH_* (or from your ~/.bashrc)
#
# slurm/train.sbatch reads it again on the job's first node. MRMAE_SITE names another file. Every line here is optional;
# those that are not commented out are the defaults.

# ---- read by sbatch (man sbatch, "INPUT ENVIRONMENT VARIABLES"); an option on its command line wins
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8           # or SBATCH_GRES=gpu:8, as your cluster wants it
# export SBATCH_CONSTRAINT=h100
# export SBATCH_SIGNAL=USR1@600           # how long before the limit to save and stop; 300 s if not said
# export SBATCH_OUTPUT=runs/slurm-%x-%j.out   # its folder must exist; slurm-ID.out in the current one if not said

# ---- the environment on every node. As in the shell, so with `module` and `conda` if they work there
# source /etc/profile.d/modules.sh        # where batch scripts do not know `module`
# module load gcc/13 cuda/13
# conda activate mrmae                    # the environment with FFCV's libraries, if it was made by conda
# export HF_HUB_OFFLINE=1                 # nodes without internet: teachers come from files (docs/cluster.md)
# export DS_ACCELERATOR=cpu               # nodes without GPUs
# export PYTORCH_ALLOC_CONF=expandable_segments:True   # where memory is short because it is fragmented
PYTHON=.venv/bin/python                   # of the environment; inside the container, if there is one

# ---- how processes are started
TASKS_PER_NODE=                           # processes a node; empty: the GPUs that the job has on one
SRUN_OPTIONS=()                           # (--container-image=/images/mrmae.sqsh --container-mounts=/work) with pyxis
CONTAINER=()                              # (apptainer exec --nv --bind /work /images/mrmae.sif): put before $PYTHON

# ---- network
NETWORK_INTERFACE=                        # for NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: ib0, for example
# export MASTER_ADDR=                     # only if the address that Slurm knows of the first node is not the one to use
# export NCCL_IB_HCA=mlx5                 # which InfiniBand adapters; see docs/cluster.md, "NCCL"
# export NCCL_DEBUG=INFO                  # WARN if not said

# ---- data
# A folder on each node's own disk or memory to which the .beton files are copied, once a node; it becomes the recipe's
# loader.cache_dir. One whose name holds $SLURM_JOB_ID is removed when the job ends; others stay for the next job.
CACHE_DIR=                                 # /dev/shm/$USER-${SLURM_JOB_ID:-}

# ---- how often a job may be started again after it was saved near its limit, or lost a node
MAX_RESTARTS=50
