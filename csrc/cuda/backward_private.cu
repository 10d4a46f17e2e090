// PRIVATE: every block keeps copies of the whole gradient in shared memory, and a thread owns one column of one copy.
// Nothing is shared inside a copy, so no atomics and no conflicts however hot a row is. (Four columns a thread, in one
// wide access, were slower: fewer threads fit.) One cooperative launch:
//
//   1. a block adds its share of the rows to its copies, then sums the copies and leaves one partial table;
//   2. after a grid-wide barrier all threads sum the partial tables, in order, and write every row once.
//
// Each sum has a fixed order, so the result is reproducible, and 16-bit gradients round once.
#include <cooperative_groups.h>

#include "common.cuh"

namespace fast_embedding {
namespace {

constexpr int kUnroll = 8;  // rows in flight in a thread
constexpr int kMaxThreads = 1024;

struct PrivateParams {
  const void* indices;
  FeIndexType index_type;
  int64_t index_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  int64_t num_rows;
  void* grad_weight;  // the whole of it, with what lies around the table
  int64_t grad_weight_numel;
  int64_t table_offset;
  void* partials;  // [splits, V * D] accumulators
  int64_t padding_idx;
  int32_t num_embeddings;
  int32_t embedding_dim;
  int32_t lanes;            // threads that share a row in a block
  int32_t copies;           // of the table in a block
  int32_t threads_per_sum;  // phase 2: threads that sum one element's partials; a power of two up to 32
};

// Sums over lanes of an aligned group of `width` threads, in a fixed order; the first lane has the result.
template <typename T>
__device__ inline T sum_group(T value, int width) {
  for (int delta = width / 2; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffffu, value, delta, width);
  return value;
}

// Phase 1, the additions: this thread's column of this thread's rows.
template <typename scalar_t>
__device__ inline void accumulate(const PrivateParams& params, acc_t<scalar_t>* copy, int column, int64_t first_row,
                                  int64_t row_step) {
  const scalar_t* grad = static_cast<const scalar_t*>(params.grad_output) + column;
  for (int64_t row = first_row; row < params.num_rows; row += kUnroll * row_step) {
    int64_t index[kUnroll];
    scalar_t value[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t at = row + k * row_step;
      index[k] = 0;
      if (at < params.num_rows) {
        index[k] = load_index(params.indices, params.index_type, at * params.index_stride);
        value[k] = load_once<1>(grad + at * params.grad_output_stride).value[0];
      }
    }
    bool in_range = true;  // checked together: a branch behind each load would make the next load wait for it
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      index[k] = signed_index(index[k], params.index_type);
      in_range = in_range && is_in_range(index[k], params.num_embeddings);
    }
    if (!in_range) {
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) check_index(index[k], params.num_embeddings);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (row + k * row_step >= params.num_rows || index[k] == params.padding_idx) continue;
      copy[static_cast<int>(index[k]) * blockDim.x] += widen(value[k]);
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kMaxThreads) private_backward(const PrivateParams params) {
  using sum_t = acc_t<scalar_t>;
  extern __shared__ __align__(16) char shared[];
  // Row v of thread t at [v * blockDim.x + t]: a warp's accesses never meet in a bank, whatever the indices.
  sum_t* copies = reinterpret_cast<sum_t*>(shared);
  for (int i = threadIdx.x; i < params.num_embeddings * static_cast<int>(blockDim.x); i += blockDim.x) copies[i] = 0;
  // No barrier: a thread has cleared what it owns.

  const int copy = threadIdx.x / params.lanes;
  const int lane = threadIdx.x - copy * params.lanes;
  const int first_column = blockIdx.y * params.lanes;
  const int column = first_column + lane;
  if (copy < params.copies && column < params.embedding_dim) {
    // Neighbouring copies take neighbouring rows, so that short rows are still read in full lines.
    accumulate<scalar_t>(params, copies + threadIdx.x, column, static_cast<int64_t>(blockIdx.x) * params.copies + copy,
                         static_cast<int64_t>(gridDim.x) * params.copies);
  }
  __syncthreads();

  // One partial table a block: a group of threads sums the copies of one element, another group the next.
  const int64_t table_numel = static_cast<int64_t>(params.num_embeddings) * params.embedding_dim;
  sum_t* partial = static_cast<sum_t*>(params.partials) + blockIdx.x * table_numel;
  const int elements = params.num_embeddings * params.lanes;  // of this block
  int width = 1;
  while (width < 32 && elements * width * 2 <= static_cast<int>(blockDim.x)) width *= 2;
  const int groups = blockDim.x / width;
  const int member = threadIdx.x % width;
  // Uniform trip count in a warp: the shuffles need all lanes.
  for (int first = 0; first < elements; first += groups) {
    const int element = first + threadIdx.x / width;
    const int row = element / params.lanes;
    const int element_lane = element - row * params.lanes;
    sum_t total = 0;
    if (element < elements) {
      for (int c = member; c < params.copies; c += width) {
        total += copies[row * blockDim.x + c * params.lanes + element_lane];
      }
    }
    total = sum_group(total, width);
    const int element_column = first_column + element_lane;
    if (element < elements && member == 0 && element_column < params.embedding_dim) {
      partial[static_cast<int64_t>(row) * params.embedding_dim + element_column] = total;
    }
  }

  cooperative_groups::this_grid().sync();

  // Phase 2.
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x;
  const int64_t thread = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  const int split_width = params.threads_per_sum;
  const sum_t* partials = static_cast<const sum_t*>(params.partials);
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight);
  const int64_t element_step = num_threads / split_width;
  const int split_member = threadIdx.x % split_width;
  for (int64_t first = 0; first < table_numel; first += element_step) {
    const int64_t element = first + thread / split_width;
    sum_t total = 0;
    if (element < table_numel) {
#pragma unroll 8
      for (int split = split_member; split < static_cast<int>(gridDim.x); split += split_width) {
        total += partials[split * table_numel + element];
      }
    }
    total = sum_group(total, split_width);
    if (element < table_numel && split_member == 0) {
      grad_weight[params.table_offset + element] = narrow<scalar_t>(total);
    }
  }
  const int64_t table_end = params.table_offset + table_numel;
  fill_zero(grad_weight, params.table_offset * sizeof(scalar_t), thread, num_threads);
  fill_zero(grad_weight + table_end, (params.grad_weight_numel - table_end) * sizeof(scalar_t), thread, num_threads);
}

template <typename scalar_t>
FeStatus launch(const FePlan& plan, PrivateParams params, const DeviceInfo& device, cudaStream_t stream) {
  const int slices = static_cast<int>(ceil_div(params.embedding_dim, plan.threads));
  params.lanes = static_cast<int>(ceil_div(params.embedding_dim, slices));
  params.copies = plan.threads / params.lanes;
  const int splits = std::max(1, std::min(plan.splits, device.properties.num_sms / slices));

  const int64_t grid_threads = static_cast<int64_t>(splits) * slices * plan.threads;
  const int64_t elements = static_cast<int64_t>(params.num_embeddings) * params.embedding_dim;
  params.threads_per_sum = 1;
  while (params.threads_per_sum < 32 && elements * params.threads_per_sum * 2 <= grid_threads) {
    params.threads_per_sum *= 2;
  }

  const auto kernel = private_backward<scalar_t>;
  const int64_t shared_bytes = static_cast<int64_t>(params.num_embeddings) * plan.threads * sizeof(acc_t<scalar_t>);
  if (shared_bytes > device.properties.shared_bytes_per_block || slices > device.properties.num_sms) {
    return FE_INVALID_ARGUMENT;
  }
  static std::atomic<uint64_t> allowed{0};
  const FeStatus status =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), device.properties.shared_bytes_per_block, device,
                          &allowed, "backward_private shared memory");
  if (status != FE_OK) return status;
  return launch_cooperative(kernel, dim3(splits, slices), dim3(plan.threads), shared_bytes, params, stream,
                            "backward_private");
}

}  // namespace

