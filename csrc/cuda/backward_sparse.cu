// The sparse gradient: the rows that are looked up, ascending, and a sum for each.
//
//   count     sort_indices.cu sorts the lookups by row, then blocks count the runs of their chunks of the list. The
//             host reads the sum and allocates
//   backward  blocks number the runs and write the row of each. With numbers in the place of rows, what remains is the
//             dense gradient of a table of `count` rows, all of which have lookups: sum_sorted.cu
#include "block.cuh"
#include "sum_sorted.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 8;                 // lookups of a thread in a tile
constexpr int kTile = kThreads * kItems;  // lookups that a block numbers at a time
constexpr int kBlocksPerSm = 4;           // every block adds up the counts of all before it
constexpr int64_t kAlignment = 256;

struct RunParams {
  const Lookup* lookups;  // sorted
  uint32_t num_lookups;
  uint32_t num_embeddings;
  uint32_t chunk;        // lookups of a block
  uint32_t* chunk_runs;  // [blocks] runs that begin in each chunk
  unsigned long long* count;
  // Of number_runs alone:
  uint32_t num_runs;
  Lookup* numbered;
  int64_t* rows;
};

__device__ inline bool begins_run(const RunParams& params, uint32_t i) {
  const uint32_t row = __ldg(&params.lookups[i].row);
  return row < params.num_embeddings && (i == 0 || __ldg(&params.lookups[i - 1].row) != row);
}

// The sum over the threads, for all of them. Ends with a barrier.
__device__ inline uint32_t sum_over_block(uint32_t value) {
  __shared__ uint32_t warp_sum[kWarps];
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kFullWarp, value, delta);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += warp_sum[w];
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kThreads) count_runs(const __grid_constant__ RunParams params) {
  const uint32_t begin = blockIdx.x * params.chunk;
  const uint32_t end = min(begin + params.chunk, params.num_lookups);
  uint32_t runs = 0;
#pragma unroll 8
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) runs += begins_run(params, i);
  runs = sum_over_block(runs);
  if (threadIdx.x == 0) {
    params.chunk_runs[blockIdx.x] = runs;
    atomicAdd(params.count, static_cast<unsigned long long>(runs));
  }
}

// To another list: a block looks at the last lookup of the one before, which must not be a number yet.
__global__ void __launch_bounds__(kThreads) number_runs(const __grid_constant__ RunParams params) {
  __shared__ uint32_t warp_runs[kWarps];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  uint32_t earlier = 0;
  for (uint32_t block = threadIdx.x; block < blockIdx.x; block += kThreads) earlier += params.chunk_runs[block];
  uint32_t begun = sum_over_block(earlier);  // runs, before this tile

  const uint32_t begin = blockIdx.x * params.chunk;
  const uint32_t end = min(begin + params.chunk, params.num_lookups);
  for (uint32_t tile = begin; tile < end; tile += kTile) {
    // A warp takes a stretch of the tile, 32 lookups at a time, so that numbers follow the order of the list.
    const uint32_t first = tile + warp * (32 * kItems) + lane;
    Lookup lookup[kItems];
    uint32_t ordinal[kItems];  // runs of the warp that have begun with this lookup
    uint32_t heads = 0;        // bit k: lookup k begins a run
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const uint32_t i = first + 32 * k;
      if (i < end) {
        const uint2 both = __ldg(reinterpret_cast<const uint2*>(params.lookups) + i);
        lookup[k] = {both.x, both.y};
        if (begins_run(params, i)) heads |= 1u << k;
      }
    }
    uint32_t runs = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const unsigned vote = __ballot_sync(kFullWarp, heads >> k & 1);
      ordinal[k] = runs + __popc(vote & kFullWarp >> (31 - lane));
      runs += __popc(vote);
    }
    if (lane == 0) warp_runs[warp] = runs;
    __syncthreads();
    uint32_t before = begun;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_runs[w];
      begun += warp_runs[w];
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const uint32_t i = first + 32 * k;
      if (i < end) {
        // Padding is behind all rows, here as there.
        const uint32_t number = lookup[k].row < params.num_embeddings ? before + ordinal[k] - 1 : params.num_runs;
        params.numbered[i] = {number, lookup[k].position};
        if (heads >> k & 1) params.rows[number] = lookup[k].row;
      }
    }
    __syncthreads();
  }
}

