// Sums over lookups that are sorted by row: what a sort is for, in the dense gradient and in the sparse one.
#pragma once

#include "sort_indices.cuh"

namespace fast_embedding {

struct SumTable {
  const Lookup* lookups;
  int64_t weight_offset;
  uint32_t num_embeddings;
  int32_t embedding_dim;
  int32_t first_column;
  int32_t lanes;
  int32_t chunks;  // work item first_work + i is column chunk i % chunks of part i / chunks
  int32_t pack;    // columns in an access
};

struct SumParams {
  int32_t first_work[kMaxSortTables];
  SumTable table[kMaxSortTables];
  int32_t num_tables;
  uint32_t num_rows;
  int32_t part;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;
  uint32_t* flags;  // [work]
  void* partials;   // [work, partial_stride] accumulators
  int32_t partial_stride;
};

// The sums of up to kMaxSortTables tables of a call: each row that has lookups is written once, the others not at all.
class SortedSums {
 public:
  SortedSums(const FePlan& plan, const FeBackwardArgs& args, const DeviceInfo& device);

  // `lookups`: [num_rows], ascending by (row, position); rows from num_embeddings on are dropped.
  void add(const TableSlice& table, const Lookup* lookups) { add(table, lookups, pack_bytes(args_, table)); }
  // The same in accesses of `pack` bytes, where the addresses are yet to come.
  void add(const TableSlice& table, const Lookup* lookups, int64_t pack);

  // Whether the plan does: nothing is enqueued where not.
  bool fits() const { return fits_; }
  int64_t flags_bytes() const;
  int64_t partials_bytes() const;
  // Takes both, aligned to 256; the flags are zeroed.
  FeStatus enqueue(void* flags, void* partials, cudaStream_t stream);

 private:
  template <typename scalar_t, int kSize>
  FeStatus start(cudaStream_t stream) const;

  const FeBackwardArgs& args_;
  const DeviceInfo& device_;
  bool fits_;
  SumParams params_{};
  int64_t work_ = 0;
  int64_t partial_stride_ = 0;
};

}  // namespace fast_embedding
