// Which kernel runs the backward, from sizes and device properties alone. The measurements behind each threshold are
// in docs/design/kernels.md.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "fast_embedding.h"

namespace {

constexpr int64_t kMaxIndices = INT32_MAX;  // kernels count positions and rows in 32 bits
// What a float32 copy of a 16-bit gradient may take: the bound on all workspace.
constexpr double kScratchBytes = 8 << 20;
constexpr double kScratchBytesPerIndex = 16;
constexpr double kScratchShareOfGradient = 0.1;
constexpr int64_t kMaxOwnIndices = 1024;
constexpr int64_t kMaxOwnIndicesForSort = 2048;  // where the alternative is SORT, at 35 us and more
constexpr int kMaxPrivateThreads = 1024;
constexpr int kMinPrivateThreads = 256;  // fewer leave too few loads in flight in an SM to reach the copy rate
// Beyond these, summing the blocks' tables costs more than tiles do, and more than a sort does.
constexpr int64_t kMaxPrivateNumel = 512;
constexpr int64_t kMinPrivateIndices = 131072;
constexpr int64_t kMaxPrivateNumelForSort = 2048;
constexpr int64_t kMinPrivateIndicesForSort = kMaxOwnIndicesForSort;
// PRIVATE in registers: see backward_few_rows.cu. Every block of it takes up to 64 accesses of a row side by side.
constexpr int64_t kMinFewRowsIndices = 4096;
constexpr int64_t kFewRowsColumns64 = 64;  // in float64: 300 columns take a quarter longer than before, 768 twice
constexpr int64_t kFewRowsOfWide16 = 10;   // 16-bit rows of kWideColumns16 and more: TILE is up to 10% faster beyond
constexpr int64_t kWideColumns16 = 256;
constexpr int64_t kFewRowsColumnsPerSm = 32;  // more would leave SMs idle, or not fit
// Sorting costs 15 to 70 us whatever the columns; then a row costs one read and one write. See sorting_pays().
constexpr int64_t kMinSortRowBytes = 512;
constexpr int64_t kMinSortGradientBytes = int64_t{192} << 20;
constexpr int64_t kMinSortRowBytes16 = 128;
constexpr int64_t kMinSortGradientBytes16 = int64_t{32} << 20;
constexpr int64_t kAlwaysSortRowBytes16 = 1024;
// Of fewer rows a tile merges so many lookups that its atomics cost less than a sort. In 16 bits that goes on to
// kManySortRows16, where the gradient is not long.
constexpr int64_t kMinSortRows = 256;
constexpr int64_t kManySortRows16 = 2048;
constexpr int64_t kLongSortGradientBytes16 = int64_t{64} << 20;
// What small tables beside others cost, in microseconds on 132 SMs: a lookup in TILE and in SORT, a column of one in
// PRIVATE, and what PRIVATE's launch adds where others run too, or more than TILE's where none do.
constexpr double kTileLookupUs = 42e-6;
constexpr double kSortLookupUs = 85e-6;
constexpr double kPrivateColumnUs = 2.2e-6;
constexpr double kGradientColumnUs = 1e-6;    // of a long row in TILE and SORT
constexpr double kPrivateSumChunkUs = 12e-6;  // of a table's row in PRIVATE's form for sums, up to 64 columns
constexpr double kPrivateLaunchUs = 9;
constexpr double kPrivateSumLaunchUs = 12;
constexpr double kMeasuredSms = 132;
constexpr int kMinPrivateThreadsForMany = 512;
constexpr int64_t kMaxPrivateNumelForMany = 16384;  // a block leaves as many sums
// What PRIVATE for sums holds in shared memory: see lay_out() in private_sum.cuh.
constexpr int64_t kPrivateSumColumns = 64;
constexpr int64_t kPrivateSumLookups = 2 * 64;  // of two tiles at the least
constexpr int64_t kPrivateSumEdges = 64 * 64;
constexpr int64_t kPrivateSumListBytes = 12 << 10;
constexpr double kPrivateSumEntryBytes = 4;  // of a lookup, in scratch
constexpr int64_t kMaxSumTables = 16;
constexpr int kTileBlocksPerSm = 3;
constexpr int kPartStep = 32;
constexpr int64_t kRoomyShared = 112 << 10;
constexpr int kClusterThreads = 1024;  // each with up to 16 lookups
constexpr int64_t kClusterChunk = 16 * kClusterThreads;
constexpr int kClusterSms = 64;  // that clusters of all tables take at the most
constexpr int kMaxSmallCluster = 4;
constexpr int kSmallClusterSms = 112;  // the same for clusters that find a place anywhere
constexpr double kZeroBytesPerUs = 4.6e6;
constexpr double kZeroBytesPerUsOfSm = 5e4;
constexpr double kReadItemUs = 1.6;  // of a cluster's thread, where the indices of several tables stand side by side
constexpr double kMostOverZeros = 1.02;
constexpr double kHiddenZerosUs = 3.7;  // at a barrier of the sort by all blocks
constexpr int kChunkBytes = 64 * 16;    // of a row that a block takes: 64 threads, 16 bytes each

int64_t accumulator_bytes(FeScalarType type) { return type == FE_FLOAT64 ? 8 : 4; }
int64_t scalar_bytes(FeScalarType type) { return type == FE_FLOAT64 ? 8 : type == FE_FLOAT32 ? 4 : 2; }

// Where a sort costs less than TILE's atomics. 16-bit types pay more for those: they go to a float32 copy, which is
// read once more to be rounded. A sort costs by the lookup and atomics by the byte, so with tables of mixed width it is
// the mean row that decides, not the widest.
bool sorting_pays(const FePlanQuery& query) {
  const double all_rows_bytes = static_cast<double>(query.embedding_dim) * scalar_bytes(query.scalar_type);
  const double row_bytes = all_rows_bytes / static_cast<double>(std::max<int64_t>(query.num_tables, 1));
  const double gradient_bytes = static_cast<double>(query.num_indices) * all_rows_bytes;
  if (query.num_embeddings < kMinSortRows) return false;
  if (scalar_bytes(query.scalar_type) != 2) {
    return row_bytes >= kMinSortRowBytes && gradient_bytes >= kMinSortGradientBytes;
  }
  return (query.num_embeddings >= kManySortRows16 || gradient_bytes >= kLongSortGradientBytes16) &&
         (row_bytes >= kAlwaysSortRowBytes16 ||
          (row_bytes >= kMinSortRowBytes16 && gradient_bytes >= kMinSortGradientBytes16));
}

bool scratch_too_large(const FePlanQuery& query) {
  if (scalar_bytes(query.scalar_type) != 2) return false;
  const double rows = static_cast<double>(query.num_indices);
  const double row_bytes = static_cast<double>(query.embedding_dim) * scalar_bytes(query.scalar_type);
  const double most = kScratchBytes + rows * kScratchBytesPerIndex * static_cast<double>(query.num_tables) +
                      rows * row_bytes * kScratchShareOfGradient;
  return static_cast<double>(query.grad_weight_numel) * accumulator_bytes(query.scalar_type) > most;
}

// Of all tables' rows side by side: a chunk belongs to one table.
double chunks(const FePlanQuery& query) {
  const double bytes = static_cast<double>(query.embedding_dim) * scalar_bytes(query.scalar_type);
  return std::max({1.0, static_cast<double>(query.num_tables), std::ceil(bytes / kChunkBytes)});
}

// A thread owns one column of one copy of the table in shared memory, so threads * V accumulators must fit.
bool plan_private(const FePlanQuery& query, bool instead_of_sort, FePlan* plan) {
  const int64_t max_numel = instead_of_sort ? kMaxPrivateNumelForSort : kMaxPrivateNumel;
  const int64_t min_indices = instead_of_sort ? kMinPrivateIndicesForSort : kMinPrivateIndices;
  if (query.num_tables != 1 || query.num_embeddings == 0 || query.embedding_dim == 0 ||
      query.num_embeddings > max_numel / query.embedding_dim || query.num_indices < min_indices) {
    return false;
  }
  const int64_t column_bytes = query.num_embeddings * accumulator_bytes(query.scalar_type);
  const int64_t fitting = query.device.shared_bytes_per_block / column_bytes;
  const int64_t threads = std::min<int64_t>(fitting, kMaxPrivateThreads) / 32 * 32;
  if (threads < kMinPrivateThreads) return false;
  // Each split reads its share of the gradient and leaves V * D accumulators that are written and read once more.
  // With s splits the time is proportional to N * b / (s / num_sms) + 2 * s * V * a: least at the root below.
  const double reads = static_cast<double>(query.num_indices) * scalar_bytes(query.scalar_type);
  const double best = std::sqrt(reads * query.device.num_sms / (2.0 * column_bytes));
  plan->strategy = FE_STRATEGY_PRIVATE;
  plan->threads = static_cast<int32_t>(threads);
  plan->splits = static_cast<int32_t>(std::clamp<double>(best, 1, query.device.num_sms));
  return true;
}

// Whether float64 is added at half of float32's rate, and not at a thirty-second or less.
bool float64_is_fast(const FeDevice& device) {
  const int32_t capability = device.compute_capability;
  return capability == 70 || capability == 80 || capability == 90 || capability == 100;
}

// A thread has a sum in registers for each row and adds to all of them, to all but one under a predicate that is false.
// In microseconds on an H200, launch and barrier take 5, the sums of blocks 2, and the rest goes at the speed of memory
// up to some ten rows, of instructions beyond, where the other kernels go no faster.
bool plan_few_rows(const FePlanQuery& query, bool instead_of_sort, FePlan* plan) {
  const int64_t min_indices = instead_of_sort ? kMinPrivateIndicesForSort : kMinFewRowsIndices;
  if (query.num_tables != 1 || query.num_embeddings == 0 || query.num_embeddings > FE_MAX_FEW_ROWS ||
      query.embedding_dim == 0 || query.embedding_dim > kFewRowsColumnsPerSm * query.device.num_sms ||
      query.num_indices < min_indices) {
    return false;
  }
  if (query.scalar_type == FE_FLOAT64 && (!float64_is_fast(query.device) || query.embedding_dim > kFewRowsColumns64)) {
    return false;
  }
  const bool adds_more_than_it_reads = scalar_bytes(query.scalar_type) == 2 &&
                                       query.num_embeddings > kFewRowsOfWide16 && query.embedding_dim >= kWideColumns16;
  if (adds_more_than_it_reads && !instead_of_sort) return false;
  plan->strategy = FE_STRATEGY_PRIVATE;
  plan->threads = 0;
  plan->splits = query.device.num_sms;
  return true;
}

// A sort in clusters, one a table, beside the zeros. In microseconds, whichever device it is: the ratios count.
struct ClusterSort {
  int32_t blocks = 0;  // of a table's cluster; 0 where none fits
  double zeros_us = 0;
  double both_us = 0;
  double one_after_the_other_us = 0;  // by all blocks

