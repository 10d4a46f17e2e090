// PRIVATE for one table of few rows: the sums are in registers. A thread owns a pack of neighbouring columns and a
// share of the lookups. It has a sum for every row of the table, and adds a pack under a predicate: the index is
// compared with every row and addresses nothing, a hot row is as fast as any other, and what is infinite stays in its
// row. In shared memory (backward_private.cu) an addition is a read and a write, and wide packs leave room for too few
// threads. One launch:
//
//   1. a block's threads sum their shares, and the block sums what its threads have, through shared memory;
//   2. after a grid-wide barrier all threads sum the blocks' sums, in order, and write every element once.
//
// Each sum has a fixed order, so the result is reproducible, and 16-bit gradients round once.
#include <cooperative_groups.h>

#include "private.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 512;  // of up to 128 registers
constexpr int kMaxLanes = 64;  // threads that share a row; more would leave more partial sums of each element
constexpr int kFanIn = 8;      // copies that a thread sums at a time
constexpr int kMinShare = 2;   // lookups of a thread

// Lookups in flight in a thread: as many as fit beside the sums, but no more than the memory has use for.
template <typename scalar_t, int kColumns>
constexpr int kPackRegisters = (kColumns * static_cast<int>(sizeof(scalar_t)) + 3) / 4;
template <typename scalar_t, int kColumns>
constexpr int kMostInFlight = sizeof(scalar_t) == 8                     ? 6
                              : kPackRegisters<scalar_t, kColumns> == 4 ? 8
                                                                        : 12;
template <typename scalar_t, int kRows, int kColumns>
constexpr int kSumRegisters = kRows * kColumns * static_cast<int>(sizeof(acc_t<scalar_t>)) / 4;
template <typename scalar_t, int kRows, int kColumns>
constexpr int kInFlight = std::min(kMostInFlight<scalar_t, kColumns>, (96 - kSumRegisters<scalar_t, kRows, kColumns>) /
                                                                          (kPackRegisters<scalar_t, kColumns> + 2));

struct FewRowsParams {
  int64_t weight_offset;
  int32_t num_embeddings;
  int32_t embedding_dim;
  int32_t padding_idx;
  int32_t packs;   // of a row
  int32_t lanes;   // packs of a block: threads that share a row
  int32_t copies;  // rows that a block reads side by side, each by threads with sums of their own
  int32_t splits;
  int32_t threads_per_sum;  // phase 2
  int32_t num_rows;
  FeIndexType index_type;
  const void* indices;  // of the table, as is grad_output
  int64_t index_row_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;
  int64_t around;  // elements of grad_weight that are not the table's, to be zeroed
  void* partials;  // [splits, num_embeddings * embedding_dim] accumulators
};

// A thread's lookups: `count` from `first` on, `step` apart.
struct Share {
  int first;
  int step;
  int count;
};

__device__ inline Share share_of_thread(const FewRowsParams& params, int copy) {
  // Neighbouring copies take neighbouring rows, so that short rows are still read in full lines.
  const int first = blockIdx.x * params.copies + copy;
  const int step = gridDim.x * params.copies;
  return {first, step, first < params.num_rows ? (params.num_rows - first - 1) / step + 1 : 0};
}

__device__ inline const char* index_address(const FewRowsParams& params, int row) {
  return static_cast<const char*>(params.indices) + row * params.index_row_stride * index_bytes(params.index_type);
}

// Finds which of a thread's indices is out of range, and fails.
__noinline__ __device__ void fail_in_share(const FewRowsParams& params, Share share) {
#pragma unroll 1
  for (int i = 0; i < share.count; ++i) {
    const char* address = index_address(params, share.first + i * share.step);
    check_index(signed_index(load_index(address, params.index_type, 0), params.index_type), params.num_embeddings);
  }
}

