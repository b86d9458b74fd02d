#include "cuda/products.h"

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <mutex>
#include <optional>

#include "core/error.h"
#include "cuda/card.h"
#include "cuda/check.h"
#include "cuda/stream.h"

namespace deltafox::cuda {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail("CUDA: {} failed: cuBLAS status {}", what, static_cast<int>(status));
  }
}

cudaDataType_t blas_type(DType dtype) {
  return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
}

std::uint32_t alignment(const ConstTensorView& matrix) {
  const auto row_bytes = static_cast<std::uintptr_t>(matrix.shape[1]) * size_of(matrix.dtype);
  const auto bits = reinterpret_cast<std::uintptr_t>(matrix.data) | row_bytes | std::uintptr_t{256};
  return 1U << std::countr_zero(bits);
}

// cuBLAS has columns where we have rows: cᵀ = op(b)ᵀ op(a)ᵀ, so its A is b. These descriptions are
// plain structs; making them costs nothing worth keeping them for.
struct Description {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;

  Description(const Product& p, std::int64_t m) {
    // COMPUTE_32F without _FAST_TF32: float32 products are float32.
    check_blas(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
               "cublasLtMatmulDescInit");
    const auto set = [&](cublasLtMatmulDescAttributes_t name, bool transposed) {
      const cublasOperation_t op = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
      check_blas(cublasLtMatmulDescSetAttribute(&product, name, &op, sizeof(op)),
                 "cublasLtMatmulDescSetAttribute");
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_b);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_a);
    const auto layout = [](cublasLtMatrixLayoutOpaque_t& to, const ConstTensorView& matrix,
                           std::int64_t rows, std::int64_t columns) {
      check_blas(cublasLtMatrixLayoutInit(&to, blas_type(matrix.dtype),
                                          static_cast<std::uint64_t>(columns),
                                          static_cast<std::uint64_t>(rows), matrix.shape[1]),
                 "cublasLtMatrixLayoutInit");
    };
    layout(a, p.b, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n);
    layout(b, p.a, p.transpose_a ? p.k : m, p.transpose_a ? m : p.k);
    layout(c, p.c, m, p.n);
  }
};

// All that an algorithm may depend on.
using AlgorithmKey = std::array<std::int64_t, 11>;

AlgorithmKey key_of(const Product& p, std::int64_t rows) {
  return {rows,
          p.n,
          p.k,
          static_cast<std::int64_t>(p.a.dtype),
          static_cast<std::int64_t>(p.c.dtype),
          p.transpose_a ? 1 : 0,
          p.transpose_b ? 1 : 0,
          p.accumulate ? 1 : 0,
          alignment(p.a),
          alignment(p.b),
          alignment(p.c)};
}

// Of many rows the algorithm with the most waves of tiles, the smallest ones, is faster than the
// one that cuBLASLt proposes first (docs/kernels.md).
bool takes_most_waves(const Product& p, std::int64_t rows) {
  constexpr std::int64_t kLeastRows = 2048;
  constexpr std::int64_t kLeastSums = kLeastRows * 1536;  // elements of c
  constexpr std::int64_t kMostOutputs = 8192;
  return p.transpose_b && !p.transpose_a && p.a.dtype == DType::kBF16 && rows >= kLeastRows &&
         rows * p.n >= kLeastSums && p.n <= kMostOutputs;
}

// The algorithm, or none where cuBLASLt has none.
std::optional<cublasLtMatmulAlgo_t> find_algorithm(cublasLtHandle_t blas, const Product& p,
                                                   std::int64_t rows) {
  if (plain_products()) return std::nullopt;
  Description description(p, rows);
  cublasLtMatmulPreferenceOpaque_t preference;
  check_blas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof(value));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.b));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.a));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.c));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.c));
  constexpr int kProposed = 8;
  std::array<cublasLtMatmulHeuristicResult_t, kProposed> proposed{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      blas, &description.product, &description.a, &description.b, &description.c, &description.c,
      &preference, takes_most_waves(p, rows) ? kProposed : 1, proposed.data(), &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0) return std::nullopt;
  return std::max_element(proposed.begin(), proposed.begin() + found,
                          [](const auto& a, const auto& b) { return a.wavesCount < b.wavesCount; })
      ->algo;
}

std::optional<cublasLtMatmulAlgo_t> algorithm(cublasLtHandle_t blas, const Product& p,
                                              std::int64_t rows) {
  static std::mutex mutex;
  static std::map<AlgorithmKey, std::optional<cublasLtMatmulAlgo_t>> known;
  const std::scoped_lock lock(mutex);
  const AlgorithmKey key = key_of(p, rows);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, find_algorithm(blas, p, rows)).first->second;
}

}  // namespace

bool product_blas(Context& ctx, const Product& p, std::int64_t algorithm_rows) {
  const cublasLtHandle_t blas = ctx.stream().blas();
  const std::optional<cublasLtMatmulAlgo_t> algo = algorithm(blas, p, algorithm_rows);
  if (!algo) return false;
  ScratchScope scratch(ctx);
  void* workspace = scratch.tensor({static_cast<std::int64_t>(kWorkspaceBytes)}, DType::kU8).data;
  Description description(p, p.m);
  const float alpha = 1;
  const float beta = p.accumulate ? 1 : 0;
  check_blas(cublasLtMatmul(blas, &description.product, &alpha, p.b.data, &description.a, p.a.data,
                            &description.b, &beta, p.c.data, &description.c, p.c.data,
                            &description.c, &*algo, workspace, kWorkspaceBytes, stream_of(ctx)),
             "cublasLtMatmul");
  return true;
}

}  // namespace deltafox::cuda
