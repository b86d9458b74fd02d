// Attention's backward of bfloat16 on the tensor cores (see attention_backward.cuh for the passes).
//
// Four warps own a block of 64 rows. For each block of 64 columns that it reads or is read by: the
// scores S = rows · columnsᵀ and dP = row partners · column partnersᵀ; from them the weights P and
// dS, which stay in registers as the left operands of
//   sums += dS · columns  and, of keys,  partner sums += P · column partners.
// Keys: rows k, v and columns q, do give dk, dv. Queries: rows q, do and columns k, v give dq.
//
// On sm_80 a thread block is four warps, with two stages of columns in shared memory. On sm_90 it
// is persistent: one warp copies, and two warp groups each own a block of a pair; a warp group's
// exponentials are computed while its sums of the columns before are still under way. Every thread
// gives back itself what it has read.
#include "cuda/attention_backward.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tensor_core.cuh"

namespace deltafox::cuda {
namespace {

// Head sizes are padded with zeros to whole blocks of 64 columns.
template <int kDim>
constexpr int kTileBytes = kBlockTokens* kDim * 2;

constexpr int padded_to_blocks(std::int64_t dim) {
  return dim <= 64 ? 64 : 128;
}

constexpr int kTileThreads = 128;

__device__ inline float dot_of_pieces(const uint4& x, const uint4& y) {
  const auto* a = reinterpret_cast<const __nv_bfloat162*>(&x);
  const auto* b = reinterpret_cast<const __nv_bfloat162*>(&y);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 of_a = __bfloat1622float2(a[i]);
    const float2 of_b = __bfloat1622float2(b[i]);
    sum += of_a.x * of_b.x + of_a.y * of_b.y;
  }
  return sum;
}

// Rows of a tensor [T, heads, D] become tiles, as tensor_core.cuh orders them; with those of do
// goes do·o. blockIdx.z is the tensor: q, k, v, do.
template <int kDim>
__global__ __launch_bounds__(kTileThreads) void make_tiles(const AttentionBackwardParams params) {
  constexpr int kPieces = kDim / 8;
  constexpr int kTurns = kBlockTokens * kPieces / kTileThreads;
  const int tensor = static_cast<int>(blockIdx.z);
  const int heads = tensor == 1 || tensor == 2 ? params.kv_heads : params.heads;
  const int head = static_cast<int>(blockIdx.y);
  if (head >= heads) return;
  const int block_index = static_cast<int>(blockIdx.x);
  const AttentionBlock block = params.blocks[block_index];
  const auto piece = [&](const void* rows, int i) {
    const int t = i / kPieces;
    const int d = i % kPieces * 8;
    uint4 elements{};
    if (t >= block.count || d >= params.dim) return elements;
    const __nv_bfloat16* row =
        static_cast<const __nv_bfloat16*>(rows) +
        (static_cast<std::int64_t>(block.row + t) * heads + head) * params.dim + d;
    if (params.dim % 8 == 0) return *reinterpret_cast<const uint4*>(row);
    auto* each = reinterpret_cast<__nv_bfloat16*>(&elements);
    for (int k = 0; k < min(params.dim - d, 8); ++k) each[k] = row[k];
    return elements;
  };
  const void* from = params.d_o;
  std::byte* to = params.d_o_tiles;
  if (tensor == 0) from = params.q, to = params.q_tiles;
  if (tensor == 1) from = params.k, to = params.k_tiles;
  if (tensor == 2) from = params.v, to = params.v_tiles;
  std::byte* tile = to + params.block_at(head, block_index) * kTileBytes<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  uint4 pieces[kTurns];
#pragma unroll
  for (int n = 0; n < kTurns; ++n) pieces[n] = piece(from, thread + n * kTileThreads);
  if (tensor == 3) {
    uint4 outputs_of_forward[kTurns];
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      outputs_of_forward[n] = piece(params.o, thread + n * kTileThreads);
    }
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      float sum = dot_of_pieces(pieces[n], outputs_of_forward[n]);
#pragma unroll
      for (int step = kPieces / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0U, sum, step);
      const int i = thread + n * kTileThreads;
      if (i % kPieces == 0) params.deltas[params.row_at(head, block_index) + i / kPieces] = -sum;
    }
  }
