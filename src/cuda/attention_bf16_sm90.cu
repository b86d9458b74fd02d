// Forgetting attention of bfloat16 on sm_90: a persistent thread block with one warp that copies
// pages into shared memory, and two or three warpgroups that each attend for 64 queries of a tile.
//
// Every thread arrives for itself at the barrier of what it has written or read, not one lane for
// its warp: so it is ordered by the barriers alone.
//
// Per warpgroup and 128 keys: S = Q Kᵀ is a product onto the keys' share of the decay
// (c_ref − c_j)·√D, c the gates' running sums and c_ref that before the tile's first query: what is
// missing, c_i − c_ref, is the same for all keys of a query and cancels in the softmax. Then, while
// the tensor cores already add up the weighted values of the keys before, the exponentials.
#include <climits>

#include "cuda/attention_kernels.cuh"
#include "cuda/sm90.cuh"

// Compiled for older architectures too, where the kernel is empty and all that it uses unused.
#pragma nv_diag_suppress 177

namespace deltafox::cuda {

namespace {

using namespace sm90;

constexpr int kKeys = 2 * kPageTokens;  // of a turn of the loop
constexpr float kMinusInfinity = -INFINITY;

template <int kDim>
struct Config {
  static constexpr int kWarpgroups = kDim == 128 ? 2 : 3;
  static constexpr int kConsumers = kWarpgroups * 128;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kStages = kDim == 128 ? 2 : 4;
  static constexpr int kRegisters = kDim == 128 ? 240 : 160;
  static constexpr int kProducerRegisters = kDim == 128 ? 24 : 32;
  static constexpr int kHeadBytes = kDim * kPageTokens * 2;  // of a page's keys
  static constexpr Swizzle kRowSwizzle = kDim == 32 ? Swizzle::k64 : Swizzle::k128;
  static constexpr int kRowBytes = kDim == 32 ? 64 : 128;  // of a panel of queries or values
};

template <int kDim>
struct Shared {
  using C = Config<kDim>;
  alignas(1024) std::byte keys[C::kStages][2 * C::kHeadBytes];
  alignas(1024) std::byte values[C::kStages][2 * C::kHeadBytes];
  // [panels, 64, min(kDim, 64)], chunks swizzled
  alignas(1024) std::byte queries[C::kWarpgroups][kQueryGroup * kDim * 2];
  alignas(16) float decays[C::kStages][kKeys];
  std::uint64_t keys_full[C::kStages];
  std::uint64_t keys_empty[C::kStages];
  std::uint64_t values_full[C::kStages];
  std::uint64_t values_empty[C::kStages];
  int turn[2];
  std::uint64_t turn_full[2];
  std::uint64_t turn_empty[2];
};

// A stage of a ring and the parity of its round.
template <int kStages>
struct Cursor {
  int stage = 0;
  int parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The turns of the loop over keys that a group of queries needs: [first, last], last < first if
// none.
struct KeyTurns {
  int first;
  int last;
};

__device__ KeyTurns turns_of_group(const AttentionTile& tile, int group, const GroupRange& range) {
  const int count = min(kQueryGroup, tile.count - group * kQueryGroup);
  if (count <= 0) return {0, -1};
  return {range.first / kKeys, (tile.position + group * kQueryGroup + count - 1) / kKeys};
}

template <int kDim>
__device__ KeyTurns turns_of_tile(const AttentionTile& tile, const GroupRange* ranges) {
  KeyTurns turns{INT_MAX, -1};
  for (int group = 0; group < Config<kDim>::kWarpgroups; ++group) {
    const KeyTurns of = turns_of_group(tile, group, ranges[group]);
    if (of.last < of.first) continue;
    turns.first = min(turns.first, of.first);
    turns.last = max(turns.last, of.last);
  }
  return turns;
}

template <int kDim>
__device__ const GroupRange* ranges_of(const AttentionParams& params, int tile, int head) {
  return params.ranges + (tile * params.heads + head) * Config<kDim>::kWarpgroups;
}

// The pages of one head of a sequence, newest first, with the lanes of a warp as their cache.
class PageReader {
 public:
  __device__ PageReader(const KvSequence& sequence, int newest)
      : sequence_(sequence), newest_(newest) {
    load();
  }
  // Of descending pages; those that do not exist are replaced by ones that do.
  __device__ std::byte* page(int p) {
    p = min(max(p, sequence_.first_page), sequence_.end_page - 1);
    if (newest_ - p >= 32) {
      newest_ = p + 1;  // both pages of a turn
      load();
    }
    const int lane = newest_ - p;
    return reinterpret_cast<std::byte*>(
        __shfl_sync(~0U, reinterpret_cast<unsigned long long>(pointer_), max(lane, 0)));
  }

