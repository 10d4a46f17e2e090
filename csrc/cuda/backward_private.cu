// PRIVATE: every block keeps copies of small tables' gradients in shared memory, and a thread owns one column of one
// copy. Nothing is shared inside a copy, so no atomics and no conflicts however hot a row is. (Four columns a thread,
// in one wide access, were slower: fewer threads fit.) Tables side by side are one row of columns, each column with its
// table's index, so the gradient is read in full lines however short the tables' rows are. One launch:
//
//   1. a block adds its share of the rows (a split) to its copies, then sums the copies;
//   2. after a grid-wide barrier all threads sum the blocks' sums, in order, and write every row once.
//
// Each sum has a fixed order, so the result is reproducible, and 16-bit gradients round once.
#include <cooperative_groups.h>

#include "private.cuh"

namespace fast_embedding {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxTables = 64;  // in one launch: the parameters of a kernel end at 4 KB

// Rows in flight in a thread. At 1024 threads of 64 registers more would spill.
template <typename scalar_t>
constexpr int kUnroll = sizeof(scalar_t) == 8 ? 4 : 8;

struct PrivateTable {
  int64_t weight_offset;
  int32_t num_embeddings;
  int32_t embedding_dim;
  int32_t padding_idx;
  int32_t index_column;
  int32_t first_column;  // in grad_output
  int32_t gap;           // elements of grad_weight behind the table that are no table's
};

// For up to kTables tables.
template <int kTables>
struct PrivateParams {
  int32_t first_lane[kTables];  // columns of the tables before
  int32_t first_element[kTables];
  PrivateTable table[kTables];
  int32_t num_tables;
  int32_t num_lanes;     // columns of all tables
  int32_t num_elements;  // of all tables
  int32_t max_rows;      // of the largest table
  int32_t lanes;         // columns of a block: threads that share a row
  int32_t copies;        // of the tables in a block
  int32_t splits;
  int32_t threads_per_sum;  // phase 2
  int32_t num_rows;
  int32_t zeroes_around;  // the only table
  FeIndexType index_type;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;
  int64_t grad_weight_numel;
  void* partials;  // [splits, num_elements] accumulators
};

// Finds which of a thread's indices is out of range, and fails.
template <typename index_t>
__noinline__ __device__ void fail_in_batch(const index_t* indices, int64_t step, int count, int num_embeddings) {
  for (int k = 0; k < count; ++k) check_index(indices[k * step], num_embeddings);
}

// Phase 1, the additions: `count` rows of a thread's column, `index_step` and `grad_step` elements apart. While a batch
// of rows is added the next is under way: without that, the memory rests while the SM adds.
template <typename index_t, typename scalar_t>
__device__ inline void accumulate(const index_t* indices, int64_t index_step, const scalar_t* grad, int64_t grad_step,
                                  int count, const PrivateTable& table, acc_t<scalar_t>* copy) {
  using unsigned_t = std::make_unsigned_t<index_t>;
  constexpr int kRows = kUnroll<scalar_t>;
  const int num_embeddings = table.num_embeddings;
  const int padding_idx = table.padding_idx;
  index_t index[kRows];
  scalar_t incoming[kRows];
  const auto load = [&](int remaining) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      index[k] = 0;
      if (k < remaining) {
        index[k] = __ldg(indices + k * index_step);
        incoming[k] = load_once<1>(grad + k * grad_step).value[0];
      }
    }
    indices += kRows * index_step;
    grad += kRows * grad_step;
  };
  load(count);
  for (int remaining = count; remaining > 0; remaining -= kRows) {
    bool in_range = true;  // checked together: a branch behind each load would make the next load wait for it
    int row[kRows];
    scalar_t value[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      in_range = in_range && static_cast<unsigned_t>(index[k]) < static_cast<unsigned_t>(num_embeddings);
      row[k] = static_cast<int>(index[k]);
      value[k] = incoming[k];
    }
    if (!in_range) fail_in_batch(indices - kRows * index_step, index_step, min(remaining, kRows), num_embeddings);
    load(remaining - kRows);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k < remaining && row[k] != padding_idx) copy[row[k] * blockDim.x] += widen(value[k]);
    }
  }
}

template <typename scalar_t, int kTables>
__device__ inline void write_sum(const PrivateParams<kTables>& params, const PrivateTable& table, int at,
                                 acc_t<scalar_t> total) {
  static_cast<scalar_t*>(params.grad_weight)[table.weight_offset + at] = narrow<scalar_t>(total);
}