#pragma unroll
  for (int n = 0; n < kTurns; ++n) {
    const int i = thread + n * kTileThreads;
    *reinterpret_cast<uint4*>(tile + piece_offset(i / kPieces, i % kPieces)) = pieces[n];
  }
}

// Where a pass finds its operands.
template <int kDim, Pass kPass>
struct Operands {
  static constexpr bool kKeys = kPass == Pass::kKeys;
  const AttentionBackwardParams& p;

  // Heads of rows, and heads of queries that share one of them.
  __device__ int row_heads() const { return kKeys ? p.kv_heads : p.heads; }
  __device__ int sharing() const { return kKeys ? p.sharing() : 1; }
  // Of `head` of queries.
  __device__ int column_head(int head) const { return kKeys ? head : head / p.sharing(); }

  __device__ const AttentionRows* rows() const { return kKeys ? p.key_rows : p.query_rows; }
  __device__ const std::byte* tile(const std::byte* tiles, int head, int block) const {
    return tiles + p.block_at(head, block) * kTileBytes<kDim>;
  }
  __device__ const std::byte* row_tile(int head, int block) const {
    return tile(kKeys ? p.k_tiles : p.q_tiles, head, block);
  }
  __device__ const std::byte* row_partner_tile(int head, int block) const {
    return tile(kKeys ? p.v_tiles : p.d_o_tiles, head, block);
  }
  __device__ const std::byte* column_tile(int head, int block) const {
    return tile(kKeys ? p.q_tiles : p.k_tiles, column_head(head), block);
  }
  __device__ const std::byte* column_partner_tile(int head, int block) const {
    return tile(kKeys ? p.d_o_tiles : p.v_tiles, column_head(head), block);
  }
  __device__ const float* row_terms() const { return kKeys ? p.key_terms : p.query_terms; }
  __device__ const float* column_terms() const { return kKeys ? p.query_terms : p.key_terms; }

  // Blocks of columns of a block of rows: [first, end), of which BlockPair tells those read.
  __device__ int first_column(int row_block, int first) const { return kKeys ? row_block : first; }
  __device__ int end_column(int row_block, int end) const { return kKeys ? end : row_block + 1; }
  __device__ BlockPair pair(int head, int row_block, int column_block, int first) const {
    const int query = kKeys ? column_block : row_block;
    return {p.ranges[p.block_at(head, query)], query, kKeys ? row_block : column_block, first};
  }
  __device__ float decay(int head, int row_block, int column_block) const {
    return kKeys ? p.decay(head, column_block, row_block) : p.decay(head, row_block, column_block);
  }
  // The order of turns: heads in groups whose tiles stay in the L2 cache, within these long rows
  // first.
  __device__ void turn(int turn, AttentionRows& own, int& head) const {
    constexpr int kHeadsPerTurn = 4;
    const int group = turn / (p.rows_count * kHeadsPerTurn);
    const int within = turn % (p.rows_count * kHeadsPerTurn);
    const int size = min(kHeadsPerTurn, row_heads() - group * kHeadsPerTurn);
    own = rows()[within / size];
    head = group * kHeadsPerTurn + within % size;
  }
};

__device__ inline float exp2_approximate(float x) {
  float y = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// From shared memory, also what was loaded before.
__device__ inline float2 load_pair_again(const float* from) {
  float2 pair;
  asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(shared_address(from)));
  return pair;
}

// What goes with a block of columns, in shared memory.
struct ColumnTerms {
  alignas(16) float terms[kBlockTokens];
  alignas(16) float deltas[kBlockTokens];         // of queries
  alignas(16) std::int32_t begins[kBlockTokens];  // of queries
};

// A block of rows of four warps: each thread holds parts of two rows, eight apart.
template <int kDim, Pass kPass>
struct RowBlock {
  static constexpr bool kKeys = kPass == Pass::kKeys;

  const AttentionBackwardParams& p;
  int row;     // of the block: this thread's first
  int column;  // of a block of columns: this thread's first
  int block = 0;
  int head = -1;     // of queries
  int position = 0;  // of the block
  float term[2];
  float delta[2];  // of queries
  int begin[2];    // of queries
  float gradient_sum[2];
  float s[8][4];   // scores, then weights
  float ds[8][4];  // dP, then dS
  std::uint32_t weights[4][4];
  std::uint32_t gradients[4][4];
  float sums[kDim / 8][4];
  float partner_sums[kKeys ? kDim / 8 : 1][4];

