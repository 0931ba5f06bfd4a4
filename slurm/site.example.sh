# shellcheck shell=bash disable=SC2034
# Settings that differ between clusters. Copy this file to slurm/site.sh, which git ignores, and edit the copy:
#
#   cp slurm/site.example.sh slurm/site.sh
#   source slurm/site.sh           in the submitting shell, because sbatch reads SBATCH_* (or from your ~/.bashrc)
#
# slurm/train.sbatch sources it again on the job's first node. MRMAE_SITE selects another file. Every line is optional;
# the lines that are not commented out are the defaults.

# ---- read by sbatch (man sbatch, "INPUT ENVIRONMENT VARIABLES"); options on its command line take precedence
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8           # or SBATCH_GRES=gpu:8, depending on the cluster
# export SBATCH_CONSTRAINT=h100
# export SBATCH_SIGNAL=USR1@600           # seconds before the time limit to save and stop; default: 300
# export SBATCH_OUTPUT=runs/slurm-%x-%j.out   # its folder must exist; default: slurm-ID.out in the current folder

# ---- environment on every node; `module` and `conda` work here if they work in batch scripts
# source /etc/profile.d/modules.sh        # where `module` is not defined in batch scripts
# module load gcc/13 cuda/13
# conda activate mrmae                    # the environment with FFCV's libraries, if conda installed them
# export HF_HUB_OFFLINE=1                 # nodes without internet: load teachers from files (docs/slurm.md)
# export DS_ACCELERATOR=cpu               # nodes without GPUs
# export PYTORCH_ALLOC_CONF=expandable_segments:True   # if memory is short because of fragmentation
PYTHON=.venv/bin/python                   # Python of the environment; inside the container, if there is one

# ---- launching ranks
TASKS_PER_NODE=                           # ranks per node; empty: the number of GPUs of the job on a node
SRUN_OPTIONS=()                           # further options of srun, (--label) for example
CONTAINER=()                              # a command that is placed before $PYTHON; IMAGE sets it for apptainer

# ---- container (docs/container.md): the image of `make image`, in which every rank runs
IMAGE=                                    # /images/mrmae.sif (apptainer); /images/mrmae.sqsh or REGISTRY#NAME:TAG (pyxis)
MOUNTS=()                                 # (/data /scratch/runs): folders beside the repository; no spaces or commas

# ---- network
NETWORK_INTERFACE=                        # for NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: ib0, for example
# export MASTER_ADDR=                     # only if Slurm's address of the first node is not the one to use
# export NCCL_IB_HCA=mlx5                 # InfiniBand adapters to use; see docs/slurm.md, "NCCL"
# export NCCL_DEBUG=INFO                  # default: WARN

# ---- data
# Folder on each node's local disk or memory to which the .beton files are copied, once per node (the recipe's
# loader.cache_dir). A folder with $SLURM_JOB_ID in its name is removed when the job ends; others stay for the next job.
CACHE_DIR=                                 # /dev/shm/$USER-${SLURM_JOB_ID:-}

# ---- largest number of restarts of a job after a checkpoint near its time limit, or a lost node
MAX_RESTARTS=50
