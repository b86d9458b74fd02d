// Attention's backward in float32: products on the ordinary units, for exactness, not for speed.
// A thread block of 256 owns a block of 64 rows and goes by 32 columns at a time; each thread holds
// the scores of 4×2 rows and columns, and of 4 rows kDim / 16 dimensions of the sums.
#include "cuda/attention_backward.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;
constexpr int kStride = kBlockTokens + 4;  // of transposed rows; a multiple of 16 bytes

// The operands of a pass: scores are rows · columns, their gradients row_partners ·
// column_partners.
template <int kDim>
struct Shared {
  alignas(16) float rows[kDim][kStride];           // transposed: k, or q
  alignas(16) float row_partners[kDim][kStride];   // transposed: v, or do
  float columns[kColumns][kDim + 1];               // q, or k
  float column_partners[kColumns][kDim + 1];       // do, or v
  alignas(16) float weights[kColumns][kStride];    // transposed
  alignas(16) float gradients[kColumns][kStride];  // transposed, dS
};

__device__ inline float sum_of_16(float x) {
  for (int lane = 8; lane > 0; lane /= 2) x += __shfl_xor_sync(~0U, x, lane);
  return x;
}

// One head of [T, heads, D].
struct Head {
  float* data;
  int heads;
  int head;
  int dim;
  __device__ Head(const void* tensor, int of_heads, int own, int size)
      : data(static_cast<float*>(const_cast<void*>(tensor))),
        heads(of_heads),
        head(own),
        dim(size) {}
  __device__ float* row(std::int64_t t) const { return data + (t * heads + head) * dim; }
  // Zero behind the last row or dimension.
  __device__ float load(const AttentionBlock& block, int t, int d) const {
    return t < block.count && d < dim ? row(block.row + t)[d] : 0;
  }
};

template <int kDim, Pass kPass>
class Rows {
 public:
  __device__ Rows(const AttentionBackwardParams& params, Shared<kDim>& shared, int block)
      : params_(params),
        shared_(shared),
        block_index_(block),
        block_(params.blocks[block]),
        row_(static_cast<int>(threadIdx.x) / 16 * 4),
        column_(static_cast<int>(threadIdx.x) % 16) {}

  // `head` of keys in Pass::kKeys, of queries in Pass::kQueries.
  __device__ void run(int head) {
    if (kPass == Pass::kKeys) {
      load_rows(Head(params_.k, params_.kv_heads, head, params_.dim),
                Head(params_.v, params_.kv_heads, head, params_.dim));
      for (int i = 0; i < params_.sharing(); ++i) {
        visit_head(head * params_.sharing() + i, head, block_index_, block_.end);
      }
      store(sums_, Head(params_.dk, params_.kv_heads, head, params_.dim), params_.scale);
      store(partner_sums_, Head(params_.dv, params_.kv_heads, head, params_.dim), 1);
    } else {
      load_rows(Head(params_.q, params_.heads, head, params_.dim),
                Head(params_.d_o, params_.heads, head, params_.dim));
      visit_head(head, head / params_.sharing(), block_.first, block_index_ + 1);
      store(sums_, Head(params_.dq, params_.heads, head, params_.dim), params_.scale);
    }
  }

