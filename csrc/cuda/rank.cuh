// Ranks of a block's lookups by a digit of their rows: the step that both sorts are made of. A warp takes its entries
// in order, 32 at a time; those with equal digits find each other by ballots, and the warp's own counter of the digit
// says how many came before (the multisplit of Ashkiani et al. 2016, as in cub::DeviceRadixSort).
#pragma once

#include "block.cuh"
#include "sort_indices.cuh"

namespace fast_embedding {

constexpr int kMaxDigitBits = 10;

// Counts of two digits share a word, 16 bits each: no sum of a tile's or a chunk's counts reaches over.
__device__ inline uint32_t low_half(uint32_t word) { return word & 0xffff; }
__device__ inline uint32_t high_half(uint32_t word) { return word >> 16; }
__device__ inline uint32_t half_at(const uint32_t* words, uint32_t i) { return low_half(words[i / 2] >> i % 2 * 16); }

__device__ inline int64_t read_index(const SortParams& params, const SortTable& table, uint32_t position) {
  return load_index(params.indices, params.index_type,
                    position * params.index_row_stride + table.index_column * params.index_table_stride);
}

// The warp's own counters, of `words` words, zeroed.
__device__ inline uint32_t* clear_warp_count(uint32_t* warp_count, uint32_t words) {
  uint32_t* count = warp_count + threadIdx.x / 32 * words;
  for (uint32_t word = threadIdx.x % 32; word < words; word += 32) count[word] = 0;
  __syncwarp();
  return count;
}

// How many of the warp's entries with this digit came before this lane's; `count` is then past them. All lanes call.
__device__ inline uint32_t rank_in_warp(uint32_t digit, bool present, uint32_t* count) {
  const unsigned peers = lanes_with_digit<kMaxDigitBits>(digit, present);
  const unsigned below = peers & ((1u << threadIdx.x % 32) - 1);
  const int half = digit % 2 * 16;
  uint32_t before = 0;
  if (present && below == 0) before = atomicAdd(&count[digit / 2], static_cast<uint32_t>(__popc(peers)) << half);
  return low_half(__shfl_sync(kFullWarp, before, __ffs(peers) - 1) >> half) + __popc(below);
}

// Turns the warps' counts into how many entries of a digit the warps before have, and leaves all warps' in `count`.
// Barriers before and after are the caller's.
template <int kWarps>
__device__ inline void count_before_warps(uint32_t* warp_count, uint32_t words, uint32_t* count) {
  const uint32_t word = threadIdx.x;
  if (word >= words) return;
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t own = warp_count[w * words + word];
    warp_count[w * words + word] = sum;
    sum += own;
  }
  count[word] = sum;
}

}  // namespace fast_embedding