// Phase 1, the end: leaves the block's sum of an element where phase 2 or the gradient has it.
template <typename scalar_t, int kTables>
__device__ inline void leave_sum(const PrivateParams<kTables>& params, int t, int at, acc_t<scalar_t> total) {
  if (params.splits > 1) {
    auto* partials = static_cast<acc_t<scalar_t>*>(params.partials);
    partials[static_cast<int64_t>(blockIdx.x) * params.num_elements + params.first_element[t] + at] = total;
  } else {
    write_sum<scalar_t>(params, params.table[t], at, total);
  }
}

// Of one table: a group of threads sums the copies of one element, another group the next.
template <typename scalar_t>
__device__ inline void sum_copies(const PrivateParams<1>& params, int first_lane, const acc_t<scalar_t>* copies) {
  using sum_t = acc_t<scalar_t>;
  const int elements = params.max_rows * params.lanes;  // of this block
  int width = 1;
  while (width < 32 && elements * width * 2 <= static_cast<int>(blockDim.x)) width *= 2;
  const int groups = blockDim.x / width;
  const int member = threadIdx.x % width;
  // Uniform trip count in a warp: the shuffles need all lanes.
  for (int first = 0; first < elements; first += groups) {
    const int element = first + threadIdx.x / width;
    const int row = element / params.lanes;
    const int lane = element - row * params.lanes;
    sum_t total = 0;
    if (element < elements) {
#pragma unroll 4
      for (int c = member; c < params.copies; c += width) {
        total += copies[row * blockDim.x + c * params.lanes + lane];
      }
    }
    total = sum_group(total, width);
    if (element < elements && member == 0 && first_lane + lane < params.num_lanes) {
      leave_sum<scalar_t>(params, 0, row * params.table[0].embedding_dim + first_lane + lane, total);
    }
  }
}

// Of several: a thread keeps its column, and so its table, and takes every params.copies-th row. By elements as above
// each one's table has to be looked up, and that took longer than the additions.
template <typename scalar_t, int kTables>
__device__ inline void sum_copies_of_column(const PrivateParams<kTables>& params, int first_lane,
                                            const acc_t<scalar_t>* copies) {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // else what follows from it is kept through the additions, and they spill
  const int copy = thread / params.lanes;
  const int lane = thread - copy * params.lanes;
  const int column = first_lane + lane;
  if (copy >= params.copies || column >= params.num_lanes) return;
  const int t = find_last(params.first_lane, params.num_tables, column);
  const PrivateTable& table = params.table[t];
  for (int row = copy; row < table.num_embeddings; row += params.copies) {
    acc_t<scalar_t> total = 0;
#pragma unroll 4
    for (int c = 0; c < params.copies; ++c) total += copies[row * blockDim.x + c * params.lanes + lane];
    leave_sum<scalar_t>(params, t, row * table.embedding_dim + column - params.first_lane[t], total);
  }
}

// Phase 2.
template <typename scalar_t, int kTables>
__device__ inline void sum_splits(const PrivateParams<kTables>& params) {
  const auto write = [&](int element, acc_t<scalar_t> total) {
    const int t = kTables > 1 ? find_last(params.first_element, params.num_tables, element) : 0;
    write_sum<scalar_t>(params, params.table[t], element - params.first_element[t], total);
  };
  sum_partials(static_cast<const acc_t<scalar_t>*>(params.partials), params.splits, params.num_elements,
               params.threads_per_sum, write);
}

static_assert(sizeof(PrivateParams<kMaxTables>) <= kMaxParamBytes);

