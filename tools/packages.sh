# The Debian 12 packages that deltafox needs, and how a script gets them. Sourced, not run.

# To build the program and the library. docs/dependencies.md says what each is for.
build_packages=(
  g++
  cmake
  ninja-build
  pkg-config
  ca-certificates
  libblosc-dev
  libcli11-dev
  libcurl4-openssl-dev
  libfmt-dev
  libhwy-dev
  libssl-dev
  libutf8proc-dev
  libxxhash-dev
  libyaml-cpp-dev
  libzstd-dev
  nlohmann-json3-dev
  zlib1g-dev
)

# To check and test it as well.
test_packages=(
  ccache
  clang-14
  clang-format-14
  clang-tidy-14
  libclang-rt-14-dev
  libgmock-dev
  libgtest-dev
  pybind11-dev
  python3
  python3-dev
  python3-numpy
  python3-pytest
  python3-venv
)

# install_missing PACKAGE...: asks apt only for what is not installed, so that without anything
# missing neither the network nor root is needed.
install_missing() {
  local package missing=()
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
      missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || {
      echo "error: not root, and no sudo to install: ${missing[*]}" >&2
      return 1
    }
    as_root=(sudo)
  fi
  echo "Installing ${missing[*]}"
  "${as_root[@]}" apt-get -qq update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
}
