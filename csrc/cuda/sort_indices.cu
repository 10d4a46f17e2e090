// A stable radix sort of (row, position) pairs, least significant digit first, all passes and all tables in one
// cooperative launch. A block owns a chunk of a table's list. A pass:
//
//   rank     how many of the chunk's entries with the same digit come before each, which leaves a matrix of counts
//   barrier
//   place    where the chunk's entries of each digit begin: behind those of lower digits and of lower chunks. Every
//            block adds that up from the matrix itself, which takes less than another barrier
//   move     entries are put in order in shared memory and written out run by run
//   barrier
//
// A pass costs barriers and latency more than bandwidth, so digits are as wide as rows ask for.
#include <cooperative_groups.h>

#include <utility>

#include "rank.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 16;                   // entries of a thread in a tile, at the most
constexpr int kMaxTile = kThreads * kItems;  // entries ranked at a time
constexpr int kReads = 4;             // of indices in flight in a thread: more are code that few lookups jump over
constexpr int kMinDigitBits = 3;      // counts are read eight at a time
constexpr int64_t kMaxChunk = 32768;  // counts are of 16 bits
constexpr int64_t kMinChunk = kThreads;
constexpr int kLoads = 8;                            // of counts in flight in a thread
constexpr int64_t kZerosOfBlock = int64_t{1} << 17;  // bytes at a barrier: about as long as the wait
constexpr int64_t kPageBytes = int64_t{2} << 20;
constexpr int64_t kStaticSharedBytes = 1024;  // at most

static_assert(1 << kMaxDigitBits <= 2 * kThreads);  // two digits a thread
static_assert(sizeof(SortParams) <= kMaxParamBytes);
static_assert(kMaxTile < 1 << 16 && kMaxChunk < 1 << 16);

struct SortShared {
  Lookup* tile;          // [params.tile]
  uint32_t* start;       // [bins] where the chunk's next entry of a digit goes
  uint32_t* local;       // [bins] where a digit begins in the tile
  uint32_t* count;       // [bins / 2] of the tile
  uint32_t* warp_count;  // [kWarps, bins / 2]

  __device__ SortShared(char* memory, const SortParams& params) {
    tile = reinterpret_cast<Lookup*>(memory);
    start = reinterpret_cast<uint32_t*>(tile + params.tile);
    local = start + params.bins;
    count = local + params.bins;
    warp_count = count + params.bins / 2;
  }
};

int64_t shared_bytes(const SortParams& params) {
  return sizeof(Lookup) * params.tile + params.bins * 2 * sizeof(uint32_t) +
         params.bins / 2 * (1 + kWarps) * sizeof(uint32_t);
}

// A work item in one pass.
struct Item {
  const SortTable& table;
  const Lookup* source;  // null in the first pass, which reads the indices
  Lookup* destination;
  uint32_t begin, end;
  uint32_t bins, shift;

  __device__ Item(const SortParams& params, int item, int pass) : table(params.table[item / params.chunks]) {
    const int64_t list = static_cast<int64_t>(item / params.chunks) * params.num_rows;
    source = pass == 0 ? nullptr : params.lookups[(pass - 1) % 2] + list;
    destination = params.lookups[pass % 2] + list;
    begin = min(item % params.chunks * params.rows_of_chunk, params.num_rows);
    end = min(begin + params.rows_of_chunk, params.num_rows);
    bins = 1u << table.digit_bits;
    shift = pass * table.digit_bits;
  }
  __device__ uint32_t digit(uint32_t row) const { return row >> shift & (bins - 1); }
};

