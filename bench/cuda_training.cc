// Backward of the ops of training that memory bounds, one by one, at the shapes of the paper's 760M
// models with 16,384 tokens in bfloat16, on the GPU. Prints JSON: microseconds (the best of several
// rounds), the bytes that must be moved at least, and the share of the speed of a copy within the
// device's memory, measured in the same run. Products and mixers are given in FLOP/s.
//
//   bench_cuda_training [TOKENS [FILTER]]
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "core/context.h"
#include "core/error.h"
#include "core/float_convert.h"
#include "ops/activation.h"
#include "ops/adamw.h"
#include "ops/cross_entropy.h"
#include "ops/delta_mixer.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/gla.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/selective_scan.h"
#include "ops/short_conv.h"
#include "ops/ssd.h"
#include "ops/token_shift.h"

namespace deltafox {
namespace {

constexpr std::int64_t kHidden = 1536;
constexpr std::int64_t kIntermediate = 4096;
constexpr std::int64_t kHeads = 12;
constexpr std::int64_t kHeadDim = 128;
constexpr std::int64_t kVocabulary = 50257;
constexpr std::int64_t kVocabularyRow =
    50304;  // elements a row of logits, so that rows are aligned

class Bench {
 public:
  Bench(std::int64_t tokens, std::string filter)
      : tokens_(tokens),
        filter_(std::move(filter)),
        threads_(0),
        ctx_(threads_, Device::kCuda, DType::kBF16) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (float& x : pool_) x = normal(random);
    measure_copy();
  }

  // Normally distributed, the same numbers again and again.
  Tensor normal(DType dtype, const Shape& shape) {
    Tensor device(dtype, shape, Device::kCuda);
    Tensor host(dtype, shape);
    Tensor pool(dtype, {static_cast<std::int64_t>(pool_.size())});
    convert({pool_.data(), DType::kF32, pool.view().shape}, pool.view());
    for (std::size_t at = 0; at < host.bytes(); at += pool.bytes()) {
      std::copy_n(static_cast<const std::byte*>(pool.view().data),
                  std::min(pool.bytes(), host.bytes() - at),
                  static_cast<std::byte*>(host.view().data) + at);
    }
    cuda::copy(device.view().data, host.view().data, host.bytes());
    return device;
  }
  Tensor uniform(const Shape& shape, float low, float high) {
    Tensor host(DType::kF32, shape);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> draw(low, high);
    for (std::int64_t i = 0; i < shape.size(); ++i) host.f32()[i] = draw(random);
    return uploaded(host);
  }
  Tensor zeros(DType dtype, const Shape& shape) { return {dtype, shape, Device::kCuda}; }
  Tensor ids(const std::function<std::int32_t(std::int64_t)>& id) {
    Tensor host(DType::kI32, {tokens_});
    for (std::int64_t t = 0; t < tokens_; ++t) {
      static_cast<std::int32_t*>(host.view().data)[t] = id(t);
    }
    return uploaded(host);
  }

  bool wanted(const std::string& name) const { return name.find(filter_) != std::string::npos; }
  // Bytes of what is read or written once; 0 where FLOPs bound.
  void time(const std::string& name, double bytes, double flops,
            const std::function<void(Context&)>& op) {
    if (!wanted(name)) return;
    nlohmann::ordered_json row{{"op", name}};
    try {
      const double seconds = best_seconds([&] { op(ctx_); });
      row["microseconds"] = 1e6 * seconds;
      if (bytes > 0) {
        row["bytes"] = bytes;
        row["bytes_per_second"] = bytes / seconds;
        row["share_of_copy"] = bytes / seconds / copy_;
      }
      if (flops > 0) row["flops_per_second"] = flops / seconds;
    } catch (const Error& error) {
      row["error"] = error.what();
    }
    rows_.push_back(row);
  }

  std::int64_t tokens() const { return tokens_; }
  nlohmann::ordered_json report() const {
    return {{"tokens", tokens_}, {"copy_bytes_per_second", copy_}, {"ops", rows_}};
  }

 private:
  using Clock = std::chrono::steady_clock;

