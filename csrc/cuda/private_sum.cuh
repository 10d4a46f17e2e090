// What a launch of PRIVATE for sums is told: which tables go together, and what fits shared memory.
#pragma once

#include <algorithm>

#include "private.cuh"

namespace fast_embedding {

constexpr int kWarps = 32;  // what hides the latency of shared memory
constexpr int kThreads = kWarps * 32;
constexpr int kLanes = 16;  // threads that share a row, at the most
constexpr int kQuad = 4;    // columns of a thread
constexpr int kMaxColumns = kLanes * kQuad;
constexpr int kMaxTables = 16;
constexpr int kMaxTile = 512;  // rows: a lane that sorts them keeps one of each 32 in registers
constexpr int kMinTile = 64;
constexpr int kMinShare = 64;        // rows: a block must be worth the sums that it leaves
constexpr int kMaxJointPlaces = 64;  // more leave the tiles too little shared memory, and cost more to tell apart
constexpr int kEntryStep = 4;        // a lane group's share of the list is a multiple of it
constexpr int kPlaceBits = 14;       // of an entry, which leaves 18: a tile has at most 512 rows of 64 float64
constexpr int64_t kWholeTileBytes = 64 << 10;  // more are worth a second tile, so that copying and summing overlap
constexpr int64_t kMinSumBytes = 4 << 10;      // counters for all warps where tables are tiny
constexpr int kMaxParts = 8;

// Tables that are taken together stand one after the other.
struct PrivateSumTable {
  int64_t weight_offset;
  int32_t num_embeddings;
  int32_t padding_idx;
  int32_t index_column;
  int32_t gap;         // elements of grad_weight behind the table that are no table's
  int32_t multiplier;  // from a row to the next among the group's places
  int32_t group;
};

struct TableGroup {
  int32_t first_table;
  int32_t num_tables;
  int32_t first_place;
  int32_t places;  // the product of the tables' rows
  int32_t bits;    // of a place in the group
};

// Where things are in shared memory: bytes, multiples of 32. At 0 the counters of step 1, [warps, bins], and then the
// sums, [places + 1, columns], the last for entries that are none.
struct Layout {
  int32_t edges;    // [kThreads] parts of runs that began in another lane group's share
  int32_t goes_on;  // [kThreads]: whether a lane group's run goes on beyond its share
  int32_t lists;    // of list_bytes: where the row is in the tile << kPlaceBits | place, group after group
  int32_t list_bytes;
  int32_t tiles;  // of tile_bytes: [tile, columns] of the gradient
  int32_t tile_bytes;
  int32_t total;
};

struct PrivateSumParams {
  int32_t first_row[kMaxTables];  // rows of the tables before
  PrivateSumTable table[kMaxTables];
  TableGroup group[kMaxTables];
  int32_t num_tables;
  int32_t num_groups;
  int32_t total_rows;  // of all tables
  int32_t places;
  int32_t bins;  // of the group with the most places, a multiple of 32
  int32_t embedding_dim;
  int32_t columns;    // of a block, a multiple of kQuad up to kMaxColumns
  int32_t lane_bits;  // 2^lane_bits threads share a row
  int32_t copy_bytes;
  int32_t copies_in_steps;  // nonzero: a thread copies what it sums, its columns, while it sums
  int32_t target_step;      // bytes from a row that a lane group copies to its next, in shared memory
  int64_t source_step;      // and in grad_output
  int32_t tile;
  int32_t tiles;  // of a split, at the most
  int32_t share;  // entries of a list that a lane group takes
  int32_t sort_warps;
  int32_t parts;  // threads that share an element of step 3, a power of two
  int32_t rows_per_split;
  int32_t num_rows;
  Layout layout;
  FeIndexType index_type;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* grad_output;
  int64_t grad_output_stride;
  void* grad_weight;
  void* partials;  // [splits, slices, total_rows, columns] accumulators
  char* lists;     // [splits, tiles, list_bytes] as in shared memory
};

// Tables by groups, the largest first; a table joins the first group whose places stay at most `max_places`.
inline std::vector<std::vector<size_t>> group_tables(const BackwardCall& call, int64_t max_places) {
  const auto rows = [&](size_t t) { return call.tables[t].num_embeddings; };
  std::vector<size_t> order;
  for (size_t t = 0; t < call.tables.size(); ++t) {
    if (rows(t) > 0) order.push_back(t);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rows(a) > rows(b); });
  std::vector<std::vector<size_t>> groups;
  std::vector<int64_t> places;
  for (const size_t t : order) {
    size_t g = 0;
    while (g < groups.size() && places[g] * rows(t) > max_places) ++g;
    if (g == groups.size()) {
      groups.emplace_back();
      places.push_back(1);
    }
    groups[g].push_back(t);
    places[g] *= rows(t);
  }
  return groups;
}