template <typename scalar_t, int kTables>
__global__ void __launch_bounds__(kMaxThreads) private_backward(const __grid_constant__ PrivateParams<kTables> params) {
  using sum_t = acc_t<scalar_t>;
  extern __shared__ __align__(16) char shared[];
  // Row v of thread t at [v * blockDim.x + t]: a warp's accesses never meet in a bank, whatever the indices.
  sum_t* copies = reinterpret_cast<sum_t*>(shared);
  for (int row = 0; row < params.max_rows; ++row) copies[row * blockDim.x + threadIdx.x] = 0;
  // No barrier: a thread has cleared what it owns.

  const int copy = threadIdx.x / params.lanes;
  const int first_lane = blockIdx.y * params.lanes;
  const int lane = first_lane + threadIdx.x - copy * params.lanes;
  if (copy < params.copies && lane < params.num_lanes) {
    const int t = kTables > 1 ? find_last(params.first_lane, params.num_tables, lane) : 0;
    const PrivateTable& table = params.table[t];
    // Neighbouring copies take neighbouring rows, so that short rows are still read in full lines.
    const int first_row = blockIdx.x * params.copies + copy;
    const int row_step = gridDim.x * params.copies;
    const int count = first_row < params.num_rows ? (params.num_rows - first_row - 1) / row_step + 1 : 0;
    const scalar_t* grad = static_cast<const scalar_t*>(params.grad_output) + table.first_column + lane -
                           params.first_lane[t] + first_row * params.grad_output_stride;
    const int64_t first_index = first_row * params.index_row_stride + table.index_column * params.index_table_stride;
    const int64_t index_step = row_step * params.index_row_stride;
    const int64_t grad_step = row_step * params.grad_output_stride;
    if (params.index_type == FE_INT64) {
      accumulate(static_cast<const long long*>(params.indices) + first_index, index_step, grad, grad_step, count, table,
                 copies + threadIdx.x);
    } else {
      accumulate(static_cast<const int*>(params.indices) + first_index, index_step, grad, grad_step, count, table,
                 copies + threadIdx.x);
    }
  }
  __syncthreads();
  wait_for_last_launch();
  if constexpr (kTables == 1) {
    sum_copies<scalar_t>(params, first_lane, copies);
  } else {
    sum_copies_of_column<scalar_t>(params, first_lane, copies);
  }

  // What is no table's is zero.
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  if constexpr (kTables == 1) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x;
    const int64_t thread = static_cast<int64_t>(block) * blockDim.x + threadIdx.x;
    const PrivateTable& table = params.table[0];
    const int64_t end = table.weight_offset + table.num_embeddings * table.embedding_dim;
    scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight);
    if (params.zeroes_around) {
      fill_zero(grad_weight, table.weight_offset * sizeof(scalar_t), thread, threads);
      fill_zero(grad_weight + end, (params.grad_weight_numel - end) * sizeof(scalar_t), thread, threads);
    }
  } else if (block == 0) {
    for (int t = threadIdx.x; t < params.num_tables; t += blockDim.x) {
      const PrivateTable& table = params.table[t];
      const int numel = table.num_embeddings * table.embedding_dim;
      for (int i = 0; i < table.gap; ++i) write_sum<scalar_t>(params, table, numel + i, 0);
    }
  }
  if (params.splits > 1) {
    cooperative_groups::this_grid().sync();
    sum_splits<scalar_t>(params);
  }
}

template <typename scalar_t, int kTables>
FeStatus launch(PrivateParams<kTables> params, int threads, Begin begin, const DeviceInfo& device,
                cudaStream_t stream) {
  const auto kernel = private_backward<scalar_t, kTables>;
  static std::atomic<uint64_t> allowed{0};
  const FeStatus status =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), device.properties.shared_bytes_per_block, device,
                          &allowed, "backward_private shared memory");
  if (status != FE_OK) return status;
  const int64_t shared_bytes = threads * params.max_rows * sizeof(acc_t<scalar_t>);
  const dim3 grid(params.splits, static_cast<unsigned>(ceil_div(params.num_lanes, params.lanes)));
  if (params.splits == 1) {
    kernel<<<grid, threads, shared_bytes, stream>>>(params);
    return check_cuda(cudaGetLastError(), "backward_private");
  }
  params.threads_per_sum = threads_per_sum(params.num_elements, static_cast<int64_t>(grid.x) * grid.y * threads);
  return fast_embedding::launch(kernel, grid, dim3(threads), shared_bytes, params, true, begin, device, stream,
                                "backward_private");
}