  explicit ClusterSort(const FePlanQuery& query) {
    const int64_t tables = std::max<int64_t>(query.num_tables, 1);
    const double lookups = static_cast<double>(query.num_indices);
    const double passes = query.num_embeddings >= int64_t{1} << 20 ? 3 : query.num_embeddings >= 1 << 10 ? 2 : 1;
    const double zeros = query.sparse ? 0 : static_cast<double>(query.grad_weight_numel);
    zeros_us = zeros * scalar_bytes(query.scalar_type) / kZeroBytesPerUs;
    const double all_blocks_us = 4 + 5.5 * passes + (1 + passes) * lookups * static_cast<double>(tables) / 52000;
    one_after_the_other_us = all_blocks_us + std::max(0.0, zeros_us - kHiddenZerosUs * (2 * passes - 1));
    for (const int32_t candidate : {16, 8, 4, 2, 1}) {
      const int64_t sms = tables * candidate;
      const bool fits = candidate <= query.device.max_cluster_blocks &&
                        sms <= (candidate <= kMaxSmallCluster ? kSmallClusterSms : kClusterSms) &&
                        query.num_indices <= candidate * kClusterChunk;
      if (!fits) continue;
      const double items = std::ceil(lookups / (candidate * kClusterThreads));
      const double sort_us = 4.5 + 0.5 * items + passes * (2 + 1.4 * items);
      const double read_us = tables > 1 ? kReadItemUs * items : 0;  // before the zeros begin
      const double rate = static_cast<double>(query.device.num_sms - sms) * kZeroBytesPerUsOfSm / kZeroBytesPerUs;
      const double total_us = read_us + sort_us + std::max(0.0, zeros_us - sort_us * std::clamp(rate, 0.0, 1.0));
      if (blocks > 0 && total_us > 0.99 * both_us) continue;
      blocks = candidate;
      both_us = total_us;
    }
  }
  // TILE's zeros take as long, and the sums less than TILE; not so behind clusters of one or two blocks.
  bool hides_behind_zeros() const {
    return pays() && blocks >= kMaxSmallCluster && both_us <= kMostOverZeros * zeros_us;
  }
  bool pays() const { return blocks > 0 && both_us <= one_after_the_other_us; }
};

void plan_tile(const FePlanQuery& query, FePlan* plan) {
  plan->strategy = FE_STRATEGY_TILE;
  plan->float32_scratch = scalar_bytes(query.scalar_type) == 2;
}

void plan_sort(const FePlanQuery& query, const ClusterSort& cluster, FePlan* plan) {
  plan->strategy = FE_STRATEGY_SORT;
  const double part =
      static_cast<double>(query.num_indices) * chunks(query) / (kTileBlocksPerSm * query.device.num_sms);
  plan->tile = static_cast<int32_t>(std::clamp(std::ceil(part / kPartStep) * kPartStep, 64.0, 1024.0));
  // Counters take 20 KB at eight bits and 80 KB at ten, the entries that are put in order eight bytes each.
  const bool roomy = query.device.shared_bytes_per_block >= kRoomyShared;
  plan->digit_bits = roomy ? 10 : 8;
  plan->sort_tile = roomy ? 8192 : 4096;
  if (cluster.pays()) plan->cluster = cluster.blocks;
}

std::vector<int64_t> ascending_by_rows(const FeBackwardArgs& args) {
  std::vector<int64_t> order(args.num_tables);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return args.tables[a].num_embeddings < args.tables[b].num_embeddings; });
  return order;
}

