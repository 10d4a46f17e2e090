// SORT: the lookups are sorted by row, and each row's sum is written once, over zeros. Reproducible, one rounding for
// 16-bit types, no atomics.
//
//   1. sort_indices.cu sorts, and writes the zeros while its blocks wait for each other;
//   2. a block sums a part of the sorted list, an equal share whatever the distribution. A run of lookups that reaches
//      over parts is put together by the block of the part where it ends: the blocks before leave their partial sums
//      and raise a flag, and it looks back at them (decoupled look-back, Merrill and Garland 2016). Blocks start in the
//      order of their numbers, so what is waited for is under way.
#include <algorithm>
#include <vector>

#include "runs.cuh"
#include "sort_indices.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;
constexpr int kUnroll = 4;  // gradient loads in flight in a thread
constexpr int kMaxLanes = 64;
constexpr int kMaxPart = 1024;
constexpr int64_t kAlignment = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

enum Flag : uint32_t {
  kPending = 0,
  kGoesThrough = 1,  // the part is of one run, which began earlier and goes on
  kBegins = 2,       // the run that goes on begins in this part
};

struct SumTable {
  const Lookup* lookups;
  int64_t weight_offset;
  uint32_t num_embeddings;
  int32_t embedding_dim;
  int32_t first_column;
  int32_t lanes;
  int32_t chunks;  // work item first_work + i is column chunk i % chunks of part i / chunks
};

struct SumParams {
  int32_t first_work[kMaxSortTables];
  SumTable table[kMaxSortTables];
  int32_t num_tables;
  uint32_t num_rows;
  int32_t part;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;
  uint32_t* flags;  // [work]
  void* partials;   // [work, partial_stride] accumulators
  int32_t partial_stride;
};

template <typename scalar_t, int kSize>
struct SumShared {
  Lookup lookup[kMaxPart];
  uint32_t length;
  uint32_t behind;  // parts that the first run reaches back
  Edges<acc_t<scalar_t>, kSize, kThreads> edges;
  Pack<acc_t<scalar_t>, kSize> incoming[kMaxLanes];
};

// How many parts before `work` the run that comes into it reaches back. The first warp calls.
__device__ inline uint32_t look_back(const SumParams& params, int64_t work, int chunks) {
  const int lane = threadIdx.x % 32;
  uint32_t behind = 0;
  while (true) {
    const int64_t at = work - (behind + lane + 1) * static_cast<int64_t>(chunks);
    const uint32_t flag = at >= 0 ? *static_cast<volatile uint32_t*>(params.flags + at) : kPending;
    const unsigned begins = __ballot_sync(kFullWarp, flag == kBegins);
    const unsigned needed = begins ? begins ^ (begins - 1) : kFullWarp;  // up to the nearest part that begins a run
    if ((__ballot_sync(kFullWarp, flag != kPending) & needed) != needed) continue;
    behind += __popc(needed);
    if (begins) return behind;
  }
}