  static Tensor uploaded(const Tensor& host) {
    Tensor device(host.view().dtype, host.view().shape, Device::kCuda);
    cuda::copy(device.view().data, host.view().data, host.bytes());
    return device;
  }
  // Calls follow one another without a wait, so that what a call costs the host is hidden.
  double best_seconds(const std::function<void()>& call) {
    constexpr int kRounds = 5;
    call();
    ctx_.synchronize();
    const auto begin_one = Clock::now();
    call();
    ctx_.synchronize();
    const double one = std::chrono::duration<double>(Clock::now() - begin_one).count();
    const int calls = std::clamp(static_cast<int>(0.01 / one), 1, 50);
    double best = INFINITY;
    for (int round = 0; round < kRounds; ++round) {
      const auto begin = Clock::now();
      for (int i = 0; i < calls; ++i) call();
      ctx_.synchronize();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count() / calls);
    }
    return best;
  }
  void measure_copy() {
    const Tensor from(DType::kF32, {std::int64_t{1} << 28}, Device::kCuda);
    Tensor to(DType::kF32, from.view().shape, Device::kCuda);
    const double seconds = best_seconds(
        [&] { cuda::copy(ctx_.stream(), to.view().data, from.view().data, to.bytes()); });
    copy_ = 2.0 * static_cast<double>(to.bytes()) / seconds;
  }

  std::int64_t tokens_;
  std::string filter_;
  ThreadPool threads_;
  Context ctx_;
  std::vector<float> pool_ = std::vector<float>(1 << 20);
  double copy_ = 0;
  std::vector<nlohmann::ordered_json> rows_;
};

void norms(Bench& bench) {
  const auto elements = static_cast<double>(bench.tokens() * kHidden);
  const Shape stream{bench.tokens(), kHidden};
  const Tensor x = bench.normal(DType::kF32, stream);
  const Tensor dy = bench.normal(DType::kBF16, stream);
  const Tensor w = bench.normal(DType::kF32, {kHidden});
  Tensor dx = bench.normal(DType::kF32, stream);
  Tensor rounded = bench.zeros(DType::kBF16, stream);
  Tensor dw = bench.zeros(DType::kF32, {kHidden});
  bench.time("rms_norm of the stream, dx +=, rounded", elements * (4 + 2 + 8 + 2), 0,
             [&](Context& ctx) {
               ops::rms_norm_backward(ctx, {.x = x.view(),
                                            .w = w.view(),
                                            .eps = 1e-6F,
                                            .dy = dy.view(),
                                            .dx = dx.view(),
                                            .accumulate_dx = true,
                                            .rounded = rounded.view(),
                                            .dw = dw.view()});
             });
  const Tensor y = bench.normal(DType::kBF16, stream);
  const Tensor scales = bench.uniform({bench.tokens()}, 0.5F, 1);
  bench.time("rms_norm of the stream from its output, dx +=, rounded", elements * (2 + 2 + 8 + 2),
             0, [&](Context& ctx) {
               ops::rms_norm_backward(ctx, {.y = y.view(),
                                            .scales = scales.view(),
                                            .w = w.view(),
                                            .dy = dy.view(),
                                            .dx = dx.view(),
                                            .accumulate_dx = true,
                                            .rounded = rounded.view(),
                                            .dw = dw.view()});
             });
  const Shape wide{bench.tokens() / 2, 2 * kHidden};
  const Tensor wide_w = bench.normal(DType::kF32, {2 * kHidden});
  Tensor wide_dw = bench.zeros(DType::kF32, {2 * kHidden});
  bench.time("rms_norm of the stream, 3072 wide", elements * (4 + 2 + 8 + 2), 0, [&](Context& ctx) {
    ops::rms_norm_backward(ctx, {.x = x.view().reshaped(wide),
                                 .w = wide_w.view(),
                                 .eps = 1e-6F,
                                 .dy = dy.view().reshaped(wide),
                                 .dx = dx.view().reshaped(wide),
                                 .accumulate_dx = true,
                                 .rounded = rounded.view().reshaped(wide),
                                 .dw = wide_dw.view()});
  });
  const Shape heads{bench.tokens() * kHeads, kHeadDim};
  const Tensor o = bench.normal(DType::kBF16, heads);
  const Tensor gate = bench.normal(DType::kBF16, heads);
  const Tensor head_w = bench.normal(DType::kF32, {kHeadDim});
  Tensor d_o = bench.normal(DType::kBF16, heads);
  Tensor dgate = bench.zeros(DType::kBF16, heads);
  Tensor head_dw = bench.zeros(DType::kF32, {kHeadDim});
  bench.time("rms_norm of heads", elements * 6, 0, [&](Context& ctx) {
    ops::rms_norm_backward(ctx, {.x = o.view(),
                                 .w = head_w.view(),
                                 .eps = 1e-6F,
                                 .dy = d_o.view(),
                                 .dx = d_o.view(),
                                 .dw = head_dw.view()});
  });
  bench.time("rms_norm of heads with a gate", elements * 10, 0, [&](Context& ctx) {
    ops::rms_norm_backward(ctx, {.x = o.view(),
                                 .w = head_w.view(),
                                 .gate = gate.view(),
                                 .eps = 1e-6F,
                                 .dy = d_o.view(),
                                 .dx = d_o.view(),
                                 .dw = head_dw.view(),
                                 .dgate = dgate.view()});
  });
}

