// PRIVATE for small tables whose embeddings were added: their gradients come from the same rows, so each is read once.
// A block has up to kMaxColumns columns of all tables' sums in shared memory and a share of the rows:
//
//   1. warps sort the lookups of a tile of rows by row of the table, each those of one group of tables; where blocks
//      have columns of the same rows they sort each its part, leave the lists in scratch and wait for the others;
//   2. tile by tile, the next being copied into shared memory meanwhile, lane groups take equal shares of the list,
//      whatever the indices. Where a run of one place begins, its sum so far comes into registers, and goes back where
//      the run ends: no branch, so a warp's lane groups do not wait for each other's ends of runs. A run over several
//      shares is put together by the lane group in which it begins, so a sum has one owner at a time;
//   3. after a grid-wide barrier all threads sum the blocks' sums, in order.
//
// What bounds it is shared memory: each element is read once for each table. So small tables are first taken together:
// one place for each pair of rows of two tables, whose sums are told apart in step 3. Nine tables of 2 to 119 rows need
// five reads instead of nine, at 293 places instead of 176.
//
// Each sum has a fixed order, so the result is reproducible, and 16-bit gradients round once.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "block.cuh"
#include "private.cuh"
#include "private_sum.cuh"

namespace fast_embedding {
namespace {

// Rows of the gradient under way in a thread.
template <typename scalar_t>
constexpr int kUnroll = sizeof(scalar_t) == 8 ? 2 : kEntryStep;
template <typename scalar_t>
constexpr bool kMayCopyInSteps = sizeof(scalar_t) < 8;  // 5% slower in float64

// The block's columns of a tile, by threads [0, threads) of those that copy. [row of the tile, bytes], asked for and
// not waited for, but for single 16-bit elements, which no asynchronous copy takes.
template <typename scalar_t, int kBytes>
__device__ inline void copy_rows(const PrivateSumParams& params, const scalar_t* grad, int rows, int thread,
                                 int threads, char* tile) {
  constexpr int kRowBytes = kMaxColumns * static_cast<int>(sizeof(scalar_t));  // at the most
  constexpr int kLaneStep = kLanes * kBytes;
  const int first_column = blockIdx.y * params.columns;
  const int width = min(params.columns, params.embedding_dim - first_column) * static_cast<int>(sizeof(scalar_t));
  const int pitch = params.columns * static_cast<int>(sizeof(scalar_t));
  const int64_t stride = params.grad_output_stride * static_cast<int64_t>(sizeof(scalar_t));
  const int first = thread % kLanes * kBytes;
  const int row_step = threads / kLanes;
  int row = thread / kLanes;
  const char* source = reinterpret_cast<const char*>(grad + first_column) + row * stride;
  char* target = tile + row * pitch;
#pragma unroll 4
  for (; row < rows; row += row_step) {
#pragma unroll
    for (int at = first; at < first + kRowBytes; at += kLaneStep) {
      if constexpr (kBytes >= 4) {
        if (at < width) __pipeline_memcpy_async(target + at, source + at, kBytes);
      } else {
        // Threads behind the last column repeat it: a branch would make each load wait for the one before.
        const int column = min(at, width - kBytes);
        *reinterpret_cast<unsigned short*>(target + column) =
            __ldg(reinterpret_cast<const unsigned short*>(source + column));
      }
    }
    source += row_step * stride;
    target += row_step * pitch;
  }
}

template <typename scalar_t>
__device__ inline void copy_tile(const PrivateSumParams& params, int64_t first_row, int rows, int thread, int threads,
                                 char* tile) {
  const scalar_t* grad = static_cast<const scalar_t*>(params.grad_output) + first_row * params.grad_output_stride;
  if (params.copy_bytes == 16) {
    copy_rows<scalar_t, 16>(params, grad, rows, thread, threads, tile);
  } else if (params.copy_bytes == 8) {
    copy_rows<scalar_t, 8>(params, grad, rows, thread, threads, tile);
  } else {
    copy_rows<scalar_t, sizeof(scalar_t)>(params, grad, rows, thread, threads, tile);
  }
}

__device__ inline char* list_in_scratch(const PrivateSumParams& params, int tile) {
  return params.lists + (static_cast<int64_t>(blockIdx.x) * params.tiles + tile) * params.layout.list_bytes;
}

// Of a tile that has been sorted into scratch.
__device__ inline void copy_list(const PrivateSumParams& params, int tile, int rows, char* list) {
  const char* source = list_in_scratch(params, tile);
  const int bytes = (params.num_groups * rows + kEntryStep) * 4;
#pragma unroll 1
  for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16) __pipeline_memcpy_async(list + at, source + at, 16);
}

// Step 1: a warp sorts one group's lookups of a tile by place, by counting. Loads and ballots of the batches of 32 rows
// do not wait for each other.
__device__ inline void sort_lookups(const PrivateSumParams& params, const TableGroup& group, int row_bytes,
                                    int64_t first_row, int rows, uint32_t* counters, uint32_t* list) {
  constexpr int kBatches = kMaxTile / 32;
  constexpr int kTogether = kBatches / 2;
  const int lane = threadIdx.x % 32;
  uint32_t place[kBatches] = {};
#pragma unroll 1
  for (int t = group.first_table; t < group.first_table + group.num_tables; ++t) {
    const PrivateSumTable& table = params.table[t];
    int64_t at = (first_row + lane) * params.index_row_stride + table.index_column * params.index_table_stride;
    int64_t wrong = 0;
#pragma unroll
    for (int first = 0; first < kBatches; first += kTogether) {
      if (first * 32 >= rows) break;
      int64_t index[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k, at += 32 * params.index_row_stride) {
        index[k] = (first + k) * 32 + lane < rows ? load_index(params.indices, params.index_type, at) : 0;
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int64_t row = signed_index(index[k], params.index_type);
        if (!is_in_range(row, table.num_embeddings)) wrong = row;
        place[first + k] += static_cast<uint32_t>(row) * table.multiplier;
      }
    }
    check_index(wrong, table.num_embeddings);
  }
  for (int bin = lane; bin < params.bins; bin += 32) counters[bin] = 0;
  __syncwarp();
  // Each lookup's rank among those of its place goes into the place's high half.
#pragma unroll
  for (int first = 0; first < kBatches; first += kTogether) {
    if (first * 32 >= rows) break;
    unsigned peers[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) peers[k] = __ballot_sync(kFullWarp, (first + k) * 32 + lane < rows);
#pragma unroll 1
    for (int bit = 0; bit < group.bits; ++bit) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) peers[k] &= lanes_with_bit(place[first + k], 1u << bit);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int b = first + k;
      const uint32_t lower = __popc(peers[k] & ((1u << lane) - 1));
      const uint32_t before = counters[place[b]];
      __syncwarp();
      if (b * 32 + lane < rows && lower == 0) counters[place[b]] = before + __popc(peers[k]);
      __syncwarp();
      place[b] |= (before + lower) << 16;
    }
  }
  uint32_t total = 0;