template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) sum_sorted(const __grid_constant__ SumParams params) {
  using sum_t = acc_t<scalar_t>;
  __shared__ SumShared<scalar_t, kSize> shared;

  const int work = blockIdx.x;
  const int t = find_last(params.first_work, params.num_tables, work);
  const SumTable& table = params.table[t];
  const uint32_t part = static_cast<uint32_t>(work - params.first_work[t]) / table.chunks;
  const int chunk = work - params.first_work[t] - static_cast<int>(part) * table.chunks;
  const int groups = kThreads / table.lanes;
  const int group = threadIdx.x / table.lanes;
  const int lane = threadIdx.x - group * table.lanes;
  const int column = (chunk * table.lanes + lane) * kSize;
  const bool active = group < groups && column < table.embedding_dim;

  const uint32_t begin = part * params.part;
  const uint32_t end = min(begin + params.part, params.num_rows);
  const auto row_before = [&](uint32_t i) { return i > 0 ? __ldg(&table.lookups[i - 1].row) : table.num_embeddings; };
  const auto row_at = [&](uint32_t i) {
    return i < params.num_rows ? __ldg(&table.lookups[i].row) : table.num_embeddings;
  };
  if (threadIdx.x == 0) shared.length = end - begin;
  const uint32_t before = row_before(begin);
  const uint32_t after = row_at(end);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < end - begin; i += kThreads) {
    const uint2 both = __ldg(reinterpret_cast<const uint2*>(table.lookups) + begin + i);
    shared.lookup[i] = {both.x, both.y};
    if (both.x >= table.num_embeddings) atomicMin(&shared.length, i);  // padding, behind all rows
  }
  __syncthreads();
  const uint32_t length = shared.length;
  if (length == 0) return;
  const uint32_t first_row = shared.lookup[0].row;
  const uint32_t last_row = shared.lookup[length - 1].row;
  const bool incoming = first_row == before;
  const bool outgoing = last_row == after;
  sum_t* partial =
      static_cast<sum_t*>(params.partials) + static_cast<int64_t>(work) * params.partial_stride + lane * kSize;
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight) + table.weight_offset + column;
  const auto address_of = [&](uint32_t row) { return grad_weight + static_cast<int64_t>(row) * table.embedding_dim; };

  const scalar_t* grad_output = static_cast<const scalar_t*>(params.grad_output) + table.first_column + column;
  sum_runs<scalar_t, kSize, kUnroll>(
      length, table.lanes, active, shared.edges, [&](uint32_t i) { return shared.lookup[i].row; },
      [&](uint32_t i) { return grad_output + shared.lookup[i].position * params.grad_output_stride; },
      [&](uint32_t row, const sum_t(&sum)[kSize]) {
        if (outgoing && row == last_row) {
          store<sum_t>(partial, sum);
        } else if (incoming && row == first_row) {
#pragma unroll
          for (int j = 0; j < kSize; ++j) shared.incoming[lane].value[j] = sum[j];
        } else {
          store<scalar_t>(address_of(row), sum);
        }
      });
  __syncthreads();

  const bool goes_through = incoming && outgoing && first_row == last_row;
  if (outgoing && threadIdx.x == 0) {
    __threadfence();
    *static_cast<volatile uint32_t*>(params.flags + work) = goes_through ? kGoesThrough : kBegins;
  }
  if (!incoming || goes_through) return;
  if (threadIdx.x < 32) {
    const uint32_t behind = look_back(params, work, table.chunks);
    __threadfence();
    if (threadIdx.x == 0) shared.behind = behind;
  }
  __syncthreads();
  // Lane groups take equal shares of the partial sums, in order; the first puts the shares together.
  const uint32_t behind = shared.behind;
  const uint32_t share = (behind + groups - 1) / groups;
  const uint32_t share_end = min((group + 1) * share, behind);
  sum_t sum[kSize] = {};
  if (active) {
#pragma unroll 4
    for (uint32_t i = group * share; i < share_end; ++i) {
      const sum_t* earlier = partial - static_cast<int64_t>(behind - i) * table.chunks * params.partial_stride;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += __ldcg(earlier + j);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) shared.edges.sum[threadIdx.x].value[j] = sum[j];
  }
  __syncthreads();
  if (active && group == 0) {
    const int used = static_cast<int>((behind + share - 1) / share);
    for (int g = 1; g < used; ++g) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += shared.edges.sum[g * table.lanes + lane].value[j];
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] += shared.incoming[lane].value[j];
    store<scalar_t>(address_of(first_row), sum);
  }
}

// The tables whose rows allow accesses of one width, in one launch.
struct SumLaunch {
  int64_t pack;  // bytes
  SumParams params{};
  int64_t work = 0;
  int64_t partial_stride = 0;
};

