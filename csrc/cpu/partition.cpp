#include "partition.h"

#include <algorithm>
#include <cstring>

namespace fast_embedding::cpu {
namespace {

// 2048 counters of 8 bytes and one open cache line a digit stay in L2. Few keys are better off with few counters.
constexpr int kMaxDigitBits = 11;
constexpr int kFewKeysDigitBits = 8;
constexpr int64_t kFewKeys = 4096;

// Positions a block at least, and blocks at most: 64 keep as many cores busy with 1 MB of counters.
constexpr int64_t kMinBlockRows = 16 << 10;
constexpr int64_t kMaxBlocks = 64;

int bits_for(int64_t count) {
  return count <= 1 ? 0 : 64 - __builtin_clzll(static_cast<unsigned long long>(count - 1));
}

// counts[block][digit] becomes the place of the block's first key with that digit. Returns the number of keys.
int64_t place_blocks(uint64_t* counts, int64_t num_blocks, int64_t num_digits) {
  uint64_t place = 0;
  for (int64_t digit = 0; digit < num_digits; ++digit) {
    for (int64_t block = 0; block < num_blocks; ++block) {
      uint64_t& count = counts[block * num_digits + digit];
      const uint64_t next = place + count;
      count = place;
      place = next;
    }
  }
  return static_cast<int64_t>(place);
}

// for_each_key(block, visit) calls visit(key) for the keys of a block in order; it is called twice.
template <typename ForEachKey>
void radix_pass(const PartitionPlan& plan, int shift, uint64_t* counts, uint64_t* output, int64_t* num_keys,
                Team::Member& member, const ForEachKey& for_each_key) {
  const int64_t num_digits = plan.num_digits();
  const auto digit_mask = static_cast<uint64_t>(num_digits - 1);
  member.for_each(plan.num_blocks, [&](int64_t block) {
    uint64_t* count = counts + block * num_digits;
    std::fill(count, count + num_digits, uint64_t{0});
    for_each_key(block, [&](uint64_t key) { ++count[(key >> shift) & digit_mask]; });
  });
  member.once([&] {
    *num_keys = place_blocks(counts, plan.num_blocks, num_digits);
    std::fill(output + *num_keys, output + *num_keys + kPrefetchRows, uint64_t{0});
  });
  member.for_each(plan.num_blocks, [&](int64_t block) {
    uint64_t* place = counts + block * num_digits;
    for_each_key(block, [&](uint64_t key) { output[place[(key >> shift) & digit_mask]++] = key; });
  });
}

}  // namespace

PartitionPlan plan_partition(int64_t num_rows, int64_t num_embeddings) {
  PartitionPlan plan{};
  plan.num_rows = num_rows;
  plan.position_bits = bits_for(num_rows);
  const int row_bits = std::max(bits_for(num_embeddings), 1);
  plan.supported = plan.position_bits + row_bits < 64;
  const int max_digit_bits = num_rows < kFewKeys ? kFewKeysDigitBits : kMaxDigitBits;
  plan.num_passes = static_cast<int>(divide_up(row_bits, max_digit_bits));
  plan.digit_bits = static_cast<int>(divide_up(row_bits, plan.num_passes));
  plan.num_blocks = std::clamp<int64_t>(num_rows / kMinBlockRows, 1, kMaxBlocks);
  plan.block_rows = divide_up(num_rows, plan.num_blocks);
  plan.keys_capacity = num_rows + kPrefetchRows;
  return plan;
}

Partition partition_by_row(const PartitionPlan& plan, const Indices& indices, int64_t table, int64_t padding_idx,
                           void* workspace, Team::Member& member) {
  auto* num_keys = static_cast<int64_t*>(workspace);
  auto* counts = reinterpret_cast<uint64_t*>(num_keys + 1);
  uint64_t* keys = counts + plan.num_blocks * plan.num_digits();
  uint64_t* other_keys = keys + plan.keys_capacity;  // exists where there is more than one pass

  // The first pass reads the indices themselves and leaves the padding row's out.
  radix_pass(plan, plan.position_bits, counts, keys, num_keys, member, [&](int64_t block, const auto& visit) {
    int64_t tile[kTile];
    const int64_t block_end = std::min((block + 1) * plan.block_rows, plan.num_rows);
    for (int64_t row = block * plan.block_rows; row < block_end; row += kTile) {
      const int64_t tile_rows = std::min(kTile, block_end - row);
      indices.read(row, tile_rows, table, tile);
      for (int64_t i = 0; i < tile_rows; ++i) {
        if (tile[i] == padding_idx) continue;
        visit(static_cast<uint64_t>(tile[i]) << plan.position_bits | static_cast<uint64_t>(row + i));
      }
    }
  });

  for (int pass = 1; pass < plan.num_passes; ++pass) {
    const int shift = plan.position_bits + pass * plan.digit_bits;
    radix_pass(plan, shift, counts, other_keys, num_keys, member, [&](int64_t block, const auto& visit) {
      const int64_t block_keys = divide_up(*num_keys, plan.num_blocks);
      const int64_t block_end = std::min((block + 1) * block_keys, *num_keys);
      for (int64_t i = block * block_keys; i < block_end; ++i) visit(keys[i]);
    });
    std::swap(keys, other_keys);
  }
  return {keys, num_keys};
}

}  // namespace fast_embedding::cpu