  __device__ explicit RowBlock(const AttentionBackwardParams& params)
      : p(params),
        row(static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4),
        column(static_cast<int>(threadIdx.x) % 4 * 2) {}

  __device__ void start(int of_block) {
    block = of_block;
    position = p.blocks[block].position;
    head = -1;
    WarpProducts::clear(sums);
    WarpProducts::clear(partner_sums);
  }

  __device__ void enter_head(int of_head) {
    head = of_head;
    const std::int64_t at = p.row_at(head, block) + row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      term[r] = (kKeys ? p.key_terms : p.query_terms)[at + 8 * r] * (p.scale * kLog2E);
      delta[r] = kKeys ? 0 : p.deltas[at + 8 * r];
      begin[r] = kKeys ? 0 : p.begins[at + 8 * r];
      gradient_sum[r] = 0;
    }
  }
  __device__ void leave_head() const {
    float* to = (kKeys ? p.key_sums : p.query_sums) + p.row_at(head, block) + row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = gradient_sum[r];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
      if (column == 0) to[8 * r] = sum;
    }
  }

  // `distance`: from the rows to the columns.
  __device__ void mask(const ColumnTerms& columns, int distance) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i / 2 * 8;
        const int c = n * 8 + column + i % 2;
        const int key = kKeys ? r : distance + c;
        const int query = kKeys ? distance + c : r;
        const int first = (kKeys ? columns.begins[c] : begin[i / 2]) - position;
        // Not &&, which would branch.
        const bool seen = (key <= query) & (key >= first);
        if (!seen) s[n][i] = -INFINITY;
      }
    }
  }

  // What products are added to: to the scores the columns' terms, to dP of keys the columns'
  // deltas.
  __device__ void begin_scores(const ColumnTerms& columns) {
    copy_to_rows(s, columns.terms);
  }
  __device__ void begin_gradients(const ColumnTerms& columns) {
    if (kKeys) copy_to_rows(ds, columns.deltas);
  }
  __device__ void copy_to_rows(float (&to)[8][4], const float* from) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        // Loaded twice, which costs less than copies.
        const float2 pair = load_pair_again(from + n * 8 + column);
        to[n][i] = pair.x;
        to[n][i + 1] = pair.y;
      }
    }
  }

  // Scores become weights.
  __device__ void exponentiate(float decay) {
    const float exponent = p.scale * kLog2E;
    const float of_rows[2] = {term[0] + decay, term[1] + decay};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approximate(fmaf(s[n][i], exponent, of_rows[i / 2]));
      }
    }
  }
  // dP becomes dS.
  __device__ void differentiate() {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ds[n][i] = s[n][i] * (kKeys ? ds[n][i] : ds[n][i] + delta[i / 2]);
        gradient_sum[i / 2] += ds[n][i];
      }
    }
  }

  __device__ void round() {
    if constexpr (kKeys) to_operand(weights, s);
    to_operand(gradients, ds);
  }

  // The products with the columns; asynchronous if Products are.
  template <class Products>
  __device__ void add_products(std::uint32_t columns, std::uint32_t column_partners) {
    Products::begin(sums);
    if constexpr (kKeys) Products::begin(partner_sums);
    Products::template times<false>(sums, gradients, columns);
    if constexpr (kKeys) {
      Products::template times<false>(partner_sums, weights, column_partners);
    }
    Products::commit();
  }
  template <class Products>
  __device__ void products_added() {
    Products::end(sums);
    if constexpr (kKeys) Products::end(partner_sums);
  }

  __device__ void store(int row_head) const {
    if constexpr (kKeys) {
      store_rows(sums, p.dk, p.kv_heads, row_head, p.scale);
      store_rows(partner_sums, p.dv, p.kv_heads, row_head, 1);
    } else {
      store_rows(sums, p.dq, p.heads, row_head, p.scale);
    }
  }

  __device__ void store_rows(const float (&from)[kDim / 8][4], void* to, int heads, int row_head,
                             float scale) const {
    const AttentionBlock own = p.blocks[block];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= own.count) continue;
      __nv_bfloat16* out =
          static_cast<__nv_bfloat16*>(to) +
          (static_cast<std::int64_t>(own.row + row + 8 * r) * heads + row_head) * p.dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = n * 8 + column;
        const float x = from[n][2 * r] * scale;
        const float y = from[n][2 * r + 1] * scale;
        if (p.dim % 2 == 0) {
          if (d < p.dim) *reinterpret_cast<std::uint32_t*>(out + d) = pack(x, y);
        } else {
          if (d < p.dim) out[d] = __float2bfloat16(x);
          if (d + 1 < p.dim) out[d + 1] = __float2bfloat16(y);
        }
      }
    }
  }
};

