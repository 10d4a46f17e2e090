// PRIVATE for small tables whose embeddings were added: their gradients come from the same rows, so each is read once.
// A warp has a copy of all tables' sums in shared memory, kColumns columns of it, and takes a batch of rows at a time:
//
//   1. each lane turns the indices of one row into places in the copy;
//   2. the warp adds the gradient's rows, one after the other, to the places of each. A thread owns two columns, so
//      there are no atomics and no conflicts. The next batch's rows are under way meanwhile;
//   3. the copies of a block are summed; after a grid-wide barrier all threads sum the blocks' sums, in order.
//
// What bounds it is shared memory: a read and a write for each table and element. So small tables are first taken
// together: one place for each pair of rows of two tables, whose sums are told apart in step 3. Nine tables of 2 to 119
// rows need six accesses instead of nine, at 211 places instead of 176.
//
// Each sum has a fixed order, so the result is reproducible, and 16-bit gradients round once.
#include <cooperative_groups.h>

#include <algorithm>

#include "private.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 384;                         // warps without a copy help to sum the copies and the splits
constexpr int kColumns = 64;                          // of a block: two a thread
constexpr int kBatch = 32;                            // rows: one a lane
constexpr int kMaxTables = 16;                        // and accesses for a row, all under way at once
constexpr int kIndexLoads = 8;                        // in flight in a lane
constexpr int kPlaceBytes = kBatch * kMaxTables * 4;  // of a warp's batch

// Rows of the gradient in flight in a warp.
template <typename scalar_t>
constexpr int kUnroll = sizeof(scalar_t) == 8 ? 8 : 32;

// Tables whose places are those of the pairs (triples, ...) of their rows stand one after the other.
struct SumTable {
  int64_t weight_offset;
  int32_t num_embeddings;
  int32_t padding_idx;
  int32_t index_column;
  int32_t gap;         // elements of grad_weight behind the table that are no table's
  int32_t multiplier;  // from a row to the next among the group's places
  int32_t group_place;
  int32_t group_places;
  int32_t access;  // of a gradient row; -1 but for the last table of a group
};

struct SumParams {
  int32_t first_row[kMaxTables];  // rows of the tables before
  SumTable table[kMaxTables];
  int32_t num_tables;
  int32_t total_rows;  // of all tables
  int32_t places;      // in a copy; one more, behind them, takes what is not to be added
  int32_t copies;
  int32_t embedding_dim;
  int32_t columns;  // of a block, up to kColumns
  int32_t num_rows;
  FeIndexType index_type;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;
  void* partials;  // [splits, total_rows, embedding_dim] accumulators
};

// Where a row's accesses go: byte offsets in a copy.
template <int kAccesses>
struct alignas(16) Places {
  int32_t offset[(kAccesses + 3) / 4 * 4];
};

// Step 1: this lane's row.
template <typename sum_t, int kAccesses>
__device__ inline void find_places(const SumParams& params, int64_t row, Places<kAccesses>* places) {
  constexpr int kPlaceStep = kColumns * sizeof(sum_t);
#pragma unroll
  for (int access = 0; access < kAccesses; ++access) places->offset[access] = params.places * kPlaceStep;
  if (row >= params.num_rows) return;
  int place = 0;
  for (int first = 0; first < params.num_tables; first += kIndexLoads) {
    int64_t index[kIndexLoads];
#pragma unroll
    for (int k = 0; k < kIndexLoads; ++k) {
      if (first + k < params.num_tables) {
        index[k] = load_index(
            params.indices, params.index_type,
            row * params.index_row_stride + params.table[first + k].index_column * params.index_table_stride);
      }
    }
#pragma unroll
    for (int k = 0; k < kIndexLoads; ++k) {
      if (first + k >= params.num_tables) break;
      const SumTable& table = params.table[first + k];
      const int64_t at = signed_index(index[k], params.index_type);
      check_index(at, table.num_embeddings);
      place += static_cast<int>(at) * table.multiplier;
      if (table.access >= 0) {
        places->offset[table.access] = (table.group_place + place) * kPlaceStep;
        place = 0;
      }
    }
  }
}

// The next batch's indices are asked for while this one's rows are added.
__device__ inline void prefetch_indices(const SumParams& params, int64_t row) {
  if (row >= params.num_rows) return;
  const int64_t bytes = params.index_type == FE_INT64 ? 8 : 4;
  for (const int t : {0, params.num_tables - 1}) {
    const char* address =
        static_cast<const char*>(params.indices) +
        (row * params.index_row_stride + params.table[t].index_column * params.index_table_stride) * bytes;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
  }
}

