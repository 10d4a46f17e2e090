// SORT: a stable radix sort of (row, position) pairs, then sums over the runs of equal rows. Reproducible, and exact to
// one rounding for 16-bit gradients of any size.
//
//   1. the gradient is zeroed and the sort keys are written;
//   2. cub::DeviceRadixSort on as many bits as the rows need;
//   3. a lane group sums `segment` consecutive entries: runs inside its segment go to the gradient with plain stores,
//      the runs that it shares with a neighbour become partial sums, at most two a segment;
//   4. the partial sums are again a list sorted by row: step 3 repeats on it until one segment is left. Each level is
//      shorter by kEdgeSegment / 2, so a row with 10^6 indices takes four.
//
// All tables of a call are sorted together: a key is the table's first key plus the index.
#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;
constexpr int kUnroll = 4;        // gradient loads in flight in a thread
constexpr int kEdgeSegment = 64;  // partial sums that a lane group sums
constexpr int kMaxLanes = 64;
constexpr int kMaxTables = 64;            // in one sort: the parameters of a kernel end at 4 KB
constexpr uint32_t kNoSum = 0x80000000u;  // marks an entry of the edge list that only keeps a run together
constexpr int64_t kAlignment = 256;

struct SortTable {
  uint32_t first_key;
  int32_t num_embeddings;
  int64_t weight_offset;
  int64_t padding_idx;
  int32_t embedding_dim;
  int32_t first_column;
};

struct SortParams {
  SortTable table[kMaxTables];
  int32_t num_tables;
  Divisor tables_divisor;
  int32_t max_embedding_dim;
  uint32_t num_keys;  // the key of padding, above all rows
  FeIndexType index_type;
  const void* indices;  // of the first table
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  int64_t num_entries;  // num_rows * num_tables; entry e is row e / num_tables, table e % num_tables
  void* grad_weight;
  int64_t grad_weight_numel;
  int32_t zero_first;
};

// A level of step 3 and 4.
struct Level {
  const uint32_t* keys;       // sorted; at the edge levels with kNoSum marks
  const uint32_t* positions;  // first level: the entry that stands here
  const void* sums;           // edge levels: [num_entries, max_embedding_dim] accumulators
  int64_t num_entries;
  int32_t segment;
  uint32_t* edge_keys;  // [2 * segments]
  void* edge_sums;      // [2 * segments, max_embedding_dim]
};

__global__ void __launch_bounds__(kThreads)
    write_keys(const __grid_constant__ SortParams params, uint32_t* keys, uint32_t* positions) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t entry = thread; entry < params.num_entries; entry += num_threads) {
    const uint32_t row = params.tables_divisor.quotient(static_cast<uint32_t>(entry));
    const uint32_t t = static_cast<uint32_t>(entry) - row * params.num_tables;
    const SortTable& table = params.table[t];
    const int64_t index =
        load_index(params.indices, params.index_type, row * params.index_row_stride + t * params.index_table_stride);
    check_index(index, table.num_embeddings);
    keys[entry] = index == table.padding_idx ? params.num_keys : table.first_key + static_cast<uint32_t>(index);
    positions[entry] = static_cast<uint32_t>(entry);
  }
}

__device__ inline const SortTable& table_of_key(const SortParams& params, uint32_t key) {
  int low = 0, high = params.num_tables - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (params.table[middle].first_key <= key) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return params.table[low];
}

// What a lane group adds to its sums: nothing, or a pack of columns.
template <typename source_t>
struct Addend {
  uint32_t key;
  const source_t* address;  // null: nothing
};

// Entry i of the level's list, seen by the threads that own `column`.
template <typename scalar_t, bool kOneTable>
__device__ inline Addend<scalar_t> read_entry(const SortParams& params, const Level& level, int64_t i, int column) {
  const uint32_t key = __ldg(level.keys + i);
  const uint32_t entry = __ldg(level.positions + i);
  const scalar_t* grad_output = static_cast<const scalar_t*>(params.grad_output);
  if (key == params.num_keys) return {key, nullptr};
  if constexpr (kOneTable) {
    return {key, grad_output + entry * params.grad_output_stride + column};
  } else {
    const uint32_t row = params.tables_divisor.quotient(entry);
    const SortTable& table = params.table[entry - row * params.num_tables];
    if (column >= table.embedding_dim) return {key, nullptr};
    return {key, grad_output + row * params.grad_output_stride + table.first_column + column};
  }
}

