#!/bin/bash
# Runs the GPU tests under compute-sanitizer, in shards at the same time.
#   tools/sanitize_cuda.sh [GPU_TESTS [RESULTS]]     build/cuda/tests/gpu_tests, build/sanitize
# From the environment: TOOLS (memcheck racecheck initcheck), SHARDS of each (as many as cores), JOBS at a time (the
# same), SECONDS_EACH (900) and FILTER of tests. Prints a line for each shard, then the places in kernels that were
# reported, with how often; logs lie in RESULTS. Ends with "N passed, N failed", in shards: what ran out of time failed.
set -uo pipefail
cd "$(dirname "$0")/.."

export tests results sanitizer shards seconds filter
tests=$(realpath "${1:-build/cuda/tests/gpu_tests}")
results=${2:-build/sanitize}
shards=${SHARDS:-$(nproc)}
seconds=${SECONDS_EACH:-900}
# Left out is what runs the kernels of other tests for too long.
filter=${FILTER:-*-*Training*:*FiveSteps*:*OfManyRows*:*LongSequence*}
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
  echo "error: no compute-sanitizer on PATH or in /usr/local/cuda/bin" >&2
  exit 2
}
rm -rf "$results"
mkdir -p "$results"

# one TOOL SHARD
one() {
  local log=$results/$1-$2.log start=$SECONDS status options=()
  # How kernels of libraries share memory is not ours to judge.
  [[ $1 != racecheck ]] || options=(--kernel-name kernel_substring=deltafox --racecheck-report analysis)
  GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$2 timeout --kill-after=5 "$seconds" \
    "$sanitizer" --tool "$1" --error-exitcode 9 --show-backtrace no "${options[@]}" \
    "$tests" --gtest_filter="$filter" >"$log" 2>&1
  status=$?
  case $status in
    0) status=passed ;;
    124 | 137) status="out of time in $(grep '^\[ RUN' "$log" | tail -n 1)" ;;
    *) status="failed ($status)" ;;
  esac
  echo "$status: $1 of shard $2, $((SECONDS - start)) s. $(grep -oE '[A-Z]+ SUMMARY: .*' "$log" | tail -n 1)"
}
export -f one

for tool in ${TOOLS:-memcheck racecheck initcheck}; do
  for ((shard = 0; shard < shards; ++shard)); do echo "$tool $shard"; done
done | xargs -P "${JOBS:-$shards}" -L 1 bash -c 'one "$@"' one | tee "$results/summary"

echo
for tool in ${TOOLS:-memcheck racecheck initcheck}; do
  grep -hE '^=+ +(Error|.*access at|.*in [^ ]+:[0-9]+)' "$results/$tool"-*.log 2>/dev/null |
    grep -oE '[A-Za-z0-9_]+\.(cu|cuh|h):[0-9]+' | sort | uniq -c | sort -rn | sed "s/^/$tool/"
done
grep -h '^\[  FAILED  \] [^ ]*\.' "$results"/*.log | sort -u
passed=$(grep -c '^passed' "$results/summary")
failed=$(grep -vc '^passed' "$results/summary")
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
