// The gradients of GLA, of Mamba-2's state space and of Mamba's selective scan on the GPU against
// the plain versions on the CPU.
#include <gtest/gtest.h>

#include <cmath>

#include "cuda/gpu.h"
#include "ops/gla.h"
#include "ops/selective_scan.h"
#include "ops/ssd.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::Random;

// In float32, sums of up to a few hundred terms follow one another: state, its gradient, scores,
// result, with products of gates that are off by a few roundings each. Computed so and rounded
// once, BF16 adds an epsilon.
double tolerance(DType dtype) {
  const double sums = 4 * 16 * test::epsilon(DType::kF32);
  return dtype == DType::kBF16 ? test::epsilon(dtype) + sums : sums;
}

// On the tensor cores BF16 rounds what a chunk adds to a state, the states, the scores, the left
// operands once they are scaled, and outputs: errors of independent signs, √5 epsilons of what they
// act on, and twice that for the few numbers of a parameter's gradient, where they need not average
// out.
double chunk_tolerance() {
  return 2 * std::sqrt(5.0) * test::epsilon(DType::kBF16);
}

// GLA's queries and keys are rounded once when they are decayed within a part of a chunk and again
// across parts; further what a chunk adds to a state, the states, those within a chunk, the scores
// or what a state makes of rows, and outputs.
double gla_chunk_tolerance() {
  return 2 * std::sqrt(8.0) * test::epsilon(DType::kBF16);
}

// Rows [begin, end) of each tensor.
Tensor rows_of(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  const Shape& shape = tensor.view().shape;
  const std::int64_t row = shape.size() / shape[0];
  std::array<std::int64_t, 3> dims{end - begin, shape[1], 1};
  if (shape.rank() == 3) dims[2] = shape[2];
  Tensor rows(DType::kF32, Shape(std::span<const std::int64_t>(
                               dims.data(), static_cast<std::size_t>(shape.rank()))));
  std::copy_n(tensor.f32() + begin * row, (end - begin) * row, rows.f32());
  return rows;
}

// Bounded: of products of several normal numbers a few are so large that rounding them is an error
// of many times the tensor's root mean square.
Tensor uniform_tensor(Random& random, const Shape& shape) {
  Tensor tensor(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.size(); ++i) tensor.f32()[i] = random.uniform(-2, 2);
  return tensor;
}

struct GlaCase {
  std::vector<std::int64_t> cu;
  Tensor q, k, g, v, d_o;

  GlaCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t heads,
          std::int64_t key_dim, std::int64_t value_dim)
      : cu(std::move(cu_seqlens)),
        q(random.normal_tensor({cu.back(), heads, key_dim})),
        k(DType::kF32, q.view().shape),
        g(DType::kF32, q.view().shape),
        v(random.normal_tensor({cu.back(), heads, value_dim})),
        d_o(random.normal_tensor({cu.back(), heads, value_dim})) {
    for (std::int64_t i = 0; i < q.view().shape.size(); ++i) {
      // Some forget everything, some nothing.
      const std::int64_t kind = random.integer(0, 9);
      g.f32()[i] = kind == 0 ? 0 : kind == 1 ? 1 : 1 - std::pow(random.uniform(0, 1), 4.0F);
      k.f32()[i] = 1 - g.f32()[i];
    }
  }
  GlaCase(const GlaCase& all, std::int64_t begin, std::int64_t end)
      : cu{0, end - begin},
        q(rows_of(all.q, begin, end)),
        k(rows_of(all.k, begin, end)),
        g(rows_of(all.g, begin, end)),
        v(rows_of(all.v, begin, end)),
        d_o(rows_of(all.d_o, begin, end)) {}

  GlaBackwardArgs args(const Tensor& queries, const Tensor& keys, const Tensor& gates,
                       const Tensor& values, const Tensor& d_outputs,
                       std::vector<Tensor>& d) const {
    return {.q = queries.view(),
            .k = keys.view(),
            .g = gates.view(),
            .v = values.view(),
            .sequences = Sequences(cu),
            .d_o = d_outputs.view(),
            .dq = d[0].view(),
            .dk = d[1].view(),
            .dg = d[2].view(),
            .dv = d[3].view()};
  }
  // dq, dk, dg and dv as float32. Inputs are rounded here to what the GPU reads.
  std::vector<Tensor> run(Gpu& gpu) {
    const DType dtype = gpu.dtype();
    const Tensor device_q = gpu.upload(q, dtype);
    const Tensor device_k = gpu.upload(k);
    const Tensor device_g = gpu.upload(g);
    const Tensor device_v = gpu.upload(v, dtype);
    const Tensor device_d_o = gpu.upload(d_o, dtype);
    std::vector<Tensor> d;
    d.emplace_back(dtype, q.view().shape, Device::kCuda);
    d.emplace_back(DType::kF32, k.view().shape, Device::kCuda);
    d.emplace_back(DType::kF32, g.view().shape, Device::kCuda);
    d.emplace_back(dtype, v.view().shape, Device::kCuda);
    ops::gla_backward(gpu.ctx(), args(device_q, device_k, device_g, device_v, device_d_o, d));
    for (Tensor& gradient : d) gradient = gpu.download(gradient);
    return d;
  }
  std::vector<Tensor> run_plain() const {
    std::vector<Tensor> d;
    for (const Tensor* like : {&q, &k, &g, &v}) d.emplace_back(DType::kF32, like->view().shape);
    reference::gla_backward(args(q, k, g, v, d_o, d));
    return d;
  }
};

