// TILE: a block takes a tile of indices, brings equal ones together, sums each run of them in registers and adds the
// sum to the gradient with one atomic a run: a hot row costs one atomic a tile instead of one an index.
//
// Equal indices are brought together by counting in a hash table in shared memory, not by sorting: the order of the
// rows does not matter, and counting takes three barriers where a radix sort takes three a digit. Where a sample of
// the first tile shows no row so often that its atomics would queue, a block leaves that out and adds each lookup by
// itself: the gradient is then read in order, and the atomics meet seldom.
//
// Three blocks share an SM, or, where there are lookups enough, one has it to itself: its tiles are three times as
// large, so that more lookups of a row meet in one.
//
// One launch: the zeros of the gradient are written first, while the first tile is being grouped or read, so the
// latency of the one hides behind the traffic of the other; after a grid-wide barrier come the additions. (Many zeros
// are a launch of their own, and there is no barrier.) A 16-bit gradient is summed in a float32 copy and rounded once
// after a second barrier.
//
// Tables of a call differ in how wide an access their columns allow. Where all allow one, the kernel is made for it;
// where they do not, a kernel for all widths branches on the table's, so that they share the zeros and the barrier.
#include <cooperative_groups.h>

#include <algorithm>
#include <vector>

#include "block.cuh"
#include "runs.cuh"

namespace fast_embedding {
namespace {

// Threads of a block: three blocks share an SM (of four each thread would have 64 registers: bfloat16 and float64
// spill), or one has it to itself, where it has lookups for all.
constexpr int kFewThreads = 256;
constexpr int kManyThreads = 768;
constexpr int kItems = 4;  // lookups of a thread in a tile, at the most
constexpr int kTileStep = 32;
constexpr int64_t kMaxGroupedInSmallTiles = 4096;
constexpr int kRoundPack = 4;
constexpr int kUnroll = 4;  // gradient loads in flight in a thread; 8 wide ones spill in bfloat16 and float64
constexpr int kUnrollNarrow = 8;
constexpr int kMinSlotBits = 8;
constexpr int kMaxLanes = 64;
constexpr int kMaxTables = 64;  // in one launch: the parameters of a kernel end at 4 KB
constexpr int kSamples = 512;   // lookups of the first tile that are looked at for a hot row: 0.3 us for each 256
constexpr int kAhead = 2;       // gradients of a thread that are asked for before the indices are known; more spill
constexpr int32_t kEmpty = -1;
constexpr uint32_t kSkip = 0xffffffffu;
[[maybe_unused]] constexpr int kPrefetchBytes = 2048;  // of a warp, while the tile is grouped
// A block has an SM to itself from so many lookups an SM on, each counted for every chunk of its columns, or from so
// many bytes of sums.
constexpr int64_t kManyLookupsOfSm = 900;
constexpr int64_t kManyBytesOfSm = 240 << 10;
constexpr int64_t kManyThreadsShared = 96 << 10;  // what the largest tile takes

// Columns in the widest access: 16 bytes of accumulators (see narrow_pack_bytes).
template <typename scalar_t>
constexpr int kWidest = 16 / sizeof(acc_t<scalar_t>);
// And in the widest of a kernel.
template <typename scalar_t, int kSize>
constexpr int kLargest = kSize == kMixed ? kWidest<scalar_t> : kSize;

// Atomics to one row queue. Measured: 1.8 ns a lookup of 16 bytes, 2.6 of 128, 5.3 of 512, 12 of 4096; in float64,
// which are added one by one, 5 of 32, 20 of 256 to 1024, 45 of 8192.
constexpr double kAtomicMicroseconds = 1.8e-3;
constexpr double kAtomicMicrosecondsPerByte = 5e-6;
constexpr double kAtomicMicrosecondsPerByte64 = 70e-6;
constexpr double kMaxQueuedBytes64 = 256;
constexpr double kQueueMicroseconds = 3;  // about what grouping costs
// Roundings follow one another where lookups are added one by one. The error stays below ATen's while a row has so many
// lookups in the mean, the second where a sample tells hot rows well, and the hottest no more than kMaxChain.
constexpr int64_t kMaxRepeats = 64;
constexpr int64_t kMaxRepeatsIfSharp = 128;
constexpr int64_t kMaxChain = 64;
constexpr int32_t kSharpCount = 3;
constexpr double kMaxChance = 0.01;
constexpr int32_t kAlwaysHot = 0;
constexpr int32_t kNeverHot = 33;  // of 32

struct TileTable {
  int64_t num_embeddings;
  int64_t weight_offset;
  int64_t padding_idx;
  int32_t embedding_dim;
  int32_t first_column;  // of the table's slice of grad_output
  int32_t lanes;         // threads that share a row: a column chunk
  int32_t chunks;
  int32_t index_column;
  int32_t hot_count;  // a tile is grouped if a row stands so often among 32 neighbours
  int32_t pack;       // columns in an access
};

struct TileParams {
  int32_t first_work[kMaxTables];  // (tile, column chunk) pairs of all tables, in one list
  TileTable table[kMaxTables];
  int32_t num_tables;
  FeIndexType index_type;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  int64_t num_rows;
  void* sums;  // accumulators of grad_weight's layout: grad_weight itself, or the float32 copy
  void* grad_weight;
  int64_t grad_weight_numel;
  int32_t num_work;
  int32_t tile;
  int32_t slots;  // of the hash table: a power of two, at least twice the tile
  int32_t slot_bits;
  int32_t zero_first;
  int32_t round_last;
  int32_t round_packs;  // grad_weight is aligned to kRoundPack elements
};

static_assert(sizeof(TileParams) <= kMaxParamBytes);

// The shared memory of a block, sized by the tile.
struct TileShared {
  int32_t* row;        // [slots] the row that a slot stands for
  uint32_t* count;     // [slots] its indices, then where its run begins
  uint32_t* grouped;   // [tile] the row of each position; then position << 16 | slot, runs of equal slots
  uint32_t* warp_sum;  // [kManyThreads / 32]
  void* edges;         // Edges

