// Which kernels this processor can run. Kernels that Highway has no targets for (bfloat16 products,
// VNNI, AMX) are compiled for their instruction set alone, with intrinsics, and chosen here.
#pragma once

namespace deltafox::cpu {

struct Isa {
  bool avx2 = false;         // and FMA
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_vnni = false;  // the dot products of bytes, on 512 bits
  bool avx512_bf16 = false;
  bool amx_int8 = false;
  bool amx_bf16 = false;
};

// What the processor and the operating system offer, found out once. The environment variable
// DELTAFOX_ISA=plain|avx2|avx512|amx allows no more than what it names: for tests and comparisons.
const Isa& isa();

// Until it is destroyed, isa() is `cap`, and no more than the machine has. Not for use while
// kernels run.
class IsaForTesting {
 public:
  explicit IsaForTesting(const Isa& cap);
  ~IsaForTesting();
  IsaForTesting(const IsaForTesting&) = delete;
  IsaForTesting& operator=(const IsaForTesting&) = delete;

 private:
  Isa before_;
};

}  // namespace deltafox::cpu
