// fast_embedding::multi_embedding and fast_embedding::multi_embedding_backward: n tables at once.
//
//   multi_embedding           weight [numel], indices [..., n] -> [..., D_0 + ... + D_{n-1}]
//   multi_embedding_backward  grad_output [..., sum of D], indices [..., n] -> the dense gradient [numel]
//
// Table t is weight[weight_offsets[t] :][: V_t * D_t] as [V_t, D_t]; the tables stand in ascending order and do not
// overlap; the gradient of the holes between them is zero. padding_idx[t] is -1 (none) or in [0, V_t).
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "launch.h"

namespace fast_embedding {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The tables as the schemas pass them: one entry a table.
struct Tables {
  IntArrayRef num_embeddings;
  IntArrayRef embedding_dims;
  IntArrayRef weight_offsets;
  IntArrayRef padding_idx;

  int64_t size() const { return static_cast<int64_t>(num_embeddings.size()); }
  int64_t numel(int64_t table) const { return num_embeddings[table] * embedding_dims[table]; }
  int64_t output_dim() const { return c10::sum_integers(embedding_dims); }
};

/// RuntimeError unless the tables make sense for a flat weight (or gradient) of `weight_numel` elements.
void check_tables(const Tables& tables, int64_t weight_numel) {
  const size_t count = tables.num_embeddings.size();
  TORCH_CHECK(count > 0, "num_embeddings must name at least one table");
  TORCH_CHECK(tables.embedding_dims.size() == count && tables.weight_offsets.size() == count &&
                  tables.padding_idx.size() == count,
              "num_embeddings, embedding_dims, weight_offsets and padding_idx must have one entry a table, got ", count,
              ", ", tables.embedding_dims.size(), ", ", tables.weight_offsets.size(), " and ",
              tables.padding_idx.size());
  int64_t end = 0;  // of the table before
  for (int64_t table = 0; table < tables.size(); ++table) {
    const int64_t rows = tables.num_embeddings[table];
    const int64_t columns = tables.embedding_dims[table];
    const int64_t offset = tables.weight_offsets[table];
    const int64_t padding_idx = tables.padding_idx[table];
    TORCH_CHECK(rows >= 0 && columns >= 0, "num_embeddings and embedding_dims must not be negative, got ", rows,
                " and ", columns, " for table ", table);
    TORCH_CHECK(padding_idx >= -1 && padding_idx < std::max<int64_t>(rows, 0), "padding_idx must be -1 or a row of ",
                rows, " for table ", table, ", got ", padding_idx);
    TORCH_CHECK(offset >= end, "weight_offsets must ascend without overlap, got ", offset, " for table ", table,
                " where the one before ends at ", end);
    // Without forming rows * columns, which may overflow.
    TORCH_CHECK(offset <= weight_numel && (columns == 0 || rows <= (weight_numel - offset) / columns), "table ", table,
                " of ", rows, " x ", columns, " elements at ", offset, " must lie within the weight's ", weight_numel);
    end = offset + tables.numel(table);
  }
}

void check_last_dim(const Tensor& indices, const Tables& tables) {
  TORCH_CHECK(indices.dim() >= 1 && indices.sym_size(-1) == tables.size(), "indices must have one column a table (",
              tables.size(), "), got the shape ", indices.sym_sizes());
}

// ---- The same from ATen's ops: any type, any transform ------------------------------------------------------------

Tensor composite(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  check_last_dim(indices, tables);
  std::vector<Tensor> outputs;
  outputs.reserve(tables.size());
  for (int64_t table = 0; table < tables.size(); ++table) {
    const Tensor rows = weight.narrow(0, tables.weight_offsets[table], tables.numel(table))
                            .reshape({tables.num_embeddings[table], tables.embedding_dims[table]});
    outputs.push_back(at::embedding(rows, indices.select(-1, table), tables.padding_idx[table]));
  }
  return at::cat(outputs, -1);
}

Tensor composite_backward(const Tensor& grad_output, const Tensor& indices, const c10::SymInt& weight_numel,
                          const Tables& tables) {
  check_last_dim(indices, tables);
  const auto zeros = [&](const c10::SymInt& numel) { return grad_output.new_zeros_symint({numel}); };
  std::vector<Tensor> pieces;
  int64_t end = 0;
  int64_t column = 0;
  for (int64_t table = 0; table < tables.size(); ++table) {
    const int64_t embedding_dim = tables.embedding_dims[table];
    pieces.push_back(zeros(tables.weight_offsets[table] - end));
    pieces.push_back(at::embedding_dense_backward(grad_output.narrow(-1, column, embedding_dim),
                                                  indices.select(-1, table), tables.num_embeddings[table],
                                                  tables.padding_idx[table], /*scale_grad_by_freq=*/false)
                         .reshape({-1}));
    end = tables.weight_offsets[table] + tables.numel(table);
    column += embedding_dim;
  }
  pieces.push_back(zeros(weight_numel - end));
  return at::cat(pieces);
}

// ---- CPU and CUDA -------------------------------------------------------------------------------------------------

using TableVector = c10::SmallVector<FeTable, 16>;

TableVector as_table_vector(const Tables& tables) {
  TableVector result;
  for (int64_t table = 0; table < tables.size(); ++table) {
    result.push_back({tables.num_embeddings[table], tables.embedding_dims[table], tables.weight_offsets[table],
                      /*weight_stride=*/tables.embedding_dims[table], tables.padding_idx[table]});
  }
  return result;
}

Tensor multi_embedding_dense(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  TORCH_CHECK(weight.dim() == 1, "weight must be 1-D, got ", weight.dim(), "-D");
  check_tables(tables, weight.numel());
  check_indices(indices, weight, "weight");
  check_last_dim(indices, tables);
  const auto scalar = scalar_type(weight.scalar_type());
  if (!scalar) {
    return composite(weight, indices, tables);
  }
  c10::DimVector sizes(indices.sizes());
  sizes.back() = tables.output_dim();
  Tensor output = at::empty(sizes, weight.options());

  const Tensor flat = weight.contiguous();
  const IndexRows index_rows = as_index_rows(indices, /*last_is_table=*/true);
  const TableVector table_vector = as_table_vector(tables);
  FeForwardArgs args{};
  args.scalar_type = *scalar;
  args.index_type = index_rows.type;
  args.num_tables = tables.size();
  args.tables = table_vector.data();
  args.num_rows = index_rows.num_rows;
  args.indices = index_rows.storage.const_data_ptr();
  args.index_row_stride = index_rows.row_stride;
  args.index_table_stride = index_rows.table_stride;
  args.weight = flat.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.output_stride = sizes.back();
  return run_forward(args, weight, indices) ? output : composite(weight, indices, tables);
}

Tensor multi_embedding_backward_dense(const Tensor& grad_output, const Tensor& indices, int64_t weight_numel,
                                      const Tables& tables) {
  check_tables(tables, weight_numel);
  check_indices(indices, grad_output, "grad_output");
  check_last_dim(indices, tables);
  TORCH_CHECK(grad_output.dim() == indices.dim() && grad_output.size(-1) == tables.output_dim() &&
                  grad_output.sizes().slice(0, indices.dim() - 1) == indices.sizes().slice(0, indices.dim() - 1),
              "grad_output must have ", tables.output_dim(), " columns and the leading dimensions of indices, got ",
              grad_output.sizes(), " for indices of shape ", indices.sizes());
  const auto scalar = scalar_type(grad_output.scalar_type());
  if (!scalar) {
    return composite_backward(grad_output, indices, weight_numel, tables);
  }
  Tensor grad_weight = at::empty({weight_numel}, grad_output.options());

  const Rows grad_rows = as_rows(grad_output);
  const IndexRows index_rows = as_index_rows(indices, /*last_is_table=*/true);
  const TableVector table_vector = as_table_vector(tables);
  FeBackwardArgs args{};
  args.scalar_type = *scalar;
  args.index_type = index_rows.type;
  args.num_tables = tables.size();
  args.tables = table_vector.data();
  args.num_rows = index_rows.num_rows;
  args.indices = index_rows.storage.const_data_ptr();
  args.index_row_stride = index_rows.row_stride;
  args.index_table_stride = index_rows.table_stride;
  args.grad_output = grad_rows.storage.const_data_ptr();
  args.grad_output_stride = grad_rows.stride;
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_weight_numel = weight_numel;
  args.deterministic = at::globalContext().deterministicAlgorithms();
  return run_backward(args, grad_output, indices) ? grad_weight
                                                  : composite_backward(grad_output, indices, weight_numel, tables);
}

// ---- The dispatcher's signatures ----------------------------------------------------------------------------------

Tensor call_multi_embedding(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fast_embedding::multi_embedding", "")
          .typed<Tensor(const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef)>();
  return op.call(weight, indices, tables.num_embeddings, tables.embedding_dims, tables.weight_offsets,
                 tables.padding_idx);
}

Tensor call_multi_embedding_backward(const Tensor& grad_output, const Tensor& indices, c10::SymInt weight_numel,
                                     const Tables& tables) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fast_embedding::multi_embedding_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, c10::SymInt, IntArrayRef, IntArrayRef,
                                           IntArrayRef, IntArrayRef)>();
  return op.call(grad_output, indices, std::move(weight_numel), tables.num_embeddings, tables.embedding_dims,
                 tables.weight_offsets, tables.padding_idx);
}

