// Sums over runs of equal rows in a list that a block holds in shared memory.
#pragma once

#include "common.cuh"

namespace fast_embedding {

// The first of the entries [begin, end) of an ascending list whose row is `row` at least; `end` if none is.
template <typename RowAt>
__device__ inline uint32_t first_from(uint32_t begin, uint32_t end, uint32_t row, RowAt row_at) {
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (row_at(middle) < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <typename scalar_t, int kSize>
__device__ inline void store_mean(scalar_t* address, const acc_t<scalar_t> (&sum)[kSize], uint32_t count) {
  const acc_t<scalar_t> scale = acc_t<scalar_t>{1} / static_cast<acc_t<scalar_t>>(count);
  acc_t<scalar_t> mean[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) mean[j] = sum[j] * scale;
  store<scalar_t>(address, mean);
}

// What a lane group's threads hand to the group in which a run began: their part of it, and whether it goes on.
template <typename sum_t, int kSize, int kThreads>
struct Edges {
  Pack<sum_t, kSize> sum[kThreads];
  bool goes_on[kThreads];
};

// Each lane group (`lanes` threads that share a row) takes an equal share of the list, whatever the runs. A run that
// reaches over shares is put together by the group in which it begins, so every run is emitted once. The parts of a
// long one are added by pairs, so a hot row costs a few steps more than others, and its sum is no long chain.
//
//   row_at(i)            tells runs apart
//   gradient_at(i)       where entry i's columns of this thread stand in grad_output
//   emit(row, sum)       takes a finished run
//
// What a load that is left out would leave is kept in registers, and that through the whole kernel, unless it is zero:
// kSaveRegisters says that it should be. Not everywhere: OWN's 16-bit rows of some hundred columns take 10% longer so.
//
// All threads of the block must call; those with `active` work. Ends with the block's threads apart: a barrier is due
// before the list or the edges are written again.
template <typename scalar_t, int kSize, int kUnroll, bool kSaveRegisters, int kThreads, typename RowAt,
          typename GradientAt, typename Emit>
__device__ inline void sum_runs(uint32_t length, int lanes, bool active, Edges<acc_t<scalar_t>, kSize, kThreads>& edges,
                                RowAt row_at, GradientAt gradient_at, Emit emit) {
  using sum_t = acc_t<scalar_t>;
  const uint32_t groups = small_quotient(kThreads, lanes);
  const uint32_t group = small_quotient(threadIdx.x, lanes);
  const uint32_t share = small_quotient(length + groups - 1, groups);
  const uint32_t begin = min(group * share, length);
  const uint32_t end = min(begin + share, length);

  sum_t sum[kSize] = {};
  uint32_t current = 0;
  bool pending = false;
  bool goes_on = false;  // this group's share lies within one run, and the sum is to be handed over
  if (active && begin < end) {
    current = row_at(begin);
    bool incoming = begin > 0 && row_at(begin - 1) == current;
    const auto hand_over = [&](bool continues) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) edges.sum[threadIdx.x].value[j] = sum[j];
      edges.goes_on[threadIdx.x] = continues;
    };
    for (uint32_t i = begin; i < end; i += kUnroll) {
      uint32_t row[kUnroll];
      Pack<scalar_t, kSize> value[kUnroll];
      if constexpr (kSaveRegisters) {
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) value[k] = {};
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const uint32_t at = min(i + k, end - 1);
        row[k] = row_at(at);
        if (i + k < end) value[k] = load_once<kSize>(gradient_at(at));
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (i + k >= end) break;
        if (row[k] != current) {
          if (incoming) {
            hand_over(false);
          } else {
            emit(current, sum);
          }
          incoming = false;
          current = row[k];
#pragma unroll
          for (int j = 0; j < kSize; ++j) sum[j] = 0;
        }
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] += widen(value[k].value[j]);
      }
    }
    const bool outgoing = end < length && row_at(end) == current;
    if (incoming) {
      hand_over(outgoing);
      goes_on = outgoing;
    } else if (outgoing) {
      pending = true;
    } else {
      emit(current, sum);
    }
  }
  // Step by step the parts of 2, 4, 8, ... groups.
  for (int distance = lanes; __syncthreads_or(goes_on); distance *= 2) {
    Pack<sum_t, kSize> next;
    bool next_goes_on = false;
    if (goes_on) {
      next = edges.sum[threadIdx.x + distance];
      next_goes_on = edges.goes_on[threadIdx.x + distance];
    }
    __syncthreads();
    if (goes_on) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += next.value[j];
#pragma unroll
      for (int j = 0; j < kSize; ++j) edges.sum[threadIdx.x].value[j] = sum[j];
      edges.goes_on[threadIdx.x] = goes_on = next_goes_on;
    }
  }
  if (pending) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] += edges.sum[threadIdx.x + lanes].value[j];
    emit(current, sum);
  }
}

}  // namespace fast_embedding
