// fast_embedding::multi_embedding and fast_embedding::multi_embedding_backward: n tables at once.
//
//   multi_embedding           weight [numel], indices [..., n] -> [..., D_0 + ... + D_{n-1}]
//   multi_embedding_backward  grad_output [..., sum of D], indices [..., n] -> the dense gradient [numel]
//
// Column t of the indices reads the table weight[weight_offsets[t] :][: V_t * D_t] as [V_t, D_t]. Several columns may
// read one table, which then gets the sum of their gradients; else tables do not overlap. The gradient of the holes
// between them is zero. padding_idx[t] is -1 (none) or in [0, V_t). With `sum` all D are equal, and the rows are added
// (in column order, in float32 for 16-bit types, rounded once) instead of concatenated: output and grad_output have D
// columns.
//
// Under torch.compile the forward becomes what Inductor fuses into what follows: a sum of aten.embedding, or one
// aten.take given `columns`, int64 [4, C] for the C columns of the concatenation: for each the column of the indices,
// V, D, and where it stands in row 0 of its table. The backward stays our op.
//
// multi_embedding.described is the eager form: the tables come as the rows of a CPU tensor, int64 [n, 5], in the order
// of FeTable's fields. Lists of ints cost 50 ns an entry on their way from Python and as much again into autograd.
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/take.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "launch.h"
#include "node.h"

namespace fast_embedding {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TableVector = c10::SmallVector<FeTable, 16>;

/// What a call is about: a table for each column of the indices, owned by someone else.
struct Tables {
  c10::ArrayRef<FeTable> columns;
  FeCombination combination;

  int64_t size() const { return static_cast<int64_t>(columns.size()); }
  const FeTable& operator[](int64_t column) const { return columns[column]; }
  bool sums() const { return combination == FE_SUM; }
  int64_t concatenated_dim() const {
    int64_t dim = 0;
    for (const FeTable& table : columns) {
      dim += table.embedding_dim;
    }
    return dim;
  }
  int64_t output_dim() const { return sums() ? columns[0].embedding_dim : concatenated_dim(); }
  Tables concatenated() const { return {columns, FE_CONCAT}; }
};

int64_t numel(const FeTable& table) { return table.num_embeddings * table.embedding_dim; }

bool is_same_table(const FeTable& a, const FeTable& b) {
  return a.weight_offset == b.weight_offset && a.num_embeddings == b.num_embeddings &&
         a.embedding_dim == b.embedding_dim;
}

// ---- Checks -------------------------------------------------------------------------------------------------------

struct Place {
  int64_t column;
  bool again;  // the column reads the table of the place before
};

/// Columns by where their tables stand; those of one table follow each other in column order.
std::vector<Place> by_offset(const Tables& tables) {
  std::vector<int64_t> order(tables.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::make_pair(tables[a].weight_offset, numel(tables[a])) <
           std::make_pair(tables[b].weight_offset, numel(tables[b]));
  });
  std::vector<Place> places;
  places.reserve(order.size());
  for (const int64_t column : order) {
    const FeTable& table = tables[column];
    places.push_back(
        {column, !places.empty() && numel(table) > 0 && is_same_table(tables[places.back().column], table)});
  }
  return places;
}

/// RuntimeError unless the tables make sense for a flat weight (or gradient) of `weight_numel` elements. Returns
/// whether any table is read by several columns.
bool check_tables(const Tables& tables, int64_t weight_numel) {
  TORCH_CHECK(tables.size() > 0, "num_embeddings must name at least one table");
  bool ascending = true;
  int64_t end = 0;  // of the table before
  for (int64_t column = 0; column < tables.size(); ++column) {
    const auto& [rows, dim, offset, stride, padding_idx] = tables[column];
    TORCH_CHECK(rows >= 0 && dim >= 0, "num_embeddings and embedding_dims must not be negative, got ", rows, " and ",
                dim, " for table ", column);
    TORCH_CHECK(stride == dim, "tables must be packed, got the stride ", stride, " for table ", column);
    TORCH_CHECK(padding_idx >= -1 && padding_idx < std::max<int64_t>(rows, 0), "padding_idx must be -1 or a row of ",
                rows, " for table ", column, ", got ", padding_idx);
    TORCH_CHECK(!tables.sums() || dim == tables[0].embedding_dim, "a sum needs tables of one embedding_dim, got ",
                tables[0].embedding_dim, " and ", dim);
    // Without forming rows * dim, which may overflow.
    TORCH_CHECK(offset >= 0 && offset <= weight_numel && (dim == 0 || rows <= (weight_numel - offset) / dim), "table ",
                column, " of ", rows, " x ", dim, " elements at ", offset, " must lie within the weight's ",
                weight_numel);
    ascending = ascending && offset >= end;
    end = offset + rows * dim;
  }
  if (C10_LIKELY(ascending)) {
    return false;
  }
  bool shared = false;
  end = 0;
  for (const auto& [column, again] : by_offset(tables)) {
    if (again) {
      shared = true;
      continue;
    }
    const FeTable& table = tables[column];
    TORCH_CHECK(table.weight_offset >= end, "tables must not overlap unless they are the same, got the offset ",
                table.weight_offset, " for table ", column, " where another ends at ", end);
    end = table.weight_offset + numel(table);
  }
  return shared;
}