 private:
  __device__ void load_rows(const Head& rows, const Head& partners) {
    for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * kDim; i += kThreads) {
      const int t = i / kDim;
      const int d = i % kDim;
      shared_.rows[d][t] = rows.load(block_, t, d);
      shared_.row_partners[d][t] = partners.load(block_, t, d);
    }
  }

  // The blocks [first, end) of columns, as one head of queries reads them or is read by them.
  __device__ void visit_head(int head, int kv_head, int first, int end) {
    const std::int64_t own = params_.row_at(head, block_index_) + row_;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      term_[r] = (kPass == Pass::kKeys ? params_.key_terms : params_.query_terms)[own + r];
      delta_[r] = kPass == Pass::kKeys ? 0 : params_.deltas[own + r];
      begin_[r] = kPass == Pass::kKeys ? 0 : params_.begins[own + r];
      gradient_sum_[r] = 0;
    }
    const Head columns = kPass == Pass::kKeys
                             ? Head(params_.q, params_.heads, head, params_.dim)
                             : Head(params_.k, params_.kv_heads, kv_head, params_.dim);
    const Head partners = kPass == Pass::kKeys
                              ? Head(params_.d_o, params_.heads, head, params_.dim)
                              : Head(params_.v, params_.kv_heads, kv_head, params_.dim);
    for (int c = first; c < end; ++c) {
      const int query_block = kPass == Pass::kKeys ? c : block_index_;
      const int key_block = kPass == Pass::kKeys ? block_index_ : c;
      const BlockPair pair(params_.ranges[params_.block_at(head, query_block)], query_block,
                           key_block, block_.first);
      if (!pair.read) continue;
      const float decay = params_.decay(head, query_block, key_block);
      const AttentionBlock block = params_.blocks[c];
      for (int t = 0; t < kBlockTokens; t += kColumns) {
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < kColumns * kDim; i += kThreads) {
          const int column = i / kDim;
          const int d = i % kDim;
          shared_.columns[column][d] = columns.load(block, t + column, d);
          shared_.column_partners[column][d] = partners.load(block, t + column, d);
        }
        __syncthreads();
        visit_columns(head, c, block.position + t, t, decay);
      }
    }
    float* to = (kPass == Pass::kKeys ? params_.key_sums : params_.query_sums) + own;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float sum = sum_of_16(gradient_sum_[r]);
      if (column_ == 0) to[r] = sum;
    }
  }

  __device__ void visit_columns(int head, int block, int position, int t, float decay) {
    float s[4][2] = {};
    float ds[4][2] = {};
    for (int d = 0; d < kDim; ++d) {
      const float4 row = *reinterpret_cast<const float4*>(&shared_.rows[d][row_]);
      const float4 partner = *reinterpret_cast<const float4*>(&shared_.row_partners[d][row_]);
      const float rows[4] = {row.x, row.y, row.z, row.w};
      const float partners[4] = {partner.x, partner.y, partner.z, partner.w};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float column = shared_.columns[column_ + 16 * c][d];
        const float column_partner = shared_.column_partners[column_ + 16 * c][d];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          s[r][c] += rows[r] * column;
          ds[r][c] += partners[r] * column_partner;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = column_ + 16 * c;
      const std::int64_t at = params_.row_at(head, block) + t + column;
      const float term = (kPass == Pass::kKeys ? params_.query_terms : params_.key_terms)[at];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row_position = block_.position + row_ + r;
        const int key = kPass == Pass::kKeys ? row_position : position + column;
        const int query = kPass == Pass::kKeys ? position + column : row_position;
        const int begin = kPass == Pass::kKeys ? params_.begins[at] : begin_[r];
        const float delta = kPass == Pass::kKeys ? params_.deltas[at] : delta_[r];
        const float exponent = (s[r][c] + (term_[r] + term)) * (params_.scale * kLog2E) + decay;
        const float weight = key <= query && key >= begin ? exp2f(exponent) : 0;
        const float gradient = weight * (ds[r][c] + delta);
        gradient_sum_[r] += gradient;
        shared_.weights[column][row_ + r] = weight;
        shared_.gradients[column][row_ + r] = gradient;
      }
    }
    // The sixteen threads of a row lie in one warp.
    __syncwarp();
    for (int j = 0; j < kColumns; ++j) {
      add_products(sums_, shared_.gradients[j], shared_.columns[j]);
      if (kPass == Pass::kKeys) {
        add_products(partner_sums_, shared_.weights[j], shared_.column_partners[j]);
      }
    }
  }

  __device__ void add_products(float (&to)[4][kDim / 16], const float* factors,
                               const float* columns) {
    const float4 factor = *reinterpret_cast<const float4*>(factors + row_);
    const float rows[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      const float x = columns[column_ + 16 * c];
#pragma unroll
      for (int r = 0; r < 4; ++r) to[r][c] += rows[r] * x;
    }
  }

  __device__ void store(const float (&from)[4][kDim / 16], const Head& to, float scale) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (row_ + r >= block_.count) continue;
#pragma unroll
      for (int c = 0; c < kDim / 16; ++c) {
        const int d = column_ + 16 * c;
        if (d < params_.dim) to.row(block_.row + row_ + r)[d] = from[r][c] * scale;
      }
    }
  }

  const AttentionBackwardParams& params_;
  Shared<kDim>& shared_;
  int block_index_;
  AttentionBlock block_;
  int row_;  // the first of this thread's four
  int column_;
  float term_[4];
  float delta_[4];                         // of queries
  int begin_[4];                           // of queries
  float gradient_sum_[4];                  // of this thread's columns
  float sums_[4][kDim / 16] = {};          // dS · columns
  float partner_sums_[4][kDim / 16] = {};  // P · column partners
};

template <int kDim, Pass kPass>
__global__ __launch_bounds__(kThreads) void differentiate(
    const __grid_constant__ AttentionBackwardParams params) {
  extern __shared__ __align__(128) std::byte memory[];
  Rows<kDim, kPass>(params, *reinterpret_cast<Shared<kDim>*>(memory), static_cast<int>(blockIdx.x))
      .run(static_cast<int>(blockIdx.y));
}

template <int kDim, Pass kPass>
void launch_pass(const AttentionBackwardParams& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim>);
  const int heads = kPass == Pass::kKeys ? params.kv_heads : params.heads;
  const dim3 grid(static_cast<unsigned>(params.block_count), static_cast<unsigned>(heads));
  cudaFuncSetAttribute(differentiate<kDim, kPass>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       kBytes);
  differentiate<kDim, kPass><<<grid, kThreads, kBytes, stream>>>(params);
}

template <int kDim>
void launch(const AttentionBackwardParams& params, cudaStream_t stream) {
  launch_pass<kDim, Pass::kKeys>(params, stream);
  launch_pass<kDim, Pass::kQueries>(params, stream);
}

}  // namespace

void launch_attention_backward_f32(const AttentionBackwardParams& params, cudaStream_t stream) {
  switch (padded_dim(params.dim)) {
    case 32:
      return launch<32>(params, stream);
    case 64:
      return launch<64>(params, stream);
    default:
      return launch<128>(params, stream);
  }
}

}  // namespace deltafox::cuda
