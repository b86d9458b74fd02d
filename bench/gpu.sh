#!/bin/bash
# Decoding, prompts and training of 760M models on the GPU, the kernels by themselves, and what
# flash-linear-attention takes on the same machine, as JSON files in OUT. Needs the benches:
#   cmake --preset cuda -D DELTAFOX_BUILD_BENCH=ON && cmake --build build/cuda
#   bench/gpu.sh OUT [FLA]      FLA: a checkout of flash-linear-attention; without it no comparison
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
fla=${2:-}
build=${BUILD:-build/cuda}
program=$build/deltafox
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$out"
for name in delta_net fox_pro transformer_llama mamba2 hgrn2; do
  model=$folder/$name
  batches=1,16
  [[ $name != delta_net ]] || batches=1,4,8,16,64,256
  "$program" init "$name-760m" --dtype bfloat16 -o "$model"
  "$program" bench model --model "$model" --device cuda --threads 8 --prompt 0 --gen 400 \
    --batch "$batches" --runs 3 --json >"$out/decode_$name.json"
  "$program" bench model --model "$model" --device cuda --threads 8 --prompt 512,2048,16384 --gen 0 \
    --runs 5 --json >"$out/prefill_$name.json"
  if [[ $name == delta_net ]]; then
    for dtype in int8 int4; do
      "$program" quantize --model "$model" --dtype "$dtype" --output "$model-$dtype"
      "$program" bench model --model "$model-$dtype" --device cuda --threads 8 --prompt 0 --gen 400 \
        --batch 1,8 --runs 3 --json >"$out/decode_${name}_$dtype.json"
      rm -r "$model-$dtype"
    done
  fi
  rm -r "$model"
done
for name in delta_net fox_pro transformer_llama mamba2 hgrn2 samba; do
  "$build"/bench/bench_training "$name-760m" 16384 5 "$(nproc)" cuda ops >"$out/train_$name.json"
done
"$build"/bench/bench_cuda_kernels >"$out/kernels.json"
for shape in "16384 24 64" "16384 12 128" "16384 24 32" "2048 24 64" "1024 24 64"; do
  for major in 9 8; do  # the kernels of this card, and of older ones
    DELTAFOX_CUDA_MAJOR=$major "$build"/bench/bench_cuda_attention $shape >"$out/attention_${shape// /_}_sm${major}0.json"
  done
done
"$build"/bench/bench_cuda_training >"$out/training_ops.json"
if [[ -n $fla ]]; then
  bench/peers/fla_baseline.py --fla "$fla" --compile 6 --json "$out/fla.json"
fi
