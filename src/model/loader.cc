#include "model/loader.h"

#include <set>
#include <string>

#include "core/context.h"
#include "core/device.h"
#include "core/error.h"
#include "core/float_convert.h"
#include "core/quantized.h"
#include "model/quantize.h"
#include "ops/quantize.h"

namespace deltafox {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

std::int64_t element_bytes(std::int64_t elements, DType dtype) {
  return elements * static_cast<std::int64_t>(size_of(dtype));
}

Tensor converted(const ConstTensorView& from, DType dtype, ThreadPool& threads) {
  constexpr std::int64_t kPiece = std::int64_t{1} << 18;
  Tensor to(dtype, from.shape);
  const std::int64_t size = from.shape.size();
  const TensorView target = to.view();
  threads.parallel_for((size + kPiece - 1) / kPiece, [&](std::int64_t task) {
    const std::int64_t begin = task * kPiece;
    const Shape piece{std::min(kPiece, size - begin)};
    convert({static_cast<const std::byte*>(from.data) + element_bytes(begin, from.dtype),
             from.dtype, piece},
            {static_cast<std::byte*>(target.data) + element_bytes(begin, dtype), dtype, piece});
  });
  return to;
}

// A parameter as the checkpoint has it: under its name, or packed under a longer one.
struct Stored {
  std::string name;
  ConstTensorView value;
};

Stored stored_param(const io::Checkpoint& checkpoint, const std::string& name, const Param& param) {
  for (const DType dtype : {DType::kQ8, DType::kQ4}) {
    const std::string packed = packed_name(name, dtype);
    if (!param.is_matrix || !checkpoint.contains(packed)) continue;
    const ConstTensorView view = checkpoint.view(packed);
    const PackedLayout layout(dtype, param.shape[0], param.shape[1]);
    const Shape expected{layout.panels(), layout.panel_bytes()};
    if (view.dtype != DType::kU8 || view.shape != expected) {
      fail("{}: tensor '{}' is {} {}, but the config asks for U8 {}", checkpoint.file_of(packed),
           packed, name_of(view.dtype), to_string(view.shape), to_string(expected));
    }
    return {packed, {view.data, dtype, param.shape}};
  }
  if (!checkpoint.contains(name)) fail("{}: tensor '{}' is missing", checkpoint.path(), name);
  const ConstTensorView view = checkpoint.view(name);
  if (!is_float(view.dtype)) {
    fail("{}: tensor '{}' has dtype {}, expected F32, BF16 or F16", checkpoint.file_of(name), name,
         name_of(view.dtype));
  }
  if (view.shape != param.shape) {
    fail("{}: tensor '{}' has shape {}, but the config asks for {}", checkpoint.file_of(name), name,
         to_string(view.shape), to_string(param.shape));
  }
  return {name, view};
}

}  // namespace

DType kept_dtype(const ParamNames& names, const std::string& name, const Param& param,
                 DType wanted) {
  if (!param.is_matrix) return DType::kF32;
  if (!is_packed(wanted)) return wanted;
  // Small matrices give gates and time steps: little to save, much to spoil.
  constexpr std::int64_t kMinPacked = 64;
  if (!param.packable || param.shape[0] < kMinPacked || param.shape[1] < kMinPacked) {
    return DType::kBF16;
  }
  return name == names.embeddings ? DType::kQ8 : wanted;
}

Tensor kept_as(const ConstTensorView& from, DType dtype, const std::string& file,
               const std::string& name, ThreadPool& threads) {
  if (!is_packed(dtype)) return converted(from, dtype, threads);
  Context ctx(threads);
  Tensor to(dtype, from.shape);
  try {
    ops::quantize(ctx, {.w = from, .packed = to.view()});
  } catch (const Error& error) {
    fail("{}: tensor '{}': {}", file, name, error.what());
  }
  return to;
}

std::vector<Tensor> bind_params(CausalLM& model, const io::Checkpoint& checkpoint,
                                std::optional<DType> dtype, ThreadPool& threads) {
  std::vector<Tensor> buffers;
  std::set<std::string> used;
  const ParamNames& names = model.config().names;
  if (checkpoint.contains(names.layers + "0." + names.mlp + "up_proj.weight")) {
    model.split_gate_and_up();
  }
  model.visit_params([&](const std::string& name, Param& param) {
    const Stored stored = stored_param(checkpoint, name, param);
    const std::string& file = checkpoint.file_of(stored.name);
    param.value = stored.value;
    used.insert(stored.name);
    if (is_packed(stored.value.dtype)) {
      if (dtype && kept_dtype(names, name, param, *dtype) != stored.value.dtype) {
        fail("{}: tensor '{}' is packed and cannot be kept in another dtype", file, stored.name);
      }
      return;
    }
    const DType kept = kept_dtype(names, name, param, dtype.value_or(stored.value.dtype));
    if (stored.value.dtype == kept) return;
    buffers.push_back(kept_as(stored.value, kept, file, name, threads));
    param.value = std::as_const(buffers.back()).view();
  });
  for (const std::string& name : checkpoint.names()) {
    // A tied head may be stored all the same.
    const bool tied_head =
        model.config().tie_word_embeddings && name == model.config().names.lm_head;
    if (!used.contains(name) && !tied_head) {
      fail("{}: tensor '{}' does not belong to the model that the config describes",
           checkpoint.file_of(name), name);
    }
  }
  return buffers;
}

namespace {

// Packed matrices on a GPU, into the order that it reads.
void arrange_all_packed(CausalLM& model, ThreadPool& threads) {
  Context ctx(threads, Device::kCuda, DType::kBF16);
  model.visit_params([&](const std::string&, const Param& param) {
    if (!is_packed(param.value.dtype)) return;
    ops::arrange_packed(
        ctx, {const_cast<void*>(param.value.data), param.value.dtype, param.value.shape});
  });
  ctx.synchronize();
}

}  // namespace

std::vector<Tensor> place_on_gpu(CausalLM& model, ThreadPool& threads) {
  constexpr std::size_t kAlignment = 256;
  const auto padded = [](const Param& param) {
    const std::size_t bytes = bytes_of(param.value.dtype, param.padded_shape());
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  std::size_t total = 0;
  model.visit_params([&](const std::string&, const Param& param) { total += padded(param); });
  std::vector<Tensor> buffers;
  buffers.emplace_back(DType::kU8, Shape{static_cast<std::int64_t>(total)}, Device::kCuda);
  auto* to = static_cast<std::byte*>(buffers[0].view().data);
  std::vector<cuda::Piece> pieces;
  bool packed = false;
  model.visit_params([&](const std::string&, Param& param) {
    pieces.push_back({to, param.value.data, bytes_of(param.value.dtype, param.shape)});
    packed = packed || is_packed(param.value.dtype);
    if (param.read_on_host) {
      Tensor& host = buffers.emplace_back(DType::kF32, param.shape);
      convert(param.value, host.view());
      param.host = std::as_const(host).view();
    }
    param.value.data = to;
    param.in_one_piece = true;
    to += padded(param);
  });
  cuda::upload(threads, pieces);
  if (packed) arrange_all_packed(model, threads);
  return buffers;
}

}  // namespace deltafox