// Tables [first, last) of a call, laid out for blocks of plan.threads threads.
template <int kTables>
PrivateParams<kTables> lay_out(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, size_t first,
                               size_t last, const std::vector<int32_t>& gaps) {
  const FeBackwardArgs& args = call.args;
  PrivateParams<kTables> params{};
  for (size_t t = first; t < last; ++t) {
    const TableSlice& source = call.tables[t];
    if (source.num_embeddings * source.embedding_dim == 0) continue;
    params.first_lane[params.num_tables] = params.num_lanes;
    params.first_element[params.num_tables] = params.num_elements;
    PrivateTable& table = params.table[params.num_tables++];
    table.weight_offset = source.weight_offset;
    table.num_embeddings = static_cast<int32_t>(source.num_embeddings);
    table.embedding_dim = static_cast<int32_t>(source.embedding_dim);
    table.padding_idx = static_cast<int32_t>(source.padding_idx);
    table.index_column = static_cast<int32_t>(source.index_column);
    table.first_column = static_cast<int32_t>(source.first_column);
    table.gap = gaps.empty() ? 0 : gaps[t];
    params.num_lanes += table.embedding_dim;
    params.num_elements += table.num_embeddings * table.embedding_dim;
    params.max_rows = std::max(params.max_rows, table.num_embeddings);
  }
  params.num_rows = static_cast<int32_t>(args.num_rows);
  params.zeroes_around = !call.zeroed;
  set_input(args, &params);
  params.grad_weight = args.grad_weight;
  params.grad_weight_numel = args.grad_weight_numel;
  if (params.num_lanes == 0) return params;
  const int64_t slices = ceil_div(params.num_lanes, plan.threads);
  params.lanes = static_cast<int32_t>(ceil_div(params.num_lanes, slices));
  params.copies = plan.threads / params.lanes;
  // A block is worth its partial sums once each of its threads has rows to keep in flight.
  const int64_t filled = args.num_rows / (kUnroll<float> * params.copies);
  params.splits = static_cast<int32_t>(
      std::max<int64_t>(1, std::min({int64_t{plan.splits}, device.properties.num_sms / slices, filled})));
  return params;
}

template <int kTables>
FeStatus run(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
             size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  const bool around = kTables == 1 && call.tables[0].num_embeddings * call.tables[0].embedding_dim > 0;
  const std::vector<int32_t> gaps = call.zeroed || around ? std::vector<int32_t>{} : find_gaps(call);
  const auto part = [&](size_t first) {
    return lay_out<kTables>(plan, call, device, first, std::min(first + kTables, call.tables.size()), gaps);
  };
  const auto needed = [&](const PrivateParams<kTables>& params) {
    if (params.splits <= 1) return size_t{0};
    return static_cast<size_t>(params.splits) * params.num_elements * accumulator_bytes(args.scalar_type);
  };
  if (workspace == nullptr) {
    *workspace_bytes = 0;
    for (size_t first = 0; first < call.tables.size(); first += kTables) {
      *workspace_bytes = std::max(*workspace_bytes, needed(part(first)));
    }
    return FE_OK;
  }
  if (!call.zeroed && !around && gaps.empty()) {
    const int64_t bytes = args.grad_weight_numel * scalar_bytes(args.scalar_type);
    const FeStatus zeroed = check_cuda(cudaMemsetAsync(args.grad_weight, 0, bytes, stream), "backward_private");
    if (zeroed != FE_OK) return zeroed;
  }
  for (size_t first = 0; first < call.tables.size(); first += kTables) {
    PrivateParams<kTables> params = part(first);
    if (*workspace_bytes < needed(params)) return FE_WORKSPACE_TOO_SMALL;
    if (params.num_lanes == 0) continue;
    params.partials = workspace;
    const FeStatus status = dispatch_scalar(args.scalar_type, [&](auto scalar) {
      return launch<decltype(scalar), kTables>(params, plan.threads, call.begin, device, stream);
    });
    if (status != FE_OK) return status;
  }
  return FE_OK;
}

}  // namespace

FeStatus backward_private(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                          size_t* workspace_bytes, cudaStream_t stream) {
  if (plan.threads == 0 && call.tables.size() == 1 && call.tables[0].num_embeddings <= kMaxFewRows) {
    return backward_few_rows(plan, call, device, workspace, workspace_bytes, stream);
  }
  if (call.args.combination == FE_SUM) {
    return backward_private_sum(plan, call, device, workspace, workspace_bytes, stream);
  }
  if (plan.threads < 32 || plan.threads > kMaxThreads || plan.threads % 32 != 0 || plan.splits < 1) {
    return FE_INVALID_ARGUMENT;
  }
  int64_t rows = 0;
  int64_t columns = 0;
  for (const TableSlice& table : call.tables) {
    rows = std::max(rows, table.num_embeddings);
    columns += table.embedding_dim;
  }
  const int64_t shared_bytes = plan.threads * rows * accumulator_bytes(call.args.scalar_type);
  if (shared_bytes > device.properties.shared_bytes_per_block ||
      columns > int64_t{plan.threads} * device.properties.num_sms) {
    return FE_INVALID_ARGUMENT;
  }
  const auto run_for = call.tables.size() == 1 ? run<1> : run<kMaxTables>;
  return run_for(plan, call, device, workspace, workspace_bytes, stream);
}

}  // namespace fast_embedding
