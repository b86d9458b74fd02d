#!/bin/bash
# Decoding and prompts of 760M models on the GPU, and what flash-linear-attention takes on the same
# machine, as JSON files in OUT.
#   bench/gpu.sh OUT [FLA]      FLA: a checkout of flash-linear-attention; without it no comparison
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
fla=${2:-}
program=${DELTAFOX:-build/cuda/deltafox}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$out"
for name in delta_net fox_pro transformer_llama mamba2; do
  model=$folder/$name
  batches=1,16
  [[ $name != delta_net ]] || batches=1,4,8,16,64,256
  "$program" init "$name-760m" --dtype bfloat16 -o "$model"
  "$program" bench model --model "$model" --device cuda --threads 8 --prompt 0 --gen 400 \
    --batch "$batches" --runs 3 --json >"$out/decode_$name.json"
  "$program" bench model --model "$model" --device cuda --threads 8 --prompt 512,2048,16384 --gen 0 \
    --runs 5 --json >"$out/prefill_$name.json"
  rm -r "$model"
done
if [[ -n $fla ]]; then
  bench/peers/fla_baseline.py --fla "$fla" --part infer --json "$out/fla.json"
fi
