// What the threads of a warp or a block find out together.
#pragma once

#include "common.cuh"

namespace fast_embedding {

constexpr unsigned kFullWarp = 0xffffffffu;

// The lanes whose `bit` (a power of two) of `value` is this lane's. In PTX, since from C++ the compiler makes seven
// instructions of it, and ranks are made of nothing else.
__device__ inline unsigned lanes_with_bit(uint32_t value, uint32_t bit) {
  unsigned lanes;
  asm volatile(
      "{\n\t"
      ".reg .pred set;\n\t"
      ".reg .b32 masked;\n\t"
      "and.b32 masked, %1, %2;\n\t"
      "setp.ne.u32 set, masked, 0;\n\t"
      "vote.sync.ballot.b32 %0, set, 0xffffffff;\n\t"
      "@!set not.b32 %0, %0;\n\t"
      "}"
      : "=r"(lanes)
      : "r"(value), "r"(bit));
  return lanes;
}

// The lanes that are present and have this lane's digit of kBits bits, found by a ballot for each bit (the multisplit
// of Ashkiani et al. 2016). For a lane that is not present: nothing that means anything.
template <int kBits>
__device__ inline unsigned lanes_with_digit(uint32_t digit, bool present) {
  unsigned peers = __ballot_sync(kFullWarp, present);
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) peers &= lanes_with_bit(digit, 1u << bit);
  return peers;
}

// The sum over the lanes up to this one.
__device__ inline uint32_t scan_lanes(uint32_t value, int lane) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, value, delta);
    if (lane >= delta) value += below;
  }
  return value;
}

struct Scan {
  uint32_t before;  // the sum over the threads before this one
  uint32_t total;
};

// A scan over a block of kThreads. warp_sum: [kThreads / 32] in shared memory; a barrier is due before it is written
// again.
template <int kThreads>
__device__ inline Scan scan_threads(uint32_t value, uint32_t* warp_sum) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const uint32_t inclusive = scan_lanes(value, lane);
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  Scan scan = {inclusive - value, 0};
  if constexpr (kThreads > 512) {
    const uint32_t sums = scan_lanes(lane < kThreads / 32 ? warp_sum[lane] : 0, lane);
    scan.total = __shfl_sync(kFullWarp, sums, 31);
    const uint32_t through_warp = __shfl_sync(kFullWarp, sums, warp);
    scan.before += through_warp - warp_sum[warp];
  } else {
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) scan.before += warp_sum[w];
      scan.total += warp_sum[w];
    }
  }
  return scan;
}

}  // namespace fast_embedding