struct SsdCase {
  std::vector<std::int64_t> cu;
  std::int64_t heads, groups, state_size, head_dim;
  Tensor xbc, dt, dt_bias, a_log, d, dy;
  float dt_min = 0;
  float dt_max = INFINITY;

  SsdCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t num_groups,
          std::int64_t heads_of_group, std::int64_t n, std::int64_t p)
      : cu(std::move(cu_seqlens)),
        heads(num_groups * heads_of_group),
        groups(num_groups),
        state_size(n),
        head_dim(p),
        xbc(uniform_tensor(random, {cu.back(), heads * p + 2 * groups * n})),
        dt(uniform_tensor(random, {cu.back(), heads})),
        dt_bias(uniform_tensor(random, {heads})),
        a_log(uniform_tensor(random, {heads})),
        d(random.normal_tensor({heads})),
        dy(uniform_tensor(random, {cu.back(), heads, p})) {}
  SsdCase(const SsdCase& all, std::int64_t begin, std::int64_t end)
      : cu{0, end - begin},
        heads(all.heads),
        groups(all.groups),
        state_size(all.state_size),
        head_dim(all.head_dim),
        xbc(rows_of(all.xbc, begin, end)),
        dt(rows_of(all.dt, begin, end)),
        dt_bias(all.dt_bias),
        a_log(all.a_log),
        d(all.d),
        dy(rows_of(all.dy, begin, end)) {}

  SsdBackwardArgs args(const Tensor& rows, const Tensor& steps, const Tensor& bias,
                       const Tensor& rates, const Tensor& skips, const Tensor& d_outputs,
                       std::vector<Tensor>& gradients) const {
    return {.xbc = rows.view(),
            .dt = steps.view(),
            .dt_bias = bias.view(),
            .a_log = rates.view(),
            .d = skips.view(),
            .dt_min = dt_min,
            .dt_max = dt_max,
            .num_groups = groups,
            .sequences = Sequences(cu),
            .dy = d_outputs.view(),
            .dxbc = gradients[0].view(),
            .ddt = gradients[1].view(),
            .d_dt_bias = gradients[2].view(),
            .d_a_log = gradients[3].view(),
            .dd = gradients[4].view()};
  }
  std::vector<Tensor> results(DType dtype, Device device) const {
    std::vector<Tensor> gradients;
    gradients.emplace_back(dtype, xbc.view().shape, device);
    gradients.emplace_back(DType::kF32, dt.view().shape, device);
    for (int i = 0; i < 3; ++i) gradients.emplace_back(DType::kF32, Shape{heads}, device);
    return gradients;
  }
  // dxbc, ddt, d_dt_bias, d_a_log and dd as float32.
  std::vector<Tensor> run(Gpu& gpu) {
    const Tensor device_xbc = gpu.upload(xbc, gpu.dtype());
    const Tensor device_dt = gpu.upload(dt);
    const Tensor device_dt_bias = gpu.upload(dt_bias);
    const Tensor device_a_log = gpu.upload(a_log);
    const Tensor device_d = gpu.upload(d);
    const Tensor device_dy = gpu.upload(dy, gpu.dtype());
    std::vector<Tensor> gradients = results(gpu.dtype(), Device::kCuda);
    ops::ssd_backward(gpu.ctx(), args(device_xbc, device_dt, device_dt_bias, device_a_log, device_d,
                                      device_dy, gradients));
    for (Tensor& gradient : gradients) gradient = gpu.download(gradient);
    return gradients;
  }
  std::vector<Tensor> run_plain() const {
    std::vector<Tensor> gradients = results(DType::kF32, Device::kCpu);
    reference::ssd_backward(args(xbc, dt, dt_bias, a_log, d, dy, gradients));
    return gradients;
  }
};