#pragma unroll 1
  for (int first = 0; first < group.places; first += 32) {
    const uint32_t count = counters[first + lane];
    const uint32_t inclusive = scan_lanes(count, lane);
    counters[first + lane] = total + inclusive - count;
    total += __shfl_sync(kFullWarp, inclusive, 31);
  }
  __syncwarp();
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    if (b * 32 + lane < rows) {
      const uint32_t at = place[b] & 0xffff;
      list[counters[at] + (place[b] >> 16)] = (b * 32 + lane) * row_bytes << kPlaceBits | (group.first_place + at);
    }
  }
  __syncwarp();
}

// Step 1. The blocks of the same rows share the work, unless there is one tile alone: its list is not worth a barrier.
template <typename scalar_t>
__device__ inline void sort_tiles(const PrivateSumParams& params, int64_t first_row, int rows, char* shared) {
  const bool shares = params.tiles > 1;
  const int blocks = shares ? gridDim.y : 1;
  const int first_tile = shares ? blockIdx.y : 0;
  const int tiles = (rows + params.tile - 1) / params.tile;
  const int jobs = (tiles - first_tile + blocks - 1) / blocks * params.num_groups;
  const int warp = threadIdx.x / 32;
  const int row_bytes = params.columns * static_cast<int>(sizeof(scalar_t));
  if (warp >= params.sort_warps) return;
  uint32_t* counters = reinterpret_cast<uint32_t*>(shared) + warp * params.bins;
  // All groups of a tile in one block: they read the same sectors of the indices, which its L1 then has. The shuffle
  // keeps the compiler from taking job for warp, of which it would spill a copy for every counter.
  for (int job = __shfl_sync(kFullWarp, warp, 0); job < jobs; job += params.sort_warps) {
    const int turn = job / params.num_groups;
    const int g = job - turn * params.num_groups;
    const int tile = turn * blocks + first_tile;
    const int begin = tile * params.tile;
    const int tile_rows = min(rows - begin, params.tile);
    auto* list = reinterpret_cast<uint32_t*>(shares ? list_in_scratch(params, tile) : shared + params.layout.lists);
    list += g * tile_rows;
    sort_lookups(params, params.group[g], row_bytes, first_row + begin, tile_rows, counters, list);
    // The last share's entries up to a whole step are of a place behind all others.
    const int lane = threadIdx.x % 32;
    if (g == params.num_groups - 1 && lane < kEntryStep) list[tile_rows + lane] = params.places;
  }
}

