// A block sums a part of the sorted list, an equal share whatever the distribution. A run of lookups that reaches over
// parts is put together by the block of the part where it ends: the blocks before leave their partial sums and raise a
// flag, and it looks back at them (decoupled look-back, Merrill and Garland 2016). Blocks start in the order of their
// numbers, so what is waited for is under way.
#include <algorithm>

#include "block.cuh"
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
constexpr int64_t kMaxPack = 8;  // columns in the widest access of all types: to it partial sums are aligned

enum Flag : uint32_t {
  kPending = 0,
  kGoesThrough = 1,  // the part is of one run, which began earlier and goes on
  kBegins = 2,       // the run that goes on begins in this part
};

// What a block holds in shared memory of its part of the list,
struct PartShared {
  Lookup lookup[kMaxPart];
  uint32_t length;
  uint32_t behind;  // parts that the first run reaches back
};

// and of the sums, sized by the access.
template <typename sum_t, int kSize>
struct SumShared {
  Edges<sum_t, kSize, kThreads> edges;
  Pack<sum_t, kSize> incoming[kMaxLanes];
};

// A block's part of a table's list and column chunk, and a thread's place in it.
struct Part {
  int work;
  int chunk;
  int groups, group, lane;
  uint32_t begin, length;
  uint32_t row_before, row_after;  // num_embeddings where there is none
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

// The sums of a part that lies in shared memory. kScaled: a row's sum is divided by the number of its lookups, which
// the sorted list tells. kAmongOthers: the kernel has other accesses, too, and needs the registers; where it has not,
// they keep a fourth block off an SM, with which float32 rows of some hundred columns take 10% longer.
template <typename scalar_t, int kSize, bool kScaled, bool kAmongOthers>
__device__ inline void sum_part(const SumParams& params, const SumTable& table, const Part& part, PartShared& shared,
                                SumShared<acc_t<scalar_t>, kSize>& sums) {
  using sum_t = acc_t<scalar_t>;
  const int column = (part.chunk * table.lanes + part.lane) * kSize;
  const bool active = part.group < part.groups && column < table.embedding_dim;
  const uint32_t first_row = shared.lookup[0].row;
  const uint32_t last_row = shared.lookup[part.length - 1].row;
  const bool incoming = first_row == part.row_before;
  const bool outgoing = last_row == part.row_after;
  sum_t* partial = static_cast<sum_t*>(params.partials) + static_cast<int64_t>(part.work) * params.partial_stride +
                   part.lane * kSize;
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight) + table.weight_offset + column;
  const auto address_of = [&](uint32_t row) { return grad_weight + static_cast<int64_t>(row) * table.embedding_dim; };

  const scalar_t* grad_output = static_cast<const scalar_t*>(params.grad_output) + table.first_column + column;
  sum_runs<scalar_t, kSize, kUnroll, kAmongOthers>(
      part.length, table.lanes, active, sums.edges, [&](uint32_t i) { return shared.lookup[i].row; },
      [&](uint32_t i) { return grad_output + shared.lookup[i].position * params.grad_output_stride; },
      [&](uint32_t row, const sum_t(&sum)[kSize]) {
        if (outgoing && row == last_row) {
          store<sum_t>(partial, sum);
        } else if (incoming && row == first_row) {
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums.incoming[part.lane].value[j] = sum[j];
        } else if constexpr (kScaled) {
          const auto row_of = [&](uint32_t i) { return shared.lookup[i].row; };
          const uint32_t count = first_from(0, part.length, row + 1, row_of) - first_from(0, part.length, row, row_of);
          store_mean<scalar_t>(address_of(row), sum, count);
        } else {
          store<scalar_t>(address_of(row), sum);
        }
      });
  __syncthreads();