// `gaps`: behind each table, or empty where they are zeroed otherwise.
inline void set_groups(const BackwardCall& call, const std::vector<int32_t>& gaps, int64_t max_places,
                       PrivateSumParams* params) {
  params->num_tables = params->num_groups = params->total_rows = params->places = params->bins = 0;
  for (const std::vector<size_t>& members : group_tables(call, max_places)) {
    TableGroup& group = params->group[params->num_groups];
    group = {params->num_tables, static_cast<int32_t>(members.size()), params->places, 1, 0};
    for (const size_t t : members) {
      const TableSlice& source = call.tables[t];
      params->first_row[params->num_tables] = params->total_rows;
      PrivateSumTable& table = params->table[params->num_tables++];
      table.weight_offset = source.weight_offset;
      table.num_embeddings = static_cast<int32_t>(source.num_embeddings);
      table.padding_idx = static_cast<int32_t>(source.padding_idx);
      table.index_column = static_cast<int32_t>(source.index_column);
      table.gap = gaps.empty() ? 0 : gaps[t];
      table.multiplier = group.places;
      table.group = params->num_groups;
      group.places *= table.num_embeddings;
      params->total_rows += table.num_embeddings;
    }
    while ((1 << group.bits) < group.places) ++group.bits;
    ++params->num_groups;
    params->places += group.places;
    params->bins = std::max(params->bins, static_cast<int32_t>(round_up(group.places, 32)));
  }
}

inline Layout lay_out(const PrivateSumParams& params, FeScalarType type, int32_t tile, int32_t buffers) {
  const int64_t sum_bytes = accumulator_bytes(type);
  Layout layout;
  int64_t end = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, 32);
    return static_cast<int32_t>(begin);
  };
  place(std::max((params.places + 1) * params.columns * sum_bytes, kMinSumBytes));
  layout.edges = place(kThreads * kQuad * sum_bytes);
  layout.goes_on = place(kThreads);
  layout.list_bytes = static_cast<int32_t>(round_up((params.num_groups * tile + kEntryStep) * 4, 32));
  layout.lists = place(int64_t{buffers} * layout.list_bytes);
  layout.tile_bytes = static_cast<int32_t>(round_up(tile * params.columns * scalar_bytes(type), 32));
  layout.tiles = place(int64_t{buffers} * layout.tile_bytes);
  layout.total = static_cast<int32_t>(end);
  return layout;
}

// The most rows that a tile can have; 0 if the tables do not fit.
inline int32_t largest_tile(const PrivateSumParams& params, FeScalarType type, int32_t buffers, int64_t shared_bytes) {
  int32_t tile = kMaxTile;
  while (tile >= kMinTile && lay_out(params, type, tile, buffers).total > shared_bytes) tile -= 8;
  return tile < kMinTile ? 0 : tile;
}

// One tile if it holds all rows of a split, or else such that each share of a list is of whole steps, unless that makes
// them more.
inline void set_tiles(FeScalarType type, int64_t slices, int32_t largest, int64_t shared_bytes,
                      PrivateSumParams* params) {
  const int64_t rows = params->rows_per_split;
  const bool overlaps = slices == 1 && rows * params->columns * scalar_bytes(type) > kWholeTileBytes;
  const int64_t step = kThreads * kEntryStep >> params->lane_bits;
  const auto share = [&](int64_t tile) { return ceil_div(tile * params->num_groups, step) * kEntryStep; };
  int32_t buffers = 1;
  params->tile = params->rows_per_split;
  if (overlaps || rows > largest_tile(*params, type, 1, shared_bytes)) {
    buffers = 2;
    const int64_t fitting = std::min<int64_t>(largest, ceil_div(rows, 2));
    const int64_t whole = fitting * params->num_groups / step * step / params->num_groups;
    const auto steps = [&](int64_t tile) { return ceil_div(rows, tile) * share(tile); };
    params->tile = static_cast<int32_t>(whole > 0 && steps(whole) <= steps(fitting) ? whole : fitting);
  }
  params->tiles = static_cast<int32_t>(ceil_div(rows, params->tile));
  params->share = static_cast<int32_t>(share(params->tile));
  params->layout = lay_out(*params, type, params->tile, buffers);
  params->sort_warps = std::min(kWarps, params->layout.edges / (params->bins * 4));
}

}  // namespace fast_embedding