void elementwise(Bench& bench) {
  const auto elements = static_cast<double>(bench.tokens() * kHidden);
  const Shape rows{bench.tokens(), kHidden};
  const Shape heads{bench.tokens(), kHeads, kHeadDim};
  const Tensor x = bench.normal(DType::kBF16, rows);
  const Tensor dy = bench.normal(DType::kBF16, rows);
  const Tensor gate = bench.normal(DType::kBF16, rows);
  Tensor dx = bench.zeros(DType::kBF16, rows);
  Tensor dgate = bench.zeros(DType::kBF16, rows);
  bench.time("gate", elements * 10, 0, [&](Context& ctx) {
    ops::gate_backward(ctx, {.activation = Activation::kSilu,
                             .gate = gate.view(),
                             .x = x.view(),
                             .dy = dy.view(),
                             .dx = dx.view(),
                             .dgate = dgate.view()});
  });
  bench.time("activation", elements * 6, 0, [&](Context& ctx) {
    ops::activation_backward(
        ctx, {.activation = Activation::kSilu, .x = x.view(), .dy = dy.view(), .dx = dx.view()});
  });
  bench.time("feature_map, silu and l2", elements * 6, 0, [&](Context& ctx) {
    ops::feature_map_backward(ctx, {.activation = Activation::kSilu,
                                    .norm = FeatureNorm::kL2,
                                    .x = x.view().reshaped(heads),
                                    .dy = dy.view().reshaped(heads),
                                    .dx = dx.view().reshaped(heads)});
  });
  bench.time("feature_map, l2", elements * 6, 0, [&](Context& ctx) {
    ops::feature_map_backward(ctx, {.norm = FeatureNorm::kL2,
                                    .x = x.view().reshaped(heads),
                                    .dy = dy.view().reshaped(heads),
                                    .dx = dx.view().reshaped(heads)});
  });
  const auto inner = static_cast<double>(bench.tokens() * kIntermediate);
  const Tensor gate_up = bench.normal(DType::kBF16, {bench.tokens(), 2 * kIntermediate});
  const Tensor d_inner = bench.normal(DType::kBF16, {bench.tokens(), kIntermediate});
  Tensor dgate_up = bench.zeros(DType::kBF16, {bench.tokens(), 2 * kIntermediate});
  Tensor y = bench.zeros(DType::kBF16, {bench.tokens(), kIntermediate});
  bench.time("glu", inner * 10, 0, [&](Context& ctx) {
    ops::glu_backward(
        ctx, {.gate_up = gate_up.view(), .dy = d_inner.view(), .dgate_up = dgate_up.view()});
  });
  bench.time("glu and its product", inner * 12, 0, [&](Context& ctx) {
    ops::glu_backward(ctx, {.gate_up = gate_up.view(),
                            .dy = d_inner.view(),
                            .dgate_up = dgate_up.view(),
                            .y = y.view()});
  });
}

