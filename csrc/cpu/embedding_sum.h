// The sum of one row of each table: what fe_cpu_embedding_forward and _backward concatenate, added up.
//
//   forward   output[b] = table_0[x[b, 0]] + table_1[x[b, 1]] + ..., in this order, in float32 for 16-bit types
//   (float64
//             for float64), rounded once. output is [num_rows, D].
//   backward  every table's gradient comes from the same grad_output, [num_rows, D].
//
// All tables have the same D; otherwise arguments and workspace are as in fast_embedding.h. FE_UNSUPPORTED for more
// than 2048 tables.
#pragma once

#include "fast_embedding.h"

extern "C" {
FE_EXPORT FeStatus fe_cpu_embedding_sum_forward(const FeForwardArgs* args, void* workspace, size_t* workspace_bytes,
                                                const FeCpuContext* context);
FE_EXPORT FeStatus fe_cpu_embedding_sum_backward(const FeBackwardArgs* args, void* workspace, size_t* workspace_bytes,
                                                 const FeCpuContext* context);
}
