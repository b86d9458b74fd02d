// y = x wᵀ on cuBLASLt. The algorithm is chosen once for a bucket of T (a power of two) and used
// for every T in it, so that what a row gets does not depend on how many rows are beside it.
#include "cuda/linear.h"

#include <bit>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "core/error.h"
#include "cuda/check.h"
#include "cuda/small_linear.h"
#include "cuda/stream.h"

namespace deltafox::cuda {
namespace {

constexpr std::int64_t kMinBucket = 32;
constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail("CUDA: {} failed: cuBLAS status {}", what, static_cast<int>(status));
  }
}

cudaDataType_t blas_type(DType dtype) {
  return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
}

// Column-major, as cuBLAS has it: the transpose of [rows, columns].
class Layout {
 public:
  Layout(DType dtype, std::int64_t rows, std::int64_t columns) {
    check_blas(
        cublasLtMatrixLayoutCreate(&layout_, blas_type(dtype), static_cast<std::uint64_t>(columns),
                                   static_cast<std::uint64_t>(rows), columns),
        "cublasLtMatrixLayoutCreate");
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(layout_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  cublasLtMatrixLayout_t get() const { return layout_; }

 private:
  cublasLtMatrixLayout_t layout_ = nullptr;
};

class Product {
 public:
  Product() {
    // COMPUTE_32F without _FAST_TF32: float32 products are float32.
    check_blas(cublasLtMatmulDescCreate(&desc_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
               "cublasLtMatmulDescCreate");
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check_blas(cublasLtMatmulDescSetAttribute(desc_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                              sizeof(transposed)),
               "cublasLtMatmulDescSetAttribute");
  }
  ~Product() { cublasLtMatmulDescDestroy(desc_); }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  cublasLtMatmulDesc_t get() const { return desc_; }

 private:
  cublasLtMatmulDesc_t desc_ = nullptr;
};

std::uint32_t alignment(const void* pointer, std::int64_t row_bytes) {
  const auto bits = reinterpret_cast<std::uintptr_t>(pointer) |
                    static_cast<std::uintptr_t>(row_bytes) | std::uintptr_t{256};
  return 1U << std::countr_zero(bits);
}

// bucket, N, K, dtype of x and w, dtype of y, accumulate, alignments of w, x, y
using PlanKey = std::tuple<std::int64_t, std::int64_t, std::int64_t, DType, DType, bool,
                           std::uint32_t, std::uint32_t, std::uint32_t>;

// The algorithm, or none where cuBLASLt has none.
std::optional<cublasLtMatmulAlgo_t> find_algorithm(cublasLtHandle_t blas, const PlanKey& key) {
  const auto& [bucket, n, k, x_dtype, y_dtype, accumulate, align_w, align_x, align_y] = key;
  const Product product;
  const Layout w(x_dtype, n, k);
  const Layout x(x_dtype, bucket, k);
  const Layout y(y_dtype, bucket, n);
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align_w);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align_x);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align_y);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align_y);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      blas, product.get(), w.get(), x.get(), y.get(), y.get(), preference, 1, &result, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0) return std::nullopt;
  return result.algo;
}

std::optional<cublasLtMatmulAlgo_t> algorithm(cublasLtHandle_t blas, const PlanKey& key) {
  static std::mutex mutex;
  static std::map<PlanKey, std::optional<cublasLtMatmulAlgo_t>> plans;
  const std::scoped_lock lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  return plans.emplace(key, find_algorithm(blas, key)).first->second;
}

bool linear_blas(Context& ctx, const LinearArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t n = args.w.shape[0];
  const std::int64_t k = args.w.shape[1];
  const auto bucket = std::max<std::int64_t>(
      kMinBucket, static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(tokens))));
  const auto element = static_cast<std::int64_t>(size_of(args.x.dtype));
  const auto element_y = static_cast<std::int64_t>(size_of(args.y.dtype));
  const PlanKey key{bucket,
                    n,
                    k,
                    args.x.dtype,
                    args.y.dtype,
                    args.accumulate,
                    alignment(args.w.data, k * element),
                    alignment(args.x.data, k * element),
                    alignment(args.y.data, n * element_y)};
  const cublasLtHandle_t blas = ctx.stream().blas();
  const std::optional<cublasLtMatmulAlgo_t> algo = algorithm(blas, key);
  if (!algo) return false;
  ScratchScope scratch(ctx);
  void* workspace = scratch.tensor({static_cast<std::int64_t>(kWorkspaceBytes)}, DType::kU8).data;
  const Product product;
  const Layout w(args.w.dtype, n, k);
  const Layout x(args.x.dtype, tokens, k);
  const Layout y(args.y.dtype, tokens, n);
  const float alpha = 1;
  const float beta = args.accumulate ? 1 : 0;
  check_blas(cublasLtMatmul(blas, product.get(), &alpha, args.w.data, w.get(), args.x.data, x.get(),
                            &beta, args.y.data, y.get(), args.y.data, y.get(), &*algo, workspace,
                            kWorkspaceBytes, stream_of(ctx)),
             "cublasLtMatmul");
  return true;
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  if (args.x.shape[0] == 0) return;
  if (args.w.dtype != args.x.dtype) {
    fail("linear: x is {} and w {}, on a GPU they must be the same", name_of(args.x.dtype),
         name_of(args.w.dtype));
  }
  const std::int64_t tokens = args.x.shape[0];
  if (fits_small_linear(args)) {
    small_linear(ctx, args);
  } else if (tokens <= kSmallLinearRows || !linear_blas(ctx, args)) {
    linear_plain(ctx, args);
  }
  if (args.bias.data != nullptr) add_bias(ctx, args.y, args.bias);
}

}  // namespace deltafox::cuda
