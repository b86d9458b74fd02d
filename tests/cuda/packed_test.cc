// Packed matrices on the GPU by themselves; products with them are in linear_test.cc.
#include <gtest/gtest.h>

#include "cuda/gpu.h"
#include "ops/embedding.h"

namespace deltafox {
namespace {

using test::expect_equal;
using test::Gpu;
using test::Random;

class CudaPacked : public test::EachDType {};

TEST_P(CudaPacked, RowsOfATableAreThoseOfTheCpu) {
  Random random(1);
  Gpu gpu(DType::kBF16);
  for (const std::int64_t width : {1536, 64, 33, 1, 300, 4}) {
    SCOPED_TRACE(width);
    const std::int64_t rows = random.integer(1, 100);
    Tensor table = random.normal_tensor({rows, width});
    const Tensor gpu_table = gpu.upload(table, GetParam());
    std::vector<std::int32_t> ids;
    for (std::int64_t n = 0; n < rows; ++n) {
      ids.push_back(static_cast<std::int32_t>(random.integer(0, rows - 1)));
    }
    Tensor gpu_ids(DType::kI32, {rows}, Device::kCuda);
    gpu_ids.read_from(ids.data());
    Tensor y(DType::kF32, {rows, width}, Device::kCuda);
    ops::embedding(gpu.ctx(), {.ids = {static_cast<const std::int32_t*>(gpu_ids.view().data),
                                       static_cast<std::size_t>(rows)},
                               .table = gpu_table.view(),
                               .y = y.view()});
    Tensor expected(DType::kF32, {rows, width});
    for (std::size_t t = 0; t < ids.size(); ++t) {
      std::copy_n(table.f32() + ids[t] * width, width,
                  expected.f32() + static_cast<std::int64_t>(t) * width);
    }
    expect_equal(gpu.download(y), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, CudaPacked, testing::Values(DType::kQ8, DType::kQ4),
                         test::dtype_name);

}  // namespace
}  // namespace deltafox
