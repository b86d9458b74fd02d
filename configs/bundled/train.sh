#!/bin/bash
# Trains the bundled model from nothing: configs/bundled/train.sh WORK [--device cuda] [key=value...]
# Installs what is missing, builds, gathers the texts, learns the vocabulary, trains and exports. WORK receives
# the texts, the data, the run and, in WORK/model, the model in bfloat16 with its curve. Whatever is already
# there is not made again; a run that was interrupted goes on. To try it all: train.max_tokens=262144
# schedule.warmup_steps=32768 trains for a minute on two cores, which teaches the model commas.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:?usage: $0 WORK [--device cuda] [key=value...]}
shift
source "$root/tools/packages.sh"

install_missing "${build_packages[@]}" python3
mkdir -p "$work"
work=$(cd "$work" && pwd)
[[ -f $work/texts/SOURCES.md ]] || "$root/tools/bundled_corpus.py" "$work/texts"

cd "$root"
device=cpu
[[ " $* " != *' --device cuda '* && " $* " != *' --device=cuda '* ]] || device=cuda
build=build/$device
[[ -f $build/build.ninja ]] || cmake --preset $device -D DELTAFOX_BUILD_TESTS=OFF >/dev/null
cmake --build $build --target deltafox_cli
deltafox=$build/deltafox

[[ -f $work/data/data.json ]] ||
  $deltafox data "$work/texts" --train-tokenizer --vocab-size 8192 --heldout 0.01 -o "$work/data"
$deltafox train configs/bundled/delta_net.yaml data_dir="$work/data" output_dir="$work/run" "$@"
[[ -f $work/model/model.safetensors ]] ||
  $deltafox export "$work/run" --dtype bfloat16 --output "$work/model"
cp models/english-9m/generation_config.json "$work/model"
tools/plot_training.py "$work/run" -o "$work/model/training.svg"

$deltafox loss --model "$work/model" --text "$(<tests/data/english/held_out.txt)"
$deltafox generate --model "$work/model" -n 80 "Once upon a time"
