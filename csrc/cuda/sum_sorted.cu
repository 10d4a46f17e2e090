// A block sums a part of the sorted list, an equal share whatever the distribution. A run of lookups that reaches over
// parts is put together by the block of the part where it ends: the blocks before leave their partial sums and raise a
// flag, and it looks back at them (decoupled look-back, Merrill and Garland 2016). Blocks start in the order of their
// numbers, so what is waited for is under way.
#include <algorithm>

#include "runs.cuh"
#include "sum_sorted.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;
constexpr int kBlocksPerSmScaled = 2;  // with three, the division spills
constexpr int kUnroll = 4;             // gradient loads in flight in a thread
constexpr int kMaxLanes = 64;
constexpr int kMaxPart = 1024;
constexpr int64_t kAlignment = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

enum Flag : uint32_t {
  kPending = 0,
  kGoesThrough = 1,  // the part is of one run, which began earlier and goes on
  kBegins = 2,       // the run that goes on begins in this part
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

// kScaled: a row's sum is divided by the number of its lookups, which the sorted list tells.
template <typename scalar_t, int kSize, bool kScaled>
__global__ void __launch_bounds__(kThreads, kScaled ? kBlocksPerSmScaled : kBlocksPerSm)
    sum_sorted(const __grid_constant__ SumParams params) {
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
  const auto row_before = [&](uint32_t i) { return i > 0 ? __ldcg(&table.lookups[i - 1].row) : table.num_embeddings; };
  const auto row_at = [&](uint32_t i) {
    return i < params.num_rows ? __ldcg(&table.lookups[i].row) : table.num_embeddings;
  };
  if (threadIdx.x == 0) shared.length = end - begin;
  let_next_launch_begin();
  wait_for_last_launch();
  const uint32_t before = row_before(begin);
  const uint32_t after = row_at(end);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < end - begin; i += kThreads) {
    const uint2 both = __ldcg(reinterpret_cast<const uint2*>(table.lookups) + begin + i);
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
        } else if constexpr (kScaled) {
          const auto row_of = [&](uint32_t i) { return shared.lookup[i].row; };
          const uint32_t count = first_from(0, length, row + 1, row_of) - first_from(0, length, row, row_of);
          store_mean<scalar_t>(address_of(row), sum, count);
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
    if constexpr (kScaled) {
      const auto row_of = [&](uint32_t i) { return __ldcg(&table.lookups[i].row); };
      const uint32_t run_begin = first_from(begin - behind * params.part, begin, first_row, row_of);
      const uint32_t run_end = first_from(begin, begin + length, first_row + 1, row_of);
      store_mean<scalar_t>(address_of(first_row), sum, run_end - run_begin);
    } else {
      store<scalar_t>(address_of(first_row), sum);
    }
  }
}

}  // namespace

SortedSums::SortedSums(const FePlan& plan, const FeBackwardArgs& args, const DeviceInfo& device)
    : args_(args),
      device_(device),
      fits_(plan.tile >= 32 && plan.tile <= kMaxPart),
      launches_{{16}, {8}, {scalar_bytes(args.scalar_type)}} {
  for (Launch& launch : launches_) launch.params.part = fits_ ? plan.tile : kMaxPart;
}

void SortedSums::add(const TableSlice& source, const Lookup* lookups, int64_t pack) {
  Launch& launch = launches_[pack == 16 ? 0 : pack == 8 ? 1 : 2];
  launch.params.first_work[launch.params.num_tables] = static_cast<int32_t>(launch.work);
  SumTable& table = launch.params.table[launch.params.num_tables++];
  table.lookups = lookups;
  const int64_t columns = launch.pack / scalar_bytes(args_.scalar_type);
  const int64_t packs = std::max<int64_t>(ceil_div(source.embedding_dim, columns), 1);
  table.weight_offset = source.weight_offset;
  table.num_embeddings = static_cast<uint32_t>(source.num_embeddings);
  table.embedding_dim = static_cast<int32_t>(source.embedding_dim);
  table.first_column = static_cast<int32_t>(source.first_column);
  table.chunks = static_cast<int32_t>(ceil_div(packs, kMaxLanes));
  table.lanes = static_cast<int32_t>(ceil_div(packs, table.chunks));
  launch.work += ceil_div(args_.num_rows, launch.params.part) * table.chunks;
  launch.partial_stride = std::max(launch.partial_stride, table.lanes * columns);
}

int64_t SortedSums::flags_bytes() const {
  int64_t work = 0;
  for (const Launch& launch : launches_) work += launch.work;
  return round_up(work * static_cast<int64_t>(sizeof(uint32_t)), kAlignment);
}

int64_t SortedSums::partials_bytes(const Launch& launch) const {
  return round_up(launch.work * launch.partial_stride * accumulator_bytes(args_.scalar_type), kAlignment);
}

int64_t SortedSums::partials_bytes() const {
  int64_t bytes = 0;
  for (const Launch& launch : launches_) bytes += partials_bytes(launch);
  return bytes;
}

template <typename scalar_t, int kSize>
FeStatus SortedSums::start(const Launch& launch, cudaStream_t stream) const {
  if (launch.work > INT32_MAX) return FE_UNSUPPORTED;
  const auto kernel = args_.scale_grad_by_freq ? sum_sorted<scalar_t, kSize, true> : sum_sorted<scalar_t, kSize, false>;
  return fast_embedding::launch(kernel, dim3(static_cast<unsigned>(launch.work)), dim3(kThreads), Begin::EARLY, device_,
                                stream, "sum_sorted", launch.params);
}

FeStatus SortedSums::enqueue(void* flags, void* partials, cudaStream_t stream) {
  if (!fits_) return FE_INVALID_ARGUMENT;
  auto* next_flag = static_cast<uint32_t*>(flags);
  auto* next_partial = static_cast<char*>(partials);
  for (Launch& launch : launches_) {
    if (launch.work == 0) continue;
    SumParams& params = launch.params;
    params.num_rows = static_cast<uint32_t>(args_.num_rows);
    params.grad_output = args_.grad_output;
    params.grad_output_stride = args_.grad_output_stride;
    params.grad_weight = args_.grad_weight;
    params.flags = next_flag;
    params.partials = next_partial;
    params.partial_stride = static_cast<int32_t>(launch.partial_stride);
    const FeStatus status = dispatch_scalar(args_.scalar_type, [&](auto scalar) {
      using scalar_t = decltype(scalar);
      return dispatch_pack<scalar_t>(launch.pack,
                                     [&](auto size) { return start<scalar_t, decltype(size)::value>(launch, stream); });
    });
    if (status != FE_OK) return status;
    next_flag += launch.work;
    next_partial += partials_bytes(launch);
  }
  return FE_OK;
}

}  // namespace fast_embedding