// Step 2, one row: all reads, then all writes, which the compiler would not dare. A row's places are distinct, but for
// the one that takes what is not to be added.
template <typename sum_t, int kAccesses>
__device__ inline void add_row(char* copy, const Places<kAccesses>& places, const sum_t (&addend)[2]) {
  sum_t sum[kAccesses][2];
#pragma unroll
  for (int m = 0; m < kAccesses; ++m) {
    const sum_t* at = reinterpret_cast<const sum_t*>(copy + places.offset[m]);
    sum[m][0] = at[0];
    sum[m][1] = at[32];
  }
#pragma unroll
  for (int m = 0; m < kAccesses; ++m) {
    sum_t* at = reinterpret_cast<sum_t*>(copy + places.offset[m]);
    at[0] = sum[m][0] + addend[0];
    at[32] = sum[m][1] + addend[1];
  }
}

// Steps 1 and 2. Loads are unconditional, or the compiler puts them all behind the additions that they should overlap:
// behind the last row and column the last is read again, and added to where nobody looks.
template <typename scalar_t, int kAccesses>
__device__ inline void accumulate(const SumParams& params, acc_t<scalar_t>* copy, Places<kAccesses>* places,
                                  int64_t first_row, int64_t row_step) {
  using sum_t = acc_t<scalar_t>;
  constexpr int kRows = kUnroll<scalar_t>;
  const int lane = threadIdx.x % 32;
  const int first_column = blockIdx.y * params.columns + lane;
  const int last_column = min((blockIdx.y + 1) * params.columns, params.embedding_dim) - 1;
  const scalar_t* grad = static_cast<const scalar_t*>(params.grad_output) + min(first_column, last_column);
  const int second = min(first_column + 32, last_column) - min(first_column, last_column);
  char* lane_copy = reinterpret_cast<char*>(copy + lane);

  scalar_t value[kRows][2];
  const scalar_t* address = nullptr;
  int behind = 0;  // rows that follow the one at `address`
  const auto go_to = [&](int64_t row) {
    const int64_t last_row = params.num_rows - 1;
    address = grad + min(row, last_row) * params.grad_output_stride;
    behind = static_cast<int>(max(int64_t{0}, last_row - row));
  };
  const auto load = [&](int k) {
    value[k][0] = load_once<1>(address).value[0];
    value[k][1] = load_once<1>(address + second).value[0];
    address += k < behind ? params.grad_output_stride : 0;
  };
  go_to(first_row);
#pragma unroll
  for (int k = 0; k < kRows; ++k) load(k);
  for (int64_t batch = first_row; batch < params.num_rows; batch += row_step) {
    find_places<sum_t>(params, batch + lane, places + lane);
    __syncwarp();
    prefetch_indices(params, batch + row_step + lane);
#pragma unroll 1
    for (int begin = 0; begin < kBatch; begin += kRows) {
      go_to(begin + kRows < kBatch ? batch + begin + kRows : batch + row_step);
      Places<kAccesses> next = places[begin];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const Places<kAccesses> current = next;
        if (k + 1 < kRows) next = places[begin + k + 1];
        const sum_t addend[2] = {widen(value[k][0]), widen(value[k][1])};
        load(k);
        add_row(lane_copy, current, addend);
      }
    }
    __syncwarp();
  }
}

// Step 3, in a block: a warp sums one row of a table at a time.
template <typename scalar_t>
__device__ inline void sum_copies(const SumParams& params, const acc_t<scalar_t>* copies) {
  using sum_t = acc_t<scalar_t>;
  const int lane = threadIdx.x % 32;
  const int first_column = blockIdx.y * params.columns;
  const int end_column = min(first_column + params.columns, params.embedding_dim);
  const int copy_size = (params.places + 1) * kColumns;
  for (int row = threadIdx.x / 32; row < params.total_rows; row += kThreads / 32) {
    const int t = find_last(params.first_row, params.num_tables, row);
    const SumTable& table = params.table[t];
    const int local = row - params.first_row[t];
    sum_t sum[2] = {};
    if (local != table.padding_idx) {
      const int block = table.multiplier * table.num_embeddings;
      for (int high = 0; high < table.group_places; high += block) {
        for (int low = 0; low < table.multiplier; ++low) {
          const sum_t* at = copies + (table.group_place + high + local * table.multiplier + low) * kColumns + lane;
#pragma unroll 4
          for (int c = 0; c < params.copies; ++c) {
            sum[0] += at[c * copy_size];
            sum[1] += at[c * copy_size + 32];
          }
        }
      }
    }
    sum_t* partial = static_cast<sum_t*>(params.partials) +
                     (static_cast<int64_t>(blockIdx.x) * params.total_rows + row) * params.embedding_dim;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = first_column + lane + 32 * j;
      if (column < end_column) partial[column] = sum[j];
    }
  }
}