// Shared memory by addresses of 32 bits. In PTX, since from C++ the compiler adds where the block's shared memory
// begins to every single address.
__device__ inline uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

template <typename T>
__device__ inline T load_shared(uint32_t address) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t word[kWords];
  if constexpr (kWords == 1) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(address) : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(address) : "memory");
  } else {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[w]), "=r"(word[w + 1]), "=r"(word[w + 2]), "=r"(word[w + 3])
                   : "r"(address + w * 4)
                   : "memory");
    }
  }
  T value;
  memcpy(&value, word, sizeof(T));
  return value;
}

template <typename T>
__device__ inline void store_shared(uint32_t address, const T& value) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t word[kWords];
  memcpy(word, &value, sizeof(T));
#pragma unroll
  for (int w = 0; w < kWords; w += 4) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address + w * 4), "r"(word[w]), "r"(word[w + 1]),
                 "r"(word[w + 2]), "r"(word[w + 3])
                 : "memory");
  }
}

// A thread's part in step 2, whatever the tile. All but the first are addresses.
struct Part {
  int begin;  // of its lane group's share of a list
  uint32_t list;
  uint32_t gradient;  // the thread's columns in the tile; threads behind the last column repeat the last one's
  uint32_t first_sum;
  uint32_t place_bytes;  // 0 behind the last column: such threads keep all sums in their edges, which nobody reads
  uint32_t edge;
  const char* source;  // the thread's columns in grad_output, in its lane group's first row; null where it copies none
};

template <typename scalar_t>
__device__ inline Part find_part(const PrivateSumParams& params, int64_t first_row, const char* shared) {
  using sum_t = acc_t<scalar_t>;
  const int lane_group = static_cast<int>(threadIdx.x) >> params.lane_bits;
  const int lane = static_cast<int>(threadIdx.x) - (lane_group << params.lane_bits);
  const int column = min(lane * kQuad, params.columns - kQuad);
  const bool owns = lane * kQuad == column;
  const uint32_t base = address_of(shared);
  Part part;
  part.begin = lane_group * params.share;
  part.list = base + params.layout.lists + part.begin * 4;
  part.gradient = base + params.layout.tiles + column * sizeof(scalar_t);
  part.edge = base + params.layout.edges + threadIdx.x * sizeof(Pack<sum_t, kQuad>);
  part.first_sum = owns ? base + column * sizeof(sum_t) : part.edge;
  part.place_bytes = owns ? params.columns * sizeof(sum_t) : 0;
  const int first_column = blockIdx.y * params.columns + column;
  const scalar_t* grad = static_cast<const scalar_t*>(params.grad_output) + first_column;
  const bool copies = params.copies_in_steps && owns && first_column < params.embedding_dim;
  part.source =
      copies ? reinterpret_cast<const char*>(grad + (first_row + lane_group) * params.grad_output_stride) : nullptr;
  // Or the compiler finds it all anew for every tile.
  asm volatile(""
               : "+r"(part.begin), "+r"(part.list), "+r"(part.gradient), "+r"(part.edge), "+r"(part.first_sum),
                 "+r"(part.place_bytes), "+l"(part.source));
  return part;
}

