// Sums over lanes of several numbers at once.
#pragma once

namespace deltafox::cuda {

template <int kOffset, int kLast, int kLeft, int kCount>
__device__ void halve_lane_sums(float (&x)[kCount]) {
  if constexpr (kOffset >= kLast) {
    const bool upper = (threadIdx.x & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kLeft / 2; ++i) {
      const float sent = upper ? x[i] : x[i + kLeft / 2];
      const float kept = upper ? x[i + kLeft / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(0xffffffffU, sent, kOffset);
    }
    halve_lane_sums<kOffset / 2, kLast, kLeft / 2>(x);
  }
}

// Sums over the lanes that differ in the bits kOffset, kOffset / 2, ... kLast of their number. Of
// kCount numbers each lane keeps its share, in the first places of x: with a bit set the second
// half of what is left, else the first.
template <int kOffset, int kLast, int kCount>
__device__ void lane_sums(float (&x)[kCount]) {
  halve_lane_sums<kOffset, kLast, kCount>(x);
}

// Which share that is.
template <int kOffset, int kLast>
__device__ int lane_share() {
  return static_cast<int>(threadIdx.x) % (2 * kOffset) / kLast;
}

}  // namespace deltafox::cuda