struct ScanCase {
  std::vector<std::int64_t> cu;
  bool gated;
  Tensor x, dt, dt_bias, a_log, b, c, d, gate, dy;

  ScanCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t channels,
           std::int64_t states, bool has_gate)
      : cu(std::move(cu_seqlens)),
        gated(has_gate),
        x(uniform_tensor(random, {cu.back(), channels})),
        dt(uniform_tensor(random, {cu.back(), channels})),
        dt_bias(uniform_tensor(random, {channels})),
        a_log(uniform_tensor(random, {channels, states})),
        b(uniform_tensor(random, {cu.back(), states})),
        c(uniform_tensor(random, {cu.back(), states})),
        d(random.normal_tensor({channels})),
        gate(uniform_tensor(random, {cu.back(), channels})),
        dy(uniform_tensor(random, {cu.back(), channels})) {}
  ScanCase(const ScanCase& all, std::int64_t begin, std::int64_t end)
      : cu{0, end - begin},
        gated(all.gated),
        x(rows_of(all.x, begin, end)),
        dt(rows_of(all.dt, begin, end)),
        dt_bias(all.dt_bias),
        a_log(all.a_log),
        b(rows_of(all.b, begin, end)),
        c(rows_of(all.c, begin, end)),
        d(all.d),
        gate(rows_of(all.gate, begin, end)),
        dy(rows_of(all.dy, begin, end)) {}

  // Inputs in the order of the declarations above.
  SelectiveScanBackwardArgs args(const std::vector<ConstTensorView>& in,
                                 std::vector<Tensor>& gradients) const {
    return {.x = in[0],
            .dt = in[1],
            .dt_bias = in[2],
            .a_log = in[3],
            .b = in[4],
            .c = in[5],
            .d = in[6],
            .gate = gated ? in[7] : ConstTensorView{},
            .sequences = Sequences(cu),
            .dy = in[8],
            .dx = gradients[0].view(),
            .ddt = gradients[1].view(),
            .d_dt_bias = gradients[5].view(),
            .d_a_log = gradients[6].view(),
            .db = gradients[2].view(),
            .dc = gradients[3].view(),
            .dd = gradients[7].view(),
            .dgate = gated ? gradients[4].view() : TensorView{}};
  }
  std::vector<Tensor> results(DType dtype, Device device) const {
    std::vector<Tensor> gradients;
    for (const Tensor* like : {&x, &dt, &b, &c, &gate}) {
      gradients.emplace_back(like == &dt ? DType::kF32 : dtype, like->view().shape, device);
    }
    for (const Tensor* like : {&dt_bias, &a_log, &d}) {
      gradients.emplace_back(DType::kF32, like->view().shape, device);
    }
    return gradients;
  }
  // dx, ddt, db, dc, dgate, d_dt_bias, d_a_log and dd as float32.
  std::vector<Tensor> run(Gpu& gpu) {
    std::vector<Tensor> device;
    std::vector<ConstTensorView> in;
    for (Tensor* tensor : {&x, &dt, &dt_bias, &a_log, &b, &c, &d, &gate, &dy}) {
      const bool narrow =
          tensor == &x || tensor == &b || tensor == &c || tensor == &gate || tensor == &dy;
      device.push_back(gpu.upload(*tensor, narrow ? gpu.dtype() : DType::kF32));
      in.push_back(std::as_const(device.back()).view());
    }
    std::vector<Tensor> gradients = results(gpu.dtype(), Device::kCuda);
    ops::selective_scan_backward(gpu.ctx(), args(in, gradients));
    for (Tensor& gradient : gradients) gradient = gpu.download(gradient);
    return gradients;
  }
  std::vector<Tensor> run_plain() const {
    std::vector<ConstTensorView> in;
    for (const Tensor* tensor : {&x, &dt, &dt_bias, &a_log, &b, &c, &d, &gate, &dy}) {
      in.push_back(tensor->view());
    }
    std::vector<Tensor> gradients = results(DType::kF32, Device::kCpu);
    reference::selective_scan_backward(args(in, gradients));
    return gradients;
  }
};

void expect_gradients(const std::vector<Tensor>& got, const std::vector<Tensor>& expected,
                      std::vector<const char*> names, double tolerance) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(names[i]);
    expect_close(got[i], expected[i], tolerance);
  }
}

// The first `count` gradients of each sequence alone are those in the batch, to the bit, and so are
// all of the batch in a second run.
template <class Case>
void expect_the_same_bits(Gpu& gpu, Case& all, std::size_t count) {
  const std::vector<Tensor> together = all.run(gpu);
  const std::vector<Tensor> again = all.run(gpu);
  for (std::size_t i = 0; i < together.size(); ++i) expect_equal(again[i], together[i]);
  for (std::size_t b = 0; b + 1 < all.cu.size(); ++b) {
    if (all.cu[b] == all.cu[b + 1]) continue;
    Case one(all, all.cu[b], all.cu[b + 1]);
    const std::vector<Tensor> alone = one.run(gpu);
    for (std::size_t i = 0; i < count; ++i) {
      expect_equal(alone[i], rows_of(together[i], all.cu[b], all.cu[b + 1]));
    }
  }
}

