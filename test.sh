#!/bin/bash
# From a fresh Debian 12 to green tests: installs what is missing, checks the sources, builds and
# tests plainly and under sanitizers, and fuzzes each parser for a few seconds.
#   ./test.sh            everything; returns at once if nothing changed since it was last green
#   ./test.sh --force    everything, even then
#   ./test.sh --quick    the plain build and its tests only
# The last line is "N passed, N failed"; a check or a fuzz target counts as one test.
set -euo pipefail
cd "$(dirname "$0")"
source tools/packages.sh

fuzz_seconds=10
# What runs threads of ours, for ThreadSanitizer.
thread_tests='Thread|^model\.Golden|^infer\.Generate|^train\.Train'

# What takes too long under AddressSanitizer.
long_tests='^apps\.Bench\.OfAModelReports|OnTheWholeVocabulary$'

mode=${1:-}
case $mode in
  '' | --force | --quick) ;;
  *)
    echo "usage: $0 [--force | --quick]" >&2
    exit 2
    ;;
esac

# Old ThreadSanitizers do not cope with how far newer kernels spread addresses.
if [[ -z ${DELTAFOX_SAME_ADDRESSES:-} ]] && setarch -R true 2>/dev/null; then
  DELTAFOX_SAME_ADDRESSES=1 exec setarch -R "$0" "$@"
fi

install_missing "${build_packages[@]}" "${test_packages[@]}"

jobs=$(nproc)
passed=0
failed=0
failures=()
left_out=()

# check NAME COMMAND...: runs it and counts it as one test.
check() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  if "$@"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    failures+=("$name")
  fi
  echo "   $((SECONDS - start)) s"
}

# build PRESET [--target TARGET...]
build() {
  local preset=$1
  shift
  cmake --preset "$preset" -D DELTAFOX_BUILD_TESTS=ON -D DELTAFOX_WERROR=ON >build/configure.log 2>&1 || {
    cat build/configure.log
    return 1
  }
  cmake --build "build/$preset" --parallel "$jobs" "$@"
}

# A number of the report's header: tests, failures, skipped.
report_number() { grep -m1 -oP "^\s*$1=\"\K[0-9]+" "$2" || echo 0; }

# run_tests PRESET [CTEST-OPTION...]: counts every test.
run_tests() {
  local preset=$1 report=$PWD/build/$1/junit.xml start=$SECONDS total bad not_run
  shift
  echo "== tests of $preset"
  rm -f "$report"
  ctest --preset "$preset" --parallel "$jobs" --output-junit "$report" "$@" |
    grep -v -E '^ *[0-9]+/[0-9]+ .* Passed |^ +Start ' || true
  total=$(report_number tests "$report")
  bad=$(report_number failures "$report")
  not_run=$(($(report_number skipped "$report") + $(report_number disabled "$report")))
  if ((total == 0)); then
    echo "$preset: no tests ran"
    total=1 bad=1
  fi
  passed=$((passed + total - bad - not_run))
  failed=$((failed + bad))
  ((not_run == 0)) || left_out+=("$not_run skipped tests of $preset")
  ((bad == 0)) || failures+=("tests of $preset")
  echo "   $((SECONDS - start)) s"
}

check_format() {
  find apps bench examples include python src tests \
    \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
    xargs -0 clang-format-14 --dry-run -Werror
}

check_includes() { tools/check_includes.py --self-test && tools/check_includes.py; }

# The Python package, against the library that was just built, with Debian's NumPy; and, where a package
# index can be reached, as a wheel in a fresh environment.
test_python() {
  local environment=build/python-tools
  cmake --preset cpu -D DELTAFOX_PYTHON=ON -D Python_EXECUTABLE=/usr/bin/python3 >build/configure.log &&
    cmake --build build/cpu --parallel "$jobs" --target deltafox_python &&
    PYTHONPATH=build/cpu/python /usr/bin/python3 -m pytest -q -rs -p no:cacheprovider || return 1
  left_out+=('Python tests that need torch, transformers or lm_eval')
  if [[ ! -e $environment/ready ]]; then
    /usr/bin/python3 -m venv "$environment" &&
      "$environment"/bin/pip -q --retries 0 install scikit-build-core pybind11 &&
      touch "$environment"/ready || {
      left_out+=('the Python wheel: no package index')
      return 0
    }
  fi
  # The compiler's name and the flags of the build above, whose objects ccache then finds.
  CXX=c++ "$environment"/bin/pip -q wheel --no-deps --no-build-isolation --wheel-dir build/wheels \
    --config-settings=cmake.define.DELTAFOX_WERROR=ON . || return 1
  rm -rf build/python-fresh
  /usr/bin/python3 -m venv build/python-fresh &&
    build/python-fresh/bin/pip -q install build/wheels/deltafox-*.whl &&
    build/python-fresh/bin/python python/tests/fresh.py models/english-9m
}

