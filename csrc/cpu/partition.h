// Positions of a table's indices in the order of their rows: a stable, parallel radix sort.
//
// The keys are split into blocks whose number follows from the sizes alone. Each pass counts the digits of every block,
// lays the blocks of one digit side by side, and scatters: two parallel phases a pass, balanced whatever the indices
// are, and the same list at every thread count.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"
#include "row_kernels.h"

namespace fast_embedding::cpu {

// Positions are split into this many blocks at most: they keep as many cores busy with 1 MB of counters.
constexpr int64_t kMaxPartitionBlocks = 64;

// What the phases of a partition leave for each other.
struct PartitionState {
  int64_t num_keys;
  bool sorted;                          // the indices came in ascending order: nothing to move
  bool ascending[kMaxPartitionBlocks];  // each block, from the last index of the block before
};

// A lookup that is not of the padding row, as row << position_bits | position: sorts as a plain number.
struct PartitionPlan {
  int64_t num_rows;   // positions, N
  int position_bits;  // enough for N - 1
  int digit_bits;     // of a pass
  int num_passes;     // >= 1
  int64_t num_blocks;
  int64_t block_rows;     // positions a block, the last may have less
  int64_t keys_capacity;  // of one buffer: N, and what the kernels prefetch behind the end
  bool supported;         // N * V < 2^63

  int64_t num_digits() const { return int64_t{1} << digit_bits; }
  uint64_t position_mask() const { return (uint64_t{1} << position_bits) - 1; }
  int64_t row_of(uint64_t key) const { return static_cast<int64_t>(key >> position_bits); }
  // At most 16 bytes an index, and 1 MB of counters.
  size_t workspace_bytes() const {
    return static_cast<size_t>((num_passes > 1 ? 2 : 1) * keys_capacity + num_blocks * num_digits()) *
               sizeof(uint64_t) +
           sizeof(PartitionState);
  }
};

PartitionPlan plan_partition(int64_t num_rows, int64_t num_embeddings);

struct Partition {
  uint64_t* keys;        // ascending; kPrefetchRows valid keys follow the last
  const int64_t* count;  // of keys: N less the lookups of the padding row
};

// Where partition_by_row() leaves its result.
Partition partition_in(const PartitionPlan& plan, void* workspace);

// Phases of a team; what the result points to is there when they are done. All indices must be in range. `workspace` is
// aligned for uint64_t.
Partition partition_by_row(const PartitionPlan& plan, const Indices& indices, int64_t table, int64_t padding_idx,
                           void* workspace, Team::Member& member);

}  // namespace fast_embedding::cpu
