// From tensors to a call of the kernels: types, strides, workspace, stream, and a status turned into an exception.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fast_embedding.h"

namespace fast_embedding {

/// The kernels' name of a weight's type; nullopt for the types that ATen keeps.
std::optional<FeScalarType> scalar_type(at::ScalarType type);

/// RuntimeError unless indices are int32 or int64 and stand on the other tensor's device.
void check_indices(const at::Tensor& indices, const at::Tensor& other, const char* other_name);

/// Rows for a kernel: row i of the row-major walk over all dimensions but the last starts at data + i * stride, and its
/// elements are contiguous. `storage` owns the memory: the tensor itself where its layout permits, else a copy.
struct Rows {
  at::Tensor storage;
  int64_t stride;
};
Rows as_rows(const at::Tensor& tensor);

/// Indices of `num_tables` tables for a kernel, as Rows. One table: every dimension is walked. Several: the last one
/// holds the tables.
struct IndexRows {
  at::Tensor storage;
  FeIndexType type;
  int64_t num_rows;
  int64_t row_stride;
  int64_t table_stride;
};
IndexRows as_index_rows(const at::Tensor& indices, bool last_is_table);

/// Run the kernel of `like`'s device, on its current stream or on ATen's threads. False where the kernels refuse the
/// sizes: nothing was written. IndexError for an index out of range on the CPU, named by its position in `indices`.
bool run_forward(const FeForwardArgs& args, const at::Tensor& like, const at::Tensor& indices);
bool run_backward(const FeBackwardArgs& args, const at::Tensor& like, const at::Tensor& indices);

/// The rows that one table's lookups name, int64 [1, count], ascending, and the sum of each, [count, D].
struct SparseRows {
  at::Tensor rows;
  at::Tensor values;
};

/// The sparse gradient; args as for run_backward(), with no grad_weight. On CUDA the host waits for the count. nullopt
/// where run_backward() is false, and while a CUDA graph is captured.
std::optional<SparseRows> run_sparse_backward(FeBackwardArgs args, const at::Tensor& like, const at::Tensor& indices);

}  // namespace fast_embedding