  __device__ TileShared(char* memory, const TileParams& params) {
    row = reinterpret_cast<int32_t*>(memory);
    count = reinterpret_cast<uint32_t*>(row + params.slots);
    grouped = count + params.slots;
    warp_sum = grouped + params.tile;
    edges = warp_sum + kManyThreads / 32;
  }
};

template <typename scalar_t, int kSize, int kThreads>
int64_t shared_bytes(const TileParams& params) {
  return 4 * (2 * params.slots + params.tile + kManyThreads / 32) +
         sizeof(Edges<acc_t<scalar_t>, kLargest<scalar_t, kSize>, kThreads>);
}

template <int kThreads>
__device__ inline void clear_slots(const TileShared& shared, const TileParams& params) {
  for (int slot = threadIdx.x; slot < params.slots; slot += kThreads) {
    shared.row[slot] = kEmpty;
    shared.count[slot] = 0;
  }
}

__device__ inline uint32_t find_or_insert(const TileShared& shared, const TileParams& params, int32_t row) {
  // Fibonacci hashing (Knuth, vol. 3, 6.4) with linear probing at a load of one half at the most.
  uint32_t slot = static_cast<uint32_t>(row) * 2654435769u >> (32 - params.slot_bits);
  while (true) {
    const int32_t found = atomicCAS(&shared.row[slot], kEmpty, row);
    if (found == kEmpty || found == row) return slot;
    slot = (slot + 1) & (params.slots - 1);
  }
}

// Turns counts into the beginnings of runs; returns the number of all. Ends with a barrier.
template <int kThreads>
__device__ inline uint32_t scan_counts(const TileShared& shared, const TileParams& params) {
  const int per_thread = (params.slots + kThreads - 1) / kThreads;
  const int first = threadIdx.x * per_thread;
  const int last = min(first + per_thread, params.slots);
  uint32_t own = 0;
  for (int i = first; i < last; ++i) own += shared.count[i];
  const Scan scan = scan_threads<kThreads>(own, shared.warp_sum);
  uint32_t before = scan.before;
  for (int i = first; i < last; ++i) {
    const uint32_t count = shared.count[i];
    shared.count[i] = before;
    before += count;
  }
  __syncthreads();
  return scan.total;
}

// Finds which of this thread's indices is out of range, and fails.
static __noinline__ __device__ void fail_in_tile(const TileParams& params, const TileTable& table, int64_t first_row) {
  for (int64_t row = first_row + threadIdx.x; row < min(first_row + params.tile, params.num_rows); row += blockDim.x) {
    const int64_t index = load_index(params.indices, params.index_type,
                                     row * params.index_row_stride + table.index_column * params.index_table_stride);
    check_index(signed_index(index, params.index_type), table.num_embeddings);
  }
}

// Fills shared.grouped with the rows that a tile's indices name, kSkip for padding and behind the last. A thread reads
// back what it has written, or waits.
template <int kThreads>
__device__ inline void load_rows(const TileShared& shared, const TileParams& params, const TileTable& table,
                                 int64_t first_row) {
  // All loads, then all checks: a use of one index would make the next load wait for it.
  const auto has = [&](int position) { return position < params.tile && first_row + position < params.num_rows; };
  const int64_t first =
      (first_row + threadIdx.x) * params.index_row_stride + table.index_column * params.index_table_stride;
  int64_t index[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    index[k] = 0;
    if (has(k * kThreads + threadIdx.x)) {
      index[k] = load_index(params.indices, params.index_type, first + k * kThreads * params.index_row_stride);
    }
  }
  uint32_t row[kItems];
  bool in_range = true;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    row[k] = kSkip;
    if (has(k * kThreads + threadIdx.x)) {
      in_range = in_range && is_in_range(index[k], table.num_embeddings);  // nor is a negative int32, as V < 2^31
      if (index[k] != table.padding_idx) row[k] = static_cast<uint32_t>(index[k]);
    }
  }
  if (!in_range) fail_in_tile(params, table, first_row);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int position = k * kThreads + threadIdx.x;
    if (position < params.tile) shared.grouped[position] = row[k];
  }
}

