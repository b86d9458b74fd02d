#!/bin/bash
# Trains the bundled model from nothing: configs/bundled/train.sh WORK [--device cuda] [key=value...]
# WORK receives the texts, the data, the run and, in WORK/model, the model in bfloat16. Whatever is
# already there is not made again; a run that was interrupted goes on.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:?usage: $0 WORK [--device cuda] [key=value...]}
shift
deltafox=${DELTAFOX:-$root/build/cpu/deltafox}
mkdir -p "$work"

[[ -f $work/texts/SOURCES.md ]] || "$root/tools/bundled_corpus.py" "$work/texts"
[[ -f $work/data/data.json ]] ||
  "$deltafox" data "$work/texts" --train-tokenizer --vocab-size 8192 --heldout 0.01 -o "$work/data"
"$deltafox" train "$root/configs/bundled/delta_net.yaml" data_dir="$work/data" \
  output_dir="$work/run" "$@"
[[ -f $work/model/model.safetensors ]] ||
  "$deltafox" export "$work/run" --dtype bfloat16 --output "$work/model"
cp "$root/models/english-9m/generation_config.json" "$work/model"
