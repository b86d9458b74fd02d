#!/bin/bash
# Decoding and prompts of DeltaNet 760M on the GPU, and what flash-linear-attention takes on the same
# machine, as JSON files in OUT.
#   bench/gpu.sh OUT [FLA]      FLA: a checkout of flash-linear-attention; without it no comparison
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
fla=${2:-}
program=${DELTAFOX:-build/cuda/deltafox}
model=$(mktemp -d)/delta_net-760m
trap 'rm -rf "$(dirname "$model")"' EXIT
mkdir -p "$out"
"$program" init delta_net-760m --dtype bfloat16 -o "$model"
"$program" bench model --model "$model" --device cuda --prompt 0 --gen 400 --batch 1,8,16,64,256 \
  --runs 3 --json >"$out/decode.json"
"$program" bench model --model "$model" --device cuda --prompt 512,2048,16384 --gen 0 --runs 7 \
  --json >"$out/prefill.json"
if [[ -n $fla ]]; then
  bench/peers/fla_baseline.py --fla "$fla" --part infer --json "$out/fla.json"
fi