void check_last_dim(const Tensor& indices, const Tables& tables) {
  TORCH_CHECK(indices.dim() >= 1 && indices.sym_size(-1) == tables.size(), "indices must have one column a table (",
              tables.size(), "), got the shape ", indices.sym_sizes());
}

// ---- The same from ATen's ops: any type, any transform ------------------------------------------------------------

/// [..., n * D] -> [..., D]
Tensor add_tables(const Tensor& concatenated, const Tables& tables) {
  return concatenated.unflatten(-1, {tables.size(), tables[0].embedding_dim}).sum(-2);
}

/// The gradient of what add_tables() got: [..., D] -> [..., n * D]
Tensor repeat_tables(const Tensor& grad_output, const Tables& tables) {
  c10::SymDimVector sizes(grad_output.sym_sizes());
  sizes.insert(sizes.end() - 1, tables.size());
  return grad_output.unsqueeze(-2).expand_symint(sizes).flatten(-2);
}

Tensor composite(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  check_last_dim(indices, tables);
  const auto lookup = [&](int64_t column) {
    const FeTable& table = tables[column];
    const Tensor rows =
        weight.narrow(0, table.weight_offset, numel(table)).reshape({table.num_embeddings, table.embedding_dim});
    return at::embedding(rows, indices.select(-1, column), table.padding_idx);
  };
  if (tables.sums()) {
    const at::ScalarType type = weight.scalar_type();
    const bool widens = type == at::kHalf || type == at::kBFloat16;
    const auto term = [&](int64_t column) { return widens ? lookup(column).to(at::kFloat) : lookup(column); };
    Tensor sum = term(0);
    for (int64_t column = 1; column < tables.size(); ++column) {
      sum = sum.add(term(column));
    }
    return widens ? sum.to(type) : sum;
  }
  std::vector<Tensor> outputs;
  outputs.reserve(tables.size());
  for (int64_t column = 0; column < tables.size(); ++column) {
    outputs.push_back(lookup(column));
  }
  return at::cat(outputs, -1);
}

Tensor composite_backward(const Tensor& grad_output, const Tensor& indices, const c10::SymInt& weight_numel,
                          const Tables& tables) {
  check_last_dim(indices, tables);
  if (tables.sums()) {
    return composite_backward(repeat_tables(grad_output, tables), indices, weight_numel, tables.concatenated());
  }
  std::vector<Tensor> gradients;  // by column, flat
  int64_t first = 0;
  for (int64_t column = 0; column < tables.size(); ++column) {
    const FeTable& table = tables[column];
    gradients.push_back(at::embedding_dense_backward(grad_output.narrow(-1, first, table.embedding_dim),
                                                     indices.select(-1, column), table.num_embeddings,
                                                     table.padding_idx, /*scale_grad_by_freq=*/false)
                            .reshape({-1}));
    first += table.embedding_dim;
  }
  const auto zeros = [&](const c10::SymInt& numel) { return grad_output.new_zeros_symint({numel}); };
  std::vector<Tensor> pieces;
  int64_t end = 0;
  for (const auto& [column, again] : by_offset(tables)) {
    if (again) {
      pieces.back() = pieces.back().add(gradients[column]);
      continue;
    }
    const FeTable& table = tables[column];
    pieces.push_back(zeros(table.weight_offset - end));
    pieces.push_back(gradients[column]);
    end = table.weight_offset + numel(table);
  }
  pieces.push_back(zeros(weight_numel - end));
  return at::cat(pieces);
}

