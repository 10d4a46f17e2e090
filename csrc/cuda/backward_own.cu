// OWN: for few indices. A block owns a range of rows and a chunk of columns, reads all indices, keeps those of its
// rows, sorts them by row and position, sums each run in registers and writes every row of its range once, zero rows
// included. One launch, no atomics, no barrier across the grid, one rounding; the order of every sum is fixed, so the
// result is reproducible. Reading N indices in every block is what limits it to small N.
#include "runs.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;  // gradient loads in flight in a thread
constexpr int kMaxIndices = 2048;
constexpr int kItems = kMaxIndices / kThreads;
constexpr int kPositionBits = 11;
constexpr int kMaxRowsOfBlock = 1 << 16;
constexpr int kMaxLanes = 16;  // narrow chunks: a single hot row is spread over as many blocks as can be
static_assert(kMaxIndices <= 1 << kPositionBits && kMaxRowsOfBlock <= 1 << (32 - kPositionBits));

struct OwnParams {
  const void* indices;
  FeIndexType index_type;
  int32_t num_indices;
  int64_t index_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;  // of the table
  int64_t num_embeddings;
  int64_t padding_idx;
  int32_t embedding_dim;
  int32_t rows_of_block;
  int32_t lanes;
  int32_t chunks;
  int32_t write_zeros;
};

struct OwnShared {
  uint32_t list[kMaxIndices];              // row within the range << kPositionBits | position
  uint32_t touched[kMaxRowsOfBlock / 32];  // bit set: the row has a lookup
  uint32_t length;
};