// What an MLP does besides its plain products.
void gated_products(Bench& bench) {
  const Shape gate_up_shape{bench.tokens(), 2 * kIntermediate};
  const double product = 2.0 * static_cast<double>(bench.tokens() * kHidden * kIntermediate);
  const Tensor x = bench.normal(DType::kBF16, {bench.tokens(), kHidden});
  const Tensor w = bench.normal(DType::kBF16, {2 * kIntermediate, kHidden});
  const Tensor down = bench.normal(DType::kBF16, {kHidden, kIntermediate});
  Tensor gate_up = bench.normal(DType::kBF16, gate_up_shape);
  Tensor y = bench.zeros(DType::kBF16, {bench.tokens(), kIntermediate});
  bench.time("linear of gate and up", 0, 2 * product, [&](Context& ctx) {
    ops::linear(ctx, {.x = x.view(), .w = w.view(), .y = gate_up.view()});
  });
  bench.time("linear_glu", 0, 2 * product, [&](Context& ctx) {
    ops::linear_glu(ctx, {.x = x.view(), .w = w.view(), .y = y.view()});
  });
  bench.time("linear_glu, gate and up kept", 0, 2 * product, [&](Context& ctx) {
    ops::linear_glu(ctx, {.x = x.view(), .w = w.view(), .gate_up = gate_up.view(), .y = y.view()});
  });
  bench.time("linear, dx of down", 0, product, [&](Context& ctx) {
    ops::linear_backward(ctx, {.dy = x.view(), .x = y.view(), .w = down.view(), .dx = y.view()});
  });
}

// Of q, k, v and beta of DeltaNet.
void delta_inputs(Bench& bench) {
  const std::vector<std::int64_t> cu{0, bench.tokens()};
  const std::int64_t channels = kHeads * kHeadDim;
  const std::int64_t columns = 3 * channels + 16;
  const Shape heads{bench.tokens(), kHeads, kHeadDim};
  const Tensor projected = bench.normal(DType::kBF16, {bench.tokens(), 3 * channels});
  const Tensor logits = bench.normal(DType::kF32, {bench.tokens(), kHeads});
  const Tensor w = bench.normal(DType::kF32, {channels, 4});
  const Tensor d = bench.normal(DType::kBF16, heads);
  Tensor d_projected = bench.zeros(DType::kBF16, {bench.tokens(), columns});
  Tensor dw = bench.zeros(DType::kF32, {channels, 4});
  bench.time("delta_inputs", static_cast<double>(bench.tokens()) * (18 * channels + 12 * kHeads), 0,
             [&](Context& ctx) {
               ops::delta_inputs_backward(ctx, {.projected = projected.view(),
                                                .beta_logits = logits.view(),
                                                .q = w.view(),
                                                .k = w.view(),
                                                .v = w.view(),
                                                .sequences = Sequences(cu),
                                                .dq = d.view(),
                                                .dk = d.view(),
                                                .dv = d.view(),
                                                .dbeta = logits.view(),
                                                .d_projected = d_projected.view(),
                                                .dq_conv = dw.view(),
                                                .dk_conv = dw.view(),
                                                .dv_conv = dw.view()});
             });
}