/// The concatenation for a compiler: one gather that it can fuse. An index out of range becomes an address behind the
/// weight, which the gather's own check refuses: without it the neighbour's row would come back.
Tensor gather(const Tensor& weight, const Tensor& indices, const Tables& tables, const Tensor& columns) {
  check_last_dim(indices, tables);
  const Tensor index = indices.index_select(-1, columns.select(0, 0));
  const Tensor in_range = index.ge(0).logical_and(index.lt(columns.select(0, 1)));
  const Tensor address = index.mul(columns.select(0, 2)).add(columns.select(0, 3));
  return at::take(weight, at::where(in_range, address, at::Scalar(weight.sym_numel())));
}

// ---- CPU and CUDA -------------------------------------------------------------------------------------------------

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
  FeForwardArgs args{};
  args.scalar_type = *scalar;
  args.index_type = index_rows.type;
  args.num_tables = tables.size();
  args.tables = tables.columns.data();
  args.num_rows = index_rows.num_rows;
  args.indices = index_rows.storage.const_data_ptr();
  args.index_row_stride = index_rows.row_stride;
  args.index_table_stride = index_rows.table_stride;
  args.weight = flat.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.output_stride = sizes.back();
  args.combination = tables.combination;
  return run_forward(args, weight, indices) ? output : composite(weight, indices, tables);
}

/// The kernels write every table's gradient once. A column that reads a table again gets one of its own behind the
/// weight's, which is then added.
Tensor add_shared_tables(const Tensor& grad_output, const Tensor& indices, int64_t weight_numel, const Tables& tables);

Tensor multi_embedding_backward_dense(const Tensor& grad_output, const Tensor& indices, int64_t weight_numel,
                                      const Tables& tables) {
  const bool shared = check_tables(tables, weight_numel);
  check_indices(indices, grad_output, "grad_output");
  check_last_dim(indices, tables);
  const int64_t output_dim = tables.output_dim();
  TORCH_CHECK(grad_output.dim() == indices.dim() && grad_output.size(-1) == output_dim &&
                  grad_output.sizes().slice(0, indices.dim() - 1) == indices.sizes().slice(0, indices.dim() - 1),
              "grad_output must have ", output_dim, " columns and the leading dimensions of indices, got ",
              grad_output.sizes(), " for indices of shape ", indices.sizes());
  const auto scalar = scalar_type(grad_output.scalar_type());
  if (!scalar) {
    return composite_backward(grad_output, indices, weight_numel, tables);
  }
  if (shared) {
    return add_shared_tables(grad_output, indices, weight_numel, tables);
  }
  Tensor grad_weight = at::empty({weight_numel}, grad_output.options());

  const Rows grad_rows = as_rows(grad_output);
  const IndexRows index_rows = as_index_rows(indices, /*last_is_table=*/true);
  FeBackwardArgs args{};
  args.scalar_type = *scalar;
  args.index_type = index_rows.type;
  args.num_tables = tables.size();
  args.tables = tables.columns.data();
  args.num_rows = index_rows.num_rows;
  args.indices = index_rows.storage.const_data_ptr();
  args.index_row_stride = index_rows.row_stride;
  args.index_table_stride = index_rows.table_stride;
  args.grad_output = grad_rows.storage.const_data_ptr();
  args.grad_output_stride = grad_rows.stride;
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_weight_numel = weight_numel;
  args.deterministic = at::globalContext().deterministicAlgorithms();
  args.combination = tables.combination;
  return run_backward(args, grad_output, indices) ? grad_weight
                                                  : composite_backward(grad_output, indices, weight_numel, tables);
}

Tensor add_shared_tables(const Tensor& grad_output, const Tensor& indices, int64_t weight_numel, const Tables& tables) {
  constexpr int64_t kAlignment = 8;  // elements, as in fast_embedding/layout.py
  TableVector apart(tables.columns.begin(), tables.columns.end());
  std::vector<int64_t> again;  // columns
  int64_t end = (weight_numel + kAlignment - 1) / kAlignment * kAlignment;
  for (const auto& [column, reads_again] : by_offset(tables)) {
    if (!reads_again) {
      continue;
    }
    apart[column].weight_offset = end;
    end += (numel(tables[column]) + kAlignment - 1) / kAlignment * kAlignment;
    again.push_back(column);
  }
  const Tensor gradients = multi_embedding_backward_dense(grad_output, indices, end, Tables{apart, tables.combination});
  for (const int64_t column : again) {
    gradients.narrow(0, tables[column].weight_offset, numel(tables[column]))
        .add_(gradients.narrow(0, apart[column].weight_offset, numel(tables[column])));
  }
  return gradients.narrow(0, 0, weight_numel);
}

