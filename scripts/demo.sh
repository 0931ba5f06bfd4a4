#!/usr/bin/env bash
# The whole job on a small real data set, by the commands of the README; about eight minutes on two cores.
#   scripts/demo.sh                    Fashion-MNIST
#   scripts/demo.sh --data FOLDER      an ImageFolder tree of your own, into runs/demo_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

data=""
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=${2:-}; shift 2 ;;
        *) echo "usage: scripts/demo.sh [--data FOLDER]" >&2; exit 2 ;;
    esac
done

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    processes=2
else
    processes=$gpus
fi

show() { printf '\n$ %s\n' "$*"; "$@"; }

fetch_fashion_mnist() {
    dpkg -s dataset-fashion-mnist >/dev/null 2>&1 && return
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    # Where apt or root is missing, the data script downloads the same files instead.
    { "${sudo[@]}" apt-get update -qq && "${sudo[@]}" apt-get install -y -qq dataset-fashion-mnist; } >/dev/null 2>&1 || true
}

counts=(--train-count 3200 --val-count 2000)
where=()
if [ -n "$data" ]; then
    name=demo_$(basename "$data")
    images=datasets/$name runs=runs/$name
    show python data/folder.py "$data" --out "$images" --max-side 64 "${counts[@]}"
    where=("data.train=$images/train.beton" "data.val=$images/val.beton" "teachers.mae.source=$runs/mae_tiny/pretrain")
else
    images=datasets/demo runs=runs
    fetch_fashion_mnist
    show python data/fashion_mnist.py --out "$images" "${counts[@]}"
fi

# train NAME STAGE [RECIPE]: without one, the engine config's own recipe
train() {
    local name=$1 stage=$2 recipe=() run=()
    [ $# -lt 3 ] || recipe=(--recipe "$3")
    [ -z "$data" ] || run=(--run "$runs/$name")
    local settings=("${where[@]}")
    # Only the recipe with a teacher has its section.
    [ "$name" = tiny ] || settings=("${where[@]:0:2}")
    show deepspeed -q --num_gpus "$processes" train.py --ds_config ds_configs/tiny.json --stage "$stage" \
        "${recipe[@]}" "${run[@]}" "${settings[@]}"
}

began=$SECONDS
baselines=ds_configs/baselines
train mae_tiny pretrain $baselines/mae_tiny.yaml
train tiny pretrain
train mcmae_tiny pretrain $baselines/mcmae_tiny.yaml
train tiny finetune
train mae_tiny finetune $baselines/mae_tiny.yaml
train mcmae_tiny finetune $baselines/mcmae_tiny.yaml
train scratch_tiny finetune $baselines/scratch_tiny.yaml
show mrmae table "$runs"

cat <<END

Done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s. Look at:
  $runs/table.md, table.csv, table.png        the scaling table
  $runs/tiny/pretrain/images/               reconstructions, and where student and teacher look
  $runs/*/*/loss_curves.png, metrics.jsonl    each stage's losses (tensorboard --logdir $runs)
  $runs/*/*/record.json, recipe.yaml          what ran, on what, from what
END
