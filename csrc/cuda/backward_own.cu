// OWN: for few indices. A block owns a range of rows and a chunk of columns, reads all indices, keeps those of its
// rows, sorts them by row and position, sums each run in registers and writes every row of its range once, zero rows
// included. One launch, no atomics, no barrier across the grid, one rounding; the order of every sum is fixed, so the
// result is reproducible. Reading N indices in every block is what limits it to small N.
#include "block.cuh"
#include "runs.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 8;  // gradient loads in flight in a thread
constexpr int kMaxIndices = 2048;
constexpr int kItems = kMaxIndices / kThreads;
constexpr int kPositionBits = 11;
constexpr int kMaxRowsOfBlock = 1 << 16;
constexpr int kDigitBits = 5;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBlocksPerSm = 2;  // 3 take as long on an average, 4 longer: all of them read all indices
constexpr int kMaxLanes = 16;
constexpr int kMinLanes = 2;
static_assert(kMaxIndices <= 1 << kPositionBits && kMaxRowsOfBlock <= 1 << (32 - kPositionBits));
static_assert(kWarps * kBins == kThreads);

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
  uint32_t rows_of_block;
  int32_t lanes;  // threads that share a row: a column chunk
  int32_t write_zeros;
  Divisor row_bytes;
};

struct OwnShared {
  uint32_t list[2][kMaxIndices];           // row within the range << kPositionBits | position
  uint32_t touched[kMaxRowsOfBlock / 32];  // bit set: the row has a lookup
  uint32_t count[kThreads];                // of entries: by warp, or by digit and warp
  uint32_t warp_sum[kWarps];
};

// Where a warp's 32-entry groups begin in a list of `length` entries that the warps share in order.
struct Stretch {
  uint32_t begin, items;

  __device__ explicit Stretch(uint32_t length) : items((length + kThreads - 1) / kThreads) {
    begin = threadIdx.x / 32 * items * 32;
  }
  __device__ uint32_t at(int k) const { return begin + k * 32 + threadIdx.x % 32; }
};

__device__ inline unsigned lanes_below() { return (1u << threadIdx.x % 32) - 1; }

// The number of entries before each in shared.count. Begins and ends with a barrier.
__device__ inline void scan_counts(OwnShared& shared) {
  __syncthreads();
  shared.count[threadIdx.x] = scan_threads<kThreads>(shared.count[threadIdx.x], shared.warp_sum).before;
  __syncthreads();
}

// Sorts a list of up to 32 entries into the other. Ends with a barrier.
__device__ inline void sort_in_warp(OwnShared& shared, uint32_t length) {
  if (threadIdx.x < 32) {
    const uint32_t entry = threadIdx.x < length ? shared.list[0][threadIdx.x] : 0xffffffffu;
    uint32_t rank = 0;
    for (uint32_t i = 0; i < length; ++i) rank += __shfl_sync(kFullWarp, entry, i) < entry;
    if (threadIdx.x < length) shared.list[1][rank] = entry;
  }
  __syncthreads();
}

// One pass of a stable radix sort, from list `from` to the other: warps take stretches of the list in order and find
// equal digits by ballots.
__device__ inline void sort_by_digit(OwnShared& shared, int from, uint32_t length, int shift) {
  const Stretch stretch(length);
  const int warp = threadIdx.x / 32;
  uint32_t entry[kItems];
  uint32_t rank[kItems];
  shared.count[threadIdx.x % 32 * kWarps + warp] = 0;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= stretch.items) break;
    const bool present = stretch.at(k) < length;
    entry[k] = present ? shared.list[from][stretch.at(k)] : 0;
    const uint32_t digit = entry[k] >> shift & (kBins - 1);
    const unsigned peers = lanes_with_digit<kDigitBits>(digit, present);
    uint32_t& count = shared.count[digit * kWarps + warp];
    rank[k] = count + __popc(peers & lanes_below());
    __syncwarp();
    if (present && (peers & lanes_below()) == 0) count += __popc(peers);
    __syncwarp();
  }
  scan_counts(shared);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= stretch.items) break;
    if (stretch.at(k) < length) {
      const uint32_t digit = entry[k] >> shift & (kBins - 1);
      shared.list[1 - from][shared.count[digit * kWarps + warp] + rank[k]] = entry[k];
    }
  }
  __syncthreads();
}