  const bool goes_through = incoming && outgoing && first_row == last_row;
  if (outgoing && threadIdx.x == 0) {
    __threadfence();
    *static_cast<volatile uint32_t*>(params.flags + part.work) = goes_through ? kGoesThrough : kBegins;
  }
  if (!incoming || goes_through) return;
  if (threadIdx.x < 32) {
    const uint32_t behind = look_back(params, part.work, table.chunks);
    __threadfence();
    if (threadIdx.x == 0) shared.behind = behind;
  }
  __syncthreads();
  // Lane groups take equal shares of the partial sums, in order; the first puts the shares together.
  const uint32_t behind = shared.behind;
  const uint32_t share = (behind + part.groups - 1) / part.groups;
  const uint32_t share_end = min((part.group + 1) * share, behind);
  sum_t sum[kSize] = {};
  if (active) {
#pragma unroll 4
    for (uint32_t i = part.group * share; i < share_end; ++i) {
      const sum_t* earlier = partial - static_cast<int64_t>(behind - i) * table.chunks * params.partial_stride;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += __ldcg(earlier + j);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums.edges.sum[threadIdx.x].value[j] = sum[j];
  }
  __syncthreads();
  if (active && part.group == 0) {
    const int used = static_cast<int>((behind + share - 1) / share);
    for (int g = 1; g < used; ++g) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += sums.edges.sum[g * table.lanes + part.lane].value[j];
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] += sums.incoming[part.lane].value[j];
    if constexpr (kScaled) {
      const auto row_of = [&](uint32_t i) { return __ldcg(&table.lookups[i].row); };
      const uint32_t run_begin = first_from(part.begin - behind * params.part, part.begin, first_row, row_of);
      const uint32_t run_end = first_from(part.begin, part.begin + part.length, first_row + 1, row_of);
      store_mean<scalar_t>(address_of(first_row), sum, run_end - run_begin);
    } else {
      store<scalar_t>(address_of(first_row), sum);
    }
  }
}

// kSize: columns in an access, or kMixed.
template <typename scalar_t, int kSize, bool kScaled>
__global__ void __launch_bounds__(kThreads, kScaled ? kBlocksPerSmScaled : kBlocksPerSm)
    sum_sorted(const __grid_constant__ SumParams params) {
  using sum_t = acc_t<scalar_t>;
  using Largest = SumShared<sum_t, kSize == kMixed ? kWide<scalar_t> : kSize>;
  __shared__ PartShared shared;
  __shared__ alignas(Largest) char sums[sizeof(Largest)];

  const int work = blockIdx.x;
  const int t = find_last(params.first_work, params.num_tables, work);
  const SumTable& table = params.table[t];
  const uint32_t index = static_cast<uint32_t>(work - params.first_work[t]) / table.chunks;
  Part part;
  part.work = work;
  part.chunk = work - params.first_work[t] - static_cast<int>(index) * table.chunks;
  part.groups = kThreads / table.lanes;
  part.group = threadIdx.x / table.lanes;
  part.lane = threadIdx.x - part.group * table.lanes;

  part.begin = index * params.part;
  const uint32_t end = min(part.begin + params.part, params.num_rows);
  const auto row_before = [&](uint32_t i) { return i > 0 ? __ldcg(&table.lookups[i - 1].row) : table.num_embeddings; };
  const auto row_at = [&](uint32_t i) {
    return i < params.num_rows ? __ldcg(&table.lookups[i].row) : table.num_embeddings;
  };
  if (threadIdx.x == 0) shared.length = end - part.begin;
  let_next_launch_begin();
  wait_for_last_launch();
  part.row_before = row_before(part.begin);
  part.row_after = row_at(end);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < end - part.begin; i += kThreads) {
    const uint2 both = __ldcg(reinterpret_cast<const uint2*>(table.lookups) + part.begin + i);
    shared.lookup[i] = {both.x, both.y};
    if (both.x >= table.num_embeddings) atomicMin(&shared.length, i);  // padding, behind all rows
  }
  __syncthreads();
  part.length = shared.length;
  if (part.length == 0) return;
  with_pack<scalar_t, kSize, kWide<scalar_t>>(table.pack, [&](auto pack) {
    constexpr int kColumns = decltype(pack)::value;
    auto& sums_of_size = *reinterpret_cast<SumShared<sum_t, kColumns>*>(sums);
    sum_part<scalar_t, kColumns, kScaled, kSize == kMixed>(params, table, part, shared, sums_of_size);
  });
}

}  // namespace

