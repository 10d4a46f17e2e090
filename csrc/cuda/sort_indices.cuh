// Sorts a call's lookups by row, each table by itself: what reproducible sums start from.
#pragma once

#include "common.cuh"

namespace fast_embedding {

constexpr int kMaxSortTables = 64;  // in one launch: the parameters of a kernel end at 4 KB

// A lookup: the row that it names, and where it stands in the table's column of indices. A lookup of padding_idx names
// row num_embeddings, behind all others.
struct Lookup {
  uint32_t row;
  uint32_t position;
};

struct SortTable {
  int64_t padding_idx;
  uint32_t num_embeddings;
  int32_t index_column;
  int32_t digit_bits;
  int32_t passes;
};

struct SortParams {
  SortTable table[kMaxSortTables];
  int32_t num_tables;
  int32_t passes;  // of the table that takes most
  FeIndexType index_type;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  uint32_t num_rows;
  uint32_t rows_of_chunk;
  Divisor chunk_divisor;
  int32_t chunks;      // of a table; work item i is chunk i % chunks of table i / chunks
  int32_t bins;        // of the widest digit
  int32_t tile;        // entries that a block ranks at a time
  Lookup* lookups[2];  // [num_tables, num_rows]: a pass reads one and writes the other
  uint16_t* counts;    // [num_tables * chunks, bins]
  void* flags;         // zeroed before the first barrier
  int64_t flags_bytes;
  void* zeros;  // written while blocks wait for each other
  int64_t zeros_bytes;
  int64_t zeros_at_barrier;
};

// The sort of tables [first, last) of a call, laid out in a workspace.
class IndexSort {
 public:
  IndexSort(const FePlan& plan, const BackwardCall& call, int64_t first, int64_t last, const DeviceInfo& device,
            bool with_spare = false);

  // Whether the plan does: nothing is enqueued where not.
  bool fits() const { return fits_; }
  int64_t bytes() const { return bytes_; }
  // Takes bytes() bytes of memory, aligned to 256.
  void place(char* memory);
  // Table first + t's lookups, ascending by (row, position), once the sort has run.
  const Lookup* sorted(int64_t t) const {
    return params_.lookups[in_cluster_ ? 0 : (params_.table[t].passes - 1) % 2] + t * params_.num_rows;
  }
  // As much memory again, not in use once the sort has run, where there is one table and the sort is with_spare.
  Lookup* spare() const { return params_.lookups[in_cluster_ ? 1 : params_.table[0].passes % 2]; }
  // Enqueues the sort, and zeros for two ranges. FE_INVALID_ARGUMENT where the device does not allow the cluster.
  FeStatus enqueue(void* flags, int64_t flags_bytes, void* zeros, int64_t zeros_bytes, cudaStream_t stream);

 private:
  const DeviceInfo& device_;  // outlives all: read once for the process
  SortParams params_{};
  bool in_cluster_;
  bool fits_;
  bool has_two_lists_;
  int64_t lookups_bytes_ = 0;
  int64_t bytes_ = 0;
  int64_t shared_bytes_ = 0;
  int64_t max_shared_bytes_ = 0;
  int64_t blocks_ = 0;
};

// The same in a thread block cluster of params.chunks blocks a table, into lookups[0]. FE_INVALID_ARGUMENT where the
// device or the chunk does not allow it.
FeStatus sort_in_cluster(SortParams params, const DeviceInfo& device, cudaStream_t stream);

}  // namespace fast_embedding