// Empty sequences, of one token, shorter than a chunk, whole chunks, and longer.
const std::vector<std::int64_t> kRagged{0, 64, 64, 65, 95, 265};

class CudaDecayedBackward : public EachDType {};

TEST_P(CudaDecayedBackward, GlaEqualsPlainForAnyHeadSizes) {
  Random random(1);
  Gpu gpu(GetParam());
  const std::int64_t sizes[][2] = {{128, 128}, {64, 32}, {5, 7}, {130, 40}, {33, 200}};
  for (const auto& size : sizes) {
    SCOPED_TRACE(size[0]);
    GlaCase c(random, kRagged, 2, size[0], size[1]);
    const std::vector<Tensor> got = c.run(gpu);
    const bool on_tensor_cores = gpu.dtype() == DType::kBF16 && size[0] == 128;
    expect_gradients(got, c.run_plain(), {"dq", "dk", "dg", "dv"},
                     on_tensor_cores ? gla_chunk_tolerance() : tolerance(gpu.dtype()));
  }
}

TEST_P(CudaDecayedBackward, GlaHasTheSameBitsInAnyBatchAndRun) {
  Random random(2);
  Gpu gpu(GetParam());
  for (const std::int64_t value_dim : {72, 128}) {
    GlaCase c(random, kRagged, 3, 128, value_dim);
    expect_the_same_bits(gpu, c, 4);
  }
}

TEST_P(CudaDecayedBackward, SsdEqualsPlainForAnySizes) {
  Random random(3);
  Gpu gpu(GetParam());
  // Several heads each: a parameter's sum over all tokens may come out near zero for one.
  const std::int64_t sizes[][4] = {{1, 3, 128, 64}, {2, 8, 64, 64},  {2, 2, 16, 32},
                                   {1, 2, 5, 7},    {2, 2, 150, 40}, {1, 4, 20, 140}};
  for (const auto& size : sizes) {
    SCOPED_TRACE(size[2]);
    SsdCase c(random, kRagged, size[0], size[1], size[2], size[3]);
    if (size[0] == 2) c.dt_min = 0.5F, c.dt_max = 1.5F;
    const std::vector<Tensor> got = c.run(gpu);
    const bool on_tensor_cores = gpu.dtype() == DType::kBF16 && size[3] == 64;
    expect_gradients(got, c.run_plain(), {"dxbc", "ddt", "d_dt_bias", "d_a_log", "dd"},
                     on_tensor_cores ? chunk_tolerance() : tolerance(gpu.dtype()));
  }
}

TEST_P(CudaDecayedBackward, SsdHasTheSameBitsInAnyBatchAndRun) {
  Random random(4);
  Gpu gpu(GetParam());
  for (const std::int64_t head_dim : {64, 72}) {
    SsdCase c(random, kRagged, 1, 3, 128, head_dim);
    expect_the_same_bits(gpu, c, 2);
  }
}

// Chunks of 64 tokens with up to 16 states, of 16 with more.
TEST_P(CudaDecayedBackward, SelectiveScanEqualsPlainForAnySizes) {
  Random random(5);
  Gpu gpu(GetParam());
  const std::int64_t sizes[][2] = {{128, 16}, {72, 16}, {33, 5}, {70, 64}, {5, 21}};
  for (const auto& size : sizes) {
    SCOPED_TRACE(size[1]);
    ScanCase c(random, kRagged, size[0], size[1], size[0] != 72);
    std::vector<Tensor> got = c.run(gpu);
    std::vector<Tensor> expected = c.run_plain();
    if (!c.gated) got.erase(got.begin() + 4), expected.erase(expected.begin() + 4);
    const std::vector<const char*> names{"dx",    "ddt",       "db",      "dc",
                                         "dgate", "d_dt_bias", "d_a_log", "dd"};
    expect_gradients(got, expected, names, tolerance(gpu.dtype()));
  }
}

TEST_P(CudaDecayedBackward, SelectiveScanHasTheSameBitsInAnyBatchAndRun) {
  Random random(6);
  Gpu gpu(GetParam());
  for (const std::int64_t states : {16, 30}) {
    ScanCase c(random, kRagged, 68, states, true);
    expect_the_same_bits(gpu, c, 5);
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaDecayedBackward, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
