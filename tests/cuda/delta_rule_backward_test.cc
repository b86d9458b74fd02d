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
  // None of them are heads that BF16 takes in chunks.
  const std::int64_t sizes[][2] = {{64, 66}, {30, 33}, {200, 40}, {97, 72}};
  for (const auto& size : sizes) {
    SCOPED_TRACE(size[0]);
    Case c(random, {0, 64, 64, 65, 95, 225}, 2, size[0], size[1], size[0] != 64);
    const std::vector<Tensor> got = c.run(gpu);
    expect_gradients(got, c.run_plain(), plain_tolerance(gpu.dtype()));
  }
}

// In chunks on the tensor cores, a gradient has been rounded some nine times on its way, errors of
// independent signs: S, R, T, U, dS, dU, dE, a triangle of scores and the gradient itself. Twice
// √9 epsilons leave room for the growth in T.
double chunk_tolerance() {
  return 6 * test::epsilon(DType::kBF16);
}

class CudaDeltaRuleBackwardChunks : public testing::Test {
 protected:
  Random random_{2};
  Gpu gpu_{DType::kBF16};
};

TEST_F(CudaDeltaRuleBackwardChunks, EqualPlain) {
  const std::int64_t sizes[][2] = {{128, 128}, {64, 64}, {64, 128}, {128, 64}, {72, 104}, {8, 8}};
  for (const auto& size : sizes) {
    SCOPED_TRACE(testing::Message() << "K " << size[0] << ", V " << size[1]);
    // One chunk, a chunk and one row, nothing, too few rows for chunks, tails.
    Case c(random_, {0, 64, 129, 129, 139, 182, 374, 500}, 3, size[0], size[1], size[0] != 64);
    const std::vector<Tensor> got = c.run(gpu_);
    expect_gradients(got, c.run_plain(), chunk_tolerance());
  }
}

TEST_F(CudaDeltaRuleBackwardChunks, EqualPlainAtRandomLengths) {
  for (int i = 0; i < 8; ++i) {
    SCOPED_TRACE(i);
    Case c(random_, random_.lengths(random_.integer(1, 6), 300), random_.integer(1, 4),
           8 * random_.integer(1, 16), 8 * random_.integer(1, 16), i % 4 != 0);
    const std::vector<Tensor> got = c.run(gpu_);
    expect_gradients(got, c.run_plain(), chunk_tolerance());
  }
}

// Long enough to be cut into segments, among them ones of unequal numbers of chunks.
TEST_F(CudaDeltaRuleBackwardChunks, EqualPlainInSegments) {
  for (const std::int64_t size : {64, 128}) {
    SCOPED_TRACE(size);
    Case c(random_, {0, 100, 5820, 12000}, 2, size, size, true);
    const std::vector<Tensor> got = c.run(gpu_);
    expect_gradients(got, c.run_plain(), chunk_tolerance());
  }
}

// Where β is 0 a token leaves no trace in the state, and yet has a gradient of β.
TEST_F(CudaDeltaRuleBackwardChunks, EqualPlainWhereBetaIsZeroOrSmall) {
  Case c(random_, {0, 200}, 2, 128, 128, true);
  for (std::int64_t i = 0; i < c.cu.back() * 2; ++i) {
    if (i % 3 == 0) c.beta.f32()[i] = 0;
    if (i % 7 == 0) c.beta.f32()[i] = 1e-6F;
  }
  const std::vector<Tensor> got = c.run(gpu_);
  expect_gradients(got, c.run_plain(), chunk_tolerance());
}

TEST_F(CudaDeltaRuleBackwardChunks, RepeatToTheBit) {
  Case c(random_, {0, 1000, 6700}, 2, 128, 128, true);
  const std::vector<Tensor> first = c.run(gpu_);
  for (int i = 0; i < 3; ++i) {
    const std::vector<Tensor> again = c.run(gpu_);
    for (std::size_t d = 0; d < first.size(); ++d) expect_equal(again[d], first[d]);
  }
}

TEST_F(CudaDeltaRuleBackwardChunks, DoNotDependOnTheBatch) {
  constexpr std::int64_t kHeads = 2;
  Case all(random_, {0, 300, 345, 5945, 6100}, kHeads, 128, 128, true);
  const std::vector<Tensor> together = all.run(gpu_);
  for (std::size_t b = 0; b + 1 < all.cu.size(); ++b) {
    SCOPED_TRACE(b);
    const std::int64_t begin = all.cu[b] * kHeads;
    const std::int64_t rows = (all.cu[b + 1] - all.cu[b]) * kHeads;
    Case alone(random_, {0, rows / kHeads}, kHeads, 128, 128, true);
    const auto take = [&](const Tensor& from, Tensor& to) {
      const std::int64_t width = to.view().shape.size() / rows;
      std::copy_n(from.f32() + begin * width, rows * width, to.f32());
    };
    take(all.q, alone.q);
    take(all.k, alone.k);
    take(all.v, alone.v);
    take(all.d_o, alone.d_o);
    take(all.beta, alone.beta);
    const std::vector<Tensor> got = alone.run(gpu_);
    for (std::size_t d = 0; d < got.size(); ++d) {
      Tensor expected(DType::kF32, got[d].view().shape);
      take(together[d], expected);
      expect_equal(got[d], expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaDeltaRuleBackward, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