// Adds a thread's lookups, and returns whether all of their indices are in range.
template <typename scalar_t, int kRows, int kColumns>
__device__ inline bool accumulate(const FewRowsParams& params, Share share, int pack,
                                  acc_t<scalar_t> (&sum)[kRows][kColumns]) {
  constexpr int kAhead = kInFlight<scalar_t, kRows, kColumns>;
  const char* next_index = index_address(params, share.first);
  const int64_t index_step = share.step * params.index_row_stride * index_bytes(params.index_type);
  const scalar_t* next_grad = static_cast<const scalar_t*>(params.grad_output) +
                              share.first * params.grad_output_stride + int64_t{pack} * kColumns;
  const int64_t grad_step = share.step * params.grad_output_stride;
  // Packs as words: each of two 16-bit elements would take a register while it is under way.
  using word_t = typename Word<kColumns * sizeof(scalar_t)>::type;
  int64_t index[kAhead];
  word_t word[kAhead];
  const auto load = [&](int k, bool exists) {
    if (exists) {
      index[k] = load_index(next_index, params.index_type, 0);
      word[k] = __ldcs(reinterpret_cast<const word_t*>(next_grad));
    }
    next_index += index_step;
    next_grad += grad_step;
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) load(k, k < share.count);
  bool in_range = true;
  for (int remaining = share.count; remaining > 0; remaining -= kAhead) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k >= remaining) break;
      // An int32 has no sign here, and is none the less out of range if it should be negative.
      in_range = in_range && is_in_range(index[k], params.num_embeddings);
      const int row = static_cast<int>(index[k]);
      Pack<scalar_t, kColumns> value;
      memcpy(&value, &word[k], sizeof(value));
      acc_t<scalar_t> addend[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) addend[j] = widen(value.value[j]);
      // A choice, of which the compiler makes predicated additions; of an `if` it makes branches, or widens once a row.
#pragma unroll
      for (int v = 0; v < kRows; ++v) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[v][j] = row == v ? sum[v][j] + addend[j] : sum[v][j];
      }
      // In the place of what has just been added, so that the memory does not rest meanwhile.
      load(k, k + kAhead < remaining);
    }
  }
  return in_range;
}

// Sums the copies into the first. Row v of thread t is at [v * blockDim.x + t]; each step leaves an eighth of them.
template <typename sum_t, int kColumns>
__device__ inline void sum_copies(const FewRowsParams& params, Pack<sum_t, kColumns>* sums) {
  for (int copies = params.copies; copies > 1;) {
    const int end = copies * params.lanes;
    copies = (copies + kFanIn - 1) / kFanIn;
    const int width = copies * params.lanes;
    for (int i = threadIdx.x; i < params.num_embeddings * width; i += blockDim.x) {
      const int row = small_quotient(i, width);
      const int at = i - row * width;
      Pack<sum_t, kColumns>* place = sums + row * blockDim.x;
      Pack<sum_t, kColumns> total = place[at];
#pragma unroll
      for (int k = 1; k < kFanIn; ++k) {
        if (at + k * width >= end) continue;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) total.value[j] += place[at + k * width].value[j];
      }
      place[at] = total;  // which nobody else reads in this step
    }
    __syncthreads();
  }
}

// Element by element: there is hardly ever anything in front of the only table or behind it.
template <typename scalar_t>
__device__ inline void zero_around(const FewRowsParams& params, int num_elements, scalar_t* grad_weight) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
#pragma unroll 1
  for (int64_t i = block * blockDim.x + threadIdx.x; i < params.around; i += step) {
    grad_weight[i < params.weight_offset ? i : i + num_elements] = narrow<scalar_t>(0);
  }
}