// Step 3, in the grid.
template <typename scalar_t>
__device__ inline void sum_splits(const SumParams& params) {
  using sum_t = acc_t<scalar_t>;
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight);
  const int elements = params.total_rows * params.embedding_dim;
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  const int step = gridDim.x * gridDim.y * kThreads;
  for (int element = block * kThreads + threadIdx.x; element < elements; element += step) {
    const sum_t* partial = static_cast<const sum_t*>(params.partials) + element;
    sum_t total = 0;
#pragma unroll 16
    for (int split = 0; split < static_cast<int>(gridDim.x); ++split) {
      total += partial[static_cast<int64_t>(split) * elements];
    }
    const int row = element / params.embedding_dim;
    const int t = find_last(params.first_row, params.num_tables, row);
    grad_weight[params.table[t].weight_offset + element - params.first_row[t] * params.embedding_dim] =
        narrow<scalar_t>(total);
  }
}

template <typename scalar_t, int kAccesses>
__global__ void __launch_bounds__(kThreads) private_sum_backward(const __grid_constant__ SumParams params) {
  using sum_t = acc_t<scalar_t>;
  extern __shared__ __align__(16) char shared[];
  // [copies, places + 1, kColumns] and behind them kPlaceBytes for each.
  sum_t* copies = reinterpret_cast<sum_t*>(shared);
  const int copy_size = (params.places + 1) * kColumns;
  char* places = reinterpret_cast<char*>(copies + params.copies * copy_size);
  uint4* words = reinterpret_cast<uint4*>(shared);
  const int num_words = params.copies * copy_size * static_cast<int>(sizeof(sum_t)) / 16;
  for (int i = threadIdx.x; i < num_words; i += kThreads) words[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  const int warp = threadIdx.x / 32;
  if (warp < params.copies) {
    accumulate<scalar_t, kAccesses>(params, copies + warp * copy_size,
                                    reinterpret_cast<Places<kAccesses>*>(places + warp * kPlaceBytes),
                                    (static_cast<int64_t>(blockIdx.x) * params.copies + warp) * kBatch,
                                    static_cast<int64_t>(gridDim.x) * params.copies * kBatch);
  }
  __syncthreads();
  sum_copies<scalar_t>(params, copies);

  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int t = threadIdx.x; t < params.num_tables; t += kThreads) {
      const SumTable& table = params.table[t];
      scalar_t* end = static_cast<scalar_t*>(params.grad_weight) + table.weight_offset +
                      table.num_embeddings * params.embedding_dim;
      for (int i = 0; i < table.gap; ++i) end[i] = narrow<scalar_t>(0);
    }
  }
  cooperative_groups::this_grid().sync();
  sum_splits<scalar_t>(params);
}

// Tables taken together: their places are as many as the product of their rows.
struct Group {
  int64_t places;
  std::vector<size_t> tables;
};

// Takes the smallest together while a copy of all has at most `max_places`.
std::vector<Group> make_groups(const BackwardCall& call, int64_t max_places) {
  std::vector<Group> groups;
  int64_t total = 0;
  for (size_t t = 0; t < call.tables.size(); ++t) {
    if (call.tables[t].num_embeddings == 0) continue;
    groups.push_back({call.tables[t].num_embeddings, {t}});
    total += call.tables[t].num_embeddings;
  }
  const auto more = [](const Group& a, const Group& b) { return a.places > b.places; };
  while (groups.size() > 1) {
    std::sort(groups.begin(), groups.end(), more);
    Group& last = groups.back();
    Group& before = groups[groups.size() - 2];
    total += last.places * before.places - last.places - before.places;
    if (total > max_places) break;
    before.places *= last.places;
    before.tables.insert(before.tables.end(), last.tables.begin(), last.tables.end());
    groups.pop_back();
  }
  return groups;
}