FeStatus backward_private(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                          size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  if (call.tables.size() != 1 || plan.threads < 32 || plan.threads > kMaxThreads || plan.threads % 32 != 0 ||
      plan.splits < 1 || call.tables[0].num_embeddings == 0 || call.tables[0].embedding_dim == 0) {
    return FE_INVALID_ARGUMENT;
  }
  const TableSlice& table = call.tables[0];
  const size_t needed = static_cast<size_t>(plan.splits) * table.num_embeddings * table.embedding_dim *
                        accumulator_bytes(args.scalar_type);
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;

  PrivateParams params{};
  params.indices = args.indices;
  params.index_type = args.index_type;
  params.index_stride = args.index_row_stride;
  params.grad_output = args.grad_output;
  params.grad_output_stride = args.grad_output_stride;
  params.num_rows = args.num_rows;
  params.grad_weight = args.grad_weight;
  params.grad_weight_numel = args.grad_weight_numel;
  params.table_offset = table.weight_offset;
  params.partials = workspace;
  params.padding_idx = table.padding_idx;
  params.num_embeddings = static_cast<int32_t>(table.num_embeddings);
  params.embedding_dim = static_cast<int32_t>(table.embedding_dim);

  return dispatch_scalar(args.scalar_type,
                         [&](auto scalar) { return launch<decltype(scalar)>(plan, params, device, stream); });
}

}  // namespace fast_embedding