// Whether a row stands hot_count times or more among 32 neighbours in a sample of the tile. Uniform in the block; ends
// with a barrier.
template <int kThreads>
__device__ inline bool has_hot_row(const TileShared& shared, const TileParams& params, const TileTable& table) {
  bool hot = false;
#pragma unroll
  for (int k = 0; k < (kSamples + kThreads - 1) / kThreads; ++k) {
    const int position = k * kThreads + threadIdx.x;
    const uint32_t row = position < min(params.tile, kSamples) ? shared.grouped[position] : kSkip;
    const int count = __popc(__match_any_sync(kFullWarp, row));  // by all lanes
    if (count >= table.hot_count && row != kSkip) hot = true;
  }
  return __syncthreads_or(hot);
}

// Groups the loaded rows by slots that are clear; returns how many there are, padding left out. Ends with a barrier.
template <int kThreads>
__device__ inline uint32_t group_tile(const TileShared& shared, const TileParams& params) {
  uint32_t slot[kItems];
  uint32_t rank[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int position = k * kThreads + threadIdx.x;
    const uint32_t row = position < params.tile ? shared.grouped[position] : kSkip;
    slot[k] = kSkip;
    if (row != kSkip) {
      slot[k] = find_or_insert(shared, params, static_cast<int32_t>(row));
      rank[k] = atomicAdd(&shared.count[slot[k]], 1u);
    }
  }
  __syncthreads();
  const uint32_t total = scan_counts<kThreads>(shared, params);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (slot[k] != kSkip) {
      const uint32_t position = k * kThreads + threadIdx.x;
      shared.grouped[shared.count[slot[k]] + rank[k]] = position << 16 | slot[k];
    }
  }
  __syncthreads();
  return total;
}

// A thread's share of a tile: its columns, and every groups-th lookup or an equal part of the runs.
template <typename scalar_t, int kSize, int kThreads>
struct TileShare {
  using sum_t = acc_t<scalar_t>;
  int groups, group;
  bool active;
  int length;  // lookups in the tile
  const scalar_t* grad;
  sum_t* sums;

