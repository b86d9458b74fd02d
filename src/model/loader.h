// Binds a model's parameters to a checkpoint's tensors.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "core/thread_pool.h"
#include "io/safetensors.h"
#include "model/causal_lm.h"

namespace deltafox {

// How a parameter is kept in a model whose matrices are `wanted`: vectors in float32; with a packed
// form the embedding as kQ8, and small or oddly cut matrices as bfloat16.
DType kept_dtype(const ParamNames& names, const std::string& name, const Param& param,
                 DType wanted);

// `from`, a tensor called `name` in `file`, as another dtype.
Tensor kept_as(const ConstTensorView& from, DType dtype, const std::string& file,
               const std::string& name, ThreadPool& threads);

// Points every parameter at its tensor in `checkpoint`, which must outlive the model. Tensors that
// are kept in another dtype than stored are converted into buffers, which are returned and must
// outlive it as well; packed ones stay as they are stored. Throws Error naming the file and the
// tensor that is missing, unexpected, of another shape or not of a floating-point dtype.
std::vector<Tensor> bind_params(CausalLM& model, const io::Checkpoint& checkpoint,
                                std::optional<DType> dtype, ThreadPool& threads);

// Copies the bound parameters to a GPU, one after the other. What is returned must outlive the
// model.
std::vector<Tensor> place_on_gpu(CausalLM& model, ThreadPool& threads);

}  // namespace deltafox
