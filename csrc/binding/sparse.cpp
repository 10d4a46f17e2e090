// The sparse gradient of one table: coalesced from the start, so that no optimizer sorts again.
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/engine.h>

#include "embedding.h"

namespace fast_embedding {
namespace {

using at::Tensor;

/// The rows and values where the shape alone says which rows there are. ATen has none where a row has no elements.
std::optional<SparseRows> known_rows(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                                     int64_t padding_idx) {
  const int64_t embedding_dim = grad_output.size(-1);
  const auto index_options = indices.options().dtype(at::kLong);
  if (grad_output.numel() == 0 || (num_embeddings == 1 && padding_idx == 0)) {
    return SparseRows{at::empty({1, 0}, index_options), at::empty({0, embedding_dim}, grad_output.options())};
  }
  if (padding_idx >= 0) {
    return std::nullopt;
  }
  if (indices.numel() == 1) {
    // Copies: who owns these two may write to them before the optimizer reads the gradient.
    return SparseRows{indices.reshape({1, 1}).to(index_options, /*non_blocking=*/false, /*copy=*/true),
                      grad_output.reshape({1, embedding_dim}).clone(at::MemoryFormat::Contiguous)};
  }
  if (num_embeddings == 1) {
    Tensor sum = lookup_backward(grad_output, indices, num_embeddings, padding_idx);
    if (sum.defined()) {
      return SparseRows{at::zeros({1, 1}, index_options), std::move(sum)};
    }
  }
  return std::nullopt;
}

}  // namespace

Tensor lookup_sparse_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                              int64_t padding_idx) {
  const auto scalar = scalar_type(grad_output.scalar_type());
  if (!scalar) {
    return {};
  }
  auto found = known_rows(grad_output, indices, num_embeddings, padding_idx);
  if (!found) {
    OneTableBackward call(*scalar, grad_output, indices, num_embeddings, padding_idx);
    found = run_sparse_backward(call.args, grad_output, indices);
  }
  if (!found) {
    return {};
  }
  return at::_sparse_coo_tensor_unsafe(found->rows, found->values, {num_embeddings, grad_output.size(-1)},
                                       grad_output.options().layout(at::kSparse), /*is_coalesced=*/true);
}

// Of a sparse gradient AccumulateGrad makes another tensor of the same memory, which it does not tell that it is
// coalesced. A post hook on that node would stay there for as long as the node lives; a callback is gone with this
// backward. Whoever holds the tensor by then may be reading it, as DDP's exchange does in a thread of its own: then it
// stays as it is.
void keep_coalesced(const Tensor& weight, const Tensor& gradient) {
  if (!weight.is_leaf()) {
    return;
  }
  const auto mark = [weight, rows = gradient._indices()] {
    const Tensor& grad = weight.grad();
    if (grad.defined() && grad.use_count() == 1 && grad.is_sparse() && !grad.is_coalesced() &&
        grad._nnz() == rows.size(1) && grad._indices().const_data_ptr() == rows.const_data_ptr()) {
      grad._coalesced_(true);
    }
  };
  torch::autograd::Engine::get_default_engine().queue_callback(mark);
}

}  // namespace fast_embedding