void add_table(const FeBackwardArgs& args, const TableSlice& source, const Lookup* lookups, SumLaunch* launch) {
  launch->params.first_work[launch->params.num_tables] = static_cast<int32_t>(launch->work);
  SumTable& table = launch->params.table[launch->params.num_tables++];
  table.lookups = lookups;
  const int64_t columns = launch->pack / scalar_bytes(args.scalar_type);
  const int64_t packs = std::max<int64_t>(ceil_div(source.embedding_dim, columns), 1);
  table.weight_offset = source.weight_offset;
  table.num_embeddings = static_cast<uint32_t>(source.num_embeddings);
  table.embedding_dim = static_cast<int32_t>(source.embedding_dim);
  table.first_column = static_cast<int32_t>(source.first_column);
  table.chunks = static_cast<int32_t>(ceil_div(packs, kMaxLanes));
  table.lanes = static_cast<int32_t>(ceil_div(packs, table.chunks));
  launch->work += ceil_div(args.num_rows, launch->params.part) * table.chunks;
  launch->partial_stride = std::max(launch->partial_stride, table.lanes * columns);
}

template <typename scalar_t>
FeStatus sum(const SumLaunch& launch, cudaStream_t stream) {
  if (launch.work > INT32_MAX) return FE_UNSUPPORTED;
  return dispatch_pack<scalar_t>(launch.pack, [&](auto size) {
    sum_sorted<scalar_t, decltype(size)::value>
        <<<static_cast<unsigned>(launch.work), kThreads, 0, stream>>>(launch.params);
    return check_cuda(cudaGetLastError(), "backward_sort");
  });
}

}  // namespace

FeStatus backward_sort(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                       size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  if (plan.tile < 32 || plan.tile > kMaxPart || plan.digit_bits < 1) return FE_INVALID_ARGUMENT;
  const int64_t num_tables = static_cast<int64_t>(call.tables.size());
  size_t needed = 0;
  for (int64_t first = 0; first < num_tables; first += kMaxSortTables) {
    const int64_t last = std::min<int64_t>(first + kMaxSortTables, num_tables);
    IndexSort sort(plan, call, first, last, device);
    if (workspace != nullptr) sort.place(static_cast<char*>(workspace));
    SumLaunch launches[] = {{16}, {8}, {scalar_bytes(args.scalar_type)}};
    for (SumLaunch& launch : launches) launch.params.part = plan.tile;
    for (int64_t t = first; t < last; ++t) {
      const int64_t pack = pack_bytes(args, call.tables[t]);
      SumLaunch& launch = launches[pack == 16 ? 0 : pack == 8 ? 1 : 2];
      add_table(args, call.tables[t], sort.sorted(t - first), &launch);
    }

    int64_t flags_bytes = 0, partials_bytes = 0;
    for (const SumLaunch& launch : launches) {
      flags_bytes += launch.work * sizeof(uint32_t);
      partials_bytes += round_up(launch.work * launch.partial_stride * accumulator_bytes(args.scalar_type), kAlignment);
    }
    flags_bytes = round_up(flags_bytes, kAlignment);
    needed = std::max(needed, static_cast<size_t>(sort.bytes() + flags_bytes + partials_bytes));
    if (workspace == nullptr) continue;
    if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;

    char* memory = static_cast<char*>(workspace);
    uint32_t* flags = reinterpret_cast<uint32_t*>(memory + sort.bytes());
    char* partials = memory + sort.bytes() + flags_bytes;
    const int64_t zero_bytes = first == 0 ? args.grad_weight_numel * scalar_bytes(args.scalar_type) : 0;
    FeStatus status = sort.enqueue(flags, flags_bytes, args.grad_weight, zero_bytes, stream);
    for (SumLaunch& launch : launches) {
      if (status != FE_OK) return status;
      if (launch.work == 0) continue;
      SumParams& params = launch.params;
      params.num_rows = static_cast<uint32_t>(args.num_rows);
      params.grad_output = args.grad_output;
      params.grad_output_stride = args.grad_output_stride;
      params.grad_weight = args.grad_weight;
      params.flags = flags;
      params.partials = partials;
      params.partial_stride = static_cast<int32_t>(launch.partial_stride);
      status = dispatch_scalar(args.scalar_type, [&](auto scalar) { return sum<decltype(scalar)>(launch, stream); });
      flags += launch.work;
      partials += round_up(launch.work * launch.partial_stride * accumulator_bytes(args.scalar_type), kAlignment);
    }
    if (status != FE_OK) return status;
  }
  if (workspace == nullptr) *workspace_bytes = needed;
  return FE_OK;
}

}  // namespace fast_embedding