// What a thread copies of the next tile while it sums: its columns of every so many rows, asked for row by row. All at
// once they would fill the queue of the loads, and the warps would wait for it instead of adding.
struct Copies {
  const char* source;
  int target;  // from where shared memory begins
  int end;     // of the targets
};

template <typename scalar_t>
__device__ inline Copies find_copies(const PrivateSumParams& params, const Part& part, int begin, int rows,
                                     int buffer) {
  if (part.source == nullptr) return {nullptr, 0, 0};
  const int pitch = params.columns * static_cast<int>(sizeof(scalar_t));
  const int first = params.layout.tiles + buffer * params.layout.tile_bytes;
  const int lane_group = static_cast<int>(threadIdx.x) >> params.lane_bits;
  const int lane = static_cast<int>(threadIdx.x) - (lane_group << params.lane_bits);
  const int target = first + lane_group * pitch + lane * kQuad * static_cast<int>(sizeof(scalar_t));
  return {part.source + begin * params.grad_output_stride * static_cast<int64_t>(sizeof(scalar_t)), target,
          first + rows * pitch};
}

template <typename scalar_t>
__device__ inline void copy_next(const PrivateSumParams& params, Copies& copies, char* shared) {
  constexpr int kBytes = kQuad * sizeof(scalar_t);
  static_assert(kBytes <= 16);
  if (copies.target < copies.end) __pipeline_memcpy_async(shared + copies.target, copies.source, kBytes);
  copies.source += params.source_step;
  copies.target += params.target_step;
}

template <typename scalar_t>
__device__ inline void add(Pack<acc_t<scalar_t>, kQuad>& sum, const Pack<scalar_t, kQuad>& value) {
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    // By pairs, since for the upper one of a word the compiler takes two instructions.
    uint32_t word[kQuad / 2];
    memcpy(word, &value, sizeof(word));
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w) {
      sum.value[2 * w] += __uint_as_float(word[w] << 16);
      sum.value[2 * w + 1] += __uint_as_float(word[w] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) sum.value[j] += widen(value.value[j]);
  }
}

// A run that goes on beyond the share of the lane group in which it began, and its sum's address.
constexpr uint32_t kNowhere = 0xffffffff;
template <typename sum_t>
struct OpenRun {
  Pack<sum_t, kQuad> sum;
  uint32_t to = kNowhere;
};

// Step 2. kCopies: while it sums.
template <typename scalar_t, bool kCopies>
__device__ inline OpenRun<acc_t<scalar_t>> sum_tile(const PrivateSumParams& params, const Part& part, int rows,
                                                    int buffer, Copies copies, char* shared) {
  using sum_t = acc_t<scalar_t>;
  using Sum = Pack<sum_t, kQuad>;
  constexpr int kSteps = kUnroll<scalar_t>;
  const Layout& layout = params.layout;
  OpenRun<sum_t> open;
  const int left = params.num_groups * rows - part.begin;  // entries from the share's begin on
  if constexpr (kCopies) {
    // As many copies are left as there are steps.
    const int steps = (max(min(params.share, left), 0) + kSteps - 1) / kSteps;
    while (copies.target + steps * params.target_step < copies.end) copy_next<scalar_t>(params, copies, shared);
  }
  if (left <= 0) return open;
  const uint32_t gradient = part.gradient + buffer * layout.tile_bytes;
  uint32_t at = part.list + buffer * layout.list_bytes;
  const uint32_t end = at + min(params.share, left) * 4;

  const auto place_of = [](uint32_t entry) { return entry & ((1u << kPlaceBits) - 1); };
  const auto place_at = [&](uint32_t entry_at) { return place_of(load_shared<uint32_t>(entry_at)); };
  const uint32_t first = place_at(at);
  const bool incoming = part.begin > 0 && place_at(at - 4) == first;
  uint32_t current = first;
  uint32_t to = incoming ? part.edge : part.first_sum + first * part.place_bytes;
  Sum sum = load_shared<Sum>(to);
#pragma unroll 1
  for (; at < end; at += kSteps * 4) {
    if constexpr (kCopies) copy_next<scalar_t>(params, copies, shared);
    const auto entries = load_shared<Pack<uint32_t, kSteps>>(at);
    Pack<scalar_t, kQuad> value[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      value[k] = load_shared<Pack<scalar_t, kQuad>>(gradient + (entries.value[k] >> kPlaceBits));
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint32_t place = place_of(entries.value[k]);
      if (place != current) {
        store_shared(to, sum);
        to = part.first_sum + place * part.place_bytes;
        sum = load_shared<Sum>(to);
      }
      current = place;
      add(sum, value[k]);
    }
  }
  const bool outgoing = params.share < left && place_at(end) == current;
  const bool through = outgoing && incoming && current == first;
  (shared + layout.goes_on)[threadIdx.x >> params.lane_bits] = through;  // the same from all of its threads
  if (outgoing && !through) {
    if (part.place_bytes > 0) open = {sum, to};
  } else {
    store_shared(to, sum);
  }
  return open;
}