// A tile of 64 rows as left operand.
template <int kDepth>
__device__ void load_operand(std::uint32_t (&to)[kDepth][4], std::uint32_t tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    load_matrices(to[k], tile + piece_offset(16 * warp + lane % 16, 2 * k + lane / 16));
  }
}

// ---- sm_80 ----

template <int kDim>
struct WarpShared {
  alignas(128) std::byte rows[kTileBytes<kDim>];
  std::byte row_partners[kTileBytes<kDim>];
  std::byte columns[2][kTileBytes<kDim>];
  std::byte column_partners[2][kTileBytes<kDim>];
  ColumnTerms terms[2];
};

template <int kDim, Pass kPass>
class WarpBlock {
 public:
  __device__ WarpBlock(const AttentionBackwardParams& params, WarpShared<kDim>& shared)
      : params_(params), operands_{params}, shared_(shared), rows_(params) {}

  __device__ void run(int turn) {
    AttentionRows own{};
    int row_head = 0;
    operands_.turn(turn, own, row_head);
    block_ = own.block;
    sequence_ = params_.blocks[block_];
    rows_.start(block_);
    copy(shared_.rows, operands_.row_tile(row_head, block_), kTileBytes<kDim>);
    copy(shared_.row_partners, operands_.row_partner_tile(row_head, block_), kTileBytes<kDim>);
    commit_copies();
    for (int i = 0; i < operands_.sharing(); ++i) {
      visit_head(row_head * operands_.sharing() + i);
    }
    rows_.store(row_head);
  }