 private:
  __device__ void load() {
    const int p = newest_ - static_cast<int>(threadIdx.x % 32);
    pointer_ = sequence_.page(min(max(p, sequence_.first_page), sequence_.end_page - 1));
  }
  const KvSequence& sequence_;
  int newest_;
  std::byte* pointer_;
};

// Four keys' log gate sums of each lane.
struct Gates {
  float4 high;
  float4 low;
};

template <int kDim>
class Producer {
 public:
  using C = Config<kDim>;
  __device__ Producer(const AttentionParams& params, Shared<kDim>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    const int turns = params_.tile_count * params_.heads;
    Cursor<2> slot;
    while (true) {
      int turn = 0;
      if (lane_ == 0) turn = atomicAdd(params_.next_turn, 1);
      turn = __shfl_sync(~0U, turn, 0);
      barrier_wait(&shared_.turn_empty[slot.stage], slot.parity ^ 1);
      if (lane_ == 0) {
        shared_.turn[slot.stage] = turn;
        barrier_arrive(&shared_.turn_full[slot.stage]);
      }
      slot.advance();
      if (turn >= turns) return;
      produce(turn);
    }
  }

 private:
  __device__ Gates gates(const std::byte* even, const std::byte* odd, int head) const {
    if (params_.layout.gate_heads == 0) return {};
    const std::byte* page = lane_ < 16 ? even : odd;
    const int token = lane_ % 16 * 4;
    return {*reinterpret_cast<const float4*>(page + params_.layout.gates(head) + token * 4),
            *reinterpret_cast<const float4*>(page + params_.layout.low_gates(head) + token * 4)};
  }

  __device__ void produce(int turn) {
    int tile_index = 0;
    int head = 0;
    params_.tile_of(turn, tile_index, head);
    const AttentionTile tile = params_.tiles[tile_index];
    const KvSequence sequence = params_.sequences[tile.sequence];
    const KeyTurns turns = turns_of_tile<kDim>(tile, ranges_of<kDim>(params_, tile_index, head));
    const int g = params_.kv_head(head);
    const std::int64_t key_offset = params_.layout.keys(g);
    const std::int64_t value_offset = params_.layout.values(g);
    float reference_high = 0;
    float reference_low = 0;
    if (params_.layout.gate_heads > 0) {
      const std::byte* page = sequence.page(tile.position / kPageTokens);
      const int token = tile.position % kPageTokens;
      reference_high = reinterpret_cast<const float*>(page + params_.layout.gates(head))[token];
      reference_low = reinterpret_cast<const float*>(page + params_.layout.low_gates(head))[token];
    }
    PageReader reader(sequence, 2 * turns.last + 1);
    std::byte* odd = reader.page(2 * turns.last + 1);
    std::byte* even = reader.page(2 * turns.last);
    Gates now = gates(even, odd, head);
    const float to_scores = 1 / params_.scale;
    for (int t = turns.last; t >= turns.first; --t) {
      std::byte* next_odd = nullptr;
      std::byte* next_even = nullptr;
      Gates next{};
      if (t > turns.first) {
        next_odd = reader.page(2 * t - 1);
        next_even = reader.page(2 * t - 2);
        next = gates(next_even, next_odd, head);
      }
      const int s = cursor_.stage;
      barrier_wait(&shared_.keys_empty[s], cursor_.parity ^ 1);
      const auto decay = [&](float high, float low) {
        return ((reference_high - high) + (reference_low - low)) * to_scores;
      };
      *reinterpret_cast<float4*>(&shared_.decays[s][lane_ * 4]) = {
          decay(now.high.x, now.low.x), decay(now.high.y, now.low.y), decay(now.high.z, now.low.z),
          decay(now.high.w, now.low.w)};
      if (lane_ == 0) {
        barrier_arrive_expect(&shared_.keys_full[s], 2 * C::kHeadBytes);
        copy_bulk(shared_.keys[s], even + key_offset, C::kHeadBytes, &shared_.keys_full[s]);
        copy_bulk(shared_.keys[s] + C::kHeadBytes, odd + key_offset, C::kHeadBytes,
                  &shared_.keys_full[s]);
      } else {
        barrier_arrive(&shared_.keys_full[s]);
      }
      barrier_wait(&shared_.values_empty[s], cursor_.parity ^ 1);
      if (lane_ == 0) {
        barrier_arrive_expect(&shared_.values_full[s], 2 * C::kHeadBytes);
        copy_bulk(shared_.values[s], even + value_offset, C::kHeadBytes, &shared_.values_full[s]);
        copy_bulk(shared_.values[s] + C::kHeadBytes, odd + value_offset, C::kHeadBytes,
                  &shared_.values_full[s]);
      }
      cursor_.advance();
      odd = next_odd;
      even = next_even;
      now = next;
    }
  }