/// A function of Tables as the dispatcher calls it, with the lists of the schema.
template <Tensor (*function)(const Tensor&, const Tensor&, const Tables&)>
Tensor unpacked(const Tensor& weight, const Tensor& indices, IntArrayRef num_embeddings, IntArrayRef embedding_dims,
                IntArrayRef weight_offsets, IntArrayRef padding_idx) {
  return function(weight, indices, {num_embeddings, embedding_dims, weight_offsets, padding_idx});
}

template <typename Size, Tensor (*function)(const Tensor&, const Tensor&, Size, const Tables&)>
Tensor unpacked_backward(const Tensor& grad_output, const Tensor& indices, std::decay_t<Size> weight_numel,
                         IntArrayRef num_embeddings, IntArrayRef embedding_dims, IntArrayRef weight_offsets,
                         IntArrayRef padding_idx) {
  return function(grad_output, indices, weight_numel, {num_embeddings, embedding_dims, weight_offsets, padding_idx});
}

// ---- Meta ---------------------------------------------------------------------------------------------------------

Tensor multi_embedding_meta(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  check_last_dim(indices, tables);
  c10::SymDimVector sizes(indices.sym_sizes());
  sizes.back() = tables.output_dim();
  return at::empty_symint(sizes, weight.options());
}

Tensor multi_embedding_backward_meta(const Tensor& grad_output, const Tensor& /*indices*/,
                                     const c10::SymInt& weight_numel, const Tables& /*tables*/) {
  return at::empty_symint({weight_numel}, grad_output.options());
}