__device__ inline void prefetch(const char* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// A thread's entries of a tile, in registers. Warp w takes the w-th stretch of the tile, 32 entries at a time, so that
// ranks follow the order of entries.
struct Tile {
  uint32_t begin, length;
  Lookup entry[kItems];
  uint32_t rank[kItems / 2];  // in the warp, 16 bits each

  __device__ int items() const { return (length + kThreads - 1) / kThreads; }
  __device__ uint32_t at(int k) const { return (threadIdx.x / 32 * items() + k) * 32 + threadIdx.x % 32; }
  __device__ bool has(int k) const { return k < items() && at(k) < length; }
};

// Reads the entries of a tile, and in the first pass checks their indices.
__device__ inline void read_tile(const SortParams& params, const Item& item, Tile& tile) {
  if (item.source == nullptr) {
    // Some loads, then their checks: a use of an index would make the next load wait for it.
    const int64_t first =
        (tile.begin + tile.at(0)) * params.index_row_stride + item.table.index_column * params.index_table_stride;
    const int64_t step = 32 * params.index_row_stride;
    bool in_range = true;
#pragma unroll
    for (int from = 0; from < kItems; from += kReads) {
      if (from >= tile.items()) break;
      int64_t index[kReads];
#pragma unroll
      for (int k = 0; k < kReads; ++k) {
        index[k] = 0;
        if (tile.has(from + k)) index[k] = load_index(params.indices, params.index_type, first + (from + k) * step);
      }
#pragma unroll
      for (int k = 0; k < kReads; ++k) {
        if (!tile.has(from + k)) continue;
        in_range =
            in_range && is_in_range(index[k], item.table.num_embeddings);  // nor is a negative int32, as V < 2^31
        const bool padding = index[k] == item.table.padding_idx;
        tile.entry[from + k] = {padding ? item.table.num_embeddings : static_cast<uint32_t>(index[k]),
                                tile.begin + tile.at(from + k)};
      }
    }
    if (!in_range) {
      for (int k = 0; k < tile.items(); ++k) {
        const uint32_t at = tile.at(k);
        if (at < tile.length) {
          const int64_t index = signed_index(read_index(params, item.table, tile.begin + at), params.index_type);
          check_index(index, item.table.num_embeddings);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (tile.has(k)) {
        const uint2 both = __ldcg(reinterpret_cast<const uint2*>(item.source) + tile.begin + tile.at(k));
        tile.entry[k] = {both.x, both.y};
      }
    }
  }
}

// Ranks the entries. Leaves in shared.count how many there are of each digit, and in shared.warp_count how many of them
// come before each warp's.
__device__ inline void rank_tile(const SortShared& shared, const Item& item, Tile& tile) {
  const uint32_t words = item.bins / 2;
  uint32_t* count = clear_warp_count(shared.warp_count, words);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= tile.items()) break;
    const bool present = tile.has(k);
    const uint32_t digit = item.digit(tile.entry[k].row);
    const uint32_t before = rank_in_warp(digit, present, count);
    if (k % 2 == 0) {
      tile.rank[k / 2] = before;
    } else {
      tile.rank[k / 2] |= before << 16;
    }
  }
  __syncthreads();
  count_before_warps<kWarps>(shared.warp_count, words, shared.count);
  __syncthreads();
}

// The sum over the threads before this one. Ends with a barrier.
__device__ inline uint32_t sum_before(uint32_t value) {
  __shared__ uint32_t warp_sum[kWarps];
  const uint32_t before = scan_threads<kThreads>(value, warp_sum).before;
  __syncthreads();
  return before;
}

// Fills shared.start from the rows of the matrix that are this table's; `chunk` is this block's own.
__device__ inline void place_digits(const SortShared& shared, const SortParams& params, const Item& item,
                                    const uint16_t* counts, int chunk) {
  uint32_t* total = shared.local;
  __syncthreads();  // the block's last item has moved shared.start past its entries
  for (uint32_t bin = threadIdx.x; bin < item.bins; bin += kThreads) shared.start[bin] = total[bin] = 0;
  __syncthreads();
  const uint32_t columns = item.bins / 8;
  const uint32_t column = threadIdx.x % columns;
  const int slices = kThreads / columns;
  uint32_t before[8] = {}, all[8] = {};
  for (int first = threadIdx.x / columns; first < params.chunks; first += kLoads * slices) {
    uint4 eight[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t c = first + k * slices;
      eight[k] = make_uint4(0, 0, 0, 0);
      if (c < params.chunks) eight[k] = __ldcg(reinterpret_cast<const uint4*>(counts + c * params.bins) + column);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const uint32_t word[4] = {eight[k].x, eight[k].y, eight[k].z, eight[k].w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t count = j % 2 == 0 ? low_half(word[j / 2]) : high_half(word[j / 2]);
        all[j] += count;
        if (first + k * slices < chunk) before[j] += count;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (all[j] != 0) atomicAdd(&total[8 * column + j], all[j]);
    if (before[j] != 0) atomicAdd(&shared.start[8 * column + j], before[j]);
  }
  __syncthreads();
  const uint32_t bin = 2 * threadIdx.x;
  const bool owns = bin < item.bins;
  const uint32_t lower = sum_before(owns ? total[bin] + total[bin + 1] : 0);
  if (owns) {
    shared.start[bin] += lower;
    shared.start[bin + 1] += lower + total[bin];
  }
  __syncthreads();
}

// Moves the ranked entries to their places, and shared.start past them.
__device__ inline void move_tile(const SortShared& shared, const Item& item, const Tile& tile) {
  const uint32_t bin = 2 * threadIdx.x;
  const bool owns = bin < item.bins;
  const uint32_t own = owns ? shared.count[threadIdx.x] : 0;
  const uint32_t lower = sum_before(low_half(own) + high_half(own));
  if (owns) {
    shared.local[bin] = lower;
    shared.local[bin + 1] = lower + low_half(own);
  }
  __syncthreads();
  const uint32_t* count = shared.warp_count + threadIdx.x / 32 * (item.bins / 2);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= tile.items()) break;
    if (tile.has(k)) {
      const uint32_t digit = item.digit(tile.entry[k].row);
      const uint32_t earlier = half_at(count, digit);
      const uint32_t rank = low_half(tile.rank[k / 2] >> k % 2 * 16);
      shared.tile[shared.local[digit] + earlier + rank] = tile.entry[k];
    }
  }
  __syncthreads();
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < tile.length; i += kThreads) {
    const Lookup moved = shared.tile[i];
    const uint32_t digit = item.digit(moved.row);
    item.destination[shared.start[digit] + (i - shared.local[digit])] = moved;
  }
  __syncthreads();
  if (owns) {
    shared.start[bin] += low_half(own);
    shared.start[bin + 1] += high_half(own);
  }
}

