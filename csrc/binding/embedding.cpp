// fast_embedding::embedding and fast_embedding::embedding_backward: one table.
//
//   embedding           weight [V, D], indices [...] -> [..., D]
//   embedding.options   the same with scale_grad_by_freq and sparse, which are the gradient's alone
//   embedding_backward  grad_output [..., D], indices [...] -> the dense gradient [V, D], rows at padding_idx zero
//
// padding_idx is -1 (none) or in [0, V). scale_grad_by_freq divides a row of the gradient by the number of its indices;
// sparse makes the gradient a sparse tensor, coalesced (sparse.cpp). Both together are ATen's error. Under
// torch.compile the forward becomes aten.embedding, which Inductor fuses into what follows, and the backward stays our
// op, which Inductor could not improve on.
#include "embedding.h"

#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/embedding_sparse_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dispatch.h"
#include "launch.h"
#include "node.h"

namespace fast_embedding {

using at::Tensor;

// ---- The kernels ---------------------------------------------------------------------------------------------------

Tensor lookup(const Tensor& weight, const Tensor& indices) {
  const auto scalar = scalar_type(weight.scalar_type());
  if (!scalar) {
    return {};
  }
  const int64_t embedding_dim = weight.size(1);
  c10::DimVector sizes(indices.sizes());
  sizes.push_back(embedding_dim);
  Tensor output = at::empty(sizes, weight.options());

  const Rows weight_rows = as_rows(weight);
  const IndexRows index_rows = as_index_rows(indices, /*last_is_table=*/false);
  const FeTable table{weight.size(0), embedding_dim, /*weight_offset=*/0, weight_rows.stride,
                      /*padding_idx=*/-1};
  FeForwardArgs args{};
  args.scalar_type = *scalar;
  args.index_type = index_rows.type;
  args.num_tables = 1;
  args.tables = &table;
  args.num_rows = index_rows.num_rows;
  args.indices = index_rows.storage.const_data_ptr();
  args.index_row_stride = index_rows.row_stride;
  args.index_table_stride = index_rows.table_stride;
  args.weight = weight_rows.storage.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.output_stride = embedding_dim;
  return run_forward(args, weight, indices) ? output : Tensor();
}

OneTableBackward::OneTableBackward(FeScalarType scalar, const Tensor& grad_output, const Tensor& indices,
                                   int64_t num_embeddings, int64_t padding_idx)
    : grad_rows(as_rows(grad_output)),
      index_rows(as_index_rows(indices, /*last_is_table=*/false)),
      table{num_embeddings, grad_output.size(-1), /*weight_offset=*/0, /*weight_stride=*/grad_output.size(-1),
            padding_idx} {
  args.scalar_type = scalar;
  args.index_type = index_rows.type;
  args.num_tables = 1;
  args.tables = &table;
  args.num_rows = index_rows.num_rows;
  args.indices = index_rows.storage.const_data_ptr();
  args.index_row_stride = index_rows.row_stride;
  args.index_table_stride = index_rows.table_stride;
  args.grad_output = grad_rows.storage.const_data_ptr();
  args.grad_output_stride = grad_rows.stride;
  args.deterministic = at::globalContext().deterministicAlgorithms();
}

Tensor lookup_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                       bool scale_grad_by_freq) {
  const auto scalar = scalar_type(grad_output.scalar_type());
  if (!scalar) {
    return {};
  }
  Tensor grad_weight = at::empty({num_embeddings, grad_output.size(-1)}, grad_output.options());
  OneTableBackward call(*scalar, grad_output, indices, num_embeddings, padding_idx);
  call.args.grad_weight = grad_weight.mutable_data_ptr();
  call.args.grad_weight_numel = grad_weight.numel();
  call.args.scale_grad_by_freq = scale_grad_by_freq;
  return run_backward(call.args, grad_output, indices) ? grad_weight : Tensor();
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor call_embedding(const Tensor& weight, const Tensor& indices, int64_t padding_idx) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fast_embedding::embedding", "")
                             .typed<Tensor(const Tensor&, const Tensor&, int64_t)>();
  return op.call(weight, indices, padding_idx);
}