 private:
  __device__ static void copy(void* to, const void* from, int bytes) {
    for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += 128 * 16) {
      copy_piece_async(shared_address(to) + i, static_cast<const std::byte*>(from) + i, true);
    }
  }
  __device__ void copy_columns(int head, int c, int stage) {
    copy(shared_.columns[stage], operands_.column_tile(head, c), kTileBytes<kDim>);
    copy(shared_.column_partners[stage], operands_.column_partner_tile(head, c), kTileBytes<kDim>);
    const std::int64_t at = params_.row_at(head, c);
    ColumnTerms& terms = shared_.terms[stage];
    copy(terms.terms, operands_.column_terms() + at, sizeof(terms.terms));
    if (kPass == Pass::kKeys) {
      copy(terms.deltas, params_.deltas + at, sizeof(terms.deltas));
      copy(terms.begins, params_.begins + at, sizeof(terms.begins));
    }
    commit_copies();
  }
  // From `c` on, the next block of columns that is read, or the end.
  __device__ int next(int head, int c) const {
    const int end = operands_.end_column(block_, sequence_.end);
    while (c < end && !operands_.pair(head, block_, c, sequence_.first).read) ++c;
    return c;
  }

  __device__ void visit_head(int head) {
    rows_.enter_head(head);
    const int end = operands_.end_column(block_, sequence_.end);
    int stage = 0;
    int c = next(head, operands_.first_column(block_, sequence_.first));
    copy_columns(head, c, stage);  // the block's own is always read
    while (c < end) {
      const int after = next(head, c + 1);
      if (after < end) {
        copy_columns(head, after, stage ^ 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      visit(head, c, stage);
      __syncthreads();
      c = after;
      stage ^= 1;
    }
    rows_.leave_head();
  }

  __device__ void visit(int head, int c, int stage) {
    const std::uint32_t columns = shared_address(shared_.columns[stage]);
    const std::uint32_t partners = shared_address(shared_.column_partners[stage]);
    std::uint32_t operand[kDim / 16][4];
    rows_.begin_scores(shared_.terms[stage]);
    rows_.begin_gradients(shared_.terms[stage]);
    load_operand(operand, shared_address(shared_.rows));
    WarpProducts::times_transposed<false>(rows_.s, operand, columns);
    load_operand(operand, shared_address(shared_.row_partners));
    WarpProducts::times_transposed<kPass == Pass::kQueries>(rows_.ds, operand, partners);
    if (operands_.pair(head, block_, c, sequence_.first).masked) {
      rows_.mask(shared_.terms[stage], (c - block_) * kBlockTokens);
    }
    rows_.exponentiate(operands_.decay(head, block_, c));
    rows_.differentiate();
    rows_.round();
    rows_.template add_products<WarpProducts>(columns, partners);
  }

  const AttentionBackwardParams& params_;
  Operands<kDim, kPass> operands_;
  WarpShared<kDim>& shared_;
  RowBlock<kDim, kPass> rows_;
  int block_ = 0;
  AttentionBlock sequence_{};
};

template <int kDim, Pass kPass>
__global__ __launch_bounds__(128) void differentiate_sm80(
    const __grid_constant__ AttentionBackwardParams params) {
  extern __shared__ __align__(128) std::byte memory[];
  WarpBlock<kDim, kPass>(params, *reinterpret_cast<WarpShared<kDim>*>(memory))
      .run(static_cast<int>(blockIdx.x));
}

// ---- sm_90 ----

constexpr int kGroups = 2;  // warp groups that own rows
constexpr int kGroupThreads = (kGroups + 1) * 128;

// What the copying warp tells the warp groups, through the stages.
struct Message {
  enum Kind : int { kRows, kColumns, kEnd, kFinish };
  int kind;
  int turn;              // of kRows: what is owned from now on, until kEnd
  int head;              // of kColumns
  int block;             // of kColumns
  int read;              // of kColumns: bit g if read by (or reading) the rows of group g
  int masked;            // the same: whether only in parts
  float decay[kGroups];  // from the older block to the younger, times log₂e
};

template <int kDim>
struct GroupShared {
  static constexpr int kStages = kDim == 128 ? 4 : 6;
  alignas(1024) std::byte columns[kStages][kTileBytes<kDim>];
  alignas(1024) std::byte column_partners[kStages][kTileBytes<kDim>];
  alignas(1024) std::byte rows[kGroups][kTileBytes<kDim>];
  alignas(1024) std::byte row_partners[kGroups][kTileBytes<kDim>];
  ColumnTerms terms[kStages];
  Message messages[kStages];
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  std::uint64_t rows_full;
  std::uint64_t rows_empty;
};

template <int kStages>
struct StageCursor {
  int stage = 0;
  int parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One warp.
template <int kDim, Pass kPass>
class Copier {
 public:
  using Shared = GroupShared<kDim>;
  __device__ Copier(const AttentionBackwardParams& params, Shared& shared)
      : params_(params),
        operands_{params},
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    const int turns = params_.rows_count * operands_.row_heads();
    while (true) {
      int turn = 0;
      if (lane_ == 0) turn = atomicAdd(params_.next_turn + (kPass == Pass::kKeys ? 0 : 1), 1);
      turn = __shfl_sync(~0U, turn, 0);
      if (turn >= turns) break;
      copy_rows(turn);
    }
    send({.kind = Message::kFinish});
  }

 private:
  // A message without copies.
  __device__ void send(const Message& message) {
    wait_empty();
    if (lane_ == 0) {
      shared_.messages[cursor_.stage] = message;
      sm90::barrier_arrive(&shared_.full[cursor_.stage]);
    }
    cursor_.advance();
  }
  __device__ void wait_empty() {
    sm90::barrier_wait(&shared_.empty[cursor_.stage], cursor_.parity ^ 1);
  }

  __device__ void copy_rows(int turn) {
    AttentionRows own{};
    int row_head = 0;
    operands_.turn(turn, own, row_head);
    sm90::barrier_wait(&shared_.rows_empty, rows_parity_ ^ 1);
    rows_parity_ ^= 1;
    if (lane_ == 0) {
      sm90::barrier_arrive_expect(&shared_.rows_full, own.count * 2 * kTileBytes<kDim>);
      for (int g = 0; g < own.count; ++g) {
        sm90::copy_bulk(shared_.rows[g], operands_.row_tile(row_head, own.block + g),
                        kTileBytes<kDim>, &shared_.rows_full);
        sm90::copy_bulk(shared_.row_partners[g],
                        operands_.row_partner_tile(row_head, own.block + g), kTileBytes<kDim>,
                        &shared_.rows_full);
      }
    }
    send({.kind = Message::kRows, .turn = turn});
    for (int i = 0; i < operands_.sharing(); ++i) {
      visit_head(own, row_head * operands_.sharing() + i);
    }
    send({.kind = Message::kEnd});
  }

  // A lane looks at one of 32 blocks of columns.
  __device__ void visit_head(const AttentionRows& own, int head) {
    const AttentionBlock first = params_.blocks[own.block];
    const int last_block = own.block + own.count - 1;
    const int end = operands_.end_column(last_block, first.end);
    for (int c = operands_.first_column(own.block, first.first); c < end; c += 32) {
      Message message{.kind = Message::kColumns, .head = head, .block = c + lane_};
      if (c + lane_ < end) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (g == own.count) break;
          const BlockPair pair = operands_.pair(head, own.block + g, c + lane_, first.first);
          message.read |= static_cast<int>(pair.read) << g;
          message.masked |= static_cast<int>(pair.masked) << g;
          message.decay[g] = operands_.decay(head, own.block + g, c + lane_);
        }
      }
      unsigned read = __ballot_sync(~0U, message.read != 0);
      while (read != 0) {
        const int lane = __ffs(static_cast<int>(read)) - 1;
        read &= read - 1;
        copy_columns(message, head, c + lane, lane);
      }
    }
  }

  // `lane` has the message.
  __device__ void copy_columns(const Message& message, int head, int c, int lane) {
    wait_empty();
    const int s = cursor_.stage;
    if (lane_ == lane) {
      constexpr int kTermBytes = kBlockTokens * 4;
      const std::int64_t at = params_.row_at(head, c);
      ColumnTerms& terms = shared_.terms[s];
      std::uint64_t* full = &shared_.full[s];
      shared_.messages[s] = message;
      sm90::barrier_arrive_expect(
          full, 2 * kTileBytes<kDim> + (kPass == Pass::kKeys ? 3 : 1) * kTermBytes);
      sm90::copy_bulk(shared_.columns[s], operands_.column_tile(head, c), kTileBytes<kDim>, full);
      sm90::copy_bulk(terms.terms, operands_.column_terms() + at, kTermBytes, full);
      if (kPass == Pass::kKeys) {
        sm90::copy_bulk(terms.deltas, params_.deltas + at, kTermBytes, full);
        sm90::copy_bulk(terms.begins, params_.begins + at, kTermBytes, full);
      }
      sm90::copy_bulk(shared_.column_partners[s], operands_.column_partner_tile(head, c),
                      kTileBytes<kDim>, full);
    }
    __syncwarp();
    cursor_.advance();
  }

  const AttentionBackwardParams& params_;
  Operands<kDim, kPass> operands_;
  Shared& shared_;
  int lane_;
  StageCursor<Shared::kStages> cursor_;
  int rows_parity_ = 0;
};

