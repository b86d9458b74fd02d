// Products of small bfloat16 matrices on the tensor cores, with float32 accumulation.
//
// A tile holds 64 rows in shared memory, in blocks of 64 columns: a block has 128 bytes a row, and
// its 16-byte pieces are permuted within a row (piece p of row r lies at p ^ (r & 7)), the layout
// that warp-group products read and in which eight rows of one column never share a bank.
//
// Four warps ("a warp group") work on one product of 64 rows. Warp w holds rows 16w to 16w+15 of
// the accumulator, tile [n/8] of which has, in lane l, rows l/4 and l/4 + 8 and columns 2(l%4) and
// 2(l%4) + 1: {(r, c), (r, c+1), (r+8, c), (r+8, c+1)}. Rounded in pairs, an accumulator is the
// left operand of the next product, so chains of products never leave the registers.
//
// WarpProducts computes at once (sm_80 and newer); GroupProducts issues asynchronous products of
// the whole warp group (sm_90a): `commit` ends a batch, `wait<n>` waits until at most n batches are
// under way, and registers that a product uses must not be touched in between.
#pragma once

#include "cuda/elements.cuh"

#include <cstdint>

namespace deltafox::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasGroupProducts = true;
#else
constexpr bool kHasGroupProducts = false;
#endif

constexpr int kTileRows = 64;
constexpr int kTileBlockBytes = kTileRows * 128;  // 64 rows of 64 columns

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Offset of the 16-byte piece that holds columns 8·piece to 8·piece + 7.
__device__ inline std::uint32_t piece_offset(int row, int piece) {
  return (piece >> 3) * kTileBlockBytes + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
}

__device__ inline std::uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

__device__ inline float2 unpack(std::uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// The pair of an operand times two factors.
__device__ inline std::uint32_t scale_pair(std::uint32_t pair, const float2& scale) {
  const float2 x = unpack(pair);
  return pack(x.x * scale.x, x.y * scale.y);
}

// The accumulator of a product as the left operand of the next.
template <int kTiles>
__device__ void to_operand(std::uint32_t (&operand)[kTiles / 2][4], const float (&acc)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    operand[i][0] = pack(acc[2 * i][0], acc[2 * i][1]);
    operand[i][1] = pack(acc[2 * i][2], acc[2 * i][3]);
    operand[i][2] = pack(acc[2 * i + 1][0], acc[2 * i + 1][1]);
    operand[i][3] = pack(acc[2 * i + 1][2], acc[2 * i + 1][3]);
  }
}

__device__ inline void load_matrices(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices_transposed(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Transposes the 4x4 words that each four neighbouring lanes hold, a row a lane.
__device__ inline void transpose_quads(std::uint32_t (&m)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool upper = threadIdx.x / 2 % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? m[i] : m[i + 1], 1);
    (odd ? m[i] : m[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffU, upper ? m[i] : m[i + 2], 2);
    (upper ? m[i] : m[i + 2]) = other;
  }
}

// Stores four 8x8 matrices; lane l names row l%8 of matrix l/8. On sm_90.
__device__ inline void store_matrices(std::uint32_t address, const std::uint32_t (&m)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
#endif
}

// The same, transposed.
__device__ inline void store_matrices_transposed(std::uint32_t address,
                                                 const std::uint32_t (&m)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint32_t turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(m[i]));
    const std::uint32_t row = __shfl_sync(0xffffffffU, address, 8 * i + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + 4 * (lane % 4)), "r"(turned) : "memory");
  }
#endif
}

// d += a b for a [16,16] and b [16,8]
__device__ inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounded to TF32 when its last 13 bits, which products ignore, are cut off.
__device__ inline float to_tf32(float x) {
  return __uint_as_float(__float_as_uint(x) + 0x1000U);
}

// A value that all lanes share, in a register that the warp shares.
__device__ inline int uniform(int value) {
  return __shfl_sync(0xffffffffU, value, 0);
}