template <typename scalar_t, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads) few_rows_backward(const __grid_constant__ FewRowsParams params) {
  using sum_t = acc_t<scalar_t>;
  extern __shared__ __align__(32) char shared[];
  Pack<sum_t, kColumns>* sums = reinterpret_cast<Pack<sum_t, kColumns>*>(shared);
  const int num_elements = params.num_embeddings * params.embedding_dim;
  const int copy = threadIdx.x / params.lanes;
  const int first_pack = blockIdx.y * params.lanes;
  const int pack = first_pack + threadIdx.x - copy * params.lanes;
  const bool active = copy < params.copies && pack < params.packs;

  sum_t sum[kRows][kColumns] = {};
  const bool in_range =
      !active || accumulate<scalar_t, kRows, kColumns>(params, share_of_thread(params, copy), pack, sum);
#pragma unroll
  for (int v = 0; v < kRows; ++v) {
    if (v >= params.num_embeddings) break;
    Pack<sum_t, kColumns> row;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) row.value[j] = sum[v][j];
    sums[v * blockDim.x + threadIdx.x] = row;
  }
  if (!in_range) fail_in_share(params, share_of_thread(params, copy));
  __syncthreads();
  sum_copies(params, sums);

  wait_for_last_launch();
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight);
  sum_t* partials = static_cast<sum_t*>(params.partials);
  for (int i = threadIdx.x; i < params.num_embeddings * params.lanes; i += blockDim.x) {
    const int row = small_quotient(i, params.lanes);
    const int lane = i - row * params.lanes;
    if (first_pack + lane >= params.packs) continue;
    Pack<sum_t, kColumns> total = sums[row * blockDim.x + lane];
    if (row == params.padding_idx) total = {};
    const int at = row * params.embedding_dim + (first_pack + lane) * kColumns;
    if (params.splits > 1) {
      *reinterpret_cast<Pack<sum_t, kColumns>*>(partials + int64_t{blockIdx.x} * num_elements + at) = total;
    } else {
      store<scalar_t>(grad_weight + params.weight_offset + at, total.value);
    }
  }
  zero_around(params, num_elements, grad_weight);
  if (params.splits > 1) {
    cooperative_groups::this_grid().sync();
    sum_partials(partials, params.splits, num_elements, params.threads_per_sum, [&](int element, sum_t total) {
      grad_weight[params.weight_offset + element] = narrow<scalar_t>(total);
    });
  }
}

template <typename scalar_t, int kRows, int kColumns>
FeStatus launch(const FewRowsParams& params, dim3 grid, int threads, int64_t shared_bytes, Begin begin,
                const DeviceInfo& device, cudaStream_t stream) {
  const auto kernel = few_rows_backward<scalar_t, kRows, kColumns>;
  static std::atomic<uint64_t> allowed{0};
  const FeStatus status =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), device.properties.shared_bytes_per_block, device,
                          &allowed, "backward_few_rows shared memory");
  if (status != FE_OK) return status;
  return fast_embedding::launch(kernel, grid, dim3(threads), shared_bytes, params, params.splits > 1, begin, device,
                                stream, "backward_few_rows");
}

// The bytes of an access: 16, or of a 16-bit type 8, for four columns of it; else one element. Eight columns have room
// beside the loads in flight up to four rows.
int64_t access_bytes(const FeBackwardArgs& args, const TableSlice& table) {
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const int64_t bytes = table.num_embeddings <= 4 ? pack_bytes(args, table) : narrow_pack_bytes(args, table);
  return bytes == 16 || scalar == 2 ? bytes : scalar;
}

// Calls f with the number of sums of a column and the columns of an access as constants. Each sum costs an instruction
// a lookup and column; single columns are rare, and do with fewer instances.
template <typename scalar_t, typename Function>
FeStatus dispatch(int64_t num_embeddings, int64_t bytes, Function&& f) {
  constexpr auto kFewest = std::integral_constant<int, 4>{};
  constexpr auto kMiddle = std::integral_constant<int, 10>{};
  constexpr auto kMost = std::integral_constant<int, kMaxFewRows>{};
  if (bytes == sizeof(scalar_t)) {
    constexpr auto kOne = std::integral_constant<int, 1>{};
    return num_embeddings <= kFewest ? f(kFewest, kOne) : f(kMost, kOne);
  }
  if constexpr (sizeof(scalar_t) == 2) {
    if (bytes == 16) return f(kFewest, std::integral_constant<int, kWide<scalar_t>>{});
  }
  constexpr auto kColumns = std::integral_constant<int, sizeof(scalar_t) == 2 ? kHalf<scalar_t> : kWide<scalar_t>>{};
  if (num_embeddings <= kFewest) return f(kFewest, kColumns);
  return num_embeddings <= kMiddle ? f(kMiddle, kColumns) : f(kMost, kColumns);
}

}  // namespace