// Both calls lay the workspace out alike.
class SparseBackward {
 public:
  SparseBackward(const FePlan& plan, const FeBackwardArgs& args, const DeviceInfo& device)
      : plan_(plan),
        args_(args),
        device_(device),
        call_{args, {{args.tables[0], 0, 0}}},
        sort_(plan, call_, 0, 1, device, true) {
    const int64_t blocks = int64_t{kBlocksPerSm} * device.properties.num_sms;
    chunk_ = round_up(std::max<int64_t>(ceil_div(args.num_rows, blocks), 1), kTile);
    blocks_ = ceil_div(args.num_rows, chunk_);
    chunk_runs_bytes_ = round_up(blocks_ * static_cast<int64_t>(sizeof(uint32_t)), kAlignment);
    // How wide accesses can be shows only once the values have an address.
    const int64_t scalar = scalar_bytes(args.scalar_type);
    fits_ = sort_.fits();
    for (const int64_t pack : {int64_t{16}, int64_t{8}, scalar}) {
      if (args.tables[0].embedding_dim * scalar % pack != 0) continue;
      SortedSums sums(plan, args, device);
      sums.add(call_.tables[0], nullptr, pack);
      fits_ = fits_ && sums.fits();
      flags_bytes_ = std::max(flags_bytes_, sums.flags_bytes());
      partials_bytes_ = std::max(partials_bytes_, sums.partials_bytes());
    }
  }

  bool fits() const { return fits_; }
  size_t bytes() const {
    return static_cast<size_t>(sort_.bytes() + chunk_runs_bytes_ + flags_bytes_ + partials_bytes_);
  }

  FeStatus count(int64_t* count, char* workspace, cudaStream_t stream) {
    sort_.place(workspace);
    // The count is zeroed as a table would be.
    const FeStatus status = sort_.enqueue(flags(workspace), flags_bytes_, count, sizeof(*count), stream);
    if (status != FE_OK) return status;
    RunParams params = run_params(workspace);
    params.count = reinterpret_cast<unsigned long long*>(count);
    count_runs<<<static_cast<unsigned>(blocks_), kThreads, 0, stream>>>(params);
    return check_cuda(cudaGetLastError(), "count_runs");
  }

  FeStatus sum(int64_t count, int64_t* rows, char* workspace, cudaStream_t stream) {
    sort_.place(workspace);
    RunParams params = run_params(workspace);
    params.num_runs = static_cast<uint32_t>(count);
    params.numbered = sort_.spare();
    params.rows = rows;
    number_runs<<<static_cast<unsigned>(blocks_), kThreads, 0, stream>>>(params);
    const FeStatus status = check_cuda(cudaGetLastError(), "number_runs");
    if (status != FE_OK) return status;
    TableSlice values = call_.tables[0];
    values.num_embeddings = count;
    values.weight_offset = 0;
    SortedSums sums(plan_, args_, device_);
    sums.add(values, params.numbered);
    return sums.enqueue(flags(workspace), flags(workspace) + flags_bytes_, stream);
  }

 private:
  char* chunk_runs(char* workspace) const { return workspace + sort_.bytes(); }
  char* flags(char* workspace) const { return chunk_runs(workspace) + chunk_runs_bytes_; }

  RunParams run_params(char* workspace) const {
    RunParams params{};
    params.lookups = sort_.sorted(0);
    params.num_lookups = static_cast<uint32_t>(args_.num_rows);
    params.num_embeddings = static_cast<uint32_t>(args_.tables[0].num_embeddings);
    params.chunk = static_cast<uint32_t>(chunk_);
    params.chunk_runs = reinterpret_cast<uint32_t*>(chunk_runs(workspace));
    return params;
  }

  const FePlan& plan_;
  const FeBackwardArgs& args_;
  const DeviceInfo& device_;
  BackwardCall call_;
  IndexSort sort_;
  bool fits_;
  int64_t chunk_;
  int64_t blocks_;
  int64_t chunk_runs_bytes_;
  int64_t flags_bytes_ = 0;
  int64_t partials_bytes_ = 0;
};

FeStatus check_arguments(const FeBackwardArgs* args, const size_t* workspace_bytes) {
  if (args == nullptr || workspace_bytes == nullptr || args->num_rows < 0 || args->num_tables != 1 ||
      args->tables == nullptr) {
    return FE_INVALID_ARGUMENT;
  }
  const FeTable& table = args->tables[0];
  return table.num_embeddings < 0 || table.embedding_dim < 0 ? FE_INVALID_ARGUMENT : FE_OK;
}