template <typename sum_t>
__device__ inline Addend<sum_t> read_edge(const SortParams& params, const Level& level, int64_t i, int column) {
  const uint32_t key = level.keys[i];
  const sum_t* sums = static_cast<const sum_t*>(level.sums);
  return {key & ~kNoSum, key < params.num_keys ? sums + i * params.max_embedding_dim + column : nullptr};
}

// One lane group, one segment. kEdges: the entries are partial sums of the level before, else rows of grad_output.
template <typename scalar_t, int kSize, bool kEdges, bool kOneTable>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_segments(const __grid_constant__ SortParams params, const __grid_constant__ Level level, int lanes) {
  using sum_t = acc_t<scalar_t>;
  using source_t = std::conditional_t<kEdges, sum_t, scalar_t>;
  const int groups = kThreads / lanes;
  const int group = threadIdx.x / lanes;
  const int column = (blockIdx.y * lanes + threadIdx.x - group * lanes) * kSize;
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * groups + group;
  const int64_t begin = segment * level.segment;
  if (group >= groups || column >= params.max_embedding_dim || begin >= level.num_entries) return;
  const int64_t end = min(begin + level.segment, level.num_entries);

  const auto read = [&](int64_t i) -> Addend<source_t> {
    if constexpr (kEdges) {
      return read_edge<sum_t>(params, level, i, column);
    } else {
      return read_entry<scalar_t, kOneTable>(params, level, i, column);
    }
  };

  // A run that reaches over an end of the segment becomes an edge: slot 2s if it comes in, 2s + 1 if it only goes out.
  const uint32_t before = begin > 0 ? level.keys[begin - 1] & ~kNoSum : params.num_keys;
  const uint32_t after = end < level.num_entries ? level.keys[end] & ~kNoSum : params.num_keys;
  uint32_t edge_key[2] = {params.num_keys, params.num_keys};
  bool edge_used[2] = {false, false};

  Addend<source_t> next[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) next[k] = read(min(begin + k, end - 1));
  uint32_t current = next[0].key;
  bool incoming = current == before && current != params.num_keys;
  sum_t sum[kSize] = {};

  const auto finish_run = [&](bool last) {
    if (current == params.num_keys) return;  // padding, or nothing
    const bool outgoing = last && current == after;
    const SortTable& table = kOneTable ? params.table[0] : table_of_key(params, current);
    if (incoming || outgoing) {
      const int slot = incoming ? 0 : 1;
      edge_key[slot] = current;
      edge_used[slot] = true;
      if (column < table.embedding_dim) {
        sum_t* edge = static_cast<sum_t*>(level.edge_sums) + (2 * segment + slot) * params.max_embedding_dim + column;
#pragma unroll
        for (int j = 0; j < kSize; ++j) edge[j] = sum[j];
      }
      // The run goes on in the next segment: the unused slot between must not part it.
      if (incoming && outgoing) edge_key[1] = current;
    } else if (column < table.embedding_dim) {
      const int64_t row = current - table.first_key;
      store<scalar_t>(
          static_cast<scalar_t*>(params.grad_weight) + table.weight_offset + row * table.embedding_dim + column, sum);
    }
  };

  for (int64_t i = begin; i < end; i += kUnroll) {
    Pack<source_t, kSize> value[kUnroll];
    uint32_t key[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      key[k] = next[k].key;
      value[k] = Pack<source_t, kSize>{};
      if (i + k < end && next[k].address != nullptr) value[k] = load_once<kSize>(next[k].address);
    }
    // Where to read next, while the reads are under way.
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) next[k] = read(min(i + kUnroll + k, end - 1));
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (i + k >= end) break;
      if (key[k] != current) {
        finish_run(false);
        incoming = false;
        current = key[k];
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] = 0;
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += widen(value[k].value[j]);
    }
  }
  finish_run(true);

  if (level.edge_keys != nullptr && column == 0) {
    // An unused slot takes the key beside it, marked, so that the list stays one of contiguous runs.
    if (!edge_used[0]) edge_key[0] = edge_key[1];
    if (!edge_used[1] && edge_key[1] == params.num_keys) edge_key[1] = edge_key[0];
    level.edge_keys[2 * segment] = edge_key[0] | (edge_used[0] ? 0 : kNoSum);
    level.edge_keys[2 * segment + 1] = edge_key[1] | (edge_used[1] ? 0 : kNoSum);
  }
}