// ---- The dispatcher's signatures ----------------------------------------------------------------------------------

/// The lists of the schemas, one entry a column.
struct TableLists {
  std::vector<int64_t> num_embeddings, embedding_dims, weight_offsets, padding_idx;

  explicit TableLists(const Tables& tables) {
    for (const FeTable& table : tables.columns) {
      num_embeddings.push_back(table.num_embeddings);
      embedding_dims.push_back(table.embedding_dim);
      weight_offsets.push_back(table.weight_offset);
      padding_idx.push_back(table.padding_idx);
    }
  }
};

TableVector from_lists(IntArrayRef num_embeddings, IntArrayRef embedding_dims, IntArrayRef weight_offsets,
                       IntArrayRef padding_idx) {
  const size_t count = num_embeddings.size();
  TORCH_CHECK(embedding_dims.size() == count && weight_offsets.size() == count && padding_idx.size() == count,
              "num_embeddings, embedding_dims, weight_offsets and padding_idx must have one entry a table, got ", count,
              ", ", embedding_dims.size(), ", ", weight_offsets.size(), " and ", padding_idx.size());
  TORCH_CHECK(count > 0, "num_embeddings must name at least one table");
  TableVector tables;
  for (size_t column = 0; column < count; ++column) {
    tables.push_back({num_embeddings[column], embedding_dims[column], weight_offsets[column],
                      /*weight_stride=*/embedding_dims[column], padding_idx[column]});
  }
  return tables;
}

c10::ArrayRef<FeTable> from_description(const Tensor& tables) {
  constexpr int64_t kFields = sizeof(FeTable) / sizeof(int64_t);
  static_assert(sizeof(FeTable) == 5 * sizeof(int64_t), "a row of a description is an FeTable");
  TORCH_CHECK(tables.is_cpu() && tables.scalar_type() == at::kLong && tables.dim() == 2 && tables.size(0) > 0 &&
                  tables.size(1) == kFields && tables.is_contiguous(),
              "tables must be a contiguous int64 tensor [n, ", kFields, "] on the CPU with at least one row");
  return {reinterpret_cast<const FeTable*>(tables.const_data_ptr<int64_t>()), static_cast<size_t>(tables.size(0))};
}

FeCombination combination(bool sum) { return sum ? FE_SUM : FE_CONCAT; }

Tensor call_multi_embedding(const Tensor& weight, const Tensor& indices, const Tables& tables,
                            const std::optional<Tensor>& columns = std::nullopt) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fast_embedding::multi_embedding", "")
                             .typed<Tensor(const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                                           IntArrayRef, bool, const std::optional<Tensor>&)>();
  const TableLists lists(tables);
  return op.call(weight, indices, lists.num_embeddings, lists.embedding_dims, lists.weight_offsets, lists.padding_idx,
                 tables.sums(), columns);
}

Tensor call_multi_embedding_backward(const Tensor& grad_output, const Tensor& indices, c10::SymInt weight_numel,
                                     const Tables& tables) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fast_embedding::multi_embedding_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, c10::SymInt, IntArrayRef, IntArrayRef,
                                           IntArrayRef, IntArrayRef, bool)>();
  const TableLists lists(tables);
  return op.call(grad_output, indices, std::move(weight_numel), lists.num_embeddings, lists.embedding_dims,
                 lists.weight_offsets, lists.padding_idx, tables.sums());
}

/// A function of Tables as the dispatcher calls it, with the lists of the schema.
template <Tensor (*function)(const Tensor&, const Tensor&, const Tables&, const std::optional<Tensor>&)>
Tensor unpacked(const Tensor& weight, const Tensor& indices, IntArrayRef num_embeddings, IntArrayRef embedding_dims,
                IntArrayRef weight_offsets, IntArrayRef padding_idx, bool sum, const std::optional<Tensor>& columns) {
  const TableVector tables = from_lists(num_embeddings, embedding_dims, weight_offsets, padding_idx);
  return function(weight, indices, Tables{tables, combination(sum)}, columns);
}

