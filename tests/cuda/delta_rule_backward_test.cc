// The delta rule's gradients on the GPU against the plain float32 version on the CPU.
#include <gtest/gtest.h>

#include <cmath>

#include "cuda/gpu.h"
#include "ops/delta_rule.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::Random;

class CudaDeltaRuleBackward : public EachDType {};

struct Case {
  Case(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t heads,
       std::int64_t key_dim, std::int64_t value_dim, bool has_beta)
      : cu(std::move(cu_seqlens)),
        q(unit_rows(random, {cu.back(), heads, key_dim})),
        k(unit_rows(random, {cu.back(), heads, key_dim})),
        v(random.normal_tensor({cu.back(), heads, value_dim})),
        d_o(random.normal_tensor({cu.back(), heads, value_dim})),
        beta(DType::kF32, {cu.back(), heads}),
        use_beta(has_beta) {
    for (std::int64_t i = 0; i < cu.back() * heads; ++i) beta.f32()[i] = random.uniform(0, 1);
  }

  static Tensor unit_rows(Random& random, const Shape& shape) {
    Tensor rows = random.normal_tensor(shape);
    for (float* row = rows.f32(); row < rows.f32() + shape.size(); row += shape[2]) {
      float squares = 0;
      for (std::int64_t i = 0; i < shape[2]; ++i) squares += row[i] * row[i];
      for (std::int64_t i = 0; i < shape[2]; ++i) row[i] /= std::sqrt(squares);
    }
    return rows;
  }

  // dq, dk, dv and, with beta, dbeta.
  std::vector<Tensor> results(DType dtype, Device device) const {
    std::vector<Tensor> d;
    for (const Tensor* input : {&q, &k, &v}) d.emplace_back(dtype, input->view().shape, device);
    if (use_beta) d.emplace_back(DType::kF32, beta.view().shape, device);
    return d;
  }
  DeltaRuleBackwardArgs args(const Tensor& queries, const Tensor& keys, const Tensor& values,
                             const Tensor& betas, const Tensor& d_outputs,
                             std::vector<Tensor>& d) const {
    return {.q = queries.view(),
            .k = keys.view(),
            .v = values.view(),
            .beta = use_beta ? betas.view() : ConstTensorView(),
            .sequences = Sequences(cu),
            .d_o = d_outputs.view(),
            .dq = d[0].view(),
            .dk = d[1].view(),
            .dv = d[2].view(),
            .dbeta = use_beta ? d[3].view() : TensorView()};
  }

  // As float32; inputs are rounded here to what the GPU reads.
  std::vector<Tensor> run(Gpu& gpu) {
    const Tensor device_q = gpu.upload(q, gpu.dtype());
    const Tensor device_k = gpu.upload(k, gpu.dtype());
    const Tensor device_v = gpu.upload(v, gpu.dtype());
    const Tensor device_d_o = gpu.upload(d_o, gpu.dtype());
    const Tensor device_beta = gpu.upload(beta);
    std::vector<Tensor> d = results(gpu.dtype(), Device::kCuda);
    ops::delta_rule_backward(gpu.ctx(),
                             args(device_q, device_k, device_v, device_beta, device_d_o, d));
    for (Tensor& gradient : d) gradient = gpu.download(gradient);
    return d;
  }
  std::vector<Tensor> run_plain() const {
    std::vector<Tensor> d = results(DType::kF32, Device::kCpu);
    reference::delta_rule_backward(args(q, k, v, beta, d_o, d));
    return d;
  }

  std::vector<std::int64_t> cu;
  Tensor q, k, v, d_o, beta;
  bool use_beta;
};

void expect_gradients(const std::vector<Tensor>& got, const std::vector<Tensor>& expected,
                      double tolerance) {
  const char* names[] = {"dq", "dk", "dv", "dbeta"};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(names[i]);
    expect_close(got[i], expected[i], tolerance);
  }
}

// In float32, four sums of a few hundred terms follow one another: state, its gradient, scores,
// result. Computed so and rounded once, BF16 adds an epsilon.
double plain_tolerance(DType dtype) {
  const double sums = 4 * 16 * test::epsilon(DType::kF32);
  return dtype == DType::kBF16 ? test::epsilon(dtype) + sums : sums;
}

TEST_P(CudaDeltaRuleBackward, EqualsPlainForAnyHeadSizes) {
  Random random(1);
  Gpu gpu(GetParam());
  const std::int64_t sizes[][2] = {{64, 64}, {30, 33}, {200, 40}, {96, 72}};
  for (const auto& size : sizes) {
    SCOPED_TRACE(size[0]);
    Case c(random, {0, 64, 64, 65, 95, 225}, 2, size[0], size[1], size[0] != 64);
    const std::vector<Tensor> got = c.run(gpu);
    expect_gradients(got, c.run_plain(), plain_tolerance(gpu.dtype()));
  }
}

INSTANTIATE_TEST_SUITE_P(, CudaDeltaRuleBackward, testing::Values(DType::kF32, DType::kBF16));

}  // namespace
}  // namespace deltafox