// Step 2, the end, behind a barrier. A run is of one tile and group, so its chain of parts is short. Edges are left
// cleared for the next tile.
template <typename sum_t>
__device__ inline void close_run(const PrivateSumParams& params, const Part& part, OpenRun<sum_t> open, char* shared) {
  if (open.to == kNowhere) return;
  using Sum = Pack<sum_t, kQuad>;
  const uint32_t edge_step = sizeof(Sum) << params.lane_bits;
  uint32_t edge = part.edge;
  const char* goes_on = shared + params.layout.goes_on + (threadIdx.x >> params.lane_bits);
  Sum rest{};
  do {
    edge += edge_step;
    ++goes_on;
    const Sum addend = load_shared<Sum>(edge);
    store_shared(edge, Sum{});
#pragma unroll
    for (int j = 0; j < kQuad; ++j) rest.value[j] += addend.value[j];
  } while (*goes_on);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) open.sum.value[j] += rest.value[j];
  store_shared(open.to, open.sum);
}

// Step 3, in a block: the rows' sums from those of their places.
template <typename scalar_t>
__device__ inline void sum_places(const PrivateSumParams& params, const char* shared) {
  using sum_t = acc_t<scalar_t>;
  const int quads = params.columns / kQuad;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const auto* sums = reinterpret_cast<const Pack<sum_t, kQuad>*>(shared);
  auto* partials = static_cast<Pack<sum_t, kQuad>*>(params.partials) + block * params.total_rows * quads;
  for (int item = threadIdx.x; item < params.total_rows * quads; item += kThreads) {
    const int row = small_quotient(item, quads);
    const int t = find_last(params.first_row, params.num_tables, row);
    const PrivateSumTable& table = params.table[t];
    const TableGroup& group = params.group[table.group];
    const int local = row - params.first_row[t];
    Pack<sum_t, kQuad> sum{};
    if (local != table.padding_idx) {
      const int count = group.places / table.num_embeddings;
      const int first = group.first_place + local * table.multiplier;
      const auto* at = sums + first * quads + item - row * quads;
      const int jump = table.multiplier * (table.num_embeddings - 1) * quads;  // over the table's other rows
      int in_turn = table.multiplier;
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const Pack<sum_t, kQuad> addend = *at;
#pragma unroll
        for (int j = 0; j < kQuad; ++j) sum.value[j] += addend.value[j];
        at += quads;
        if (--in_turn == 0) {
          in_turn = table.multiplier;
          at += jump;
        }
      }
    }
    partials[item] = sum;
  }
}

