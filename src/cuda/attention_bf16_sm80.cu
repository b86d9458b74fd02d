// Forgetting attention of bfloat16 on sm_80 and newer: four warps of 16 queries each; pages pass
// through two stages of shared memory, from the newest to the oldest.
#include "cuda/attention_kernels.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kMinusInfinity = -INFINITY;

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ inline void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Four 8×8 matrices, transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices_transposed(std::uint32_t (&to)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
// acc [16, 8] += a [16, 16] · b [16, 8]
__device__ inline void multiply(float* acc, const std::uint32_t* a, std::uint32_t b0,
                                std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline float exp2_approximate(float x) {
  float y = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline std::uint32_t pack(float low, float high) {
  std::uint32_t packed = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <int kDim>
struct Shared {
  static constexpr int kHeadBytes = kDim * kPageTokens * 2;
  alignas(16) std::byte keys[2][kHeadBytes];
  alignas(16) std::byte values[2][kHeadBytes];
  alignas(
      16) float decays[2][kPageTokens];  // Σ log f from behind a key up to the tile's first query
};

// One thread block's tile and head.
template <int kDim>
class Block {
 public:
  __device__ Block(const AttentionParams& params, Shared<kDim>& shared)
      : params_(params),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    int tile_index = 0;
    params_.tile_of(static_cast<int>(blockIdx.x), tile_index, head_);
    tile_ = params_.tiles[tile_index];
    sequence_ = params_.sequences[tile_.sequence];
    range_ = params_.ranges[tile_index * params_.heads + head_];
    row_ = thread_ / 32 * 16 + lane_ / 4;
    load_queries();
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + 8 * r;
      begin_[r] =
          row < tile_.count
              ? params_.begins[static_cast<std::int64_t>(head_) * params_.tokens + tile_.row + row]
              : 0;
    }
    const int first = range_.first / kPageTokens;
    const int last = (tile_.position + tile_.count - 1) / kPageTokens;
    copy_page(last, 0);
    for (int p = last; p >= first; --p) {
      const int stage = (last - p) & 1;
      if (p > first) copy_page(p - 1, stage ^ 1);
      if (p > first) {
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      visit(p, stage);
      __syncthreads();
    }
    store();
  }

 private:
  __device__ void copy_page(int p, int stage) {
    const std::byte* page = sequence_.page(p);
    const int g = params_.kv_head(head_);
    const std::byte* keys = page + params_.layout.keys(g);
    const std::byte* values = page + params_.layout.values(g);
    for (int i = thread_ * 16; i < Shared<kDim>::kHeadBytes; i += kThreads * 16) {
      copy_async(shared_.keys[stage] + i, keys + i);
      copy_async(shared_.values[stage] + i, values + i);
    }
    copies_commit();
    if (thread_ >= kPageTokens) return;
    float decay = 0;
    if (params_.layout.gate_heads > 0) {
      decay = decay_between(sequence_.page(tile_.position / kPageTokens), page, params_.layout,
                            head_, tile_.position % kPageTokens, thread_);
    }
    shared_.decays[stage][thread_] = decay * 1.4426950408889634F;
  }

  __device__ void load_queries() {
    const int dim = params_.layout.dim;
    const auto* q = static_cast<const __nv_bfloat16*>(params_.q);
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      const int row = row_ + i % 2 * 8;
      const int d = i / 4 * 16 + i / 2 % 2 * 8 + lane_ % 4 * 2;
      std::uint32_t pair = 0;
      if (row < tile_.count) {
        const __nv_bfloat16* from =
            q + (static_cast<std::int64_t>(tile_.row + row) * params_.heads + head_) * dim + d;
        if (d < dim) pair = __bfloat16_as_ushort(from[0]);
        if (d + 1 < dim) pair |= static_cast<std::uint32_t>(__bfloat16_as_ushort(from[1])) << 16;
      }
      q_[i] = pair;
    }
  }

  __device__ void visit(int p, int stage) {
    float s[kPageTokens / 2] = {};
    const std::uint32_t keys = shared_address(shared_.keys[stage]);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kPageTokens / 16; ++n) {
        std::uint32_t b[4];
        load_matrices_transposed(
            b, keys + key_chunk<__nv_bfloat16>(k * 16 + lane_ % 16, n * 2 + lane_ / 16));
        multiply(s + n * 8, q_ + k * 4, b[0], b[1]);
        multiply(s + n * 8 + 4, q_ + k * 4, b[2], b[3]);
      }
    }
    weigh(s, p, stage);
    const std::uint32_t values = shared_address(shared_.values[stage]);
#pragma unroll
    for (int k = 0; k < kPageTokens / 16; ++k) {
      const std::uint32_t a[4] = {pack(s[k * 8], s[k * 8 + 1]), pack(s[k * 8 + 2], s[k * 8 + 3]),
                                  pack(s[k * 8 + 4], s[k * 8 + 5]),
                                  pack(s[k * 8 + 6], s[k * 8 + 7])};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        std::uint32_t b[4];
        load_matrices_transposed(
            b, values + value_chunk<__nv_bfloat16, kDim>(k * 16 + lane_ % 16, n * 2 + lane_ / 16));
        multiply(o_ + n * 8, a, b[0], b[1]);
        multiply(o_ + n * 8 + 4, a, b[2], b[3]);
      }
    }
  }

  // Scores become weights relative to the rows' greatest so far.
  __device__ void weigh(float (&s)[kPageTokens / 2], int p, int stage) {
    const float exponent = params_.scale * 1.4426950408889634F;
    const int first_key = p * kPageTokens + lane_ % 4 * 2;
    const bool masked =
        (p + 1) * kPageTokens - 1 > tile_.position || p * kPageTokens < range_.all_begun;
#pragma unroll
    for (int i = 0; i < kPageTokens / 2; ++i) {
      const int column = i / 4 * 8 + i % 2;
      s[i] = s[i] * exponent + shared_.decays[stage][column + lane_ % 4 * 2];
      if (masked) {
        const int r = i / 2 % 2;
        const int key = first_key + column;
        if (key > tile_.position + row_ + 8 * r || key < begin_[r]) s[i] = kMinusInfinity;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max = max_[r];
#pragma unroll
      for (int i = 2 * r; i < kPageTokens / 2; i += 4) max = fmaxf(max, fmaxf(s[i], s[i + 1]));
      max = fmaxf(max, __shfl_xor_sync(~0U, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0U, max, 2));
      // Rows that have seen no key yet stay at zero.
      const float shift = max == kMinusInfinity ? 0.0F : max;
      const float factor = exp2_approximate(max_[r] - shift);
      max_[r] = max;
      float sum = 0;
#pragma unroll
      for (int i = 2 * r; i < kPageTokens / 2; i += 4) {
#pragma unroll
        for (int k = i; k < i + 2; ++k) {
          s[k] = exp2_approximate(s[k] - shift);
          sum += s[k];
        }
      }
      sum_[r] = sum_[r] * factor + sum;
#pragma unroll
      for (int i = 2 * r; i < kDim / 2; i += 4) {
        o_[i] *= factor;
        o_[i + 1] *= factor;
      }
    }
  }

  __device__ void store() const {
    const int dim = params_.layout.dim;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
      const int row = row_ + 8 * r;
      if (row >= tile_.count) continue;
      if (lane_ % 4 == 0) {
        store_lse(params_, tile_, row, head_, max_[r] * 0.6931471805599453F + logf(sum));
      }
      __nv_bfloat16* to =
          static_cast<__nv_bfloat16*>(params_.o) +
          (static_cast<std::int64_t>(tile_.row + row) * params_.heads + head_) * dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = n * 8 + lane_ % 4 * 2;
        if (d < dim) to[d] = __float2bfloat16(o_[n * 4 + 2 * r] / sum);
        if (d + 1 < dim) to[d + 1] = __float2bfloat16(o_[n * 4 + 2 * r + 1] / sum);
      }
    }
  }

  const AttentionParams& params_;
  Shared<kDim>& shared_;
  int thread_;
  int lane_;
  int head_ = 0;
  int row_ = 0;  // the first of this thread's two rows, eight apart
  AttentionTile tile_{};
  KvSequence sequence_{};
  GroupRange range_{};
  int begin_[2] = {};
  std::uint32_t q_[kDim / 4] = {};
  float max_[2] = {kMinusInfinity, kMinusInfinity};
  float sum_[2] = {};
  float o_[kDim / 2] = {};
};

template <int kDim>
__global__ __launch_bounds__(kThreads) void attend(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) std::byte memory[];
  Block<kDim>(params, *reinterpret_cast<Shared<kDim>*>(memory)).run();
}

template <int kDim>
void launch(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim>);
  cudaFuncSetAttribute(attend<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  attend<kDim><<<params.tile_count * params.heads, kThreads, kBytes, stream>>>(params);
}

}  // namespace

void launch_attention_bf16_sm80(const AttentionParams& params, cudaStream_t stream) {
  switch (padded_dim(params.layout.dim)) {
    case 32:
      return launch<32>(params, stream);
    case 64:
      return launch<64>(params, stream);
    default:
      return launch<128>(params, stream);
  }
}

}  // namespace deltafox::cuda