// A warp group.
template <int kDim, Pass kPass>
class Group {
 public:
  using Shared = GroupShared<kDim>;
  // Head sizes of 64 have registers for the rows as operands; those of 128 read them from shared
  // memory, and none are left to compute exponentials beside products.
  static constexpr bool kRowsInRegisters = kDim == 64;
  static constexpr int kDepth = kRowsInRegisters ? kDim / 16 : 1;
  // Whether the groups issue their products in turns, so that one's exponentials are computed while
  // the tensor cores work for the other.
  static constexpr bool kTakeTurns = kRowsInRegisters;

  __device__ Group(const AttentionBackwardParams& params, Shared& shared, int group)
      : params_(params),
        operands_{params},
        shared_(shared),
        group_(group),
        columns_(shared_address(shared.columns[0])),
        column_partners_(shared_address(shared.column_partners[0])),
        rows_(params) {}

  __device__ void run() {
    if (kTakeTurns && group_ == 1) pass_turn();
    while (true) {
      const int stage = receive();
      const int kind = shared_.messages[stage].kind;
      const int turn = shared_.messages[stage].turn;
      sm90::barrier_arrive(&shared_.empty[stage]);
      if (kind == Message::kFinish) return;
      own(turn);
    }
  }

 private:
  // The stage of the next message.
  __device__ int receive() {
    const int stage = uniform(cursor_.stage);
    sm90::barrier_wait(&shared_.full[stage], cursor_.parity);
    cursor_.advance();
    return stage;
  }
  __device__ void own(int turn) {
    AttentionRows own{};
    int row_head = 0;
    operands_.turn(turn, own, row_head);
    const bool owns = group_ < own.count;
    sm90::barrier_wait(&shared_.rows_full, rows_parity_);
    rows_parity_ ^= 1;
    if constexpr (kRowsInRegisters) {
      if (owns) {
        load_operand(operand_, shared_address(shared_.rows[group_]));
        load_operand(partner_operand_, shared_address(shared_.row_partners[group_]));
      }
      sm90::barrier_arrive(&shared_.rows_empty);
    }
    if (owns) rows_.start(own.block + group_);
    visit_columns();
    if constexpr (!kRowsInRegisters) sm90::barrier_arrive(&shared_.rows_empty);
    if (!owns) return;
    rows_.leave_head();
    rows_.store(row_head);
  }