# fuzz NAME: new inputs stay in build/; the seeds are only read.
fuzz() {
  local new=build/fuzz-corpus/$1
  mkdir -p "$new"
  build/cpu-asan/tests/fuzz/fuzz_"$1" -max_total_time=$fuzz_seconds -timeout=10 \
    -rss_limit_mb=2048 -artifact_prefix=build/fuzz-"$1"- "$new" tests/fuzz/corpus/"$1"
}

# Fuzzes every target, as many at a time as there are cores, and counts each as a test.
fuzz_all() {
  local source name names=() running=0 start=$SECONDS
  for source in tests/fuzz/*_fuzz.cc; do names+=("$(basename "$source" _fuzz.cc)"); done
  echo "== fuzzing ${#names[@]} parsers for $fuzz_seconds s each"
  for name in "${names[@]}"; do
    ((running < jobs)) || { wait -n || true; running=$((running - 1)); }
    rm -f build/fuzz-"$name".clean
    { fuzz "$name" >build/fuzz-"$name".log 2>&1 && touch build/fuzz-"$name".clean; } &
    running=$((running + 1))
  done
  wait
  for name in "${names[@]}"; do
    if [[ -e build/fuzz-"$name".clean ]]; then
      passed=$((passed + 1))
      echo "$name: $(tail -n 1 build/fuzz-"$name".log)"
    else
      failed=$((failed + 1))
      failures+=("fuzzing $name")
      tail -n 40 build/fuzz-"$name".log
    fi
  done
  echo "   $((SECONDS - start)) s"
}

# Everything that a result depends on: the files and the versions of the packages.
state_of_everything() {
  {
    find . \( -path ./build -o -path ./.git -o -name __pycache__ \) -prune -o -type f -print0 |
      sort -z | xargs -0 sha256sum
    dpkg-query -W "${build_packages[@]}" "${test_packages[@]}"
  } | sha256sum
}

finish() {
  echo
  ((${#failures[@]} == 0)) || printf 'Failed: %s\n' "${failures[@]}"
  ((${#left_out[@]} == 0)) || printf 'Left out: %s\n' "${left_out[@]}"
  echo "$passed passed, $failed failed"
}

mkdir -p build
green=build/green
everything=$(state_of_everything)
if [[ $mode == '' && -f $green && $(head -n 1 $green) == "$everything" ]]; then
  echo "Nothing changed since the last green run; --force runs it again."
  tail -n +2 $green
  exit
fi

check 'build of cpu' build cpu
run_tests cpu
check 'Python package' test_python
if [[ $mode == --quick ]]; then
  left_out+=('checks of the sources, sanitizers, fuzzing (--quick)')
  finish
  exit $((failed > 0))
fi

# The CUDA back end compiles without a GPU; its tests are left out there.
if PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; then
  check 'build of cuda' build cuda --target deltafox_cli gpu_tests
  if [[ -e /dev/nvidia0 ]]; then
    check 'tests of cuda' build/cuda/tests/gpu_tests --gtest_brief=1
  else
    left_out+=('tests of cuda: no GPU')
  fi
else
  left_out+=('the CUDA back end: no toolkit')
fi

check 'format' check_format
check 'include directions' check_includes
check 'links of the documentation' tools/check_links.py
check 'clang-tidy' tools/tidy.py build/cpu

check 'build of cpu-asan' build cpu-asan
run_tests cpu-asan -E "$long_tests"
left_out+=('the benchmark of a model and filters of a whole vocabulary under AddressSanitizer')
fuzz_all

check 'build of cpu-tsan' build cpu-tsan --target test_core test_ops test_io test_model test_infer test_train
run_tests cpu-tsan -R "$thread_tests"
left_out+=('ThreadSanitizer on tests without threads')

finish | tee build/summary
((failed == 0)) || exit 1
{
  echo "$everything"
  cat build/summary
} >$green