// d += a b for a [16,8] and b [8,8], rounded to TF32
__device__ inline void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Copies 16 bytes to shared memory, or zeros where there is nothing to read.
__device__ inline void copy_piece_async(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void copy_word_async(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kLeft>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Barriers in shared memory between the warps that fill a buffer and those that read it.
__device__ inline void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}
__device__ inline void barrier_wait(std::uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}
// Among the 128 threads of one warp group.
__device__ inline void group_sync(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// Moves registers between warp groups that do different work (sm_90a). Their sum over all groups
// must not exceed what the block was launched with.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

struct WarpProducts {
  static constexpr bool kGroup = false;

  static __device__ void publish() {}
  template <int kTiles>
  static __device__ void begin(float (&)[kTiles][4]) {}
  template <int kTiles>
  static __device__ void end(float (&)[kTiles][4]) {}
  static __device__ void commit() {}
  template <int kLeft>
  static __device__ void wait() {}

  template <int kTiles>
  static __device__ void clear(float (&d)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) d[i][0] = d[i][1] = d[i][2] = d[i][3] = 0;
  }

  // d [64, 64] (+)= a · tileᵀ, for a tile of kDepth·16 columns
  template <bool kClear, int kDepth>
  static __device__ void times_transposed(float (&d)[8][4], const std::uint32_t (&a)[kDepth][4],
                                          std::uint32_t tile) {
    if (kClear) clear(d);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t b[4];
        load_matrices(
            b, tile + piece_offset(16 * n + (lane / 16) * 8 + lane % 8, 2 * k + (lane / 8) % 2));
        mma_bf16(d[2 * n], a[k], b[0], b[1]);
        mma_bf16(d[2 * n + 1], a[k], b[2], b[3]);
      }
    }
  }

  // d [64, 8·kTiles] (+)= a · tile
  template <bool kClear, int kTiles>
  static __device__ void times(float (&d)[kTiles][4], const std::uint32_t (&a)[4][4],
                               std::uint32_t tile) {
    if (kClear) clear(d);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int n = 0; n < kTiles / 2; ++n) {
        std::uint32_t b[4];
        load_matrices_transposed(
            b, tile + piece_offset(16 * k + ((lane / 8) % 2) * 8 + lane % 8, 2 * n + lane / 16));
        mma_bf16(d[2 * n], a[k], b[0], b[1]);
        mma_bf16(d[2 * n + 1], a[k], b[2], b[3]);
      }
    }
  }

  // d [64, 64] = left · rightᵀ, for tiles of kDepth·16 columns
  template <int kDepth>
  static __device__ void tiles_transposed(float (&d)[8][4], std::uint32_t left,
                                          std::uint32_t right) {
    clear(d);
    const int lane = threadIdx.x % 32;
    const int warp = (threadIdx.x / 32) % 4;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      std::uint32_t a[1][4];
      load_matrices(a[0], left + piece_offset(16 * warp + lane % 16, 2 * k + lane / 16));
      // The columns of later warps are above the diagonal: nobody reads them.
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n <= warp) {
          std::uint32_t b[4];
          load_matrices(
              b, right + piece_offset(16 * n + (lane / 16) * 8 + lane % 8, 2 * k + (lane / 8) % 2));
          mma_bf16(d[2 * n], a[0], b[0], b[1]);
          mma_bf16(d[2 * n + 1], a[0], b[2], b[3]);
        }
      }
    }
  }
};

// clang-format off
#define DELTAFOX_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define DELTAFOX_32(d) DELTAFOX_4(d, 0), DELTAFOX_4(d, 1), DELTAFOX_4(d, 2), DELTAFOX_4(d, 3), \
                       DELTAFOX_4(d, 4), DELTAFOX_4(d, 5), DELTAFOX_4(d, 6), DELTAFOX_4(d, 7)
#define DELTAFOX_64(d) DELTAFOX_32(d), \
                       DELTAFOX_4(d, 8), DELTAFOX_4(d, 9), DELTAFOX_4(d, 10), DELTAFOX_4(d, 11), \
                       DELTAFOX_4(d, 12), DELTAFOX_4(d, 13), DELTAFOX_4(d, 14), DELTAFOX_4(d, 15)
#define DELTAFOX_D32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20," \
                     "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define DELTAFOX_D64 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20," \
                     "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
                     "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
                     "%59,%60,%61,%62,%63}"
// clang-format on

struct GroupProducts {
  static constexpr bool kGroup = true;