  // For each message both groups take a turn, the first group first.
  __device__ void take_turn() const {
    if (kTakeTurns) asm volatile("bar.sync %0, 256;" ::"r"(1 + group_) : "memory");
  }
  __device__ void pass_turn() const {
    if (kTakeTurns) asm volatile("bar.arrive %0, 256;" ::"r"(2 - group_) : "memory");
  }

  __device__ void visit_columns() {
    int before = -1;  // the stage whose products are to be added
    while (true) {
      const int stage = receive();
      const Message& message = shared_.messages[stage];
      take_turn();
      if ((message.read >> group_ & 1) == 0) {
        pass_turn();
        const bool end = message.kind == Message::kEnd;
        // The copier may need the stage before columns that concern this group come.
        if (before >= 0) {
          add_products(before);
          finish_products(before);
          before = -1;
        }
        sm90::barrier_arrive(&shared_.empty[stage]);
        if (end) return;
        continue;
      }
      if (before < 0) {
        multiply_rows(stage);
        pass_turn();
        differentiate<0>(stage);
      } else if constexpr (kRowsInRegisters) {
        multiply_rows(stage);
        add_products(before);
        pass_turn();
        differentiate<1>(stage);
        finish_products(before);
      } else {
        add_products(before);
        finish_products(before);
        multiply_rows(stage);
        differentiate<0>(stage);
      }
      rows_.round();
      before = stage;
    }
  }

  // S and dP, a batch each; asynchronous.
  __device__ void multiply_rows(int stage) {
    const std::uint32_t columns = columns_ + stage * kTileBytes<kDim>;
    const std::uint32_t partners = column_partners_ + stage * kTileBytes<kDim>;
    constexpr bool kClear = kPass == Pass::kQueries;  // of dP
    rows_.begin_scores(shared_.terms[stage]);
    GroupProducts::begin(rows_.s);
    if constexpr (kRowsInRegisters) {
      GroupProducts::times_transposed<false>(rows_.s, operand_, columns);
      GroupProducts::commit();
      rows_.begin_gradients(shared_.terms[stage]);
      GroupProducts::begin(rows_.ds);
      GroupProducts::times_transposed<kClear>(rows_.ds, partner_operand_, partners);
    } else {
      GroupProducts::tiles_transposed<kDim / 16, false>(
          rows_.s, shared_address(shared_.rows[group_]), columns);
      GroupProducts::commit();
      rows_.begin_gradients(shared_.terms[stage]);
      GroupProducts::begin(rows_.ds);
      GroupProducts::tiles_transposed<kDim / 16, kClear>(
          rows_.ds, shared_address(shared_.row_partners[group_]), partners);
    }
    GroupProducts::commit();
  }
  // With so many batches of products behind S and dP.
  template <int kBehind>
  __device__ void differentiate(int stage) {
    const Message& message = shared_.messages[stage];
    if (message.head != rows_.head) {
      if (rows_.head >= 0) rows_.leave_head();
      rows_.enter_head(message.head);
    }
    GroupProducts::wait<kBehind + 1>();
    GroupProducts::end(rows_.s);
    if ((message.masked >> group_ & 1) != 0) {
      rows_.mask(shared_.terms[stage], (message.block - rows_.block) * kBlockTokens);
    }
    rows_.exponentiate(message.decay[group_]);
    GroupProducts::wait<kBehind>();
    GroupProducts::end(rows_.ds);
    rows_.differentiate();
  }
  __device__ void add_products(int before) {
    const int stage = uniform(before);
    rows_.template add_products<GroupProducts>(columns_ + stage * kTileBytes<kDim>,
                                               column_partners_ + stage * kTileBytes<kDim>);
  }
  __device__ void finish_products(int stage) {
    GroupProducts::wait<0>();
    rows_.template products_added<GroupProducts>();
    sm90::barrier_arrive(&shared_.empty[stage]);
  }