FeStatus backward_few_rows(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                           size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  const TableSlice& table = call.tables[0];
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const int64_t num_elements = table.num_embeddings * table.embedding_dim;
  if (num_elements == 0) {
    *workspace_bytes = 0;
    if (workspace == nullptr || call.zeroed) return FE_OK;
    return check_cuda(cudaMemsetAsync(args.grad_weight, 0, args.grad_weight_numel * scalar, stream),
                      "backward_few_rows");
  }

  const int64_t bytes = access_bytes(args, table);
  const int64_t columns = bytes / scalar;
  const int64_t packs = table.embedding_dim / columns;
  const int64_t slices = ceil_div(packs, kMaxLanes);
  if (plan.splits < 1 || slices > device.properties.num_sms) return FE_INVALID_ARGUMENT;
  const int64_t thread_bytes = table.num_embeddings * columns * accumulator_bytes(args.scalar_type);
  const int64_t fitting = device.properties.shared_bytes_per_block / thread_bytes / 32 * 32;
  const int threads = static_cast<int>(std::min<int64_t>(kThreads, fitting));

  FewRowsParams params{};
  params.lanes = static_cast<int32_t>(ceil_div(packs, slices));
  params.copies = threads / params.lanes;
  if (params.copies == 0) return FE_INVALID_ARGUMENT;
  const int64_t filled = args.num_rows / (kMinShare * params.copies);
  const int64_t most = std::min({int64_t{plan.splits}, device.properties.num_sms / slices, filled});
  params.splits = static_cast<int32_t>(std::max<int64_t>(1, most));
  const size_t needed =
      params.splits > 1 ? params.splits * num_elements * accumulator_bytes(args.scalar_type) : size_t{0};
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;

  params.weight_offset = table.weight_offset;
  params.num_embeddings = static_cast<int32_t>(table.num_embeddings);
  params.embedding_dim = static_cast<int32_t>(table.embedding_dim);
  params.padding_idx = static_cast<int32_t>(table.padding_idx);
  params.packs = static_cast<int32_t>(packs);
  params.num_rows = static_cast<int32_t>(args.num_rows);
  params.index_type = args.index_type;
  params.indices = static_cast<const char*>(args.indices) +
                   table.index_column * args.index_table_stride * index_bytes(args.index_type);
  params.index_row_stride = args.index_row_stride;
  params.grad_output = static_cast<const char*>(args.grad_output) + table.first_column * scalar;
  params.grad_output_stride = args.grad_output_stride;
  params.grad_weight = args.grad_weight;
  params.around = call.zeroed ? 0 : args.grad_weight_numel - num_elements;
  params.partials = workspace;
  const dim3 grid(static_cast<unsigned>(params.splits), static_cast<unsigned>(slices));
  params.threads_per_sum = threads_per_sum(num_elements, int64_t{params.splits} * slices * threads);
  return dispatch_scalar(args.scalar_type, [&](auto element) {
    using scalar_t = decltype(element);
    return dispatch<scalar_t>(table.num_embeddings, bytes, [&](auto rows, auto width) {
      return launch<scalar_t, decltype(rows)::value, decltype(width)::value>(
          params, grid, threads, threads * thread_bytes, call.begin, device, stream);
    });
  });
}

}  // namespace fast_embedding