int64_t num_segments(int64_t entries, int64_t segment) { return ceil_div(entries, segment); }

// Where everything stands in the workspace. The buffers of the levels alternate between two.
struct Workspace {
  int64_t keys[2], positions[2], temporary, edge_keys[2], edge_sums[2], bytes = 0;
  size_t temporary_bytes = 0;

  int64_t take(int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, kAlignment);
    return offset;
  }
};

int key_bits(uint32_t num_keys) {  // num_keys itself is the key of padding
  int bits = 1;
  while (bits < 32 && num_keys >> bits != 0) ++bits;
  return bits;
}

FeStatus lay_out(const SortParams& params, int segment, FeScalarType type, Workspace* workspace) {
  const int64_t n = params.num_entries;
  FeStatus status = check_cuda(cub::DeviceRadixSort::SortPairs(
                                   nullptr, workspace->temporary_bytes, static_cast<const uint32_t*>(nullptr),
                                   static_cast<uint32_t*>(nullptr), static_cast<const uint32_t*>(nullptr),
                                   static_cast<uint32_t*>(nullptr), static_cast<int>(n), 0, key_bits(params.num_keys)),
                               "backward_sort workspace");
  for (int i = 0; i < 2; ++i) {
    workspace->keys[i] = workspace->take(n * 4);
    workspace->positions[i] = workspace->take(n * 4);
  }
  workspace->temporary = workspace->take(workspace->temporary_bytes);
  int64_t edges = 2 * num_segments(n, segment);
  for (int i = 0; i < 2; ++i) {
    workspace->edge_keys[i] = workspace->take(edges * 4);
    workspace->edge_sums[i] = workspace->take(edges * params.max_embedding_dim * accumulator_bytes(type));
    edges = 2 * num_segments(edges, kEdgeSegment);
  }
  return status;
}

template <typename scalar_t, int kSize, bool kEdges, bool kOneTable>
FeStatus launch_level(const SortParams& params, const Level& level, cudaStream_t stream) {
  const int64_t packs = ceil_div(params.max_embedding_dim, kSize);
  const int64_t chunks = ceil_div(packs, kMaxLanes);
  const int lanes = static_cast<int>(ceil_div(packs, chunks));
  const int64_t blocks = ceil_div(num_segments(level.num_entries, level.segment), kThreads / lanes);
  if (chunks > 65535) return FE_UNSUPPORTED;
  sum_segments<scalar_t, kSize, kEdges, kOneTable>
      <<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(chunks)), kThreads, 0, stream>>>(params, level,
                                                                                                    lanes);
  return check_cuda(cudaGetLastError(), "backward_sort");
}

template <typename scalar_t, int kSize>
FeStatus sum_runs(const SortParams& params, int segment, const Workspace& layout, char* memory, cudaStream_t stream) {
  Level level{};
  level.keys = reinterpret_cast<const uint32_t*>(memory + layout.keys[1]);
  level.positions = reinterpret_cast<const uint32_t*>(memory + layout.positions[1]);
  level.num_entries = params.num_entries;
  level.segment = segment;
  for (int buffer = 0;; buffer ^= 1) {
    const int64_t segments = num_segments(level.num_entries, level.segment);
    level.edge_keys = segments > 1 ? reinterpret_cast<uint32_t*>(memory + layout.edge_keys[buffer]) : nullptr;
    level.edge_sums = memory + layout.edge_sums[buffer];
    const FeStatus status =
        level.positions == nullptr ? launch_level<scalar_t, kSize, true, false>(params, level, stream)
        : params.num_tables == 1   ? launch_level<scalar_t, kSize, false, true>(params, level, stream)
                                   : launch_level<scalar_t, kSize, false, false>(params, level, stream);
    if (status != FE_OK || segments == 1) return status;
    level.keys = level.edge_keys;
    level.sums = level.edge_sums;
    level.positions = nullptr;
    level.num_entries = 2 * segments;
    level.segment = kEdgeSegment;
  }
}