// The tables that share a launch of PRIVATE: what each saves, and whether one more fits shared memory.
class PrivateTables {
 public:
  PrivateTables(const FeBackwardArgs& args, const FeDevice& device) : args_(args), device_(device) {}

  int64_t count() const { return count_; }
  int32_t threads() const { return sums() ? 0 : static_cast<int32_t>(threads_for(most_rows_)); }

  // Microseconds a lookup.
  double saves(const FeTable& table) const {
    const double columns = static_cast<double>(table.embedding_dim);
    const double lookup = args_.deterministic ? kSortLookupUs : kTileLookupUs;
    if (!sums()) return lookup - kPrivateColumnUs * columns;
    return lookup + kGradientColumnUs * columns - kPrivateSumChunkUs * std::ceil(columns / kPrivateSumColumns);
  }

  // Whether the table fits beside those that are taken, and takes it.
  bool take(const FeTable& table) {
    if (table.num_embeddings == 0 || table.embedding_dim == 0) return false;
    const int64_t rows = rows_ + table.num_embeddings;
    const int64_t most_rows = std::max(most_rows_, table.num_embeddings);
    const int64_t numel = numel_ + table.num_embeddings * table.embedding_dim;
    const bool fits = sums() ? count_ < kMaxSumTables && sums_fit(rows, table.embedding_dim) &&
                                   table.embedding_dim <= kPrivateSumColumns * device_.num_sms
                             : numel <= kMaxPrivateNumelForMany && threads_for(most_rows) >= kMinPrivateThreadsForMany;
    if (!fits) return false;
    ++count_;
    rows_ = rows;
    most_rows_ = most_rows;
    numel_ = numel;
    return true;
  }