__global__ void __launch_bounds__(kThreads, 1) sort_indices(const __grid_constant__ SortParams params) {
  extern __shared__ __align__(16) char memory[];
  const SortShared shared(memory, params);
  const int num_items = params.num_tables * params.chunks;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const auto grid = cooperative_groups::this_grid();
  int64_t zeroed = 0;
  const auto barrier = [&] {
    auto token = grid.barrier_arrive();
    const int64_t bytes = min(params.zeros_at_barrier, params.zeros_bytes - zeroed);
    if (bytes > 0) fill_zero(static_cast<char*>(params.zeros) + zeroed, bytes, thread, num_threads);
    zeroed += bytes;
    grid.barrier_wait(std::move(token));
  };
  fill_zero(params.flags, params.flags_bytes, thread, num_threads);
  // Addresses of the lists are looked up while the indices are read: the first access to a page waits for that.
  const int64_t list_bytes = static_cast<int64_t>(params.num_tables) * params.num_rows * sizeof(Lookup);
  for (int64_t at = threadIdx.x * kPageBytes; at < list_bytes; at += kThreads * kPageBytes) {
    prefetch(reinterpret_cast<const char*>(params.lookups[0]) + at);
    if (params.passes > 1) prefetch(reinterpret_cast<const char*>(params.lookups[1]) + at);
  }
  // A block with a single tile keeps it in registers, and its counts in shared memory, from the ranking to the move.
  const bool keeps = num_items <= static_cast<int>(gridDim.x) && params.rows_of_chunk <= params.tile;
  Tile tile;
  const auto rank = [&](const Item& item, uint32_t begin) {
    tile.begin = begin;
    tile.length = min(item.end - begin, static_cast<uint32_t>(params.tile));
    read_tile(params, item, tile);
    rank_tile(shared, item, tile);
  };
  // One loop for both halves of a pass, so that the code to rank stands in it once: what does not fit the instruction
  // cache is read again in every pass.
#pragma unroll 1
  for (int half = 0; half < 2 * params.passes; ++half) {
    const int pass = half / 2;
    const bool moves = half % 2 == 1;
    if (half > 0) barrier();
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
      const Item item(params, i, pass);
      if (pass >= item.table.passes) continue;
      const int chunk = i % params.chunks;
      uint16_t* const counts = params.counts + static_cast<int64_t>(i - chunk) * params.bins;  // of the table
      if (moves) place_digits(shared, params, item, counts, chunk);
      const bool owns = 2 * threadIdx.x < item.bins;
      uint32_t count = 0;
      for (uint32_t begin = item.begin; begin < item.end; begin += params.tile) {
        if (!moves || !keeps) rank(item, begin);
        if (moves) {
          move_tile(shared, item, tile);
        } else if (owns) {
          count += shared.count[threadIdx.x];
        }
      }
      if (!moves && owns) {
        reinterpret_cast<uint32_t*>(counts + static_cast<int64_t>(chunk) * params.bins)[threadIdx.x] = count;
      }
    }
  }
}

}  // namespace