  const AttentionBackwardParams& params_;
  Operands<kDim, kPass> operands_;
  Shared& shared_;
  int group_;
  std::uint32_t columns_;          // of the first stage
  std::uint32_t column_partners_;  // of the first stage
  RowBlock<kDim, kPass> rows_;
  std::uint32_t operand_[kDepth][4];
  std::uint32_t partner_operand_[kDepth][4];
  StageCursor<Shared::kStages> cursor_;
  int rows_parity_ = 0;
};

template <int kDim, Pass kPass>
__global__ __launch_bounds__(kGroupThreads, 1) void differentiate_sm90(
    const __grid_constant__ AttentionBackwardParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  extern __shared__ std::byte memory[];
  using Shared = GroupShared<kDim>;
  // By an offset, so that the compiler still knows it to be shared memory.
  auto& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shared::kStages; ++s) {
      sm90::barrier_init(&shared.full[s], 1);
      sm90::barrier_init(&shared.empty[s], kGroups * 128);
    }
    sm90::barrier_init(&shared.rows_full, 1);
    sm90::barrier_init(&shared.rows_empty, kGroups * 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int group = uniform(static_cast<int>(threadIdx.x) / 128);
  if (group == kGroups) {
    give_registers<24>();
    if (threadIdx.x % 128 < 32) Copier<kDim, kPass>(params, shared).run();
  } else {
    take_registers<240>();
    Group<kDim, kPass>(params, shared, group).run();
  }
#endif
}

template <int kDim, Pass kPass>
void launch_pass(const AttentionBackwardParams& params, bool sm90, int multiprocessors,
                 cudaStream_t stream) {
  const int turns = params.rows_count * (kPass == Pass::kKeys ? params.kv_heads : params.heads);
  if (sm90) {
    constexpr int kBytes = sizeof(GroupShared<kDim>) + 1024;
    static_assert(kBytes <= 227 * 1024);
    cudaFuncSetAttribute(differentiate_sm90<kDim, kPass>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    differentiate_sm90<kDim, kPass>
        <<<min(multiprocessors, turns), kGroupThreads, kBytes, stream>>>(params);
  } else {
    constexpr int kBytes = sizeof(WarpShared<kDim>);
    cudaFuncSetAttribute(differentiate_sm80<kDim, kPass>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    differentiate_sm80<kDim, kPass><<<turns, 128, kBytes, stream>>>(params);
  }
}

template <int kDim>
void launch(const AttentionBackwardParams& params, bool sm90, int multiprocessors,
            cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.block_count), static_cast<unsigned>(params.heads),
                  4);
  make_tiles<kDim><<<grid, kTileThreads, 0, stream>>>(params);
  launch_pass<kDim, Pass::kKeys>(params, sm90, multiprocessors, stream);
  launch_pass<kDim, Pass::kQueries>(params, sm90, multiprocessors, stream);
}

}  // namespace

std::int64_t attention_tile_bytes(std::int64_t dim) {
  return padded_to_blocks(dim) == 64 ? kTileBytes<64> : kTileBytes<128>;
}

void launch_attention_backward_bf16(const AttentionBackwardParams& params, bool sm90,
                                    int multiprocessors, cudaStream_t stream) {
  if (padded_to_blocks(params.dim) == 64) {
    launch<64>(params, sm90, multiprocessors, stream);
  } else {
    launch<128>(params, sm90, multiprocessors, stream);
  }
}

}  // namespace deltafox::cuda