// Finds which of this thread's indices is out of range, and fails.
static __noinline__ __device__ void fail_in_list(const OwnParams& params, const Stretch& stretch) {
  for (int k = 0; k < stretch.items; ++k) {
    if (stretch.at(k) >= params.num_indices) break;
    const int64_t index = load_index(params.indices, params.index_type, stretch.at(k) * params.index_stride);
    check_index(signed_index(index, params.index_type), params.num_embeddings);
  }
}

// Lists the lookups of rows [first_row, first_row + num_rows) in the order of positions; returns their number. Ends
// with a barrier.
__device__ inline uint32_t list_lookups(OwnShared& shared, const OwnParams& params, uint32_t first_row,
                                        uint32_t num_rows) {
  const uint32_t padding_row = static_cast<uint32_t>(params.padding_idx) - first_row;
  const Stretch stretch(params.num_indices);
  int64_t index[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k < stretch.items && stretch.at(k) < params.num_indices) {
      index[k] = load_index(params.indices, params.index_type, stretch.at(k) * params.index_stride);
    }
  }
  bool in_range = true;  // checked together: a branch behind each load would make the next load wait for it
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k < stretch.items && stretch.at(k) < params.num_indices) {
      in_range = in_range && is_in_range(index[k], params.num_embeddings);  // nor is a negative int32, as V < 2^31
    }
  }
  if (!in_range) fail_in_list(params, stretch);
  unsigned kept[kItems];
  uint32_t row[kItems];
  uint32_t count = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= stretch.items) break;
    row[k] = static_cast<uint32_t>(index[k]) - first_row;
    const bool keep = stretch.at(k) < params.num_indices && row[k] < num_rows && row[k] != padding_row;
    kept[k] = __ballot_sync(kFullWarp, keep);
    count += __popc(kept[k]);
  }
  if (threadIdx.x % 32 == 0) shared.warp_sum[threadIdx.x / 32] = count;
  __syncthreads();
  uint32_t before = 0;
  uint32_t length = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < threadIdx.x / 32) before += shared.warp_sum[warp];
    length += shared.warp_sum[warp];
  }
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= stretch.items) break;
    if (kept[k] >> threadIdx.x % 32 & 1) {
      shared.list[0][before + __popc(kept[k] & lanes_below())] = row[k] << kPositionBits | stretch.at(k);
    }
    before += __popc(kept[k]);
  }
  __syncthreads();
  return length;
}

// Writes zeros to rows [begin, end) of the range that have no lookup.
template <typename scalar_t>
__device__ inline void zero_rows(const OwnShared& shared, const OwnParams& params, scalar_t* range, uint32_t begin,
                                 uint32_t end) {
  const auto touched = [&](uint32_t row) { return shared.touched[row / 32] >> row % 32 & 1; };
  char* memory = reinterpret_cast<char*>(range);
  const uint32_t row_bytes = params.row_bytes.divisor;
  const uint32_t first = begin * row_bytes, last = end * row_bytes;
  const uint32_t shift = reinterpret_cast<uintptr_t>(memory) % 16;  // words are aligned, the range need not be
  for (uint32_t word = (first + shift) / 16 + threadIdx.x; word * 16 < last + shift; word += kThreads) {
    const uint32_t from = word * 16 < first + shift ? first : word * 16 - shift;
    const uint32_t to = min(word * 16 + 16 - shift, last);
    uint32_t row = params.row_bytes.quotient(from);
    bool some = touched(row), all = some;
    for (uint32_t next = (row + 1) * row_bytes; next < to; next += row_bytes) {
      const bool next_touched = touched(++row);
      some = some || next_touched;
      all = all && next_touched;
    }
    if (!some && to - from == 16) {
      *reinterpret_cast<uint4*>(memory + from) = make_uint4(0, 0, 0, 0);
    } else if (!all) {
      for (uint32_t at = from; at < to; at += sizeof(scalar_t)) {
        if (!touched(params.row_bytes.quotient(at))) *reinterpret_cast<scalar_t*>(memory + at) = narrow<scalar_t>(0);
      }
    }
  }
}

