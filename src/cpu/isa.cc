#include "cpu/isa.h"

#include <cstdlib>
#include <string_view>

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace deltafox::cpu {
namespace {

#if defined(__x86_64__)

bool bit(unsigned word, int index) {
  return ((word >> index) & 1U) != 0;
}

// The registers that the operating system saves.
unsigned saved_state() {
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// A process must ask for the tile registers before its first use of them.
bool permit_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
  Isa found;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !bit(c, 27)) return found;  // OSXSAVE
  const bool fma = bit(c, 12);
  const unsigned state = saved_state();
  if ((state & 0x6U) != 0x6U || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
  found.avx2 = fma && bit(b, 5);
  if ((state & 0xe6U) != 0xe6U) return found;
  found.avx512 = found.avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  found.avx512_vnni = found.avx512 && bit(c, 11);
  const bool amx_bf16 = bit(d, 22);
  const bool amx_int8 = bit(d, 24) && bit(d, 25);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) found.avx512_bf16 = found.avx512 && bit(a, 5);
  constexpr unsigned kTiles = 0x60000;
  if ((amx_bf16 || amx_int8) && (state & kTiles) == kTiles && permit_tiles()) {
    found.amx_bf16 = amx_bf16 && found.avx512_bf16;
    found.amx_int8 = amx_int8 && found.avx512_vnni;
  }
  return found;
}

#else

Isa detect() {
  return {};
}

#endif

Isa both(const Isa& a, const Isa& b) {
  return {a.avx2 && b.avx2,
          a.avx512 && b.avx512,
          a.avx512_vnni && b.avx512_vnni,
          a.avx512_bf16 && b.avx512_bf16,
          a.amx_int8 && b.amx_int8,
          a.amx_bf16 && b.amx_bf16};
}

const Isa& machine() {
  static const Isa found = detect();
  return found;
}

Isa allowed() {
  const char* const name = std::getenv("DELTAFOX_ISA");
  if (name == nullptr || std::string_view(name) == "amx") return machine();
  const std::string_view cap(name);
  if (cap == "plain") return {};
  if (cap == "avx2") return both(machine(), {.avx2 = true});
  if (cap == "avx512") {
    return both(machine(),
                {.avx2 = true, .avx512 = true, .avx512_vnni = true, .avx512_bf16 = true});
  }
  fail("DELTAFOX_ISA: must be plain, avx2, avx512 or amx");
}

Isa& current() {
  static Isa isa = allowed();
  return isa;
}

}  // namespace

const Isa& isa() {
  return current();
}

IsaForTesting::IsaForTesting(const Isa& cap) : before_(current()) {
  current() = both(machine(), cap);
}

IsaForTesting::~IsaForTesting() {
  current() = before_;
}

}  // namespace deltafox::cpu