  const AttentionParams& params_;
  Shared<kDim>& shared_;
  int lane_;
  Cursor<C::kStages> cursor_;
};

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

// The queries of one warpgroup. A thread holds parts of two rows, eight apart.
template <int kDim>
class Consumer {
 public:
  using C = Config<kDim>;
  __device__ Consumer(const AttentionParams& params, Shared<kDim>& shared, int group)
      : params_(params),
        shared_(shared),
        group_(group),
        thread_(static_cast<int>(threadIdx.x) % 128),
        lane_(static_cast<int>(threadIdx.x) % 32),
        exponent_(params.scale * 1.4426950408889634F),
        queries_(shared.queries[group], C::kRowSwizzle, 8 * C::kRowBytes, 16),
        keys_(shared.keys[0], Swizzle::k128, 1024, C::kHeadBytes),
        values_(shared.values[0], C::kRowSwizzle, 8 * C::kRowBytes, kPageTokens * C::kRowBytes) {}

  __device__ void run() {
    const int turns = params_.tile_count * params_.heads;
    Cursor<2> slot;
    while (true) {
      barrier_wait(&shared_.turn_full[slot.stage], slot.parity);
      const int turn = shared_.turn[slot.stage];
      barrier_arrive(&shared_.turn_empty[slot.stage]);
      slot.advance();
      if (turn >= turns) return;
      consume(turn);
    }
  }

 private:
  // The row of the tile that this thread's rows begin with.
  __device__ int first_row() const { return group_ * kQueryGroup + thread_ / 32 * 16 + lane_ / 4; }

  __device__ void load_queries(const AttentionTile& tile, int head) {
    constexpr int kChunks = kDim / 8;
    const int dim = params_.layout.dim;
    const auto* q = static_cast<const __nv_bfloat16*>(params_.q);
    // Products of the tile before have read what is overwritten.
    sync_warpgroup(1 + group_);
#pragma unroll
    for (int i = thread_; i < kQueryGroup * kChunks; i += 128) {
      const int r = i / kChunks;
      const int c = i % kChunks;
      const int row = group_ * kQueryGroup + r;
      uint4 chunk{};
      if (row < tile.count) {
        const __nv_bfloat16* from =
            q + (static_cast<std::int64_t>(tile.row + row) * params_.heads + head) * dim + c * 8;
        if (dim == kDim) {
          chunk = *reinterpret_cast<const uint4*>(from);
        } else {
          auto* to = reinterpret_cast<__nv_bfloat16*>(&chunk);
          for (int k = 0; k < 8; ++k) {
            if (c * 8 + k < dim) to[k] = from[k];
          }
        }
      }
      // Ordered as values of a page are.
      *reinterpret_cast<uint4*>(shared_.queries[group_] + value_chunk<__nv_bfloat16, kDim>(r, c)) =
          chunk;
    }
    fence_async_proxy();
    sync_warpgroup(1 + group_);
  }

  // Scores of 128 keys onto their decays; asynchronous.
  __device__ void multiply_keys(float (&s)[kKeys / 2], int stage) {
    const float* decays = shared_.decays[stage] + lane_ % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float2 decay = load_shared(reinterpret_cast<const float2*>(decays + n * 8));
      s[n * 4] = decay.x;
      s[n * 4 + 1] = decay.y;
      s[n * 4 + 2] = decay.x;
      s[n * 4 + 3] = decay.y;
    }
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      wgmma_shared(s, queries_.at(k / 4 * (kQueryGroup * 128) + k % 4 * 32),
                   keys_.at(stage * 2 * C::kHeadBytes + k * 2048));
    }
    wgmma_commit();
  }