 private:
  bool sums() const { return args_.combination == FE_SUM; }
  int64_t threads_for(int64_t rows) const {
    const int64_t fitting = device_.shared_bytes_per_block / (rows * accumulator_bytes(args_.scalar_type));
    return std::min<int64_t>(fitting, kMaxPrivateThreads) / 32 * 32;
  }
  // In shared memory, and in scratch a block's sums for each SM.
  bool sums_fit(int64_t rows, int64_t dim) const {
    const int64_t columns = std::min(kPrivateSumColumns, (dim + 7) / 8 * 8);
    const int64_t accumulator = accumulator_bytes(args_.scalar_type);
    const int64_t scalar = scalar_bytes(args_.scalar_type);
    const int64_t sum_bytes = rows * columns * accumulator;
    const double row_bytes = (kScratchBytesPerIndex - kPrivateSumEntryBytes) * static_cast<double>(count_ + 1) +
                             kScratchShareOfGradient * static_cast<double>(dim * scalar);
    return sum_bytes + kPrivateSumLookups * columns * scalar + kPrivateSumEdges * accumulator + kPrivateSumListBytes <=
               device_.shared_bytes_per_block &&
           static_cast<double>(sum_bytes * device_.num_sms) <=
               kScratchBytes + row_bytes * static_cast<double>(args_.num_rows);
  }