void sequence_ops(Bench& bench) {
  const std::vector<std::int64_t> cu{0, bench.tokens()};
  const auto elements = static_cast<double>(bench.tokens() * kHidden);
  const Shape rows{bench.tokens(), kHidden};
  const Tensor x = bench.normal(DType::kBF16, rows);
  const Tensor dy = bench.normal(DType::kBF16, rows);
  const Tensor w = bench.normal(DType::kF32, {kHidden, 4});
  Tensor dx = bench.zeros(DType::kBF16, rows);
  Tensor dw = bench.zeros(DType::kF32, {kHidden, 4});
  bench.time("short_conv and silu", elements * 6, 0, [&](Context& ctx) {
    ops::short_conv_backward(ctx, {.x = x.view(),
                                   .w = w.view(),
                                   .sequences = Sequences(cu),
                                   .activation = Activation::kSilu,
                                   .dy = dy.view(),
                                   .dx = dx.view(),
                                   .dw = dw.view()});
  });
  bench.time("short_conv, silu and l2", elements * 6, 0, [&](Context& ctx) {
    ops::short_conv_backward(ctx, {.x = x.view(),
                                   .w = w.view(),
                                   .sequences = Sequences(cu),
                                   .activation = Activation::kSilu,
                                   .norm_width = kHeadDim,
                                   .dy = dy.view(),
                                   .dx = dx.view(),
                                   .dw = dw.view()});
  });
  const Shape heads{bench.tokens(), kHeads, kHeadDim};
  Tensor alpha = bench.uniform({bench.tokens(), kHeads}, 0, 1);
  Tensor dalpha = bench.zeros(DType::kF32, {bench.tokens(), kHeads});
  bench.time("token_shift", elements * 6, 0, [&](Context& ctx) {
    ops::token_shift_backward(ctx, {.x = x.view().reshaped(heads),
                                    .alpha = alpha.view(),
                                    .sequences = Sequences(cu),
                                    .dy = dy.view().reshaped(heads),
                                    .dx = dx.view().reshaped(heads),
                                    .dalpha = dalpha.view()});
  });
  const std::vector<std::int64_t> positions{0};
  Tensor dq = bench.normal(DType::kBF16, heads);
  Tensor dk = bench.normal(DType::kBF16, heads);
  bench.time("rope of q and k", elements * 8, 0, [&](Context& ctx) {
    ops::rope_backward(
        ctx,
        {.dq = dq.view(), .dk = dk.view(), .sequences = Sequences(cu), .positions = positions});
  });
}

void embedding(Bench& bench) {
  const Tensor dy = bench.normal(DType::kF32, {bench.tokens(), kHidden});
  Tensor dtable = bench.zeros(DType::kF32, {kVocabulary, kHidden});
  std::mt19937 random(2);
  std::uniform_real_distribution<double> draw(0, 1);
  // Zipf's law: the n-th word comes with a frequency of 1/n.
  const auto natural = [&](std::int64_t /*t*/) {
    return static_cast<std::int32_t>(std::pow(static_cast<double>(kVocabulary), draw(random)) - 1);
  };
  const struct {
    const char* name;
    Tensor ids;
  } cases[] = {{"embedding, ids as in text", bench.ids(natural)},
               {"embedding, one id", bench.ids([](std::int64_t /*t*/) { return 7; })}};
  for (const auto& c : cases) {
    const auto bytes = static_cast<double>(dy.bytes());
    bench.time(c.name, bytes, 0, [&](Context& ctx) {
      ops::embedding_backward(ctx, {.ids = {static_cast<const std::int32_t*>(c.ids.view().data),
                                            static_cast<std::size_t>(bench.tokens())},
                                    .dy = dy.view(),
                                    .dtable = dtable.view()});
    });
  }
}