  __device__ TileShare(const TileParams& params, const TileTable& table, int64_t first_row, int chunk)
      : groups(small_quotient(kThreads, table.lanes)), group(small_quotient(threadIdx.x, table.lanes)) {
    const int column = (chunk * table.lanes + threadIdx.x - group * table.lanes) * kSize;
    active = group < groups && column < table.embedding_dim;
    length = min(static_cast<int64_t>(params.tile), params.num_rows - first_row);
    grad = static_cast<const scalar_t*>(params.grad_output) + table.first_column + column +
           first_row * params.grad_output_stride;
    sums = static_cast<sum_t*>(params.sums) + table.weight_offset + column;
  }
  // The gradients of lookups first + group, first + group + groups, ... into packs that may be wider.
  template <int kFrom, int kTo, int kColumns>
  __device__ void load(const TileParams& params, int first, Pack<scalar_t, kColumns>* value) const {
#pragma unroll
    for (int k = kFrom; k < kTo; ++k) {
      const int position = first + k * groups + group;
      if (!active || position >= length) continue;
      const Pack<scalar_t, kSize> loaded = load_once<kSize>(grad + position * params.grad_output_stride);
      memcpy(&value[k], &loaded, sizeof(loaded));
    }
  }
};

// Sums the runs of the grouped list and adds each to the gradient.
template <typename scalar_t, int kSize, int kLoads, int kThreads>
__device__ inline void add_runs(const TileShared& shared, const TileParams& params, const TileTable& table,
                                int64_t first_row, int chunk, uint32_t total) {
  using sum_t = acc_t<scalar_t>;
  const TileShare<scalar_t, kSize, kThreads> share(params, table, first_row, chunk);
  sum_runs<scalar_t, kSize, kLoads, true>(
      total, table.lanes, share.active, *static_cast<Edges<sum_t, kSize, kThreads>*>(shared.edges),
      [&](uint32_t i) { return shared.grouped[i] & 0xffffu; },
      [&](uint32_t i) { return share.grad + (shared.grouped[i] >> 16) * params.grad_output_stride; },
      [&](uint32_t slot, const sum_t(&sum)[kSize]) {
        add_atomically(share.sums + static_cast<int64_t>(shared.row[slot]) * table.embedding_dim, sum);
      });
}

// Waits until the gradient is zeroed, by this launch or by the one before.
__device__ inline void wait_for_zeros(const TileParams& params) {
  if (params.zero_first) {
    cooperative_groups::this_grid().sync();
  } else {
    wait_for_last_launch();
  }
}

// Adds each lookup of a tile to the gradient by itself, once it is zeroed: `*zeroed` says if that is known. `ahead`
// holds this thread's first gradients.
template <typename scalar_t, int kSize, int kLoads, int kThreads, int kColumns>
__device__ inline void add_lookups(const TileShared& shared, const TileParams& params, const TileTable& table,
                                   int64_t first_row, int chunk, const Pack<scalar_t, kColumns> (&ahead)[kAhead],
                                   bool* zeroed) {
  const TileShare<scalar_t, kSize, kThreads> share(params, table, first_row, chunk);
  for (int first = 0; first < share.length; first += share.groups * kLoads) {
    Pack<scalar_t, kColumns> value[kLoads] = {};  // for the reason in sum_runs
    if (first > 0) {
      share.template load<0, kLoads>(params, first, value);
    } else {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) value[k] = ahead[k];
      share.template load<kAhead, kLoads>(params, first, value);
    }
    if (!*zeroed) {
      wait_for_zeros(params);
      *zeroed = true;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int position = first + k * share.groups + share.group;
      const uint32_t row = share.active && position < share.length ? shared.grouped[position] : kSkip;
      if (row == kSkip) continue;
      acc_t<scalar_t> sum[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] = widen(value[k].value[j]);
      add_atomically(share.sums + static_cast<int64_t>(row) * table.embedding_dim, sum);
    }
  }
}