  const FeBackwardArgs& args_;
  const FeDevice& device_;
  int64_t count_ = 0;
  int64_t rows_ = 0;
  int64_t most_rows_ = 0;
  int64_t numel_ = 0;
};

}  // namespace

extern "C" FeStatus fe_plan_embedding_backward(const FePlanQuery* query, FePlan* plan) {
  if (query == nullptr || plan == nullptr || query->num_tables < 0 || query->num_embeddings < 0 ||
      query->embedding_dim < 0 || query->num_indices < 0 || query->grad_weight_numel < 0) {
    return FE_INVALID_ARGUMENT;
  }
  if (query->num_tables > 0 && query->num_indices > kMaxIndices / query->num_tables) return FE_UNSUPPORTED;
  if (query->num_embeddings >= kMaxIndices || query->embedding_dim >= kMaxIndices) return FE_UNSUPPORTED;

  *plan = FePlan{};
  const bool scaled = query->scale_grad_by_freq != 0;
  const bool sorts = query->deterministic || scratch_too_large(*query) || scaled || sorting_pays(*query);
  const ClusterSort cluster(*query);
  if (query->sparse || cluster.hides_behind_zeros()) {
    plan_sort(*query, cluster, plan);
  } else if (query->num_tables == 1 && query->num_indices <= (sorts ? kMaxOwnIndicesForSort : kMaxOwnIndices)) {
    plan->strategy = FE_STRATEGY_OWN;
  } else if (!scaled && (plan_few_rows(*query, sorts, plan) || plan_private(*query, sorts, plan))) {
    // That has filled it in.
  } else if (sorts) {
    plan_sort(*query, cluster, plan);
  } else {
    plan_tile(*query, plan);
  }
  return FE_OK;
}

extern "C" FeStatus fe_plan_private_tables(const FeBackwardArgs* args, const FeDevice* device, uint8_t* chosen,
                                           FePlan* plan) {
  if (args == nullptr || device == nullptr || chosen == nullptr || plan == nullptr) return FE_INVALID_ARGUMENT;
  *plan = FePlan{};
  plan->strategy = FE_STRATEGY_PRIVATE;
  std::fill(chosen, chosen + args->num_tables, uint8_t{0});
  if (args->num_tables < 2 || args->scale_grad_by_freq || args->num_rows > kMaxIndices) return FE_OK;

  PrivateTables tables(*args, *device);
  double saved = 0;
  for (const int64_t t : ascending_by_rows(*args)) {
    const double saves = tables.saves(args->tables[t]);
    if (saves <= 0 || !tables.take(args->tables[t])) continue;
    chosen[t] = 1;
    saved += saves;
  }
  const bool for_sort = tables.count() == args->num_tables && args->deterministic;
  const double launch = for_sort ? 0 : args->combination == FE_SUM ? kPrivateSumLaunchUs : kPrivateLaunchUs;
  if (tables.count() == 0 || saved * static_cast<double>(args->num_rows) * kMeasuredSms / device->num_sms < launch) {
    std::fill(chosen, chosen + args->num_tables, uint8_t{0});
    return FE_OK;
  }
  plan->threads = tables.threads();
  plan->splits = device->num_sms;
  return FE_OK;
}
