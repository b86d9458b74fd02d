#!/bin/bash
# Runs the GPU tests under compute-sanitizer, a process for each test and tool, several at a time.
#   tools/sanitize_cuda.sh [GPU_TESTS [RESULTS]]     build/cuda/tests/gpu_tests, build/sanitize
# TOOLS (memcheck racecheck initcheck), JOBS at a time (8), SECONDS_EACH (600) and FILTER, of names of tests, from
# the environment. Prints a line for each test and tool, then each place in a kernel that was reported; logs lie in
# RESULTS. Ends with "N passed, N failed"; what ran out of time failed.
set -uo pipefail
cd "$(dirname "$0")/.."

tests=$(realpath "${1:-build/cuda/tests/gpu_tests}")
results=${2:-build/sanitize}
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
  echo "error: no compute-sanitizer on PATH or in /usr/local/cuda/bin" >&2
  exit 2
}
rm -rf "$results"
mkdir -p "$results"

# What repeats the kernels of other tests at lengths that take too long here.
left_out='Training|FiveSteps|OfManyRows|LongSequence'

# one TOOL TEST
one() {
  local tool=$1 test=$2 log start=$SECONDS status options=()
  log=$results/$tool-${test//\//_}.log
  # Reads and writes of shared memory by libraries' kernels are not ours to judge.
  [[ $tool != racecheck ]] || options=(--kernel-name kernel_substring=deltafox --racecheck-report all)
  timeout "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 1000 "${options[@]}" \
    "$tests" --gtest_brief=1 --gtest_filter="$test:$test/*" >"$log" 2>&1
  status=$?
  case $status in
    0) status=passed ;;
    124) status='out of time' ;;
    *) status=failed ;;
  esac
  printf '%s\t%s\t%s\t%d s\t%s\n' "$status" "$tool" "$test" $((SECONDS - start)) \
    "$(grep -hoE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1)"
}
export -f one
export tests results sanitizer seconds=${SECONDS_EACH:-600}

"$tests" --gtest_list_tests |
  awk '/^[A-Z]/ { suite = $1 } /^  / { sub("/.*", "", $1); print suite $1 }' | uniq |
  grep -vE "$left_out" | grep -E "${FILTER:-.}" >"$results/tests"
for tool in ${TOOLS:-memcheck racecheck initcheck}; do sed "s/^/$tool /" "$results/tests"; done |
  xargs -P "${JOBS:-8}" -L 1 bash -c 'one "$@"' one | tee "$results/summary"

echo
# Where: the lines of a report that name a place in a kernel, counted.
grep -hoE 'in [^ ]+\.cuh?:[0-9]+|at .*\+0x[0-9a-f]+ in [^ ]+' "$results"/*.log | sed 's/.* in //' | sort | uniq -c | sort -rn
echo "$(grep -c '^passed' "$results/summary") passed, $(grep -vc '^passed' "$results/summary") failed"
! grep -qv '^passed' "$results/summary"