// Asks for some of the gradients of the only table's tile: memory would rest while the lookups are grouped.
__device__ inline void prefetch_gradients(const TileParams& params, int64_t first_row, int chunk, int scalar_size) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 != 0 || params.num_tables > 1) return;
  const int64_t row_bytes = params.grad_output_stride * scalar_size;
  const int64_t bytes = (min(static_cast<int64_t>(params.tile), params.num_rows - first_row) - 1) * row_bytes;
  const int64_t at = static_cast<int64_t>(chunk * (blockDim.x / 32) + threadIdx.x / 32) * kPrefetchBytes;
  if (at + kPrefetchBytes > bytes) return;
  const char* begin = static_cast<const char*>(params.grad_output) + first_row * row_bytes + at;
  begin -= reinterpret_cast<uintptr_t>(begin) % 16;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin), "n"(kPrefetchBytes) : "memory");
#endif
}

// kSize: columns in an access, or kMixed.
template <typename scalar_t, int kSize, int kThreads>
__global__ void __launch_bounds__(kThreads, kManyThreads / kThreads)
    tile_backward(const __grid_constant__ TileParams params) {
  using sum_t = acc_t<scalar_t>;
  constexpr int kLoads = kSize == 1 ? kUnrollNarrow : kUnroll;
  extern __shared__ __align__(16) char memory[];
  const TileShared shared(memory, params);
  const auto grid = cooperative_groups::this_grid();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;

  let_next_launch_begin();
  if (params.zero_first) {
    fill_zero(params.sums, params.grad_weight_numel * sizeof(sum_t), thread, num_threads);
  }
  bool zeroed = false;
  int sampled_table = -1;
  bool groups = true;
  for (int work = blockIdx.x; work < params.num_work; work += gridDim.x) {
    const int t = find_last(params.first_work, params.num_tables, work);
    const TileTable& table = params.table[t];
    const int local = work - params.first_work[t];
    const int64_t first_row = static_cast<int64_t>(local / table.chunks) * params.tile;
    const int chunk = local % table.chunks;
    if (t != sampled_table) groups = table.hot_count != kNeverHot;
    if (groups) clear_slots<kThreads>(shared, params);
    // Asked for beside the indices where lookups may be added one by one.
    Pack<scalar_t, kLargest<scalar_t, kSize>> ahead[kAhead] = {};
    const bool samples = groups && t != sampled_table && table.hot_count != kAlwaysHot;
    if (samples || !groups) {
      with_pack<scalar_t, kSize, kWidest<scalar_t>>(table.pack, [&](auto pack) {
        const TileShare<scalar_t, decltype(pack)::value, kThreads> share(params, table, first_row, chunk);
        share.template load<0, kAhead>(params, 0, ahead);
      });
    }
    load_rows<kThreads>(shared, params, table, first_row);
    if (samples) {
      groups = has_hot_row<kThreads>(shared, params, table);
    } else {
      __syncthreads();
    }
    sampled_table = t;
    if (groups) {
      if constexpr (kThreads == kManyThreads) prefetch_gradients(params, first_row, chunk, sizeof(scalar_t));
      const uint32_t total = group_tile<kThreads>(shared, params);
      if (!zeroed) {
        wait_for_zeros(params);
        zeroed = true;
      }
      with_pack<scalar_t, kSize, kWidest<scalar_t>>(table.pack, [&](auto pack) {
        add_runs<scalar_t, decltype(pack)::value, kLoads, kThreads>(shared, params, table, first_row, chunk, total);
      });
    } else {
      with_pack<scalar_t, kSize, kWidest<scalar_t>>(table.pack, [&](auto pack) {
        add_lookups<scalar_t, decltype(pack)::value, kLoads, kThreads>(shared, params, table, first_row, chunk, ahead,
                                                                       &zeroed);
      });
    }
    __syncthreads();
  }
  if (!zeroed) wait_for_zeros(params);

  if constexpr (sizeof(scalar_t) == 2) {
    if (params.round_last) {
      grid.sync();
      const sum_t* sums = static_cast<const sum_t*>(params.sums);
      scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight);
      const int64_t packs = params.round_packs ? params.grad_weight_numel / kRoundPack : 0;
      for (int64_t i = thread; i < packs; i += num_threads) {
        const Pack<sum_t, kRoundPack> pack = reinterpret_cast<const Pack<sum_t, kRoundPack>*>(sums)[i];
        store<scalar_t>(grad_weight + i * kRoundPack, pack.value);
      }
      for (int64_t i = packs * kRoundPack + thread; i < params.grad_weight_numel; i += num_threads) {
        grad_weight[i] = narrow<scalar_t>(sums[i]);
      }
    }
  }
}