  // Ordinary stores to shared memory become visible to the products.
  static __device__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  // Before the first product that uses an accumulator (or operand registers written since).
  template <int kTiles>
  static __device__ void begin(float (&d)[kTiles][4]) {
    end(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  // After the wait: keeps the compiler from reading the accumulator earlier.
  template <int kTiles>
  static __device__ void end(float (&d)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
    }
  }
  static __device__ void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <int kLeft>
  static __device__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  }

  // Swizzled layout of 128 bytes. Groups of eight rows lie 1024 bytes apart; where columns run
  // along the result ("times"), blocks of 64 columns lie kTileBlockBytes apart.
  // Of what begins some bytes behind a tile's start; only the lower half depends on either.
  static __device__ std::uint64_t descriptor(std::uint32_t tile, int bytes = 0) {
    const std::uint32_t start = ((tile & 0x3FFFF) >> 4) | ((kTileBlockBytes >> 4) << 16);
    return (std::uint64_t{(1U << 30) | (1024 >> 4)} << 32) |
           (start + static_cast<std::uint32_t>(bytes >> 4));
  }

  template <bool kClear, int kTransposed>
  static __device__ void product(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DELTAFOX_D32
        ", {%32,%33,%34,%35}, %36, add, 1, 1, %38; }"
        : DELTAFOX_32(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kClear ? 0 : 1),
          "n"(kTransposed));
  }
  template <bool kClear, int kTransposed>
  static __device__ void product(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " DELTAFOX_D64
        ", {%64,%65,%66,%67}, %68, add, 1, 1, %70; }"
        : DELTAFOX_64(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kClear ? 0 : 1),
          "n"(kTransposed));
  }

  template <bool kClear, int kDepth>
  static __device__ void times_transposed(float (&d)[8][4], const std::uint32_t (&a)[kDepth][4],
                                          std::uint32_t tile) {
    product<kClear, 0>(d, a[0], descriptor(tile));
#pragma unroll
    for (int k = 1; k < kDepth; ++k) {
      product<false, 0>(d, a[k], descriptor(tile, (k / 4) * kTileBlockBytes + (k % 4) * 32));
    }
  }

  template <bool kClear, int kTiles>
  static __device__ void times(float (&d)[kTiles][4], const std::uint32_t (&a)[4][4],
                               std::uint32_t tile) {
    product<kClear, 1>(d, a[0], descriptor(tile));
#pragma unroll
    for (int k = 1; k < 4; ++k) product<false, 1>(d, a[k], descriptor(tile, k * 16 * 128));
  }

  // d [64, 64] (+)= left · right over a depth of kDepth·16. `left` is a tile of 64 rows, or with
  // kLeftTurned its transpose, of 64 columns; `right` a tile of 64 columns, or with kRightTurned
  // its transpose, of 64 rows.
  template <bool kClear, int kDepth, bool kLeftTurned, bool kRightTurned>
  static __device__ void tiles(float (&d)[8][4], std::uint32_t left, std::uint32_t right) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      // To the next 16 rows, or columns.
      const int rows = k * 16 * 128;
      const int columns = (k / 4) * kTileBlockBytes + (k % 4) * 32;
      asm volatile(
          "{ .reg .pred add; setp.ne.b32 add, %34, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DELTAFOX_D32
          ", %32, %33, add, 1, 1, %35, %36; }"
          : DELTAFOX_32(d)
          : "l"(descriptor(left, kLeftTurned ? rows : columns)),
            "l"(descriptor(right, kRightTurned ? columns : rows)), "r"(kClear && k == 0 ? 0 : 1),
            "n"(kLeftTurned ? 1 : 0), "n"(kRightTurned ? 0 : 1));
    }
  }
  template <int kDepth, bool kClear = true>
  static __device__ void tiles_transposed(float (&d)[8][4], std::uint32_t left,
                                          std::uint32_t right) {
    tiles<kClear, kDepth, false, true>(d, left, right);
  }
};

#undef DELTAFOX_4
#undef DELTAFOX_32
#undef DELTAFOX_64
#undef DELTAFOX_D32
#undef DELTAFOX_D64

}  // namespace deltafox::cuda