template <Tensor (*function)(const Tensor&, const Tensor&, const Tables&)>
Tensor without_columns(const Tensor& weight, const Tensor& indices, const Tables& tables,
                       const std::optional<Tensor>& /*columns*/) {
  return function(weight, indices, tables);
}

template <typename Size, Tensor (*function)(const Tensor&, const Tensor&, Size, const Tables&)>
Tensor unpacked_backward(const Tensor& grad_output, const Tensor& indices, std::decay_t<Size> weight_numel,
                         IntArrayRef num_embeddings, IntArrayRef embedding_dims, IntArrayRef weight_offsets,
                         IntArrayRef padding_idx, bool sum) {
  const TableVector tables = from_lists(num_embeddings, embedding_dims, weight_offsets, padding_idx);
  return function(grad_output, indices, weight_numel, Tables{tables, combination(sum)});
}

template <Tensor (*function)(const Tensor&, const Tensor&, const Tables&)>
Tensor described(const Tensor& weight, const Tensor& indices, const Tensor& tables, bool sum) {
  return function(weight, indices, Tables{from_description(tables), combination(sum)});
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

Tensor forward_below_autograd(const Tensor& weight, const Tensor& indices, const Tables& tables,
                              const std::optional<Tensor>& columns) {
  if (is_traced(weight, indices)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    // As a reduction over the columns of one gather, a sum is a loop of its own that Inductor's C++ makes 1000 times
    // slower; sums of lookups it fuses.
    return tables.sums() ? composite(weight, indices, tables)
           : columns     ? gather(weight, indices, tables, *columns)
                         : call_multi_embedding(weight, indices, tables);
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

/// Tables in an autograd context: one list of ints, all columns after the combination. An entry of the context costs
/// 0.1 us, and compiled autograd takes ints, but neither tensors of tables nor bytes.
class SavedTables {
 public:
  static void save(AutogradContext* ctx, const Tables& tables) {
    c10::List<int64_t> numbers;
    numbers.reserve(1 + kFields * tables.columns.size());
    numbers.push_back(tables.sums() ? 1 : 0);
    for (const FeTable& table : tables.columns) {
      numbers.push_back(table.num_embeddings);
      numbers.push_back(table.embedding_dim);
      numbers.push_back(table.weight_offset);
      numbers.push_back(table.padding_idx);
    }
    ctx->saved_data["tables"] = std::move(numbers);
  }

  explicit SavedTables(AutogradContext* ctx) {
    const c10::ArrayRef<c10::IValue> numbers = ctx->saved_data["tables"].toListRef();
    combination_ = combination(numbers[0].toInt() != 0);
    for (size_t i = 1; i < numbers.size(); i += kFields) {
      const int64_t dim = numbers[i + 1].toInt();
      columns_.push_back({numbers[i].toInt(), dim, numbers[i + 2].toInt(), dim, numbers[i + 3].toInt()});
    }
  }

  Tables get() const { return {columns_, combination_}; }

 private:
  static constexpr size_t kFields = 4;
  TableVector columns_;
  FeCombination combination_;
};

struct MultiEmbeddingFunction : torch::autograd::Function<MultiEmbeddingFunction> {
  static constexpr bool is_traceable = true;

  // `columns` is no argument of the function's: it has no gradient, and a pointer is not looked at.
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& indices, const Tables& tables,
                        const std::optional<Tensor>* columns) {
    ctx->save_for_backward({indices});
    ctx->saved_data["weight_numel"] = weight.sym_numel();
    SavedTables::save(ctx, tables);
    return forward_below_autograd(weight, indices, tables, *columns);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) {
      return {Tensor(), Tensor(), Tensor(), Tensor()};
    }
    const Tensor indices = ctx->get_saved_variables()[0];
    const c10::SymInt weight_numel = ctx->saved_data["weight_numel"].toSymInt();
    const SavedTables saved(ctx);
    // The common case spares itself the dispatcher.
    Tensor grad_weight =
        needs_graph(grad_output) || is_traced(grad_output, indices)
            ? call_multi_embedding_backward(grad_output, indices, weight_numel, saved.get())
            : multi_embedding_backward_dense(grad_output, indices, weight_numel.expect_int(), saved.get());
    return {std::move(grad_weight), Tensor(), Tensor(), Tensor()};
  }
};

/// True in the columns of the concatenation where a padding row was looked up.
Tensor padding_mask(const Tensor& indices, const Tables& tables) {
  std::vector<Tensor> padded;
  for (int64_t column = 0; column < tables.size(); ++column) {
    const Tensor rows = indices.select(-1, column).eq(tables[column].padding_idx).unsqueeze(-1);
    auto sizes = rows.sym_sizes().vec();
    sizes.back() = tables[column].embedding_dim;
    padded.push_back(rows.expand_symint(sizes));
  }
  return at::cat(padded, -1);
}

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
      const bool has_padding = std::any_of(tables.columns.begin(), tables.columns.end(),
                                           [](const FeTable& table) { return table.padding_idx >= 0; });
      if (has_padding) {
        grad = call_multi_embedding(grads[0], indices, tables.concatenated())
                   .masked_fill(padding_mask(indices, tables), 0);
        grad = tables.sums() ? add_tables(grad, tables) : grad;
      } else {
        grad = call_multi_embedding(grads[0], indices, tables);
      }
    }
    return {std::move(grad), Tensor(), Tensor(), Tensor()};
  }
};