// Ascending; `size` is a power of two (Batcher's bitonic sort, 1968).
__device__ inline void sort_list(uint32_t* list, uint32_t size) {
  for (uint32_t block = 2; block <= size; block *= 2) {
    for (uint32_t stride = block / 2; stride > 0; stride /= 2) {
      for (uint32_t i = threadIdx.x; i < size / 2; i += kThreads) {
        const uint32_t low = 2 * i - (i & (stride - 1));
        const uint32_t high = low + stride;
        const bool ascending = (low & block) == 0;
        const uint32_t a = list[low], b = list[high];
        if ((a > b) == ascending) {
          list[low] = b;
          list[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// kScaled: a row's sum is divided by the number of its lookups.
template <typename scalar_t, int kSize, bool kScaled>
__global__ void __launch_bounds__(kThreads) own_backward(const __grid_constant__ OwnParams params) {
  using sum_t = acc_t<scalar_t>;
  __shared__ OwnShared shared;
  __shared__ Edges<sum_t, kSize, kThreads> edges;

  const int64_t first_row = static_cast<int64_t>(blockIdx.x / params.chunks) * params.rows_of_block;
  const int num_rows = min(static_cast<int64_t>(params.rows_of_block), params.num_embeddings - first_row);
  const int chunk = blockIdx.x % params.chunks;

  int64_t index[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int position = k * kThreads + threadIdx.x;
    if (position < params.num_indices) {
      index[k] = load_index(params.indices, params.index_type, position * params.index_stride);
    }
  }
  for (int word = threadIdx.x; word < (num_rows + 31) / 32; word += kThreads) shared.touched[word] = 0;
  if (threadIdx.x == 0) shared.length = 0;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int position = k * kThreads + threadIdx.x;
    if (position < params.num_indices) {
      index[k] = signed_index(index[k], params.index_type);
      check_index(index[k], params.num_embeddings);
      const int64_t row = index[k] - first_row;
      if (row >= 0 && row < num_rows && index[k] != params.padding_idx) {
        shared.list[atomicAdd(&shared.length, 1u)] = static_cast<uint32_t>(row) << kPositionBits | position;
        atomicOr(&shared.touched[row / 32], 1u << row % 32);
      }
    }
  }
  __syncthreads();
  const uint32_t length = shared.length;
  uint32_t size = 1;
  while (size < length) size *= 2;
  for (uint32_t i = length + threadIdx.x; i < size; i += kThreads) shared.list[i] = 0xffffffffu;
  __syncthreads();
  sort_list(shared.list, size);

  const int groups = kThreads / params.lanes;
  const int group = threadIdx.x / params.lanes;
  const int column = (chunk * params.lanes + threadIdx.x - group * params.lanes) * kSize;
  const bool active = group < groups && column < params.embedding_dim;
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight) + first_row * params.embedding_dim + column;
  if (params.write_zeros && active) {
    const sum_t zeros[kSize] = {};
    for (int row = group; row < num_rows; row += groups) {
      if (!(shared.touched[row / 32] >> row % 32 & 1)) {
        store<scalar_t>(grad_weight + static_cast<int64_t>(row) * params.embedding_dim, zeros);
      }
    }
  }
  const scalar_t* grad_output = static_cast<const scalar_t*>(params.grad_output) + column;
  const auto row_at = [&](uint32_t i) { return shared.list[i] >> kPositionBits; };
  sum_runs<scalar_t, kSize, kUnroll>(
      length, params.lanes, active, edges, row_at,
      [&](uint32_t i) { return grad_output + (shared.list[i] & (kMaxIndices - 1)) * params.grad_output_stride; },
      [&](uint32_t row, const sum_t(&sum)[kSize]) {
        scalar_t* address = grad_weight + static_cast<int64_t>(row) * params.embedding_dim;
        if constexpr (kScaled) {
          const uint32_t count = first_from(0, length, row + 1, row_at) - first_from(0, length, row, row_at);
          store_mean<scalar_t>(address, sum, count);
        } else {
          store<scalar_t>(address, sum);
        }
      });
}

template <typename scalar_t, int kSize>
FeStatus launch(OwnParams& params, bool scaled, const DeviceInfo& device, cudaStream_t stream) {
  const int64_t packs = ceil_div(params.embedding_dim, kSize);
  params.chunks = static_cast<int32_t>(ceil_div(packs, kMaxLanes));
  params.lanes = static_cast<int32_t>(ceil_div(packs, params.chunks));
  // Four blocks an SM, which is as many as hold the shared memory at once on the smallest of devices.
  const int64_t ranges = std::max<int64_t>(1, 4 * device.properties.num_sms / params.chunks);
  const int64_t rows = std::clamp<int64_t>(ceil_div(params.num_embeddings, ranges), 1, kMaxRowsOfBlock);
  params.rows_of_block = static_cast<int32_t>(rows);
  const int64_t blocks = ceil_div(params.num_embeddings, rows) * params.chunks;
  if (blocks > INT32_MAX) return FE_UNSUPPORTED;
  const auto kernel = scaled ? own_backward<scalar_t, kSize, true> : own_backward<scalar_t, kSize, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return check_cuda(cudaGetLastError(), "backward_own");
}

}  // namespace

FeStatus backward_own(const FePlan& /*plan*/, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                      size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  if (call.tables.size() != 1 || args.num_rows > kMaxIndices) return FE_INVALID_ARGUMENT;
  const TableSlice& table = call.tables[0];
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const int64_t table_numel = table.num_embeddings * table.embedding_dim;
  if (workspace == nullptr) {
    *workspace_bytes = 0;
    return FE_OK;
  }
  // Zeros that lie around the table, or are many.
  const bool memset = args.grad_weight_numel > table_numel || args.grad_weight_numel * scalar >= kMemsetBytes;
  if (memset) {
    const FeStatus status =
        check_cuda(cudaMemsetAsync(args.grad_weight, 0, args.grad_weight_numel * scalar, stream), "backward_own");
    if (status != FE_OK) return status;
  }
  if (table_numel == 0) return FE_OK;

  OwnParams params{};
  params.indices = args.indices;
  params.index_type = args.index_type;
  params.num_indices = static_cast<int32_t>(args.num_rows);
  params.index_stride = args.index_row_stride;
  params.grad_output = args.grad_output;
  params.grad_output_stride = args.grad_output_stride;
  params.grad_weight = static_cast<char*>(args.grad_weight) + table.weight_offset * scalar;
  params.num_embeddings = table.num_embeddings;
  params.padding_idx = table.padding_idx;
  params.embedding_dim = static_cast<int32_t>(table.embedding_dim);
  params.write_zeros = !memset;
  const int64_t bytes = pack_bytes(args, table);
  return dispatch_scalar(args.scalar_type, [&](auto value) {
    using scalar_t = decltype(value);
    return dispatch_pack<scalar_t>(bytes, [&](auto size) {
      return launch<scalar_t, decltype(size)::value>(params, args.scale_grad_by_freq != 0, device, stream);
    });
  });
}

}  // namespace fast_embedding
