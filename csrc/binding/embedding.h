// One table's kernels from tensors: what fast_embedding's own operators and, under enable(), aten's are made of.
#pragma once

#include <ATen/core/Tensor.h>

namespace fast_embedding {

/// Rows of weight [V, D] at indices [...], as a new contiguous tensor [..., D]; undefined where no kernel takes the
/// type or the sizes. The indices must have been checked (check_indices).
at::Tensor lookup(const at::Tensor& weight, const at::Tensor& indices);

/// The gradient [num_embeddings, D] from grad_output [..., D], rows at padding_idx zero; undefined as above. indices
/// have the shape of grad_output but for its last dimension; padding_idx is -1 (none) or a row.
at::Tensor lookup_backward(const at::Tensor& grad_output, const at::Tensor& indices, int64_t num_embeddings,
                           int64_t padding_idx);

}  // namespace fast_embedding
