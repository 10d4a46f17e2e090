// What the two forwards, of a concatenation and of a sum, share on the host.
#pragma once

#include "common.cuh"

namespace fast_embedding {

// The widest word that divides every address and row of the tables [first_table, first_table + num_tables) and of their
// columns of the output: 16, 8, 4 or 2 bytes, and at least an element.
inline int word_bytes(const FeForwardArgs& args, int64_t first_table, int64_t num_tables, int64_t first_column) {
  const int64_t scalar = scalar_bytes(args.scalar_type);
  uint64_t bits = (reinterpret_cast<uintptr_t>(args.output) + first_column * scalar) | args.output_stride * scalar;
  for (int64_t t = first_table; t < first_table + num_tables; ++t) {
    const FeTable& table = args.tables[t];
    bits |= reinterpret_cast<uintptr_t>(args.weight) + table.weight_offset * scalar;
    bits |= table.weight_stride * scalar | table.embedding_dim * scalar;
  }
  for (int bytes = 16; bytes > 2; bytes /= 2) {
    if (bits % bytes == 0) return bytes;
  }
  return 2;
}

// The forward of a sum of two tables or more; embedding_forward.cu has checked the arguments.
FeStatus sum_forward(const FeForwardArgs& args, void* workspace, size_t* workspace_bytes, cudaStream_t stream);

}  // namespace fast_embedding