Tensor call_embedding_backward(const Tensor& grad_output, const Tensor& indices, c10::SymInt num_embeddings,
                               int64_t padding_idx, bool scale_grad_by_freq) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fast_embedding::embedding_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, c10::SymInt, int64_t, bool)>();
  return op.call(grad_output, indices, std::move(num_embeddings), padding_idx, scale_grad_by_freq);
}

Tensor aten_embedding(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq,
                      bool sparse) {
  return at::embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse);
}

Tensor aten_embedding_backward(const Tensor& grad_output, const Tensor& indices, c10::SymInt num_embeddings,
                               int64_t padding_idx, bool scale_grad_by_freq) {
  return at::embedding_dense_backward_symint(grad_output, indices, std::move(num_embeddings), padding_idx,
                                             scale_grad_by_freq);
}

// ---- CPU and CUDA -------------------------------------------------------------------------------------------------

// What the flags ask for is the gradient's alone.
Tensor embedding_dense(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq,
                       bool sparse) {
  TORCH_CHECK(weight.dim() == 2, "weight must be 2-D, got ", weight.dim(), "-D");
  check_indices(indices, weight, "weight");
  Tensor output = lookup(weight, indices);
  return output.defined() ? output : aten_embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse);
}

void check_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx) {
  check_indices(indices, grad_output, "grad_output");
  TORCH_CHECK(grad_output.dim() == indices.dim() + 1 && grad_output.sizes().slice(0, indices.dim()) == indices.sizes(),
              "grad_output must have the shape of indices and one dimension more, got ", grad_output.sizes(),
              " for indices of shape ", indices.sizes());
  TORCH_CHECK(num_embeddings >= 0, "num_embeddings must not be negative, got ", num_embeddings);
  TORCH_CHECK(padding_idx >= -1 && (padding_idx < num_embeddings || padding_idx == -1),
              "padding_idx must be -1 or a row of ", num_embeddings, ", got ", padding_idx);
}

Tensor embedding_backward_dense(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                                int64_t padding_idx, bool scale_grad_by_freq) {
  check_backward(grad_output, indices, num_embeddings, padding_idx);
  Tensor grad_weight = lookup_backward(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq);
  return grad_weight.defined()
             ? grad_weight
             : aten_embedding_backward(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq);
}

// ---- Meta (the forward's is ATen's own, through CompositeExplicitAutograd) ----------------------------------------

Tensor embedding_backward_meta(const Tensor& grad_output, const Tensor& /*indices*/, c10::SymInt num_embeddings,
                               int64_t /*padding_idx*/, bool /*scale_grad_by_freq*/) {
  return at::empty_symint({std::move(num_embeddings), grad_output.sym_size(-1)}, grad_output.options());
}

// ---- Autograd -----------------------------------------------------------------------------------------------------

