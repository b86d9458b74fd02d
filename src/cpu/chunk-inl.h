// What the chunked recurrences on a state [K, V] share.
//
// Memory of a chunk has rows padded to a multiple of 16, and zeros in the padding, so that its
// matrix products need no masks.
#if defined(DELTAFOX_CPU_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DELTAFOX_CPU_CHUNK_INL_H_
#undef DELTAFOX_CPU_CHUNK_INL_H_
#else
#define DELTAFOX_CPU_CHUNK_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// The padding; and triangular matrices are computed in row blocks of this size.
constexpr std::int64_t kBlock = 16;

constexpr std::int64_t round_up(std::int64_t n) {
  return (n + kBlock - 1) / kBlock * kBlock;
}

// Rows of one head of one sequence: element d of row t is at data[t · stride + d].
struct HeadRows {
  const float* data;
  std::int64_t stride;
  const float* row(std::int64_t t) const { return data + t * stride; }
};

// Rows [begin, begin + length) times `scale` into rows of `stride`, zeros beside and below them.
HWY_INLINE void load_rows(HeadRows rows, std::int64_t begin, std::int64_t length,
                          std::int64_t width, float scale, float* to, std::int64_t stride) {
  std::fill(to, to + round_up(length) * stride, 0.0f);
  for (std::int64_t t = 0; t < length; ++t) {
    const float* from = rows.row(begin + t);
    for (std::int64_t i = 0; i < width; ++i) to[t * stride + i] = from[i] * scale;
  }
}

// f(state) with the state [K, V] in padded rows: where it lies if that needs no padding, else
// copied to `padded` and back.
template <typename F>
HWY_INLINE void with_padded_state(float* state, std::int64_t key_dim, std::int64_t value_dim,
                                  float* padded, F&& f) {
  const std::int64_t stride = round_up(value_dim);
  if (key_dim == round_up(key_dim) && value_dim == stride) {
    f(state);
    return;
  }
  std::fill(padded, padded + round_up(key_dim) * stride, 0.0f);
  for (std::int64_t i = 0; i < key_dim; ++i) {
    std::copy_n(state + i * value_dim, value_dim, padded + i * stride);
  }
  f(padded);
  for (std::int64_t i = 0; i < key_dim; ++i) {
    std::copy_n(padded + i * stride, value_dim, state + i * value_dim);
  }
}

// One token of a recurrence whose state decays, in one pass over the state [K, V]:
//   S ← diag(decay) S + k vᵀ,  o = scale · Sᵀ q
// decay(i) is the factor of row i.
template <typename Decay>
HWY_INLINE void decayed_step(float* state, std::int64_t key_dim, std::int64_t value_dim,
                             Decay&& decay, const float* k, const float* v, const float* q,
                             float scale, float* o) {
  const auto columns = [&]<int kVectors>(std::int64_t j, auto&& load_vector,
                                         auto&& store_vector) HWY_ATTR {
    VF32 values[kVectors];
    VF32 sums[kVectors];
    for (int c = 0; c < kVectors; ++c) {
      values[c] = load_vector(v + j + c * lanes());
      sums[c] = hn::Zero(kF32);
    }
    for (std::int64_t i = 0; i < key_dim; ++i) {
      const VF32 factor = hn::Set(kF32, decay(i));
      const VF32 key = hn::Set(kF32, k[i]);
      const VF32 query = hn::Set(kF32, q[i]);
      for (int c = 0; c < kVectors; ++c) {
        float* at = state + i * value_dim + j + c * lanes();
        const VF32 s = hn::MulAdd(key, values[c], hn::Mul(factor, load_vector(at)));
        store_vector(s, at);
        sums[c] = hn::MulAdd(query, s, sums[c]);
      }
    }
    for (int c = 0; c < kVectors; ++c) {
      store_vector(hn::Mul(sums[c], hn::Set(kF32, scale)), o + j + c * lanes());
    }
  };
  const auto load_whole = [](const float* p) HWY_ATTR { return load(p); };
  const auto store_whole = [](VF32 x, float* p) HWY_ATTR { store(x, p); };
  std::int64_t j = 0;
  for (; j + 4 * lanes() <= value_dim; j += 4 * lanes()) {
    columns.template operator()<4>(j, load_whole, store_whole);
  }
  for (; j + lanes() <= value_dim; j += lanes()) {
    columns.template operator()<1>(j, load_whole, store_whole);
  }
  if (j < value_dim) {
    columns.template operator()<1>(
        j, [n = value_dim - j](const float* p) HWY_ATTR { return load_first(p, n); },
        [n = value_dim - j](VF32 x, float* p) HWY_ATTR { store_first(x, p, n); });
  }
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
