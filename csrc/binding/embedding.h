// One table's kernels from tensors: what fast_embedding's own operators and, under enable(), aten's are made of.
#pragma once

#include <ATen/core/Tensor.h>

#include "launch.h"

namespace fast_embedding {

/// The arguments of one table's backward but for grad_weight, and what owns the memory that they point to.
struct OneTableBackward {
  OneTableBackward(FeScalarType scalar, const at::Tensor& grad_output, const at::Tensor& indices,
                   int64_t num_embeddings, int64_t padding_idx);
  OneTableBackward(const OneTableBackward&) = delete;

  Rows grad_rows;
  IndexRows index_rows;
  FeTable table;
  FeBackwardArgs args{};
};

/// Rows of weight [V, D] at indices [...], as a new contiguous tensor [..., D]; undefined where no kernel takes the
/// type or the sizes. The indices must have been checked (check_indices).
at::Tensor lookup(const at::Tensor& weight, const at::Tensor& indices);

/// The gradient [num_embeddings, D] from grad_output [..., D], rows at padding_idx zero; undefined as above. indices
/// have the shape of grad_output but for its last dimension; padding_idx is -1 (none) or a row. With
/// scale_grad_by_freq a row's sum is divided by the number of indices that name the row.
at::Tensor lookup_backward(const at::Tensor& grad_output, const at::Tensor& indices, int64_t num_embeddings,
                           int64_t padding_idx, bool scale_grad_by_freq = false);

/// The same gradient as a sparse tensor, coalesced; the host waits for the number of its rows, unless the shape tells.
/// Undefined as above, and on CUDA while a graph is captured.
at::Tensor lookup_sparse_backward(const at::Tensor& grad_output, const at::Tensor& indices, int64_t num_embeddings,
                                  int64_t padding_idx);

/// From a node's backward: lets the weight's .grad be coalesced like the gradient that it comes of.
void keep_coalesced(const at::Tensor& weight, const at::Tensor& gradient);

}  // namespace fast_embedding