// Column chunks of a row of `packs` packs: whole up to kMaxLanes, else equal parts of at most that.
void split_columns(int64_t packs, TileTable* table) {
  table->chunks = static_cast<int32_t>(ceil_div(packs, kMaxLanes));
  table->lanes = static_cast<int32_t>(ceil_div(packs, table->chunks));
}

template <typename scalar_t, int kSize, int kThreads>
FeStatus launch(TileParams& params, Begin begin, const DeviceInfo& device, cudaStream_t stream) {
  const auto kernel = tile_backward<scalar_t, kSize, kThreads>;
  const int64_t shared = shared_bytes<scalar_t, kSize, kThreads>(params);
  // Each block also takes 1 KB that the system reserves. All blocks of a cooperative grid must be resident.
  const int64_t fitting =
      std::min<int64_t>(device.properties.shared_bytes_per_sm / (shared + 1024), kManyThreads / kThreads);
  if (fitting < 1 || shared > (kThreads == kManyThreads ? kManyThreadsShared : 48 << 10)) return FE_INVALID_ARGUMENT;
  if constexpr (kThreads == kManyThreads) {
    static std::atomic<uint64_t> allowed{0};
    const FeStatus status = allow_shared_memory(reinterpret_cast<const void*>(kernel), kManyThreadsShared, device,
                                                &allowed, "backward_tile shared memory");
    if (status != FE_OK) return status;
  }
  const int64_t resident = fitting * device.properties.num_sms;
  const int64_t zero_bytes = params.zero_first ? params.grad_weight_numel * sizeof(acc_t<scalar_t>) : 0;
  if (zero_bytes >= kZeroLaunchBytes) {
    const FeStatus zeroed = write_zeros(params.sums, zero_bytes, begin, device, stream);
    if (zeroed != FE_OK) return zeroed;
    params.zero_first = 0;
    begin = Begin::EARLY;
  }
  // Zeros and rounding take the whole device; with few of them, no more blocks than there is work.
  const int64_t passed_bytes =
      params.zero_first || params.round_last ? params.grad_weight_numel * sizeof(acc_t<scalar_t>) : 0;
  const int64_t wanted =
      std::max<int64_t>(params.num_work, ceil_div(passed_bytes, kThreads * 16 * (params.round_last ? 1 : 4)));
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, resident)));
  const bool has_barriers = params.zero_first || params.round_last;
  return fast_embedding::launch(kernel, grid, dim3(kThreads), shared, params, has_barriers, begin, device, stream,
                                "backward_tile");
}

// Calls f with the columns in an access (or kMixed) as a constant.
template <typename scalar_t, typename Function>
FeStatus dispatch_tile_pack(int32_t pack, Function&& f) {
  if (pack == kMixed) return f(std::integral_constant<int, kMixed>{});
  return dispatch_narrow_pack<scalar_t>(pack * static_cast<int64_t>(sizeof(scalar_t)), f);
}

// What a lookup's atomics hold up others to its row.
double queue_microseconds(const FeBackwardArgs& args, const TableSlice& table) {
  const double row_bytes = static_cast<double>(table.embedding_dim) * accumulator_bytes(args.scalar_type);
  const double singly = args.scalar_type == FE_FLOAT64 ? std::min(row_bytes, kMaxQueuedBytes64) : 0;
  return kAtomicMicroseconds + row_bytes * kAtomicMicrosecondsPerByte + singly * kAtomicMicrosecondsPerByte64;
}

// How often a row stands among 32 neighbours that only chance brings together in one sample of a hundred at the most,
// at least kSharpCount.
int32_t count_above_chance(int64_t num_embeddings) {
  const double rows = static_cast<double>(num_embeddings);
  double expected = rows;  // sets of `count` neighbours that name one row
  for (int count = 1; count < kNeverHot; ++count) {
    expected *= (33.0 - count) / (count * rows);
    if (count >= kSharpCount && expected <= kMaxChance) return count;
  }
  return kNeverHot;
}