  // o += weights · values; asynchronous.
  __device__ void multiply_values(float (&o)[kDim / 2], const std::uint32_t (&p)[kKeys / 4],
                                  int stage) {
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma_registers(o, p + k * 4,
                      values_.at(stage * 2 * C::kHeadBytes + k / 4 * C::kHeadBytes +
                                 k % 4 * 16 * C::kRowBytes));
    }
    wgmma_commit();
  }

  __device__ void mask(float (&s)[kKeys / 2], int first_key) const {
    const int key = first_key + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int j = key + i / 4 * 8 + i % 2;
      const int r = i / 2 % 2;
      if (j > position_ + r * 8 || j < begin_[r]) s[i] = kMinusInfinity;
    }
  }

  // Scores become weights relative to the rows' greatest so far; sets factor_, which turns sums
  // from before into the new relation.
  __device__ void weigh(float (&s)[kKeys / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max = max_[r];
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 4) {
        max = fmaxf(max, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
      }
      max = fmaxf(max, __shfl_xor_sync(~0U, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0U, max, 2));
      // Rows that have seen no key yet stay at zero.
      const float shift = max == kMinusInfinity ? 0.0F : max * exponent_;
      factor_[r] = exp2_approximate(max_[r] * exponent_ - shift);
      max_[r] = max;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 4) {
#pragma unroll
        for (int k = i + 2 * r; k < i + 2 * r + 2; ++k) {
          s[k] = exp2_approximate(s[k] * exponent_ - shift);
          sum += s[k];
        }
      }
      sum_[r] = sum_[r] * factor_[r] + sum;
    }
  }

  __device__ void rescale(float (&o)[kDim / 2]) const {
    if (__all_sync(~0U, factor_[0] == 1 && factor_[1] == 1)) return;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] *= factor_[i / 2 % 2];
  }

  __device__ static void pack_weights(const float (&s)[kKeys / 2], std::uint32_t (&p)[kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
  }

  __device__ void store(const float (&o)[kDim / 2], const AttentionTile& tile, int head) const {
    const int dim = params_.layout.dim;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
      const int row = first_row() + 8 * r;
      if (row >= tile.count) continue;
      if (lane_ % 4 == 0) {
        store_lse(params_, tile, row, head, max_[r] * params_.scale + logf(sum));
      }
      const float scale = 1 / sum;
      __nv_bfloat16* to = static_cast<__nv_bfloat16*>(params_.o) +
                          (static_cast<std::int64_t>(tile.row + row) * params_.heads + head) * dim +
                          lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float x = o[n * 4 + 2 * r] * scale;
        const float y = o[n * 4 + 2 * r + 1] * scale;
        if (dim == kDim) {
          *reinterpret_cast<std::uint32_t*>(to + n * 8) = pack(x, y);
        } else {
          const int d = n * 8 + lane_ % 4 * 2;
          if (d < dim) to[n * 8] = __float2bfloat16(x);
          if (d + 1 < dim) to[n * 8 + 1] = __float2bfloat16(y);
        }
      }
    }
  }

  // Waits all the same, so that no warpgroup is ahead by a round of the stages.
  __device__ void skip() {
    barrier_wait(&shared_.keys_full[cursor_.stage], cursor_.parity);
    barrier_wait(&shared_.values_full[cursor_.stage], cursor_.parity);
    barrier_arrive(&shared_.keys_empty[cursor_.stage]);
    barrier_arrive(&shared_.values_empty[cursor_.stage]);
    cursor_.advance();
  }

  __device__ void consume(int turn) {
    int tile_index = 0;
    int head = 0;
    params_.tile_of(turn, tile_index, head);
    const AttentionTile tile = params_.tiles[tile_index];
    const GroupRange* ranges = ranges_of<kDim>(params_, tile_index, head);
    const GroupRange range = ranges[group_];
    const KeyTurns all = turns_of_tile<kDim>(tile, ranges);
    const KeyTurns turns = turns_of_group(tile, group_, range);
    if (turns.last < turns.first) {
      for (int t = all.last; t >= all.first; --t) skip();
      return;
    }
    load_queries(tile, head);
    position_ = tile.position + first_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row() + 8 * r;
      begin_[r] =
          row < tile.count
              ? params_.begins[static_cast<std::int64_t>(head) * params_.tokens + tile.row + row]
              : 0;
      max_[r] = kMinusInfinity;
      sum_[r] = 0;
    }
    const auto mask_if_needed = [&](float(&s)[kKeys / 2], int t) {
      if ((t + 1) * kKeys - 1 > tile.position + group_ * kQueryGroup ||
          t * kKeys < range.all_begun) {
        mask(s, t * kKeys);
      }
    };

    float o[kDim / 2] = {};
    float s[kKeys / 2];
    std::uint32_t p[kKeys / 4];
    for (int t = all.last; t > turns.last; --t) skip();
    barrier_wait(&shared_.keys_full[cursor_.stage], cursor_.parity);
    multiply_keys(s, cursor_.stage);
    wgmma_wait<0>();
    pin(s);
    barrier_arrive(&shared_.keys_empty[cursor_.stage]);
    mask_if_needed(s, turns.last);
    weigh(s);
    pack_weights(s, p);
    for (int t = turns.last - 1; t >= turns.first; --t) {
      const Cursor<C::kStages> before = cursor_;
      cursor_.advance();
      barrier_wait(&shared_.keys_full[cursor_.stage], cursor_.parity);
      multiply_keys(s, cursor_.stage);
      barrier_wait(&shared_.values_full[before.stage], before.parity);
      multiply_values(o, p, before.stage);
      wgmma_wait<1>();
      pin(s);
      barrier_arrive(&shared_.keys_empty[cursor_.stage]);
      mask_if_needed(s, t);
      weigh(s);
      wgmma_wait<0>();
      pin(o);
      barrier_arrive(&shared_.values_empty[before.stage]);
      rescale(o);
      pack_weights(s, p);
    }
    barrier_wait(&shared_.values_full[cursor_.stage], cursor_.parity);
    multiply_values(o, p, cursor_.stage);
    wgmma_wait<0>();
    pin(o);
    barrier_arrive(&shared_.values_empty[cursor_.stage]);
    cursor_.advance();
    for (int t = turns.first - 1; t >= all.first; --t) skip();
    store(o, tile, head);
  }

  const AttentionParams& params_;
  Shared<kDim>& shared_;
  int group_;
  int thread_;
  int lane_;
  float exponent_;  // of two, of a score of 1
  Descriptor queries_;
  Descriptor keys_;    // of the first stage
  Descriptor values_;  // of the first stage
  Cursor<C::kStages> cursor_;
  int position_ = 0;  // of the first of the two rows
  int begin_[2] = {};
  float max_[2] = {};
  float sum_[2] = {};
  float factor_[2] = {};
};