template <typename scalar_t>
FeStatus run(const SortParams& params, const FePlan& plan, int64_t pack, const Workspace& layout, char* memory,
             int num_sms, cudaStream_t stream) {
  const int64_t blocks = 8 * num_sms;
  FeStatus status = FE_OK;
  if (params.zero_first) {
    status = check_cuda(cudaMemsetAsync(params.grad_weight, 0, params.grad_weight_numel * sizeof(scalar_t), stream),
                        "backward_sort");
    if (status != FE_OK) return status;
  }
  const auto words = [&](int64_t offset) { return reinterpret_cast<uint32_t*>(memory + offset); };
  write_keys<<<static_cast<unsigned>(std::min(blocks, ceil_div(params.num_entries, kThreads))), kThreads, 0, stream>>>(
      params, words(layout.keys[0]), words(layout.positions[0]));
  status = check_cuda(cudaGetLastError(), "backward_sort");
  if (status != FE_OK) return status;
  size_t temporary_bytes = layout.temporary_bytes;
  status = check_cuda(
      cub::DeviceRadixSort::SortPairs(
          memory + layout.temporary, temporary_bytes, static_cast<const uint32_t*>(words(layout.keys[0])),
          words(layout.keys[1]), static_cast<const uint32_t*>(words(layout.positions[0])), words(layout.positions[1]),
          static_cast<int>(params.num_entries), 0, key_bits(params.num_keys), stream),
      "backward_sort");
  if (status != FE_OK) return status;
  return dispatch_pack<scalar_t>(pack, [&](auto size) {
    return sum_runs<scalar_t, decltype(size)::value>(params, plan.segment, layout, memory, stream);
  });
}

}  // namespace

FeStatus backward_sort(const FePlan& plan, const FeBackwardArgs& args, const DeviceInfo& device, void* workspace,
                       size_t* workspace_bytes, cudaStream_t stream) {
  if (plan.segment < kUnroll || plan.segment > 1024) return FE_INVALID_ARGUMENT;
  size_t needed = 0;
  int64_t first_column = 0;
  for (int64_t first = 0; first < args.num_tables; first += kMaxTables) {
    const int64_t last = std::min<int64_t>(first + kMaxTables, args.num_tables);
    SortParams params{};
    params.num_tables = static_cast<int32_t>(last - first);
    params.tables_divisor = Divisor(params.num_tables);
    int64_t pack = 16;
    int64_t keys = 0;
    for (int64_t t = first; t < last; ++t) {
      const FeTable& source = args.tables[t];
      SortTable& table = params.table[t - first];
      table.first_key = static_cast<uint32_t>(keys);
      table.num_embeddings = static_cast<int32_t>(source.num_embeddings);
      table.weight_offset = source.weight_offset;
      table.padding_idx = source.padding_idx;
      table.embedding_dim = static_cast<int32_t>(source.embedding_dim);
      table.first_column = static_cast<int32_t>(first_column);
      params.max_embedding_dim = std::max(params.max_embedding_dim, table.embedding_dim);
      pack = std::min(pack, pack_bytes(args, source, first_column));
      keys += source.num_embeddings;
      first_column += source.embedding_dim;
    }
    params.num_keys = static_cast<uint32_t>(keys);
    params.index_type = args.index_type;
    params.indices = static_cast<const char*>(args.indices) +
                     first * args.index_table_stride * (args.index_type == FE_INT64 ? 8 : 4);
    params.index_row_stride = args.index_row_stride;
    params.index_table_stride = args.index_table_stride;
    params.grad_output = args.grad_output;
    params.grad_output_stride = args.grad_output_stride;
    params.num_entries = args.num_rows * params.num_tables;
    params.grad_weight = args.grad_weight;
    params.grad_weight_numel = args.grad_weight_numel;
    params.zero_first = first == 0;
    if (params.max_embedding_dim == 0) continue;

    Workspace layout;
    FeStatus status = lay_out(params, plan.segment, args.scalar_type, &layout);
    if (status != FE_OK) return status;
    needed = std::max(needed, static_cast<size_t>(layout.bytes));
    if (workspace == nullptr) continue;
    if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;
    status = dispatch_scalar(args.scalar_type, [&](auto scalar) {
      return run<decltype(scalar)>(params, plan, pack, layout, static_cast<char*>(workspace), device.properties.num_sms,
                                   stream);
    });
    if (status != FE_OK) return status;
  }
  if (workspace == nullptr) *workspace_bytes = needed;
  return FE_OK;
}

}  // namespace fast_embedding
