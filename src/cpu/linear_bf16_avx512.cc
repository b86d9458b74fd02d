// y [+]= x wᵀ with bfloat16 weights and x rounded to bfloat16, by vdpbf16ps: each lane adds the two
// products of a pair to its float32 sum.
#if defined(__x86_64__)
#define DELTAFOX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#include "cpu/dot_gemm-inl.h"

namespace deltafox::cpu {
namespace {

struct Bf16Kind {
  using Element = std::uint16_t;
  using Vector = __m512i;
  static constexpr std::int64_t kStep = 32;

  DELTAFOX_TARGET static Vector load(const std::uint16_t* p) { return _mm512_loadu_si512(p); }
  DELTAFOX_TARGET static Vector load_first(const std::uint16_t* p, std::int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ULL << n) - 1ULL), p);
  }
  DELTAFOX_TARGET static __m512i bits(Vector v) { return v; }
  DELTAFOX_TARGET static __m512 madd(Vector x, Vector w, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  // vcvtneps2bf16 would flush what is subnormal; float32 that small is of no consequence here.
  DELTAFOX_TARGET static void convert(const float* x, std::int64_t n, std::uint16_t* to) {
    std::int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      const auto both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
      _mm512_storeu_si512(to + i, reinterpret_cast<__m512i>(both));
    }
    for (; i < n; i += 16) {
      const auto inside = static_cast<__mmask16>((1U << std::min<std::int64_t>(16, n - i)) - 1U);
      const auto half =
          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, x + i)));
      _mm256_mask_storeu_epi16(to + i, inside, half);
    }
  }
};

}  // namespace

void linear_bf16_avx512(Context& ctx, const LinearArgs& args) {
  linear_by_dots<Bf16Kind>(ctx, args);
}

bool linear_glu_bf16_avx512(Context& ctx, const LinearGluArgs& args) {
  return linear_glu_by_dots<Bf16Kind>(ctx, args);
}

}  // namespace deltafox::cpu
#endif