template <int kDim>
__global__ __launch_bounds__(Config<kDim>::kThreads,
                             1) void attend(const __grid_constant__ AttentionParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  using C = Config<kDim>;
  extern __shared__ std::byte memory[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(
      (reinterpret_cast<std::uintptr_t>(memory) + 1023) & ~std::uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(&shared.keys_full[s], 32);
      barrier_init(&shared.values_full[s], 1);
      barrier_init(&shared.keys_empty[s], C::kConsumers);
      barrier_init(&shared.values_empty[s], C::kConsumers);
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(&shared.turn_full[s], 1);
      barrier_init(&shared.turn_empty[s], C::kConsumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  // From a shuffle, so that the compiler knows it to be the same for a warp.
  const int warpgroup = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == C::kWarpgroups) {
    shrink_registers<C::kProducerRegisters>();
    if (threadIdx.x % 128 < 32) Producer<kDim>(params, shared).run();
  } else {
    grow_registers<C::kRegisters>();
    Consumer<kDim>(params, shared, warpgroup).run();
  }
#endif
}

template <int kDim>
void launch(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim>) + 1024;
  static_assert(kBytes <= 227 * 1024);
  cudaFuncSetAttribute(attend<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const int blocks = min(multiprocessors, params.tile_count * params.heads);
  attend<kDim><<<blocks, Config<kDim>::kThreads, kBytes, stream>>>(params);
}

}  // namespace

void launch_attention_bf16_sm90(const AttentionParams& params, int multiprocessors,
                                cudaStream_t stream) {
  switch (padded_dim(params.layout.dim)) {
    case 32:
      return launch<32>(params, multiprocessors, stream);
    case 64:
      return launch<64>(params, multiprocessors, stream);
    default:
      return launch<128>(params, multiprocessors, stream);
  }
}

}  // namespace deltafox::cuda
