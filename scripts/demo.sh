#!/usr/bin/env bash
# Run the README's commands on a small real dataset: convert, pre-train, fine-tune, build the table.
# Takes about eight minutes on two cores.
#   scripts/demo.sh                    Fashion-MNIST
#   scripts/demo.sh --data FOLDER      your own ImageFolder tree; runs go to runs/demo_FOLDER
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

data=""
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=${2:-}; shift 2 ;;
        *) echo "usage: scripts/demo.sh [--data FOLDER]" >&2; exit 2 ;;
    esac
done

case $data in "" | /*) ;; *) data=$caller/$data ;; esac  # relative to where the script was called

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    ranks=2
else
    ranks=$gpus
fi

show() { printf '\n$ %s\n' "$*"; "$@"; }

fetch_fashion_mnist() {
    dpkg -s dataset-fashion-mnist >/dev/null 2>&1 && return
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    # Without apt or root, the data script downloads the same files.
    { "${sudo[@]}" apt-get update -qq && "${sudo[@]}" apt-get install -y -qq dataset-fashion-mnist; } >/dev/null 2>&1 || true
}

counts=(--num-train-images 3200 --num-val-images 2000)
overrides=()
if [ -n "$data" ]; then
    name=demo_$(basename "$data")
    images=datasets/$name runs=runs/$name
    show python data/folder.py "$data" --out "$images" --max-side 64 "${counts[@]}"
    overrides=("data.train=$images/train.beton" "data.val=$images/val.beton" "teachers.mae.source=$runs/mae_tiny/pretrain")
else
    images=datasets/demo runs=runs
    fetch_fashion_mnist
    show python data/fashion_mnist.py --out "$images" "${counts[@]}"
fi

# train NAME STAGE [RECIPE]; the default is the recipe beside the engine config
train() {
    local name=$1 stage=$2 recipe=() run=()
    [ $# -lt 3 ] || recipe=(--recipe "$3")
    [ -z "$data" ] || run=(--run "$runs/$name")
    local changes=("${overrides[@]}")
    # Only the recipe with a teacher has a teachers section to override.
    [ "$name" = tiny ] || changes=("${overrides[@]:0:2}")
    show deepspeed -q --num_gpus "$ranks" train.py --ds_config ds_configs/tiny.json --stage "$stage" \
        "${recipe[@]}" "${run[@]}" "${changes[@]}"
}

start=$SECONDS
baselines=ds_configs/baselines
train mae_tiny pretrain $baselines/mae_tiny.yaml
train tiny pretrain
train mcmae_tiny pretrain $baselines/mcmae_tiny.yaml
train tiny finetune
train mae_tiny finetune $baselines/mae_tiny.yaml
train mcmae_tiny finetune $baselines/mcmae_tiny.yaml
train scratch_tiny finetune $baselines/scratch_tiny.yaml
show mrmae table "$runs"
show mrmae report "$runs"

cat <<END

Finished in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s. Results:
  $runs/report.html                           all of it on one page for a browser
  $runs/table.md, table.csv, table.png        scaling table
  $runs/tiny/pretrain/images/                 reconstructions; attention of student and teacher
  $runs/*/*/loss_curves.png, metrics.jsonl    losses of each stage (or: tensorboard --logdir $runs)
  $runs/*/*/record.json, recipe.yaml          configuration, environment and results of each run
END