SortedSums::SortedSums(const FePlan& plan, const FeBackwardArgs& args, const DeviceInfo& device)
    : args_(args), device_(device), fits_(plan.tile >= 32 && plan.tile <= kMaxPart) {
  params_.part = fits_ ? plan.tile : kMaxPart;
}

void SortedSums::add(const TableSlice& source, const Lookup* lookups, int64_t pack) {
  SumTable& table = params_.table[params_.num_tables++];
  table.lookups = lookups;
  table.pack = static_cast<int32_t>(pack / scalar_bytes(args_.scalar_type));
  const int64_t packs = std::max<int64_t>(ceil_div(source.embedding_dim, table.pack), 1);
  table.weight_offset = source.weight_offset;
  table.num_embeddings = static_cast<uint32_t>(source.num_embeddings);
  table.embedding_dim = static_cast<int32_t>(source.embedding_dim);
  table.first_column = static_cast<int32_t>(source.first_column);
  table.chunks = static_cast<int32_t>(ceil_div(packs, kMaxLanes));
  table.lanes = static_cast<int32_t>(ceil_div(packs, table.chunks));
  work_ += ceil_div(args_.num_rows, params_.part) * table.chunks;
  partial_stride_ = std::max<int64_t>(partial_stride_, round_up(table.lanes * table.pack, kMaxPack));
}

int64_t SortedSums::flags_bytes() const { return round_up(work_ * static_cast<int64_t>(sizeof(uint32_t)), kAlignment); }

int64_t SortedSums::partials_bytes() const {
  return round_up(work_ * partial_stride_ * accumulator_bytes(args_.scalar_type), kAlignment);
}

template <typename scalar_t, int kSize>
FeStatus SortedSums::start(cudaStream_t stream) const {
  const auto kernel = args_.scale_grad_by_freq ? sum_sorted<scalar_t, kSize, true> : sum_sorted<scalar_t, kSize, false>;
  return launch(kernel, dim3(static_cast<unsigned>(work_)), dim3(kThreads), 0, params_, false, Begin::EARLY, device_,
                stream, "sum_sorted");
}

FeStatus SortedSums::enqueue(void* flags, void* partials, cudaStream_t stream) {
  if (work_ > INT32_MAX) return FE_UNSUPPORTED;
  // Those whose rows take most threads first: their blocks take longest, and others run beside the last of them.
  SumTable* const tables = params_.table;
  SumTable* const tables_end = tables + params_.num_tables;
  std::stable_sort(tables, tables_end, [](const SumTable& a, const SumTable& b) { return a.lanes > b.lanes; });
  int64_t work = 0;
  for (int t = 0; t < params_.num_tables; ++t) {
    params_.first_work[t] = static_cast<int32_t>(work);
    work += ceil_div(args_.num_rows, params_.part) * tables[t].chunks;
  }
  params_.num_rows = static_cast<uint32_t>(args_.num_rows);
  params_.grad_output = args_.grad_output;
  params_.grad_output_stride = args_.grad_output_stride;
  params_.grad_weight = args_.grad_weight;
  params_.flags = static_cast<uint32_t*>(flags);
  params_.partials = partials;
  params_.partial_stride = static_cast<int32_t>(partial_stride_);
  const bool mixed =
      std::any_of(tables, tables_end, [&](const SumTable& table) { return table.pack != tables[0].pack; });
  return dispatch_scalar(args_.scalar_type, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (mixed) return start<scalar_t, kMixed>(stream);
    return dispatch_pack<scalar_t>(tables[0].pack * static_cast<int64_t>(sizeof(scalar_t)),
                                   [&](auto size) { return start<scalar_t, decltype(size)::value>(stream); });
  });
}

}  // namespace fast_embedding