IndexSort::IndexSort(const FePlan& plan, const BackwardCall& call, int64_t first, int64_t last,
                     const DeviceInfo& device, bool with_spare)
    : device_(device), in_cluster_(plan.cluster > 0) {
  const FeBackwardArgs& args = call.args;
  params_.num_tables = static_cast<int32_t>(last - first);
  params_.index_type = args.index_type;
  params_.indices = args.indices;
  params_.index_row_stride = args.index_row_stride;
  params_.index_table_stride = args.index_table_stride;
  params_.num_rows = static_cast<uint32_t>(args.num_rows);
  const int32_t digit_bits = std::clamp(plan.digit_bits, 1, kMaxDigitBits);
  for (int64_t t = first; t < last; ++t) {
    const TableSlice& source = call.tables[t];
    SortTable& table = params_.table[t - first];
    table.padding_idx = source.padding_idx;
    table.num_embeddings = static_cast<uint32_t>(source.num_embeddings);
    table.index_column = static_cast<int32_t>(source.index_column);
    // The highest row, or the one past it that stands for padding.
    const int64_t highest = source.num_embeddings - (source.padding_idx >= 0 ? 0 : 1);
    int bits = 1;
    while (highest >> bits != 0) ++bits;
    table.passes = static_cast<int32_t>(ceil_div(bits, digit_bits));
    table.digit_bits = std::max(static_cast<int32_t>(ceil_div(bits, table.passes)), kMinDigitBits);
    params_.passes = std::max(params_.passes, table.passes);
    params_.bins = std::max(params_.bins, 1 << table.digit_bits);
  }
  const int64_t share = std::max<int64_t>(1, device.properties.num_sms / params_.num_tables);
  const int64_t chunks =
      in_cluster_ ? plan.cluster
                  : std::max(std::min(share, ceil_div(args.num_rows, kMinChunk)), ceil_div(args.num_rows, kMaxChunk));
  params_.chunks = static_cast<int32_t>(chunks);
  params_.rows_of_chunk = static_cast<uint32_t>(ceil_div(args.num_rows, chunks));
  params_.chunk_divisor = Divisor(params_.rows_of_chunk);
  params_.tile = static_cast<int32_t>(std::min<int64_t>(round_up(params_.rows_of_chunk, kThreads), plan.sort_tile));
  blocks_ = std::min<int64_t>(params_.num_tables * chunks, device.properties.num_sms);
  shared_bytes_ = shared_bytes(params_);
  max_shared_bytes_ = device.properties.shared_bytes_per_block - kStaticSharedBytes;
  fits_ = plan.digit_bits == digit_bits && plan.sort_tile % kThreads == 0 && plan.sort_tile <= kMaxTile &&
          plan.sort_tile > 0 && (in_cluster_ || shared_bytes_ <= max_shared_bytes_);

  const int64_t entries = args.num_rows * params_.num_tables;
  lookups_bytes_ = round_up(entries * sizeof(Lookup), 256);
  has_two_lists_ = (params_.passes > 1 && !in_cluster_) || with_spare;
  const int64_t counts_bytes = params_.num_tables * chunks * params_.bins * static_cast<int64_t>(sizeof(uint16_t));
  bytes_ = lookups_bytes_ * (has_two_lists_ ? 2 : 1) + (in_cluster_ ? 0 : round_up(counts_bytes, 256));
}

void IndexSort::place(char* memory) {
  params_.lookups[0] = reinterpret_cast<Lookup*>(memory);
  params_.lookups[1] = reinterpret_cast<Lookup*>(memory + lookups_bytes_);  // not used where there is one list
  params_.counts = reinterpret_cast<uint16_t*>(memory + lookups_bytes_ * (has_two_lists_ ? 2 : 1));
}

FeStatus IndexSort::enqueue(void* flags, int64_t flags_bytes, void* zeros, int64_t zeros_bytes, cudaStream_t stream) {
  params_.flags = flags;
  params_.flags_bytes = flags_bytes;
  params_.zeros = zeros;
  params_.zeros_bytes = zeros_bytes;
  if (in_cluster_) return sort_in_cluster(params_, device_, stream);
  // A few zeros hide behind the barriers; more would delay them, and leave too little for a launch of their own.
  const int64_t blocks =
      std::max(blocks_, std::min<int64_t>(device_.properties.num_sms, ceil_div(zeros_bytes, kZerosOfBlock)));
  const int64_t barriers = 2 * params_.passes - 1;
  const int64_t hidden = barriers * blocks * kZerosOfBlock;
  const int64_t inside = zeros_bytes <= hidden + hidden / 2 ? zeros_bytes : hidden;
  if (inside < zeros_bytes) {
    const FeStatus zeroed =
        write_zeros(static_cast<char*>(zeros) + inside, zeros_bytes - inside, Begin::AFTER_ALL, device_, stream);
    if (zeroed != FE_OK) return zeroed;
  }
  params_.zeros_bytes = inside;
  params_.zeros_at_barrier = round_up(ceil_div(inside, barriers), 16);
  static std::atomic<uint64_t> allowed{0};
  const FeStatus status = allow_shared_memory(reinterpret_cast<const void*>(sort_indices), max_shared_bytes_, device_,
                                              &allowed, "sort_indices shared memory");
  if (status != FE_OK) return status;
  return launch(sort_indices, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes_, params_, true,
                Begin::AFTER_ALL, device_, stream, "sort_indices");
}

}  // namespace fast_embedding
