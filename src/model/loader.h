// Binds a model's parameters to a checkpoint's tensors.
#pragma once

#include <optional>
#include <vector>

#include "core/tensor.h"
#include "core/thread_pool.h"
#include "io/safetensors.h"
#include "model/causal_lm.h"

namespace deltafox {

// Points every parameter at its tensor in `checkpoint`, which must outlive the model. Tensors that
// are kept in another dtype than stored are converted into buffers, which are returned and must
// outlive it as well. Throws Error naming the file and the tensor that is missing, unexpected, of
// another shape or not of a floating-point dtype.
std::vector<Tensor> bind_params(CausalLM& model, const io::Checkpoint& checkpoint,
                                std::optional<DType> dtype, ThreadPool& threads);

}  // namespace deltafox