// See TileTable.
int32_t hot_count(const FeBackwardArgs& args, const TableSlice& table) {
  const int32_t least = count_above_chance(std::max<int64_t>(table.num_embeddings, 1));
  const int64_t repeats = least == kSharpCount ? kMaxRepeatsIfSharp : kMaxRepeats;
  if (args.num_rows > std::max(kMaxChain, repeats * table.num_embeddings)) return kAlwaysHot;
  const double lookups = static_cast<double>(args.num_rows);
  const double queued = kQueueMicroseconds / queue_microseconds(args, table);  // lookups of a row
  if (lookups > queued * static_cast<double>(table.num_embeddings)) return kAlwaysHot;
  const double share = std::min(queued, static_cast<double>(kMaxChain)) / lookups;
  return std::clamp(static_cast<int32_t>(std::ceil(32 * share)), least, kNeverHot);
}

bool has_room_for_many(const DeviceInfo& device) {
  return device.properties.shared_bytes_per_block >= kManyThreadsShared;
}

// Up to kMaxTables tables.
struct TileLaunch {
  TileParams params;
  int threads = kFewThreads;  // of a block
  int64_t chunks = 0;         // of all tables
  bool all_grouped = true;

  explicit TileLaunch(const TileParams& common) : params(common) {}

  void add(const FeBackwardArgs& args, const TableSlice& source) {
    TileTable& table = params.table[params.num_tables++];
    table.num_embeddings = source.num_embeddings;
    table.weight_offset = source.weight_offset;
    table.padding_idx = source.padding_idx;
    table.embedding_dim = static_cast<int32_t>(source.embedding_dim);
    table.first_column = static_cast<int32_t>(source.first_column);
    table.index_column = static_cast<int32_t>(source.index_column);
    table.hot_count = hot_count(args, source);
    table.pack = static_cast<int32_t>(narrow_pack_bytes(args, source) / scalar_bytes(args.scalar_type));
    split_columns(ceil_div(std::max<int64_t>(source.embedding_dim, 1), table.pack), &table);
    chunks += table.chunks;
    all_grouped = all_grouped && table.hot_count == kAlwaysHot;
  }

  // Columns in an access of all tables.
  int32_t pack() const {
    const auto differs = [&](const TileTable& table) { return table.pack != params.table[0].pack; };
    return std::any_of(params.table, params.table + params.num_tables, differs) ? kMixed : params.table[0].pack;
  }

  // One block an SM merges the lookups of three before they touch memory, but waits longer at its barriers. Of several
  // tables, whose indices stand side by side, it reads those of the next round while no other block adds.
  int best_threads(const FeBackwardArgs& args, const DeviceInfo& device) const {
    const int64_t sms = device.properties.num_sms;
    int64_t columns = 0;
    for (int t = 0; t < params.num_tables; ++t) columns += params.table[t].embedding_dim;
    const int64_t lookups = args.num_rows * chunks;
    const int64_t bytes = args.num_rows * columns * accumulator_bytes(args.scalar_type);
    const bool many = lookups >= kManyLookupsOfSm * sms || bytes >= kManyBytesOfSm * sms;
    const bool one_round = params.num_tables == 1 || lookups <= kItems * kManyThreads * sms;
    return many && one_round && has_room_for_many(device) ? kManyThreads : kFewThreads;
  }

  // The smallest tile with which all work is under way at once, or else comes in equal rounds: larger ones merge more
  // lookups of a row before they touch memory, but leave SMs idle. Short rows that are grouped take as many as there
  // are threads to load their indices, or a multiple.
  int32_t best_tile(int64_t num_rows, int64_t blocks) const {
    const int64_t max_tile = kItems * threads;
    const int64_t rounds = std::max<int64_t>(1, ceil_div(num_rows * chunks, blocks * max_tile));
    const int64_t tiles = std::max<int64_t>(1, blocks * rounds / chunks);  // of a table's column chunk
    const int64_t tile = ceil_div(num_rows, tiles);
    const bool short_rows = chunks == params.num_tables;
    const bool many_rows = num_rows >= kMaxGroupedInSmallTiles;
    const bool fills = threads == kFewThreads && rounds == 1 && short_rows && all_grouped && many_rows;
    return static_cast<int32_t>(std::min<int64_t>(round_up(tile, fills ? kFewThreads : kTileStep), max_tile));
  }