// ---- Autograd -----------------------------------------------------------------------------------------------------

Tensor forward_below_autograd(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  if (is_traced(weight, indices)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_multi_embedding(weight, indices, tables);
  }
  return multi_embedding_dense(weight, indices, tables);
}

Tensor backward_below_autograd(const Tensor& grad_output, const Tensor& indices, const c10::SymInt& weight_numel,
                               const Tables& tables) {
  if (is_traced(grad_output, indices)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_multi_embedding_backward(grad_output, indices, weight_numel, tables);
  }
  return multi_embedding_backward_dense(grad_output, indices, weight_numel.expect_int(), tables);
}

/// Tables in an autograd context. The lists of the schema end with the call, so these are copies.
class SavedTables {
 public:
  static void save(AutogradContext* ctx, const Tables& tables) {
    ctx->saved_data["num_embeddings"] = tables.num_embeddings;
    ctx->saved_data["embedding_dims"] = tables.embedding_dims;
    ctx->saved_data["weight_offsets"] = tables.weight_offsets;
    ctx->saved_data["padding_idx"] = tables.padding_idx;
  }

  explicit SavedTables(AutogradContext* ctx)
      : num_embeddings_(ctx->saved_data["num_embeddings"].toIntVector()),
        embedding_dims_(ctx->saved_data["embedding_dims"].toIntVector()),
        weight_offsets_(ctx->saved_data["weight_offsets"].toIntVector()),
        padding_idx_(ctx->saved_data["padding_idx"].toIntVector()) {}

  Tables get() const { return {num_embeddings_, embedding_dims_, weight_offsets_, padding_idx_}; }

 private:
  std::vector<int64_t> num_embeddings_, embedding_dims_, weight_offsets_, padding_idx_;
};