bool has_lookups(const FeBackwardArgs& args) { return args.num_rows > 0 && args.tables[0].num_embeddings > 0; }

// The device and the plan: the one given or the table's own.
FeStatus prepare(const FePlan* given, const FeBackwardArgs& args, const DeviceInfo** device, FePlan* plan) {
  FeStatus status = device_info(device);
  if (status != FE_OK) return status;
  if (!(*device)->cooperative) return FE_UNSUPPORTED;
  if (given != nullptr) {
    *plan = *given;
  } else {
    FePlanQuery query{};
    query.scalar_type = args.scalar_type;
    query.num_tables = 1;
    query.num_embeddings = args.tables[0].num_embeddings;
    query.embedding_dim = args.tables[0].embedding_dim;
    query.num_indices = args.num_rows;
    query.device = (*device)->properties;
    query.sparse = 1;
    status = fe_plan_embedding_backward(&query, plan);
    if (status != FE_OK) return status;
  }
  return plan->strategy == FE_STRATEGY_SORT ? FE_OK : FE_INVALID_ARGUMENT;
}

FeStatus sparse_count(const FePlan* given, const FeBackwardArgs& args, int64_t* count, void* workspace,
                      size_t* workspace_bytes, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  FeStatus status = check_cuda(cudaStreamIsCapturing(stream, &capture), "sparse_count");
  if (status != FE_OK) return status;
  if (capture != cudaStreamCaptureStatusNone) return FE_UNSUPPORTED;
  if (!has_lookups(args)) {
    *workspace_bytes = 0;
    if (workspace == nullptr) return FE_OK;
    return check_cuda(cudaMemsetAsync(count, 0, sizeof(*count), stream), "sparse_count");
  }
  const DeviceInfo* device = nullptr;
  FePlan plan;
  status = prepare(given, args, &device, &plan);
  if (status != FE_OK) return status;
  SparseBackward backward(plan, args, *device);
  if (!backward.fits()) return FE_INVALID_ARGUMENT;
  if (workspace == nullptr) {
    *workspace_bytes = backward.bytes();
    return FE_OK;
  }
  if (*workspace_bytes < backward.bytes()) return FE_WORKSPACE_TOO_SMALL;
  return backward.count(count, static_cast<char*>(workspace), stream);
}

FeStatus sparse_backward(const FePlan* given, const FeBackwardArgs& args, int64_t count, int64_t* rows, void* workspace,
                         size_t* workspace_bytes, cudaStream_t stream) {
  if (!has_lookups(args) || count == 0) return FE_OK;
  const FeTable& table = args.tables[0];
  if (count < 0 || count > std::min(args.num_rows, table.num_embeddings) || workspace == nullptr ||
      args.grad_weight_numel != count * table.embedding_dim) {
    return FE_INVALID_ARGUMENT;
  }
  const DeviceInfo* device = nullptr;
  FePlan plan;
  const FeStatus status = prepare(given, args, &device, &plan);
  if (status != FE_OK) return status;
  SparseBackward backward(plan, args, *device);
  if (!backward.fits()) return FE_INVALID_ARGUMENT;
  if (*workspace_bytes < backward.bytes()) return FE_WORKSPACE_TOO_SMALL;
  return backward.sum(count, rows, static_cast<char*>(workspace), stream);
}

}  // namespace
}  // namespace fast_embedding

extern "C" {

FeStatus fe_cuda_embedding_sparse_count(const FePlan* plan, const FeBackwardArgs* args, int64_t* count, void* workspace,
                                        size_t* workspace_bytes, void* stream) {
  using namespace fast_embedding;
  const FeStatus status = check_arguments(args, workspace_bytes);
  if (status != FE_OK || (workspace != nullptr && count == nullptr)) return FE_INVALID_ARGUMENT;
  return sparse_count(plan, *args, count, workspace, workspace_bytes, static_cast<cudaStream_t>(stream));
}

FeStatus fe_cuda_embedding_sparse_backward(const FePlan* plan, const FeBackwardArgs* args, int64_t count, int64_t* rows,
                                           void* workspace, size_t* workspace_bytes, void* stream) {
  using namespace fast_embedding;
  const FeStatus status = check_arguments(args, workspace_bytes);
  if (status != FE_OK || (count > 0 && rows == nullptr)) return FE_INVALID_ARGUMENT;
  return sparse_backward(plan, *args, count, rows, workspace, workspace_bytes, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