  // Blocks take items a round apart. Where rows differ in length the first round has the longest, and in every second
  // one the shortest come first, so that no block has the longest of each.
  void balance(int64_t rounds) {
    const auto longer = [](const TileTable& a, const TileTable& b) { return a.lanes * a.chunks > b.lanes * b.chunks; };
    std::stable_sort(params.table, params.table + params.num_tables, longer);
    if (rounds > params.num_tables) return;  // none holds two tables
    for (int64_t round = 1; round < rounds; round += 2) {
      std::reverse(params.table + params.num_tables * round / rounds,
                   params.table + params.num_tables * (round + 1) / rounds);
    }
  }

  void lay_out(int32_t tile, int64_t blocks) {
    const int64_t tiles = ceil_div(params.num_rows, tile);
    if (pack() == kMixed) balance(ceil_div(tiles * chunks, blocks));
    params.tile = tile;
    params.slot_bits = kMinSlotBits;
    while (1 << params.slot_bits < 2 * tile) ++params.slot_bits;
    params.slots = 1 << params.slot_bits;
    for (int t = 0; t < params.num_tables; ++t) {
      params.first_work[t] = params.num_work;
      params.num_work += static_cast<int32_t>(tiles * params.table[t].chunks);
    }
  }
};

}  // namespace

FeStatus backward_tile(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                       size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  const bool scratch = scalar_bytes(args.scalar_type) == 2;
  const bool threads_fit =
      plan.threads == 0 || plan.threads == kFewThreads || (plan.threads == kManyThreads && has_room_for_many(device));
  const int max_tile = kItems * (plan.threads > 0 ? plan.threads : kFewThreads);
  if (!threads_fit || plan.tile < 0 || plan.tile > max_tile || plan.tile % kTileStep != 0 ||
      scratch != (plan.float32_scratch != 0)) {
    return FE_INVALID_ARGUMENT;
  }
  const size_t needed = scratch ? args.grad_weight_numel * sizeof(float) : 0;
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;

  TileParams common{};
  set_input(args, &common);
  common.num_rows = args.num_rows;
  common.sums = scratch ? workspace : args.grad_weight;
  common.grad_weight = args.grad_weight;
  common.grad_weight_numel = args.grad_weight_numel;

  // A launch for every kMaxTables tables. The first writes the zeros, the last rounds.
  std::vector<TileLaunch> launches;
  for (size_t t = 0; t < call.tables.size(); ++t) {
    if (t % kMaxTables == 0) launches.emplace_back(common);
    launches.back().add(args, call.tables[t]);
  }
  launches.front().params.zero_first = 1;
  launches.back().params.round_last = scratch;
  launches.back().params.round_packs = reinterpret_cast<uintptr_t>(args.grad_weight) % 8 == 0;
  Begin begin = call.begin;
  for (TileLaunch& each : launches) {
    each.threads = plan.threads > 0 ? plan.threads : plan.tile > 0 ? kFewThreads : each.best_threads(args, device);
    const int64_t blocks = kManyThreads / each.threads * device.properties.num_sms;
    each.lay_out(plan.tile > 0 ? plan.tile : each.best_tile(args.num_rows, blocks), blocks);
    const FeStatus status = dispatch_scalar(args.scalar_type, [&](auto scalar) {
      return dispatch_tile_pack<decltype(scalar)>(each.pack(), [&](auto size) {
        using scalar_t = decltype(scalar);
        constexpr int kSize = decltype(size)::value;
        return each.threads == kManyThreads ? launch<scalar_t, kSize, kManyThreads>(each.params, begin, device, stream)
                                            : launch<scalar_t, kSize, kFewThreads>(each.params, begin, device, stream);
      });
    });
    if (status != FE_OK) return status;
    begin = Begin::EARLY;
  }
  return FE_OK;
}

}  // namespace fast_embedding
