// Who computes a call: our kernels, ATen, or whoever records it.
#pragma once

#include <ATen/core/Tensor.h>

namespace fast_embedding {

/// True where ATen's own op, with its own autograd, must do the whole call: types and devices without kernels, and what
/// a C++ autograd function does not support (torch.func's transforms, forward-mode tangents).
bool is_left_to_aten(const at::Tensor& tensor);

/// True where the call is being recorded (torch.compile, make_fx, a fake or meta tensor, any dispatch mode, a tensor
/// subclass): what runs must be an op that the recorder sees, not a kernel.
bool is_traced(const at::Tensor& first, const at::Tensor& second);

/// True where autograd must remember the call.
bool needs_graph(const at::Tensor& tensor);

}  // namespace fast_embedding