// Step 3, in the grid: a block's own columns.
template <typename scalar_t>
__device__ inline void sum_splits(const PrivateSumParams& params) {
  using sum_t = acc_t<scalar_t>;
  constexpr int kLoads = 16;
  const int splits = gridDim.x;
  scalar_t* grad_weight = static_cast<scalar_t*>(params.grad_weight);
  const int elements = params.total_rows * params.columns;
  const int64_t split_step = static_cast<int64_t>(gridDim.y) * elements;
  const int items = (elements * params.parts + 31) / 32 * 32;  // whole warps, for the shuffles
  for (int item = blockIdx.x * kThreads + threadIdx.x; item < items; item += gridDim.x * kThreads) {
    const int element = min(item / params.parts, elements - 1);
    const int part = item % params.parts;
    const sum_t* partial =
        static_cast<const sum_t*>(params.partials) + static_cast<int64_t>(blockIdx.y) * elements + element;
    sum_t total = 0;
    if (splits <= kLoads * params.parts) {
      add_partials<kLoads>(partial, split_step, part, splits, params.parts, total);
    } else {
#pragma unroll kLoads
      for (int split = part; split < splits; split += params.parts) total += partial[split * split_step];
    }
    for (int delta = 1; delta < params.parts; delta *= 2) total += __shfl_xor_sync(kFullWarp, total, delta);
    const int row = element / params.columns;
    const int column = blockIdx.y * params.columns + element - row * params.columns;
    if (part > 0 || column >= params.embedding_dim) continue;
    const int t = find_last(params.first_row, params.num_tables, row);
    const int64_t local = row - params.first_row[t];
    grad_weight[params.table[t].weight_offset + local * params.embedding_dim + column] = narrow<scalar_t>(total);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) private_sum_backward(const __grid_constant__ PrivateSumParams params) {
  using sum_t = acc_t<scalar_t>;
  extern __shared__ __align__(32) char shared[];
  const Layout& layout = params.layout;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * params.rows_per_split;
  const int rows = static_cast<int>(min(int64_t{params.rows_per_split}, params.num_rows - first_row));
  // Half of the warps copy, and the others' indices do not wait behind the first tile.
  const int copier = static_cast<int>(threadIdx.x) - kThreads / 2;
  if (copier >= 0) {
    copy_tile<scalar_t>(params, first_row, min(rows, params.tile), copier, kThreads / 2, shared + layout.tiles);
  }
  sort_tiles<scalar_t>(params, first_row, rows, shared);
  if (params.tiles > 1 && gridDim.y > 1) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
  if (params.tiles > 1) copy_list(params, 0, min(rows, params.tile), shared + layout.lists);
  __pipeline_commit();
  for (int i = threadIdx.x; i < layout.lists / 16; i += kThreads) {
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  }
  const Part part = find_part<scalar_t>(params, first_row, shared);
  int buffer = 0;
  for (int tile = 0; tile * params.tile < rows; ++tile) {
    __pipeline_wait_prior(0);
    __syncthreads();
    const int begin = tile * params.tile;
    const int next = begin + params.tile;
    const int tile_rows = min(rows - begin, params.tile);
    const int next_rows = min(rows - next, params.tile);
    const int other = buffer ^ 1;
    if (next_rows > 0) copy_list(params, tile + 1, next_rows, shared + layout.lists + other * layout.list_bytes);
    OpenRun<sum_t> open;
    if (kMayCopyInSteps<scalar_t> && params.copies_in_steps && next_rows > 0) {
      const Copies copies = find_copies<scalar_t>(params, part, next, next_rows, other);
      open = sum_tile<scalar_t, kMayCopyInSteps<scalar_t>>(params, part, tile_rows, buffer, copies, shared);
    } else {
      if (next_rows > 0) {
        copy_tile<scalar_t>(params, first_row + next, next_rows, threadIdx.x, kThreads,
                            shared + layout.tiles + other * layout.tile_bytes);
      }
      open = sum_tile<scalar_t, false>(params, part, tile_rows, buffer, {}, shared);
    }
    __pipeline_commit();
    __syncthreads();
    close_run<sum_t>(params, part, open, shared);
    buffer ^= 1;
  }
  __syncthreads();
  sum_places<scalar_t>(params, shared);

  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int t = threadIdx.x; t < params.num_tables; t += kThreads) {
      const PrivateSumTable& table = params.table[t];
      scalar_t* end = static_cast<scalar_t*>(params.grad_weight) + table.weight_offset +
                      int64_t{table.num_embeddings} * params.embedding_dim;
      for (int i = 0; i < table.gap; ++i) end[i] = narrow<scalar_t>(0);
    }
  }
  cooperative_groups::this_grid().sync();
  sum_splits<scalar_t>(params);
}

template <typename scalar_t>
FeStatus launch(const PrivateSumParams& params, const dim3& grid, const DeviceInfo& device, cudaStream_t stream) {
  const auto kernel = private_sum_backward<scalar_t>;
  static std::atomic<uint64_t> allowed{0};
  const FeStatus status =
      allow_shared_memory(reinterpret_cast<const void*>(kernel), device.properties.shared_bytes_per_block, device,
                          &allowed, "backward_private_sum shared memory");
  if (status != FE_OK) return status;
  return fast_embedding::launch(kernel, grid, dim3(kThreads), params.layout.total, params, true, Begin::AFTER_ALL,
                                device, stream, "backward_private_sum");
}

}  // namespace

