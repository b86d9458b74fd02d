#!/bin/bash
# From a fresh Debian 12 to text: installs what is missing, builds, and continues a prompt with the
# small model in models/english-9m.
#   ./quickstart.sh ["prompt"]
set -euo pipefail
cd "$(dirname "$0")"
source tools/packages.sh

install_missing "${build_packages[@]}"
[[ -f build/cpu/build.ninja ]] || cmake --preset cpu -D DELTAFOX_BUILD_TESTS=OFF >/dev/null
cmake --build build/cpu --target deltafox_cli
build/cpu/deltafox generate --model models/english-9m -n 80 "${1:-Once upon a time}"