// kScaled: a row's sum is divided by the number of its lookups.
template <typename scalar_t, int kSize, bool kScaled>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) own_backward(const __grid_constant__ OwnParams params) {
  using sum_t = acc_t<scalar_t>;
  __shared__ OwnShared shared;
  __shared__ Edges<sum_t, kSize, kThreads> edges;

  const uint32_t first_row = blockIdx.y * params.rows_of_block;  // below 2^31, as V is
  const uint32_t num_rows = min(params.rows_of_block, static_cast<uint32_t>(params.num_embeddings) - first_row);
  const uint32_t chunk = blockIdx.x;

  if (params.write_zeros) {
    for (uint32_t word = threadIdx.x; word < (num_rows + 31) / 32; word += kThreads) shared.touched[word] = 0;
  }
  const uint32_t length = list_lookups(shared, params, first_row, num_rows);
  int sorted = 0;
  if (length > 1 && length <= 32 && num_rows > 1) {
    sort_in_warp(shared, length);
    sorted = 1;
  } else if (length > 1) {
    for (int shift = kPositionBits; (num_rows - 1) >> (shift - kPositionBits) != 0; shift += kDigitBits) {
      sort_by_digit(shared, sorted, length, shift);
      sorted = 1 - sorted;
    }
  }
  const uint32_t* list = shared.list[sorted];
  const auto row_at = [&](uint32_t i) { return list[i] >> kPositionBits; };
  scalar_t* range = static_cast<scalar_t*>(params.grad_weight) + static_cast<int64_t>(first_row) * params.embedding_dim;
  if (params.write_zeros) {
    for (uint32_t i = threadIdx.x; i < length; i += kThreads) {
      const uint32_t row = row_at(i);
      if (i == 0 || row_at(i - 1) != row) atomicOr(&shared.touched[row / 32], 1u << row % 32);
    }
    __syncthreads();
    // The blocks of a range share its zeros by rows, not by columns: they are written in one piece.
    const uint32_t share = (num_rows + gridDim.x - 1) / gridDim.x;
    const uint32_t begin = min(chunk * share, num_rows);
    zero_rows(shared, params, range, begin, min(begin + share, num_rows));
  }

  const uint32_t group = small_quotient(threadIdx.x, params.lanes);
  const uint32_t column = (chunk * params.lanes + threadIdx.x - group * params.lanes) * kSize;
  const bool active = group < small_quotient(kThreads, params.lanes) && column < params.embedding_dim;
  const scalar_t* grad_output = static_cast<const scalar_t*>(params.grad_output) + column;
  sum_runs<scalar_t, kSize, kUnroll, false>(
      length, params.lanes, active, edges, row_at,
      [&](uint32_t i) { return grad_output + (list[i] & (kMaxIndices - 1)) * params.grad_output_stride; },
      [&](uint32_t row, const sum_t(&sum)[kSize]) {
        scalar_t* address = range + static_cast<int64_t>(row) * params.embedding_dim + column;
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
  // Wide chunks read the gradient best; where rows are few, narrow ones spread them over more of the device.
  int64_t lanes = kMaxLanes;
  while (lanes > kMinLanes && params.num_embeddings * ceil_div(packs, lanes) < device.properties.num_sms) {
    lanes /= 2;
  }
  const int64_t chunks = ceil_div(packs, lanes);
  params.lanes = static_cast<int32_t>(ceil_div(packs, chunks));
  // One wave of blocks, as each reads all indices.
  const int64_t ranges = std::max<int64_t>(1, kBlocksPerSm * device.properties.num_sms / chunks);
  const int64_t rows = std::clamp<int64_t>(ceil_div(params.num_embeddings, ranges), 1, kMaxRowsOfBlock);
  params.rows_of_block = static_cast<uint32_t>(rows);
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(ceil_div(params.num_embeddings, rows)));
  const auto kernel = scaled ? own_backward<scalar_t, kSize, true> : own_backward<scalar_t, kSize, false>;
  kernel<<<grid, kThreads, 0, stream>>>(params);
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
  const bool zeros_first = args.grad_weight_numel > table_numel || args.grad_weight_numel * scalar >= kZeroLaunchBytes;
  if (zeros_first) {
    const FeStatus status =
        write_zeros(args.grad_weight, args.grad_weight_numel * scalar, Begin::AFTER_ALL, device, stream);
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
  params.write_zeros = !zeros_first;
  params.row_bytes = Divisor(static_cast<uint32_t>(table.embedding_dim * scalar));
  const int64_t bytes = narrow_pack_bytes(args, table);
  return dispatch_scalar(args.scalar_type, [&](auto value) {
    using scalar_t = decltype(value);
    return dispatch_narrow_pack<scalar_t>(bytes, [&](auto size) {
      return launch<scalar_t, decltype(size)::value>(params, args.scale_grad_by_freq != 0, device, stream);
    });
  });
}

}  // namespace fast_embedding