Tensor multi_embedding_autograd(const Tensor& weight, const Tensor& indices, const Tables& tables,
                                const std::optional<Tensor>& columns) {
  if (is_left_to_aten(weight)) {
    return composite(weight, indices, tables);
  }
  if (!needs_graph(weight)) {
    return forward_below_autograd(weight, indices, tables, columns);
  }
  return is_traced(weight, indices) ? MultiEmbeddingFunction::apply(weight, indices, tables, &columns)
                                    : apply_untraced<MultiEmbeddingFunction>(weight, indices, tables, &columns);
}

Tensor multi_embedding_described_autograd(const Tensor& weight, const Tensor& indices, const Tables& tables) {
  return multi_embedding_autograd(weight, indices, tables, std::nullopt);
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
      "int[] weight_offsets, int[] padding_idx, bool sum=False, Tensor? columns=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("multi_embedding.described(Tensor weight, Tensor indices, Tensor tables, bool sum=False) -> Tensor");
  m.def(
      "multi_embedding_backward(Tensor grad_output, Tensor indices, SymInt weight_numel, int[] num_embeddings, "
      "int[] embedding_dims, int[] weight_offsets, int[] padding_idx, bool sum=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fast_embedding, Autograd, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<multi_embedding_autograd>);
  m.impl("multi_embedding.described", described<multi_embedding_described_autograd>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, multi_embedding_backward_autograd>);
}

// Inference tensors arrive here without passing Autograd.
TORCH_LIBRARY_IMPL(fast_embedding, CPU, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<without_columns<multi_embedding_dense>>);
  m.impl("multi_embedding.described", described<multi_embedding_dense>);
  m.impl("multi_embedding_backward", unpacked_backward<int64_t, multi_embedding_backward_dense>);
}

TORCH_LIBRARY_IMPL(fast_embedding, CUDA, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<without_columns<multi_embedding_dense>>);
  m.impl("multi_embedding.described", described<multi_embedding_dense>);
  m.impl("multi_embedding_backward", unpacked_backward<int64_t, multi_embedding_backward_dense>);
}

TORCH_LIBRARY_IMPL(fast_embedding, Meta, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<without_columns<multi_embedding_meta>>);
  m.impl("multi_embedding.described", described<multi_embedding_meta>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, multi_embedding_backward_meta>);
}

// Other devices, and batched tensors (torch.func.vmap): ATen has rules for them.
TORCH_LIBRARY_IMPL(fast_embedding, CompositeExplicitAutograd, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<without_columns<composite>>);
  m.impl("multi_embedding.described", described<composite>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, composite_backward>);
}

TORCH_LIBRARY_IMPL(fast_embedding, FuncTorchBatched, m) {
  using namespace fast_embedding;
  m.impl("multi_embedding", unpacked<without_columns<composite>>);
  m.impl("multi_embedding.described", described<composite>);
  m.impl("multi_embedding_backward", unpacked_backward<const c10::SymInt&, composite_backward>);
}
