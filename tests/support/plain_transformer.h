// The Forgetting Transformer and the Transformer written down once more, in float64, for one
// sequence and without a state: an oracle for options that no golden case has.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/float_convert.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace deltafox::test {

class PlainTransformer {
 public:
  using Row = std::vector<double>;
  using Rows = std::vector<Row>;  // [T][...]

  PlainTransformer(const std::string& directory, const std::string& config)
      : weights_(io::Checkpoint::open(directory)),
        config_(io::JsonObject::parse(config, "config")) {}

  // Logits [T][N].
  Rows logits(const std::vector<std::int32_t>& ids) const {
    const Row table = tensor("model.embeddings.weight");
    const std::size_t width = size("hidden_size");
    Rows x;
    for (const std::int32_t id : ids) {
      const auto begin =
          table.begin() + static_cast<std::ptrdiff_t>(id) * static_cast<std::ptrdiff_t>(width);
      x.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(width));
    }
    for (std::size_t l = 0; l < size("num_hidden_layers"); ++l) {
      const std::string layer = "model.layers." + std::to_string(l) + ".";
      add(x, attention(normed(x, layer + "attn_norm.weight", width, 1e-6), layer + "attn."));
      add(x, mlp(normed(x, layer + "mlp_norm.weight", width, 1e-6), layer + "mlp."));
    }
    const bool tied = config_.boolean("tie_word_embeddings", false);
    return linear(normed(x, "model.norm.weight", width, 1e-6),
                  tied ? "model.embeddings.weight" : "lm_head.weight");
  }

 private:
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static void add(Rows& x, const Rows& y) {
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
    }
  }
  std::size_t size(const char* key) const {
    return static_cast<std::size_t>(config_.integer(key, 0, 1, 1 << 20));
  }
  bool fox() const { return config_.string("model_type", "").starts_with("forgetting"); }
  bool flag(const char* key) const { return config_.boolean(key, false); }
  Row tensor(const std::string& name) const {
    const ConstTensorView view = weights_.view(name);
    Row values;
    for (std::int64_t i = 0; i < view.shape.size(); ++i) values.push_back(load_f32(view, i));
    return values;
  }
  Rows linear(const Rows& x, const std::string& name) const {
    const Row w = tensor(name);
    const std::size_t depth = x[0].size();
    Rows y(x.size(), Row(w.size() / depth));
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t n = 0; n < y[t].size(); ++n) {
        for (std::size_t i = 0; i < depth; ++i) y[t][n] += x[t][i] * w[n * depth + i];
      }
    }
    return y;
  }
  // RMS norm of groups of `group` elements, with one weight for each element or for each of a
  // group.
  Rows normed(Rows x, const std::string& name, std::size_t group, double eps) const {
    const Row w = tensor(name);
    for (Row& row : x) {
      for (std::size_t begin = 0; begin < row.size(); begin += group) {
        double squares = 0;
        for (std::size_t i = begin; i < begin + group; ++i) squares += row[i] * row[i];
        const double scale = 1 / std::sqrt(squares / static_cast<double>(group) + eps);
        for (std::size_t i = begin; i < begin + group; ++i) row[i] *= scale * w[i % w.size()];
      }
    }
    return x;
  }
  Rows mlp(const Rows& x, const std::string& prefix) const {
    Rows gate = linear(x, prefix + "gate_proj.weight");
    const bool swish = config_.string("hidden_act", "swish") == "swish";
    for (Row& row : gate) {
      const std::size_t half = row.size() / 2;
      for (std::size_t i = 0; i < half; ++i) {
        row[i] = sigmoid(row[i]) * (swish ? row[i] : 1) * row[half + i];
      }
      row.resize(half);
    }
    return linear(gate, prefix + "down_proj.weight");
  }
  Rows keys_or_values(const Rows& x, const std::string& prefix, bool shift, std::size_t dim) const {
    if (!shift) return linear(x, prefix + "weight");
    const Rows y = linear(x, prefix + "linear.weight");
    const Rows alpha = linear(x, prefix + "shift_proj.weight");
    Rows mixed = y;
    for (std::size_t t = 0; t < y.size(); ++t) {
      for (std::size_t i = 0; i < y[t].size(); ++i) {
        const double a = sigmoid(alpha[t][i / dim]);
        mixed[t][i] = a * (t > 0 ? y[t - 1][i] : 0) + (1 - a) * y[t][i];
      }
    }
    return mixed;
  }
  static void rotate(Rows& x, std::size_t dim, double base) {
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t i = 0; i < x[t].size(); ++i) {
        if (i % dim >= dim / 2) continue;
        // Angles are products of float32 numbers by definition.
        const float exponent = 2 * static_cast<float>(i % dim) / static_cast<float>(dim);
        const float frequency = 1 / static_cast<float>(std::pow(base, exponent));
        const double angle = static_cast<float>(t) * frequency;
        double& a = x[t][i];
        double& b = x[t][i + dim / 2];
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = turned;
      }
    }
  }
  // log f [T][H]
  Rows log_gates(const Rows& x, const std::string& prefix, std::size_t heads) const {
    const std::string type = config_.string("fgate_type", fox() ? "full" : "none");
    Rows gates(x.size(), Row(heads));
    if (type == "none") return gates;
    if (type == "full") gates = linear(x, prefix + "fgate_proj.weight");
    const Row bias = tensor(prefix + (type == "full" ? "fgate_proj.bias" : "fgate_bias"));
    for (Row& row : gates) {
      for (std::size_t h = 0; h < heads; ++h) row[h] = std::log(sigmoid(row[h] + bias[h]));
    }
    return gates;
  }
  Rows attention(const Rows& x, const std::string& prefix) const {
    const std::size_t heads = size("num_heads");
    const auto kv_heads =
        static_cast<std::size_t>(config_.optional_integer("num_kv_heads", std::nullopt, 1, 1024)
                                     .value_or(static_cast<std::int64_t>(heads)));
    const std::size_t dim = size("hidden_size") / heads;
    Rows q = linear(x, prefix + "q_proj.weight");
    Rows k = keys_or_values(x, prefix + "k_proj.", flag("use_k_shift"), dim);
    const Rows v = keys_or_values(x, prefix + "v_proj.", flag("use_v_shift"), dim);
    if (flag("qk_norm")) {
      q = normed(q, prefix + "q_norm.weight", dim, 1e-5);
      k = normed(k, prefix + "k_norm.weight", dim, 1e-5);
    }
    if (config_.boolean("use_rope", !fox())) {
      rotate(q, dim, config_.number("rope_base", 500000, 1, 1e9));
      rotate(k, dim, config_.number("rope_base", 500000, 1, 1e9));
    }
    const Rows gates = log_gates(x, prefix, heads);
    const auto window = static_cast<std::size_t>(
        config_.optional_integer("window_size", std::nullopt, 1, 1 << 20).value_or(1 << 20));
    Rows o(x.size(), Row(heads * dim));
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t at = h * dim;
      const std::size_t kv_at = h / (heads / kv_heads) * dim;
      for (std::size_t t = 0; t < x.size(); ++t) {
        double decay = 0;
        double total = 0;
        for (std::size_t j = t + 1; j-- > 0 && t - j < window;) {
          double score = 0;
          for (std::size_t i = 0; i < dim; ++i) score += q[t][at + i] * k[j][kv_at + i];
          const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)) + decay);
          total += weight;
          for (std::size_t i = 0; i < dim; ++i) o[t][at + i] += weight * v[j][kv_at + i];
          decay += gates[j][h];
        }
        for (std::size_t i = 0; i < dim; ++i) o[t][at + i] /= total;
      }
    }
    if (flag("use_output_norm")) o = normed(o, prefix + "output_norm.weight", dim, 1e-6);
    if (flag("use_output_gate")) {
      const Rows gate = linear(x, prefix + "ogate_proj.weight");
      const bool silu = config_.string("ogate_act", "sigmoid") == "silu";
      for (std::size_t t = 0; t < x.size(); ++t) {
        for (std::size_t i = 0; i < o[t].size(); ++i) {
          o[t][i] *= sigmoid(gate[t][i]) * (silu ? gate[t][i] : 1);
        }
      }
    }
    return linear(o, prefix + "o_proj.weight");
  }

  io::Checkpoint weights_;
  io::JsonObject config_;
};

}  // namespace deltafox::test
