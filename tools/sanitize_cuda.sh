#!/bin/bash
# Runs GPU tests under compute-sanitizer, several at the same time.
#   tools/sanitize_cuda.sh [GPU_TESTS [RESULTS]]     build/cuda/tests/gpu_tests, build/sanitize
# From the environment: TOOLS (memcheck initcheck racecheck), JOBS at a time (as many as cores), LIMIT of seconds in
# all (480) and EACH of a run (180), FILTER of tests. Prints a line for each run, then the places in kernels that were
# reported, with how often; logs lie in RESULTS. Ends with "N passed, N failed", in runs: what was cut off has failed.
set -uo pipefail
cd "$(dirname "$0")/.."

# Every kernel is launched by these, in each of its forms, at the smallest sizes that tests have: ops against plain
# results, narrow models, and of golden ones recorded steps and gradients. Left out is what launches the same again:
# equal bits in other batches and runs, wide models, generation, training.
ops='Cuda*:DTypes/*:Forms/*'
models='Narrow/*StepsAreAsExact*:Golden/CudaModel.Recorded*:Golden/CudaGradients.AreTheSameBits*'
again='*CpuTraining*:*Neighbours*:*InAnyBatchAndRun*:*AloneAndInABatch*:*DoesNotDepend*:*DoNotDependOnTheBatch*'
again+=':*OnTheirSequenceAlone*:*RepeatToTheBit*:*ManyOutputs*'
# What cards older than 9.0 have kernels of their own for.
older='*CudaAttention*.EqualsPlain*/BF16:*CudaDeltaRule.*Plain*/BF16:*CudaSsd.*/BF16'
# Of each tool those that take longest go first, a run for each test and parameter; the others have a run for each
# suite.
long='Narrow/|Golden/|CudaProduct|CudaStepOfForm|ChooseToken|CudaAttention|ManyRows|Segments|CudaDecayed'

export tests results sanitizer end each=${EACH:-180}
tests=$(realpath "${1:-build/cuda/tests/gpu_tests}")
results=$(realpath -m "${2:-build/sanitize}")
end=$((EPOCHSECONDS + ${LIMIT:-480}))
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
  echo "error: no compute-sanitizer on PATH or in /usr/local/cuda/bin" >&2
  exit 2
}
rm -rf "$results"
mkdir -p "$results"

# runs MAJOR FILTER: "MAJOR TESTS" for each run
runs() {
  "$tests" --gtest_list_tests --gtest_filter="$2" | awk -v major="$1" -v long="$long" '
    /^[^ ]/ { suite = $1 }
    /^ / {
      name = suite $1
      run = name
      if (name !~ long) sub("[.].*", "", run)
      tests[run] = tests[run] ":" name
    }
    END { for (run in tests) print major, substr(tests[run], 2) }' | sort -r
}

# one NUMBER TOOL MAJOR TESTS
one() {
  local log=$results/$2-$1.log start=$EPOCHSECONDS seconds status options=() major=$3 name=${4%%:*}
  [[ $name == "$4" ]] || name=${name%%.*}
  [[ $3 == 9 ]] || name+=" as on $3.0"
  if ((start >= end)); then
    echo "no time left: $2 of $name"
    return
  fi
  seconds=$((end - start < each ? end - start : each))
  case $2 in
    # How kernels of libraries share memory is not ours to judge, and cuBLASLt's do not run under it. It is slow, so
    # some kernels are watched only in tests of their own: programs of steps, whose blocks wait for each other, and
    # plain products, which stand in for a library's.
    racecheck)
      export DELTAFOX_PLAIN_PRODUCTS=1 DELTAFOX_TEST_ROUNDS=20
      options=(--num-cuda-barriers 96 --racecheck-num-workers 2)
      case $4 in
        # What it does not watch runs beside it, but for kernels with tensor copies, which end with its internal error:
        # as on an older card there are none, and what a program of steps gathers is launched by itself.
        Narrow/*)
          major=8
          options+=(--kernel-name kernel_substring=step)
          ;;
        *AProgram*) options+=(--kernel-name kernel_substring=step_program) ;;
        *CudaProduct* | *CudaLinear*) options+=(--kernel-name kernel_substring=deltafox) ;;
        *) options+=(--kernel-name kernel_substring=deltafox --kernel-name-exclude kernel_substring=product_plain) ;;
      esac
      ;;
    # It does not see what bulk copies write, cuBLASLt's among them.
    initcheck)
      major=8
      export DELTAFOX_PLAIN_PRODUCTS=1
      ;;
  esac
  DELTAFOX_CUDA_MAJOR=$major timeout --kill-after=5 "$seconds" \
    "$sanitizer" --tool "$2" --error-exitcode 9 --show-backtrace no --launch-timeout 120 --max-connections 100 \
    "${options[@]}" "$tests" --gtest_brief=1 --gtest_filter="$4" >"$log" 2>&1
  status=$?
  # Racecheck warns of what it is not sure of: of warps that read behind __syncwarp what they have written.
  ((status != 9)) || ! grep -q '(0 errors,' "$log" || grep -q 'FAILED  ]' "$log" || status=0
  case $status in
    0) status=passed ;;
    124 | 137) status='out of time' ;;
    *) status="failed ($status, ${log##*/})" ;;
  esac
  echo "$status: $2 of $name, $((EPOCHSECONDS - start)) s. $(grep -oE '[A-Z]+ SUMMARY: .*' "$log" | tail -n 1)"
}
export -f one

{
  if [[ -n ${FILTER:-} ]]; then
    runs 9 "$FILTER"
  else
    runs 9 "$ops:$models-$again"
    runs 8 "$older"
  fi
} >"$results/runs"
# Racecheck takes too long for whole models; their kernels are those of the ops and of the narrow ones.
for tool in ${TOOLS:-memcheck initcheck racecheck}; do
  { grep -E "$long" "$results/runs"; grep -vE "$long" "$results/runs"; } | sed "s/^/$tool /" |
    grep -v '^racecheck .*Golden/'
done | nl | xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'one "$@"' one | tee "$results/summary"

echo
for tool in ${TOOLS:-memcheck initcheck racecheck}; do
  grep -hE '\.cuh?:[0-9]+' "$results/$tool"-*.log 2>/dev/null |
    sed -E 's/^=+ +//; s/(^| )at .* in /\1in /; s/ \[[0-9]+ hazards\]//' | sort | uniq -c | sort -rn | sed "s/^/$tool/"
done
grep -hE 'FAILED  \]|Detected overflow' "$results"/*.log | sort | uniq -c
passed=$(grep -c '^passed' "$results/summary")
failed=$(grep -vc '^passed' "$results/summary")
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