Tensor embedding_below_autograd(const Tensor& weight, const Tensor& indices, int64_t padding_idx,
                                bool scale_grad_by_freq, bool sparse) {
  if (is_traced(weight, indices)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return aten_embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  return embedding_dense(weight, indices, padding_idx, scale_grad_by_freq, sparse);
}

Tensor embedding_backward_below_autograd(const Tensor& grad_output, const Tensor& indices, c10::SymInt num_embeddings,
                                         int64_t padding_idx, bool scale_grad_by_freq) {
  if (is_traced(grad_output, indices)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_embedding_backward(grad_output, indices, std::move(num_embeddings), padding_idx, scale_grad_by_freq);
  }
  return embedding_backward_dense(grad_output, indices, num_embeddings.expect_int(), padding_idx, scale_grad_by_freq);
}

/// ATen's own where the call is recorded, or where the gradient has a graph: its rows are not summed, so that they can
/// be derived from.
Tensor embedding_sparse_backward(const Tensor& grad_output, const Tensor& indices, const Tensor& weight,
                                 int64_t padding_idx) {
  const int64_t num_embeddings = weight.size(0);
  if (!needs_graph(grad_output) && !is_traced(grad_output, indices)) {
    check_backward(grad_output, indices, num_embeddings, padding_idx);
    Tensor gradient = lookup_sparse_backward(grad_output, indices, num_embeddings, padding_idx);
    if (gradient.defined()) {
      keep_coalesced(weight, gradient);
      return gradient;
    }
  }
  return at::embedding_sparse_backward(grad_output, indices, num_embeddings, padding_idx, /*scale_grad_by_freq=*/false);
}

/// What a lookup keeps for its backward. An entry costs 0.1 us of the 2 to 3 us of a small lookup, so defaults have
/// none.
struct Options {
  int64_t padding_idx = -1;
  bool scale_grad_by_freq = false;
  Tensor weight;  // of a sparse gradient alone: whose .grad it will be. Its values play no part, and may change

  void save(AutogradContext* ctx) const {
    if (padding_idx >= 0) {
      ctx->saved_data["padding_idx"] = padding_idx;
    }
    if (scale_grad_by_freq) {
      ctx->saved_data["scale_grad_by_freq"] = true;
    }
    if (weight.defined()) {
      ctx->saved_data["weight"] = weight;
    }
  }

  static Options saved(const AutogradContext* ctx) {
    Options options;
    for (const auto& [name, value] : ctx->saved_data) {
      if (name == "padding_idx") {
        options.padding_idx = value.toInt();
      } else if (name == "scale_grad_by_freq") {
        options.scale_grad_by_freq = true;
      } else if (name == "weight") {
        options.weight = value.toTensor();
      }
    }
    return options;
  }
};

struct EmbeddingFunction : torch::autograd::Function<EmbeddingFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& indices, int64_t padding_idx,
                        bool scale_grad_by_freq, bool sparse) {
    ctx->save_for_backward({indices});
    ctx->saved_data["num_embeddings"] = weight.sym_size(0);
    Options{padding_idx, scale_grad_by_freq, sparse ? weight : Tensor()}.save(ctx);
    return embedding_below_autograd(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    Tensor grad_weight;
    if (grad_output.defined()) {
      const Tensor indices = ctx->get_saved_variables()[0];
      c10::SymInt num_embeddings = ctx->saved_data["num_embeddings"].toSymInt();
      const Options options = Options::saved(ctx);
      if (options.weight.defined()) {
        grad_weight = embedding_sparse_backward(grad_output, indices, options.weight, options.padding_idx);
      } else if (needs_graph(grad_output) || is_traced(grad_output, indices)) {
        grad_weight = call_embedding_backward(grad_output, indices, std::move(num_embeddings), options.padding_idx,
                                              options.scale_grad_by_freq);
      } else {  // the common case spares itself the dispatcher
        grad_weight = embedding_backward_dense(grad_output, indices, num_embeddings.expect_int(), options.padding_idx,
                                               options.scale_grad_by_freq);
      }
    }
    return {std::move(grad_weight), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct EmbeddingBackwardFunction : torch::autograd::Function<EmbeddingBackwardFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& indices,
                        c10::SymInt num_embeddings, int64_t padding_idx, bool scale_grad_by_freq) {
    ctx->save_for_backward({indices});
    ctx->saved_data["padding_idx"] = padding_idx;
    return embedding_backward_below_autograd(grad_output, indices, std::move(num_embeddings), padding_idx,
                                             scale_grad_by_freq);
  }

  // The backward is linear in grad_output; its transpose looks the incoming gradient up, padding rows read as zero. Not
  // divided by frequencies: ATen's double backward leaves them out, and what it gives is given here.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor grad;
    if (grads[0].defined()) {
      const Tensor indices = ctx->get_saved_variables()[0];
      const int64_t padding_idx = ctx->saved_data["padding_idx"].toInt();
      grad = call_embedding(grads[0], indices, padding_idx);
      if (padding_idx >= 0) {
        grad = grad.masked_fill(indices.eq(padding_idx).unsqueeze(-1), 0);
      }
    }
    return {std::move(grad), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor embedding_autograd(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq,
                          bool sparse) {
  if (is_left_to_aten(weight) || (sparse && (scale_grad_by_freq || is_traced(weight, indices)))) {
    return aten_embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  if (!needs_graph(weight)) {
    return embedding_below_autograd(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  return is_traced(weight, indices)
             ? EmbeddingFunction::apply(weight, indices, padding_idx, scale_grad_by_freq, sparse)
             : apply_untraced<EmbeddingFunction>(weight, indices, padding_idx, scale_grad_by_freq, sparse);
}

Tensor embedding_backward_autograd(const Tensor& grad_output, const Tensor& indices, c10::SymInt num_embeddings,
                                   int64_t padding_idx, bool scale_grad_by_freq) {
  if (is_left_to_aten(grad_output)) {
    return aten_embedding_backward(grad_output, indices, std::move(num_embeddings), padding_idx, scale_grad_by_freq);
  }
  return needs_graph(grad_output) ? EmbeddingBackwardFunction::apply(grad_output, indices, std::move(num_embeddings),
                                                                     padding_idx, scale_grad_by_freq)
                                  : embedding_backward_below_autograd(grad_output, indices, std::move(num_embeddings),
                                                                      padding_idx, scale_grad_by_freq);
}

/// embedding by what does embedding.options. Two operators, because two arguments more cost a small lookup 0.25 us
/// of 3.
template <Tensor (*implementation)(const Tensor&, const Tensor&, int64_t, bool, bool)>
Tensor without_options(const Tensor& weight, const Tensor& indices, int64_t padding_idx) {
  return implementation(weight, indices, padding_idx, /*scale_grad_by_freq=*/false, /*sparse=*/false);
}

}  // namespace
}  // namespace fast_embedding

TORCH_LIBRARY_FRAGMENT(fast_embedding, m) {
  m.def("embedding(Tensor weight, Tensor indices, int padding_idx=-1) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "embedding.options(Tensor weight, Tensor indices, int padding_idx, bool scale_grad_by_freq, bool sparse=False) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "embedding_backward(Tensor grad_output, Tensor indices, SymInt num_embeddings, int padding_idx=-1, "
      "bool scale_grad_by_freq=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fast_embedding, Autograd, m) {
  m.impl("embedding", fast_embedding::without_options<fast_embedding::embedding_autograd>);
  m.impl("embedding.options", fast_embedding::embedding_autograd);
  m.impl("embedding_backward", fast_embedding::embedding_backward_autograd);
}

// Inference tensors arrive here without passing Autograd.
TORCH_LIBRARY_IMPL(fast_embedding, CPU, m) {
  m.impl("embedding", fast_embedding::without_options<fast_embedding::embedding_dense>);
  m.impl("embedding.options", fast_embedding::embedding_dense);
  m.impl("embedding_backward", fast_embedding::embedding_backward_dense);
}

TORCH_LIBRARY_IMPL(fast_embedding, CUDA, m) {
  m.impl("embedding", fast_embedding::without_options<fast_embedding::embedding_dense>);
  m.impl("embedding.options", fast_embedding::embedding_dense);
  m.impl("embedding_backward", fast_embedding::embedding_backward_dense);
}

TORCH_LIBRARY_IMPL(fast_embedding, Meta, m) { m.impl("embedding_backward", fast_embedding::embedding_backward_meta); }

// Other devices, and batched tensors (torch.func.vmap): ATen has rules for them.
TORCH_LIBRARY_IMPL(fast_embedding, CompositeExplicitAutograd, m) {
  m.impl("embedding", fast_embedding::without_options<fast_embedding::aten_embedding>);
  m.impl("embedding.options", fast_embedding::aten_embedding);
  m.impl("embedding_backward", fast_embedding::aten_embedding_backward);
}

TORCH_LIBRARY_IMPL(fast_embedding, FuncTorchBatched, m) {
  m.impl("embedding", fast_embedding::without_options<fast_embedding::aten_embedding>);
  m.impl("embedding.options", fast_embedding::aten_embedding);
  m.impl("embedding_backward", fast_embedding::aten_embedding_backward);
}