FeStatus backward_private_sum(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                              size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  const int64_t dim = call.tables.empty() ? 0 : call.tables[0].embedding_dim;
  const int64_t slices = ceil_div(dim, kMaxColumns);
  int64_t rows = 0;
  for (const TableSlice& table : call.tables) rows += table.num_embeddings;
  if (plan.splits < 1 || call.tables.size() > kMaxTables || slices > device.properties.num_sms ||
      rows * kQuad * accumulator_bytes(args.scalar_type) > device.properties.shared_bytes_per_block) {
    return FE_INVALID_ARGUMENT;
  }
  if (rows == 0 || dim == 0) {
    *workspace_bytes = 0;
    const int64_t bytes = args.grad_weight_numel * scalar_bytes(args.scalar_type);
    if (workspace == nullptr || call.zeroed) return FE_OK;
    return check_cuda(cudaMemsetAsync(args.grad_weight, 0, bytes, stream), "backward_private_sum");
  }

  const std::vector<int32_t> gaps = call.zeroed ? std::vector<int32_t>{} : find_gaps(call);
  PrivateSumParams params{};
  params.embedding_dim = static_cast<int32_t>(dim);
  params.copy_bytes = static_cast<int32_t>(pack_bytes(args, call.tables[0]));
  const int64_t step = std::max<int64_t>(kQuad, params.copy_bytes / scalar_bytes(args.scalar_type));
  params.columns = static_cast<int32_t>(round_up(ceil_div(dim, slices), step));
  while (kQuad << params.lane_bits < params.columns) ++params.lane_bits;
  const int64_t quad_bytes = kQuad * scalar_bytes(args.scalar_type);
  // Where row parts are whole lines, asking for them all at once holds nothing up.
  const auto whole_lines = [&](int64_t columns) { return columns * scalar_bytes(args.scalar_type) % 128 == 0; };
  params.copies_in_steps = params.copy_bytes >= std::min<int64_t>(quad_bytes, 16) && dim % kQuad == 0 &&
                           !(whole_lines(params.columns) && whole_lines(args.grad_output_stride));
  const int64_t row_step = kThreads >> params.lane_bits;
  params.source_step = row_step * args.grad_output_stride * scalar_bytes(args.scalar_type);
  params.target_step = static_cast<int32_t>(row_step * params.columns * scalar_bytes(args.scalar_type));
  const int64_t shared_bytes = device.properties.shared_bytes_per_block;
  int32_t largest = 0;
  for (int max_places = kMaxJointPlaces; largest == 0 && max_places > 0; max_places /= 2) {
    set_groups(call, gaps, max_places, &params);
    largest = largest_tile(params, args.scalar_type, 2, shared_bytes);
  }
  if (largest == 0) return FE_INVALID_ARGUMENT;
  const int64_t most_splits =
      std::min({int64_t{plan.splits}, device.properties.num_sms / slices, ceil_div(args.num_rows, kMinShare)});
  params.rows_per_split = static_cast<int32_t>(ceil_div(args.num_rows, most_splits));
  const int64_t splits = ceil_div(args.num_rows, params.rows_per_split);
  set_tiles(args.scalar_type, slices, largest, shared_bytes, &params);
  const int64_t elements = int64_t{params.total_rows} * params.columns;
  params.parts = threads_per_sum(elements, splits * kThreads, kMaxParts);
  const int64_t partial_bytes = splits * slices * elements * accumulator_bytes(args.scalar_type);
  const int64_t list_bytes = params.tiles > 1 ? splits * params.tiles * params.layout.list_bytes : 0;
  const size_t needed = round_up(partial_bytes, 32) + list_bytes;
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
  params.num_rows = static_cast<int32_t>(args.num_rows);
  set_input(args, &params);
  params.grad_weight = args.grad_weight;
  params.partials = workspace;
  params.lists = static_cast<char*>(workspace) + round_up(partial_bytes, 32);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(slices));
  return dispatch_scalar(args.scalar_type,
                         [&](auto scalar) { return launch<decltype(scalar)>(params, grid, device, stream); });
}

}  // namespace fast_embedding
