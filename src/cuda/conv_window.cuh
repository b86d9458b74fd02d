// The last inputs of a short convolution of width 4, for threads that walk rows of eight channels.
#pragma once

#include "cuda/eight.cuh"

namespace deltafox::cuda {

// window[1] to window[3] = the last three inputs before a sequence, from its state [8, 4], oldest
// first, which is replaced by the last four of the sequence's `length` rows x, `stride` apart.
// Everything is asked for before any of it is stored: a store would hold up the loads behind it.
// Only with `store` is the state written.
template <typename T>
__device__ void replace_conv_state(float (&window)[4][8], float* of_channels, const T* x,
                                   std::ptrdiff_t stride, int length, bool store) {
  auto* state = reinterpret_cast<float4*>(of_channels);
  float4 old[8];
  Eight<T> last[4];
#pragma unroll
  for (int c = 0; c < 8; ++c) old[c] = state[c];
#pragma unroll
  for (int i = 0; i < 4; ++i) last[i].load(x + max(length - 4 + i, 0) * stride);
  float inputs[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) last[i].get(inputs[i]);
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    window[1][c] = old[c].y, window[2][c] = old[c].z, window[3][c] = old[c].w;
    float4 now = make_float4(inputs[0][c], inputs[1][c], inputs[2][c], inputs[3][c]);
    // Of fewer rows than it holds, some of the old inputs stay.
    if (length == 1) now = make_float4(old[c].y, old[c].z, old[c].w, now.w);
    if (length == 2) now = make_float4(old[c].z, old[c].w, now.z, now.w);
    if (length == 3) now = make_float4(old[c].w, now.y, now.z, now.w);
    if (store) state[c] = now;
  }
}

}  // namespace deltafox::cuda