template <typename scalar_t, int kAccesses>
FeStatus launch(const SumParams& params, const dim3& grid, const DeviceInfo& device, cudaStream_t stream) {
  const auto kernel = private_sum_backward<scalar_t, kAccesses>;
  static std::atomic<uint64_t> allowed{0};
  const FeStatus status =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), device.properties.shared_bytes_per_block, device,
                          &allowed, "backward_private_sum shared memory");
  if (status != FE_OK) return status;
  const int64_t copy_bytes = int64_t{params.places + 1} * kColumns * sizeof(acc_t<scalar_t>);
  const int64_t shared_bytes = params.copies * (copy_bytes + kPlaceBytes);
  return launch_cooperative(kernel, grid, dim3(kThreads), shared_bytes, params, Begin::AFTER_ALL, device, stream,
                            "backward_private_sum");
}

template <typename scalar_t>
FeStatus dispatch_accesses(size_t accesses, const SumParams& params, const dim3& grid, const DeviceInfo& device,
                           cudaStream_t stream) {
  if (accesses <= 4) return launch<scalar_t, 4>(params, grid, device, stream);
  if (accesses <= 6) return launch<scalar_t, 6>(params, grid, device, stream);
  if (accesses <= 8) return launch<scalar_t, 8>(params, grid, device, stream);
  if (accesses <= 12) return launch<scalar_t, 12>(params, grid, device, stream);
  return launch<scalar_t, kMaxTables>(params, grid, device, stream);
}

}  // namespace

FeStatus backward_private_sum(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                              size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  const int64_t dim = call.tables.empty() ? 0 : call.tables[0].embedding_dim;
  const int64_t slices = ceil_div(dim, kColumns);
  if (plan.threads < 32 || plan.threads > kThreads || plan.threads % 32 != 0 || plan.splits < 1 ||
      call.tables.size() > kMaxTables || slices > device.properties.num_sms) {
    return FE_INVALID_ARGUMENT;
  }
  SumParams params{};
  params.copies = plan.threads / 32;
  const int64_t place_bytes = kColumns * accumulator_bytes(args.scalar_type);
  const int64_t most_places =
      (device.properties.shared_bytes_per_block / params.copies - kPlaceBytes) / place_bytes - 1;
  const std::vector<Group> groups = make_groups(call, most_places);
  const std::vector<int32_t> gaps = call.zeroed ? std::vector<int32_t>{} : find_gaps(call);
  for (size_t g = 0; g < groups.size(); ++g) {
    int64_t multiplier = 1;
    for (const size_t t : groups[g].tables) {
      const TableSlice& source = call.tables[t];
      params.first_row[params.num_tables] = params.total_rows;
      SumTable& table = params.table[params.num_tables++];
      table.weight_offset = source.weight_offset;
      table.num_embeddings = static_cast<int32_t>(source.num_embeddings);
      table.padding_idx = static_cast<int32_t>(source.padding_idx);
      table.index_column = static_cast<int32_t>(source.index_column);
      table.multiplier = static_cast<int32_t>(multiplier);
      table.group_place = params.places;
      table.group_places = static_cast<int32_t>(groups[g].places);
      table.gap = gaps.empty() ? 0 : gaps[t];
      table.access = t == groups[g].tables.back() ? static_cast<int32_t>(g) : -1;
      multiplier *= source.num_embeddings;
      params.total_rows += table.num_embeddings;
    }
    params.places += static_cast<int32_t>(groups[g].places);
    if (params.places > most_places) return FE_INVALID_ARGUMENT;
  }
  params.embedding_dim = static_cast<int32_t>(dim);
  const int64_t batches = ceil_div(args.num_rows, kBatch);
  const int64_t splits =
      slices == 0
          ? 1
          : std::min({int64_t{plan.splits}, device.properties.num_sms / slices, ceil_div(batches, params.copies)});
  const size_t needed = splits * params.total_rows * dim * accumulator_bytes(args.scalar_type);
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;

  if (!call.zeroed && gaps.empty()) {
    const int64_t bytes = args.grad_weight_numel * scalar_bytes(args.scalar_type);
    const FeStatus zeroed = check_cuda(cudaMemsetAsync(args.grad_weight, 0, bytes, stream), "backward_private_sum");
    if (zeroed != FE_OK) return zeroed;
  }
  if (params.total_rows == 0 || dim == 0) return FE_OK;
  params.columns = static_cast<int32_t>(ceil_div(dim, slices));
  params.num_rows = static_cast<int32_t>(args.num_rows);
  set_input(args, &params);
  params.grad_weight = args.grad_weight;
  params.partials = workspace;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(slices));
  return dispatch_scalar(args.scalar_type, [&](auto scalar) {
    return dispatch_accesses<decltype(scalar)>(groups.size(), params, grid, device, stream);
  });
}

}  // namespace fast_embedding