void loss(Bench& bench) {
  for (const std::int64_t rows : {std::int64_t{2048}, std::int64_t{4096}, std::int64_t{8192}}) {
    Tensor logits = bench.normal(DType::kBF16, {rows, kVocabularyRow});
    Tensor x = bench.normal(DType::kBF16, {bench.tokens(), kHidden});
    const Tensor w = bench.normal(DType::kBF16, {kVocabulary, kHidden});
    Tensor dx = bench.zeros(DType::kBF16, {bench.tokens(), kHidden});
    Tensor dw = bench.zeros(DType::kF32, {kVocabulary, kHidden});
    Tensor losses = bench.zeros(DType::kF32, {rows});
    const Tensor labels =
        bench.ids([](std::int64_t t) { return static_cast<std::int32_t>(t * 37 % kVocabulary); });
    const auto size = static_cast<std::size_t>(rows);
    const auto gradient = [&](Context& ctx) {
      ops::cross_entropy_backward(
          ctx, {.logits = logits.view(),
                .classes = kVocabulary,
                .labels = {static_cast<const std::int32_t*>(labels.view().data), size},
                .scale = 1e-4F,
                .loss = {losses.f32(), size}});
    };
    bench.time(fmt::format("cross_entropy of {} rows", rows),
               static_cast<double>(rows * kVocabulary) * 4, 0, gradient);
    const double flops = 2.0 * static_cast<double>(rows * kVocabulary * kHidden);
    const auto part = [&](const TensorView& all, std::int64_t begin) {
      return TensorView{
          static_cast<std::byte*>(all.data) + begin * kHidden * 2, DType::kBF16, {rows, kHidden}};
    };
    const auto forward = [&](Context& ctx, std::int64_t begin) {
      ops::linear(ctx, {.x = part(x.view(), begin), .w = w.view(), .y = logits.view()});
    };
    const auto backward = [&](Context& ctx, std::int64_t begin, bool of_x, bool of_w) {
      ops::linear_backward(ctx, {.dy = logits.view(),
                                 .x = part(x.view(), begin),
                                 .w = w.view(),
                                 .dx = of_x ? part(dx.view(), begin) : TensorView{},
                                 .dw = of_w ? dw.view() : TensorView{}});
    };
    const auto time_product = [&](const char* name, const std::function<void(Context&)>& op) {
      bench.time(fmt::format("head: {} of {} rows", name, rows), 0, flops, op);
    };
    time_product("logits", [&](Context& ctx) { forward(ctx, 0); });
    time_product("dx", [&](Context& ctx) { backward(ctx, 0, true, false); });
    time_product("dw", [&](Context& ctx) { backward(ctx, 0, false, true); });
    bench.time(fmt::format("head: products and loss of all, {} rows at a time", rows), 0,
               3 * flops * static_cast<double>(bench.tokens() / rows), [&](Context& ctx) {
                 for (std::int64_t begin = 0; begin + rows <= bench.tokens(); begin += rows) {
                   forward(ctx, begin);
                   gradient(ctx);
                   backward(ctx, begin, true, true);
                 }
               });
  }
}

void optimiser(Bench& bench) {
  if (!bench.wanted("adamw_step")) return;
  // The 760M DeltaNet's, by the layer.
  struct Kept {
    Tensor grad, w, m, v, rounded;
  };
  std::vector<Kept> kept;
  std::vector<AdamWParam> params;
  std::int64_t count = 0;
  const auto add = [&](const Shape& shape) {
    const bool matrix = shape.rank() > 1;
    Kept& p =
        kept.emplace_back(Kept{bench.zeros(DType::kF32, shape), bench.zeros(DType::kF32, shape),
                               bench.zeros(DType::kF32, shape), bench.zeros(DType::kF32, shape),
                               matrix ? bench.zeros(DType::kBF16, shape) : Tensor()});
    params.push_back({.grad = p.grad.view(),
                      .w = p.w.view(),
                      .m = p.m.view(),
                      .v = p.v.view(),
                      .rounded = matrix ? p.rounded.view() : TensorView{},
                      .weight_decay = matrix ? 0.1 : 0});
    count += shape.size();
  };
  kept.reserve(1000);
  add({kVocabulary, kHidden});
  for (int layer = 0; layer < 24; ++layer) {
    for (int i = 0; i < 2; ++i) add({kHidden});
    for (int i = 0; i < 4; ++i) add({kHidden, kHidden});
    for (int i = 0; i < 3; ++i) add({kHidden, 4});
    add({kHeads, kHidden});
    add({kHeadDim});
    add({2 * kIntermediate, kHidden});
    add({kHidden, kIntermediate});
  }
  add({kHidden});
  add({kVocabulary, kHidden});
  Tensor norm = bench.zeros(DType::kF32, {1});
  // g twice (its norm first), w, m and v in and out, w rounded.
  bench.time(fmt::format("adamw_step of {} parameters", count),
             static_cast<double>(count) * (4 + 4 + 24 + 2), 0, [&](Context& ctx) {
               ops::adamw_step(ctx, {.params = params,
                                     .lr = 1e-3,
                                     .beta2 = 0.95,
                                     .max_norm = 1,
                                     .step = 10,
                                     .norm = norm.view()});
             });
}

