#!/usr/bin/env bash
# Tables 6 and 3 in miniature, from real images and a real teacher, on this machine.
#   scripts/toy_tables.sh IMAGES TEACHER [NAME]
# IMAGES    ImageFolder tree of 64-pixel images, train/CLASS/* and val/CLASS/*; docs/results uses 60 classes of Tiny-ImageNet
# TEACHER   weights of timm's vit_small_patch14_dinov2, a safetensors file
# NAME      name of the data set in the tables; default: the folder's name
# Run the same command again to resume. SEEDS="0 1" and JOBS (default: the cores, or 1 with a GPU) can be set in the environment.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \?//p' "$0" >&2; exit 2; }
images=$(realpath "$1") teacher=$(realpath "$2") name=${3:-$(basename "$1")}
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
data=datasets/toy seeds=${SEEDS:-0 1}
jobs=${JOBS:-$(python -c 'import os, torch; print(1 if torch.cuda.device_count() else len(os.sched_getaffinity(0)))')}

if [ ! -f $data/val.beton.json ]; then
    mrmae data write "$images" --out $data --name "$name" --num-train-images 7680
fi
ln -sfn "$teacher" $data/teacher.safetensors

started=$SECONDS
for pipeline in toy6 toy3; do
    mrmae submit pipelines/$pipeline.yaml --runs runs/toy --local --processes 1 --jobs "$jobs" --seeds "${seeds// /,}"
done
echo "Done in $(((SECONDS - started) / 60)) minutes. Results: runs/toy/table6.md and table3.md, and the images beside them."
