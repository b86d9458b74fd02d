// y [+]= x wᵀ with float32 weights, by fused multiply-adds.
#if defined(__x86_64__)
#define DELTAFOX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include "cpu/dot_gemm-inl.h"

namespace deltafox::cpu {
namespace {

struct F32Kind {
  using Element = float;
  using Vector = __m512;
  static constexpr std::int64_t kStep = 16;

  DELTAFOX_TARGET static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  DELTAFOX_TARGET static Vector load_first(const float* p, std::int64_t n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << n) - 1U), p);
  }
  DELTAFOX_TARGET static __m512i bits(Vector v) { return _mm512_castps_si512(v); }
  DELTAFOX_TARGET static __m512 madd(Vector x, Vector w, __m512 sum) {
    return _mm512_fmadd_ps(x, w, sum);
  }
  static void convert(const float* x, std::int64_t n, float* to) { std::copy_n(x, n, to); }
};

}  // namespace

void linear_f32_avx512(Context& ctx, const LinearArgs& args) {
  linear_by_dots<F32Kind>(ctx, args);
}

bool linear_glu_f32_avx512(Context& ctx, const LinearGluArgs& args) {
  return linear_glu_by_dots<F32Kind>(ctx, args);
}

}  // namespace deltafox::cpu
#endif
