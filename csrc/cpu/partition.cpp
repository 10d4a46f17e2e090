#include "partition.h"

#include <algorithm>
#include <cstring>

namespace fast_embedding::cpu {
namespace {

// 2048 counters of 8 bytes and one open cache line a digit stay in L2. Few keys are better off with few counters.
constexpr int kMaxDigitBits = 11;
constexpr int kFewKeysDigitBits = 8;
constexpr int64_t kFewKeys = 4096;

// Positions a block at least.
constexpr int64_t kMinBlockRows = 16 << 10;

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

// visit(key) for the keys of a block in the order of their positions; the padding row's lookups are left out.
template <typename Visit>
void for_each_index(const PartitionPlan& plan, const Indices& indices, int64_t table, int64_t padding_idx,
                    int64_t block, const Visit& visit) {
  int64_t tile[kTile];
  const int64_t end = std::min((block + 1) * plan.block_rows, plan.num_rows);
  for (int64_t row = block * plan.block_rows; row < end; row += kTile) {
    const int64_t tile_rows = std::min(kTile, end - row);
    indices.read(row, tile_rows, table, tile);
    for (int64_t i = 0; i < tile_rows; ++i) {
      if (tile[i] == padding_idx) continue;
      visit(static_cast<uint64_t>(tile[i]) << plan.position_bits | static_cast<uint64_t>(row + i));
    }
  }
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
  plan.num_blocks = std::clamp<int64_t>(num_rows / kMinBlockRows, 1, kMaxPartitionBlocks);
  plan.block_rows = divide_up(num_rows, plan.num_blocks);
  plan.keys_capacity = num_rows + kPrefetchRows;
  return plan;
}

Partition partition_in(const PartitionPlan& plan, void* workspace) {
  auto* state = static_cast<PartitionState*>(workspace);
  auto* keys = reinterpret_cast<uint64_t*>(state + 1) + plan.num_blocks * plan.num_digits();
  return {keys + (plan.num_passes - 1) % 2 * plan.keys_capacity, &state->num_keys};
}

Partition partition_by_row(const PartitionPlan& plan, const Indices& indices, int64_t table, int64_t padding_idx,
                           void* workspace, Team::Member& member) {
  auto* state = static_cast<PartitionState*>(workspace);
  auto* counts = reinterpret_cast<uint64_t*>(state + 1);
  uint64_t* buffers[2];  // the second exists where there is more than one pass
  buffers[0] = counts + plan.num_blocks * plan.num_digits();
  buffers[1] = buffers[0] + plan.keys_capacity;
  const Partition partition = partition_in(plan, workspace);
  uint64_t* const result = partition.keys;
  const int64_t num_digits = plan.num_digits();
  const auto digit_mask = static_cast<uint64_t>(num_digits - 1);

  for (int pass = 0; pass < plan.num_passes; ++pass) {
    const int shift = plan.position_bits + pass * plan.digit_bits;
    const uint64_t* const input = buffers[(pass + 1) % 2];
    uint64_t* const output = buffers[pass % 2];
    // The first pass reads the indices themselves.
    const auto for_each_key = [&](int64_t block, const auto& visit) {
      if (pass == 0) {
        for_each_index(plan, indices, table, padding_idx, block, visit);
      } else {
        const int64_t block_keys = divide_up(state->num_keys, plan.num_blocks);
        const int64_t block_end = std::min((block + 1) * block_keys, state->num_keys);
        for (int64_t i = block * block_keys; i < block_end; ++i) visit(input[i]);
      }
    };
    member.for_each(plan.num_blocks, [&](int64_t block) {
      if (pass > 0 && state->sorted) return;
      uint64_t* count = counts + block * num_digits;
      std::fill(count, count + num_digits, uint64_t{0});
      if (pass > 0) {
        for_each_key(block, [&](uint64_t key) { ++count[(key >> shift) & digit_mask]; });
        return;
      }
      const int64_t begin = block * plan.block_rows;
      uint64_t last = begin == 0 ? 0 : static_cast<uint64_t>(indices.at(begin - 1, table)) << plan.position_bits;
      bool ascending = true;
      for_each_key(block, [&](uint64_t key) {
        ++count[(key >> shift) & digit_mask];
        ascending &= last <= key;
        last = key;
      });
      state->ascending[block] = ascending;
    });
    member.once([&] {
      if (pass > 0 && state->sorted) return;
      state->num_keys = place_blocks(counts, plan.num_blocks, num_digits);
      if (pass == 0) {
        // With all keys there, a key's place is its position.
        state->sorted = state->num_keys == plan.num_rows &&
                        std::all_of(state->ascending, state->ascending + plan.num_blocks, [](bool it) { return it; });
      }
      std::fill(result + state->num_keys, result + state->num_keys + kPrefetchRows, uint64_t{0});
    });
    member.for_each(plan.num_blocks, [&](int64_t block) {
      if (state->sorted) {
        if (pass > 0) return;
        uint64_t* place = result + block * plan.block_rows;
        for_each_key(block, [&](uint64_t key) { *place++ = key; });
        return;
      }
      uint64_t* place = counts + block * num_digits;
      for_each_key(block, [&](uint64_t key) { output[place[(key >> shift) & digit_mask]++] = key; });
    });
  }
  return partition;
}

}  // namespace fast_embedding::cpu