void mixers(Bench& bench) {
  const std::vector<std::int64_t> cu{0, bench.tokens()};
  if (bench.wanted("gla")) {
    const Shape heads{bench.tokens(), kHeads, kHeadDim};
    const Tensor q = bench.normal(DType::kBF16, heads);
    const Tensor k = bench.uniform(heads, 0, 0.2F);
    const Tensor g = bench.uniform(heads, 0.8F, 1);
    const Tensor v = bench.normal(DType::kBF16, heads);
    const Tensor d_o = bench.normal(DType::kBF16, heads);
    Tensor o = bench.zeros(DType::kBF16, heads);
    Tensor dq = bench.zeros(DType::kBF16, heads);
    Tensor dk = bench.zeros(DType::kF32, heads);
    Tensor dg = bench.zeros(DType::kF32, heads);
    Tensor dv = bench.zeros(DType::kBF16, heads);
    Tensor state = bench.zeros(DType::kF32, {kHeads, kHeadDim, kHeadDim});
    std::vector<float*> states{state.f32()};
    bench.time("gla forward", 0, 0, [&](Context& ctx) {
      ops::gla(ctx, {.q = q.view(),
                     .k = k.view(),
                     .g = g.view(),
                     .v = v.view(),
                     .sequences = Sequences(cu),
                     .states = states,
                     .o = o.view()});
    });
    bench.time("gla", 0, 0, [&](Context& ctx) {
      ops::gla_backward(ctx, {.q = q.view(),
                              .k = k.view(),
                              .g = g.view(),
                              .v = v.view(),
                              .sequences = Sequences(cu),
                              .d_o = d_o.view(),
                              .dq = dq.view(),
                              .dk = dk.view(),
                              .dg = dg.view(),
                              .dv = dv.view()});
    });
  }
  if (bench.wanted("ssd")) {
    constexpr std::int64_t kSsdHeads = 48;
    constexpr std::int64_t kSsdHeadDim = 64;
    constexpr std::int64_t kStates = 128;
    const Shape row{bench.tokens(), kSsdHeads * kSsdHeadDim + 2 * kStates};
    const Shape values{bench.tokens(), kSsdHeads, kSsdHeadDim};
    const Shape scalars{bench.tokens(), kSsdHeads};
    const Tensor xbc = bench.normal(DType::kBF16, row);
    const Tensor dt = bench.normal(DType::kF32, scalars);
    const Tensor dt_bias = bench.uniform({kSsdHeads}, -5, -2);
    const Tensor a_log = bench.uniform({kSsdHeads}, 0, 2);
    const Tensor d = bench.normal(DType::kF32, {kSsdHeads});
    const Tensor dy = bench.normal(DType::kBF16, values);
    Tensor y = bench.zeros(DType::kBF16, values);
    Tensor dxbc = bench.zeros(DType::kBF16, row);
    Tensor ddt = bench.zeros(DType::kF32, scalars);
    Tensor sums = bench.zeros(DType::kF32, {3, kSsdHeads});
    const auto sum = [&](int i) {
      return TensorView{sums.f32() + i * kSsdHeads, DType::kF32, {kSsdHeads}};
    };
    Tensor state = bench.zeros(DType::kF32, {kSsdHeads, kStates, kSsdHeadDim});
    std::vector<float*> states{state.f32()};
    bench.time("ssd forward", 0, 0, [&](Context& ctx) {
      ops::ssd(ctx, {.xbc = xbc.view(),
                     .dt = dt.view(),
                     .dt_bias = dt_bias.view(),
                     .a_log = a_log.view(),
                     .d = d.view(),
                     .dt_min = 0,
                     .dt_max = INFINITY,
                     .sequences = Sequences(cu),
                     .states = states,
                     .y = y.view()});
    });
    bench.time("ssd", 0, 0, [&](Context& ctx) {
      ops::ssd_backward(ctx, {.xbc = xbc.view(),
                              .dt = dt.view(),
                              .dt_bias = dt_bias.view(),
                              .a_log = a_log.view(),
                              .d = d.view(),
                              .dt_min = 0,
                              .dt_max = INFINITY,
                              .sequences = Sequences(cu),
                              .dy = dy.view(),
                              .dxbc = dxbc.view(),
                              .ddt = ddt.view(),
                              .d_dt_bias = sum(0),
                              .d_a_log = sum(1),
                              .dd = sum(2)});
    });
  }
  if (bench.wanted("selective_scan")) {
    constexpr std::int64_t kChannels = 3072;
    constexpr std::int64_t kStates = 16;
    const Shape rows{bench.tokens(), kChannels};
    const Shape selected{bench.tokens(), kStates};
    const Shape rates{kChannels, kStates};
    const Tensor x = bench.normal(DType::kBF16, rows);
    const Tensor dt = bench.normal(DType::kF32, rows);
    const Tensor dt_bias = bench.uniform({kChannels}, -5, -2);
    const Tensor a_log = bench.uniform(rates, 0, 2);
    const Tensor b = bench.normal(DType::kBF16, selected);
    const Tensor c = bench.normal(DType::kBF16, selected);
    const Tensor d = bench.normal(DType::kF32, {kChannels});
    const Tensor gate = bench.normal(DType::kBF16, rows);
    const Tensor dy = bench.normal(DType::kBF16, rows);
    Tensor y = bench.zeros(DType::kBF16, rows);
    Tensor dx = bench.zeros(DType::kBF16, rows);
    Tensor dgate = bench.zeros(DType::kBF16, rows);
    Tensor ddt = bench.zeros(DType::kF32, rows);
    Tensor db = bench.zeros(DType::kBF16, selected);
    Tensor dc = bench.zeros(DType::kBF16, selected);
    Tensor d_dt_bias = bench.zeros(DType::kF32, {kChannels});
    Tensor d_a_log = bench.zeros(DType::kF32, rates);
    Tensor dd = bench.zeros(DType::kF32, {kChannels});
    Tensor state = bench.zeros(DType::kF32, {kStates, kChannels});
    std::vector<float*> states{state.f32()};
    bench.time("selective_scan forward", 0, 0, [&](Context& ctx) {
      ops::selective_scan(ctx, {.x = x.view(),
                                .dt = dt.view(),
                                .dt_bias = dt_bias.view(),
                                .a_log = a_log.view(),
                                .b = b.view(),
                                .c = c.view(),
                                .d = d.view(),
                                .gate = gate.view(),
                                .sequences = Sequences(cu),
                                .states = states,
                                .y = y.view()});
    });
    bench.time("selective_scan", 0, 0, [&](Context& ctx) {
      ops::selective_scan_backward(ctx, {.x = x.view(),
                                         .dt = dt.view(),
                                         .dt_bias = dt_bias.view(),
                                         .a_log = a_log.view(),
                                         .b = b.view(),
                                         .c = c.view(),
                                         .d = d.view(),
                                         .gate = gate.view(),
                                         .sequences = Sequences(cu),
                                         .dy = dy.view(),
                                         .dx = dx.view(),
                                         .ddt = ddt.view(),
                                         .d_dt_bias = d_dt_bias.view(),
                                         .d_a_log = d_a_log.view(),
                                         .db = db.view(),
                                         .dc = dc.view(),
                                         .dd = dd.view(),
                                         .dgate = dgate.view()});
    });
  }
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  deltafox::Bench bench(argc > 1 ? std::max(4096, std::atoi(argv[1])) : 16384,
                        argc > 2 ? argv[2] : "");
  deltafox::norms(bench);
  deltafox::elementwise(bench);
  deltafox::gated_products(bench);
  deltafox::delta_inputs(bench);
  deltafox::sequence_ops(bench);
  deltafox::embedding(bench);
  deltafox::loss(bench);
  deltafox::optimiser(bench);
  deltafox::mixers(bench);
  fmt::print("{}\n", bench.report().dump(2));
}
