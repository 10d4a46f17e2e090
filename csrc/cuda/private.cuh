// What the forms of PRIVATE share: tables side by side, one table of few rows, and tables whose embeddings were added.
#pragma once

#include "block.cuh"

namespace fast_embedding {

// For tables of a sum.
FeStatus backward_private_sum(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                              size_t* workspace_bytes, cudaStream_t stream);

// For one table of up to kMaxFewRows rows.
constexpr int64_t kMaxFewRows = FE_MAX_FEW_ROWS;
FeStatus backward_few_rows(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                           size_t* workspace_bytes, cudaStream_t stream);

// Sums over lanes of an aligned group of `width` threads, in a fixed order; the first lane has the result.
template <typename T>
__device__ inline T sum_group(T value, int width) {
  for (int delta = width / 2; delta > 0; delta /= 2) value += __shfl_down_sync(kFullWarp, value, delta, width);
  return value;
}

// The threads that sum one element's partials: a power of two up to `most`.
inline int32_t threads_per_sum(int64_t num_elements, int64_t grid_threads, int32_t most = 32) {
  int32_t width = 1;
  while (width < most && num_elements * width * 2 <= grid_threads) width *= 2;
  return width;
}

// Adds the partials split, split + width, ... below `splits` to a total: kLoads of them, at once, also where fewer are
// left. One after the other, each load would wait for the last.
template <int kLoads, typename sum_t>
__device__ inline void add_partials(const sum_t* partial, int64_t split_step, int split, int splits, int width,
                                    sum_t& total) {
  sum_t part[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const int at = split + k * width;
    part[k] = at < splits ? partial[at * split_step] : 0;
  }
#pragma unroll
  for (int k = 0; k < kLoads; ++k) total += part[k];
}

// Sums the blocks' partials [splits, num_elements] with all threads of the grid, `width` of them an element, in order.
// write(element, total) is called once an element.
template <typename sum_t, typename Write>
__device__ inline void sum_partials(const sum_t* partials, int splits, int num_elements, int width, Write write) {
  constexpr int kLoads = 8;
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  const int step = static_cast<int>(gridDim.x * gridDim.y * blockDim.x) / width;
  const int member = threadIdx.x % width;
  // Uniform trip count in a warp: the shuffles need all lanes.
  for (int first = 0; first < num_elements; first += step) {
    const int element = first + static_cast<int>(block * blockDim.x + threadIdx.x) / width;
    const bool exists = element < num_elements;
    const sum_t* partial = partials + element;
    sum_t total = 0;
    for (int split = exists ? member : splits; split < splits; split += kLoads * width) {
      add_partials<kLoads>(partial, num_elements, split, splits, width, total);
    }
    total = sum_group(total, width);
    if (exists && member == 0) write(element, total);
  }
}

// The elements of grad_weight behind each table that are no table's, to be zeroed by the kernel that writes the table.
// Empty where that does not do: a gap is large, in front, or behind a table without elements, or tables do not ascend.
inline std::vector<int32_t> find_gaps(const BackwardCall& call) {
  constexpr int64_t kMaxGap = 64;
  std::vector<int32_t> gaps;
  if (call.tables.empty() || call.tables[0].weight_offset > 0) return {};
  for (size_t t = 0; t < call.tables.size(); ++t) {
    const TableSlice& table = call.tables[t];
    const int64_t numel = table.num_embeddings * table.embedding_dim;
    const int64_t end = table.weight_offset + numel;
    const int64_t next = t + 1 < call.tables.size() ? call.tables[t + 1].weight_offset : call.args.grad_weight_numel;
    if (next < end || next - end > (numel > 0 ? kMaxGap : 0)) return {};
    gaps.push_back(static_cast<int32_t>(next - end));
  }
  return gaps;
}

}  // namespace fast_embedding