struct MultiEmbeddingFunction : torch::autograd::Function<MultiEmbeddingFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& indices, const Tables& tables) {
    ctx->save_for_backward({indices});
    ctx->saved_data["weight_numel"] = weight.sym_numel();
    SavedTables::save(ctx, tables);
    return forward_below_autograd(weight, indices, tables);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) {
      return {Tensor(), Tensor(), Tensor()};
    }
    const Tensor indices = ctx->get_saved_variables()[0];
    const c10::SymInt weight_numel = ctx->saved_data["weight_numel"].toSymInt();
    const SavedTables saved(ctx);
    // The common case spares itself the dispatcher.
    Tensor grad_weight =
        needs_graph(grad_output) || is_traced(grad_output, indices)
            ? call_multi_embedding_backward(grad_output, indices, weight_numel, saved.get())
            : multi_embedding_backward_dense(grad_output, indices, weight_numel.expect_int(), saved.get());
    return {std::move(grad_weight), Tensor(), Tensor()};
  }
};

struct MultiEmbeddingBackwardFunction : torch::autograd::Function<MultiEmbeddingBackwardFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& indices,
                        const c10::SymInt& weight_numel, const Tables& tables) {
    ctx->save_for_backward({indices});
    SavedTables::save(ctx, tables);
    return backward_below_autograd(grad_output, indices, weight_numel, tables);
  }

  // The backward is linear in grad_output; its transpose looks the incoming gradient up, padding rows read as zero.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor grad;
    if (grads[0].defined()) {
      const Tensor indices = ctx->get_saved_variables()[0];
      const SavedTables saved(ctx);
      const Tables tables = saved.get();
      grad = call_multi_embedding(grads[0], indices, tables);
      std::vector<Tensor> padded;  // per column of the output
      for (int64_t table = 0; table < tables.size(); ++table) {
        const Tensor rows = indices.select(-1, table).eq(tables.padding_idx[table]).unsqueeze(-1);
        auto sizes = rows.sym_sizes().vec();
        sizes.back() = tables.embedding_dims[table];
        padded.push_back(rows.expand_symint(sizes));
      }
      grad = grad.masked_fill(at::cat(padded, -1), 0);
    }
    return {std::move(grad), Tensor(), Tensor(), Tensor()};
  }
};

Tensor multi_embedding_autograd(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  if (is_left_to_aten(weight)) {
    return composite(weight, indices, tables);
  }
  return needs_graph(weight) ? MultiEmbeddingFunction::apply(weight, indices, tables)
                             : forward_below_autograd(weight, indices, tables);
}

Tensor multi_embedding_backward_autograd(const Tensor& grad_output, const Tensor& indices,
                                         const c10::SymInt& weight_numel, const Tables& tables) {
  if (is_left_to_aten(grad_output)) {
    return composite_backward(grad_output, indices, weight_numel, tables);
  }
  return needs_graph(grad_output) ? MultiEmbeddingBackwardFunction::apply(grad_output, indices, weight_numel, tables)
                                  : backward_below_autograd(grad_output, indices, weight_numel, tables);
}

}  // namespace
}  // namespace fast_embedding

TORCH_LIBRARY_FRAGMENT(fast_embedding, m) {
  m.def(
      "multi_embedding(Tensor weight, Tensor indices, int[] num_embeddings, int[] embedding_dims, "
      "int[] weight_offsets, int[] padding_idx) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_embedding_backward(Tensor grad_output, Tensor indices, SymInt weight_numel, int[] num_embeddings, "
      "int[] embedding_dims, int[] weight_offsets, int[] padding_idx) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fast_embedding, Autograd, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<multi_embedding_autograd>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, multi_embedding_backward_autograd>);
}

// Inference tensors arrive here without passing Autograd.
TORCH_LIBRARY_IMPL(fast_embedding, CPU, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<multi_embedding_dense>);
  m.impl("multi_embedding_backward", unpacked_backward<int64_t, multi_embedding_backward_dense>);
}

TORCH_LIBRARY_IMPL(fast_embedding, CUDA, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<multi_embedding_dense>);
  m.impl("multi_embedding_backward", unpacked_backward<int64_t, multi_embedding_backward_dense>);
}

TORCH_LIBRARY_IMPL(fast_embedding, Meta, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<multi_embedding_meta>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, multi_embedding_backward_meta>);
}

// Other devices, and batched tensors (torch.func.vmap): ATen has rules for them.
TORCH_LIBRARY_IMPL(fast_embedding, CompositeExplicitAutograd, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<composite>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, composite_backward>);
}

TORCH_LIBRARY_IMPL(fast_embedding, FuncTorchBatched, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<composite>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, composite_backward>);
}
