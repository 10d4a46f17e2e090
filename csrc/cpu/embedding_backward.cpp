// grad_weight[t][x[b, t]] += grad_output[b, columns of t], summed in float32 (float64 for float64), rounded once.
//
// Three ways, chosen from the sizes. Each is reproducible at every thread count: work is cut into pieces whose number
// does not depend on the threads, each piece adds in the order of the rows, pieces are added in their order.
//
//   in place   Little work, or a single thread and no reproducibility asked for: adds to the zeroed grad_weight itself.
//   private    Tables that fit a core's cache: each block of rows adds to its own copy of the tables, and the copies
//   are
//              summed. The gradient is read once, in order; hot rows cost nothing.
//   sorted     Larger tables, one at a time: positions are sorted by row (partition.h), and the merge of the sorted
//   list
//              with the rows 0, 1, ..., V - 1 is cut into segments of equal length. A segment sums its runs and writes
//              each row that ends in it, rows without lookups as zeros, so every row is written once and threads stay
//              balanced both under hot rows and under empty stretches. The cut is that of Merrill and Garland's
//              merge-based SpMV (SC 2016). A run over several segments leaves partial sums, added in a last step.
//              All of scale_grad_by_freq, for the list tells how often a row occurs; and the sparse gradient, which is
//              that of a table of the rows that occur: the rows in the list are replaced by their numbers.

#include <algorithm>
#include <cstring>

#include "common.h"
#include "partition.h"
#include "row_kernels.h"

namespace fast_embedding::cpu {
namespace {

// In place below this many gradient elements: 10 us on one core.
constexpr int64_t kInPlaceElements = 32 << 10;

// Copies of the tables, a power of two of them, between which neighbouring rows alternate while all fit half of L1. Two
// rows with one index would otherwise wait for each other's store.
constexpr int64_t kMaxCopies = 4;
constexpr int64_t kCopiesBytes = 4 << 10;

// Private sums of a group of tables must stay in L2.
constexpr int64_t kPrivateBytes = 1 << 20;
// Zeroing and rounding this many sums takes as long as sorting one index.
constexpr int64_t kPrivateElementsPerIndex = 32;
// A copy of the tables is zeroed and read back once for this many gradients of its size.
constexpr int64_t kPrivateReuse = 32;
constexpr int64_t kPrivateMinReuse = 8;
constexpr int64_t kPrivateMinBlocks = 4;
constexpr int64_t kPrivateMaxBlocks = 64;
constexpr int64_t kPrivateBlockElements = 16 << 10;

// Merged elements a segment at least, and segments at most.
constexpr int64_t kSegmentElements = 32 << 10;
constexpr int64_t kMaxSegments = 512;

// Sums that pieces leave for later take at most this, and a 16th of the gradient's size.
constexpr int64_t kPartialBytes = 4 << 20;

constexpr int64_t kAlignment = 256;

struct Columns {
  int64_t first;
  int64_t count;
};

enum class Strategy { kInPlace, kPrivate, kSorted };

// Consecutive tables that one strategy works on together.
struct Group {
  int64_t first_table;
  int64_t last_table;    // one past
  int64_t first_column;  // in grad_output
  int64_t columns;
  int64_t numel;  // of the tables, packed
  Strategy strategy;
};

struct PrivatePlan {
  int64_t num_blocks;
  int64_t block_rows;
  int64_t copies;
  int64_t copy_stride;   // elements
  int64_t block_stride;  // elements
};

struct SortedPlan {
  PartitionPlan partition;
  int64_t num_segments;
};

int64_t numel_of(const FeTable& table) { return table.num_embeddings * table.embedding_dim; }

template <typename scalar_t>
class Backward {
 public:
  using acc_t = accumulator_t<scalar_t>;

  explicit Backward(const FeBackwardArgs& args) : args_(args), indices_(args) {
    for (int64_t t = 0; t < args.num_tables; ++t) {
      total_columns_ += args.tables[t].embedding_dim;
      total_numel_ += numel_of(args.tables[t]);
    }
  }

  // FE_UNSUPPORTED where row and position do not fit a key together.
  FeStatus workspace_bytes(size_t* bytes) const {
    *bytes = 0;
    FeStatus status = FE_OK;
    for_each_group([&](const Group& group) {
      if (group.strategy == Strategy::kPrivate) {
        const PrivatePlan plan = plan_private(group);
        *bytes = std::max(*bytes, static_cast<size_t>(plan.num_blocks * plan.block_stride) * sizeof(acc_t));
      } else if (group.strategy == Strategy::kSorted) {
        const SortedPlan plan = plan_sorted(group);
        if (!plan.partition.supported) status = FE_UNSUPPORTED;
        *bytes = std::max(*bytes, SortedWorkspace(plan, group.columns, nullptr).bytes);
        if (!is_scaled() && may_add_to_one_copy(group)) {
          *bytes = std::max(*bytes, static_cast<size_t>(plan_private(group).block_stride) * sizeof(acc_t));
        }
      }
    });
    // Holes between tables are found in the order of the tables' places.
    *bytes = std::max(*bytes, static_cast<size_t>(args_.num_tables) * sizeof(int64_t));
    return status;
  }

  // The program of a team. Sets *bad_index where an index is out of range, and writes nothing then.
  void run(void* workspace, Team::Member& member, std::atomic<bool>* bad_index) const {
    check_indices(indices_, args_.num_rows, args_.tables, args_.num_tables, member, bad_index);
    if (bad_index->load(std::memory_order_relaxed)) return;
    if (total_numel_ < args_.grad_weight_numel) {
      member.once([&] { zero_holes(static_cast<int64_t*>(workspace)); });
    }
    for_each_group([&](const Group& group) {
      switch (group.strategy) {
        case Strategy::kInPlace:
          run_in_place(group, member);
          break;
        case Strategy::kPrivate:
          if (may_add_in_place(member) && plan_private(group).copies == 1) {
            run_in_place(group, member);
          } else {
            run_private(group, workspace, member);
          }
          break;
        case Strategy::kSorted:
          if (is_scaled()) {
            run_sorted(group, workspace, member);
          } else if (may_add_in_place(member)) {
            run_in_place(group, member);
          } else if (is_alone(member) && may_add_to_one_copy(group)) {
            run_private(group, workspace, member);
          } else {
            run_sorted(group, workspace, member);
          }
          break;
      }
    });
  }

  // ---- The sparse gradient, of the only table --------------------------------------------------------------------

  FeStatus sparse_workspace_bytes(int64_t num_embeddings, size_t* bytes) const {
    const SortedPlan plan = plan_sparse(num_embeddings);
    *bytes = SortedWorkspace(plan, only_table().columns, nullptr).bytes;
    return plan.partition.supported ? FE_OK : FE_UNSUPPORTED;
  }

  // Programs of a team. The first sorts and counts the rows, the second, of a `Backward` whose table has the rows
  // counted instead of num_embeddings, sums.
  void run_sparse_count(int64_t* count, void* workspace, Team::Member& member, std::atomic<bool>* bad_index) const {
    const FeTable& table = args_.tables[0];
    check_indices(indices_, args_.num_rows, &table, 1, member, bad_index);
    if (bad_index->load(std::memory_order_relaxed)) return;
    const SortedPlan plan = plan_sparse(table.num_embeddings);
    const SortedWorkspace space(plan, only_table().columns, static_cast<char*>(workspace));
    const Partition partition =
        partition_by_row(plan.partition, indices_, 0, table.padding_idx, space.partition, member);
    member.for_each(plan.partition.num_blocks, [&](int64_t block) {
      const Keys keys(plan.partition, partition, block);
      KeyBlock& state = space.blocks[block];
      state = {keys.begin == 0 ? -1 : plan.partition.row_of(partition.keys[keys.begin - 1]), 0};
      int64_t row = state.row_before;
      for (int64_t i = keys.begin; i < keys.end; ++i) {
        const int64_t next = plan.partition.row_of(partition.keys[i]);
        state.rows += next != row;
        row = next;
      }
    });
    member.once([&] {
      *count = 0;
      for (int64_t block = 0; block < plan.partition.num_blocks; ++block) *count += space.blocks[block].rows;
    });
  }

  void run_sparse(int64_t num_embeddings, int64_t* rows, void* workspace, Team::Member& member) const {
    const SortedPlan plan = plan_sparse(num_embeddings);
    const SortedWorkspace space(plan, only_table().columns, static_cast<char*>(workspace));
    const Partition partition = partition_in(plan.partition, space.partition);
    member.for_each(plan.partition.num_blocks, [&](int64_t block) {
      const Keys keys(plan.partition, partition, block);
      int64_t row = space.blocks[block].row_before;
      int64_t number = -1;
      for (int64_t earlier = 0; earlier < block; ++earlier) number += space.blocks[earlier].rows;
      for (int64_t i = keys.begin; i < keys.end; ++i) {
        uint64_t& key = partition.keys[i];
        const int64_t next = plan.partition.row_of(key);
        if (next != row) rows[++number] = next;
        row = next;
        key = static_cast<uint64_t>(number) << plan.partition.position_bits | (key & plan.partition.position_mask());
      }
    });
    if (only_table().columns > 0) sum_sorted(only_table(), plan, space, partition, member);
  }

  // What is read and written at least.
  int64_t traffic_bytes() const {
    return args_.num_rows * args_.num_tables * static_cast<int64_t>(sizeof(int64_t)) +
           (args_.num_rows * total_columns_ + args_.grad_weight_numel) * static_cast<int64_t>(sizeof(scalar_t));
  }

 private:
  // A block of sorted keys: the row of the key before it (-1 for none), and how many rows begin in it.
  struct KeyBlock {
    int64_t row_before;
    int64_t rows;
  };

  struct Keys {
    Keys(const PartitionPlan& plan, const Partition& partition, int64_t block) {
      const int64_t length = divide_up(*partition.count, plan.num_blocks);
      begin = std::min(block * length, *partition.count);
      end = std::min(begin + length, *partition.count);
    }
    int64_t begin, end;
  };

  // Partial sums of a sorted table. Segment s has two rows: in `heads` the end of a run that began in an earlier
  // segment, in `tails` the beginning of one that goes on in the next.
  struct SortedWorkspace {
    SortedWorkspace(const SortedPlan& plan, int64_t dim, char* base) {
      const auto place = [&](size_t size) {
        char* start = base == nullptr ? nullptr : base + bytes;
        bytes += static_cast<size_t>(round_up(static_cast<int64_t>(size), kAlignment));
        return start;
      };
      const auto rows = static_cast<size_t>(plan.num_segments * dim) * sizeof(acc_t);
      partition = place(plan.partition.workspace_bytes());
      blocks = reinterpret_cast<KeyBlock*>(place(static_cast<size_t>(plan.partition.num_blocks) * sizeof(KeyBlock)));
      starts = reinterpret_cast<int64_t*>(place(static_cast<size_t>(plan.num_segments + 1) * sizeof(int64_t)));
      heads = reinterpret_cast<acc_t*>(place(rows));
      tails = reinterpret_cast<acc_t*>(place(rows));
    }
    size_t bytes = 0;
    void* partition;
    KeyBlock* blocks;  // of the sparse gradient
    int64_t* starts;   // first key of each segment, and the number of keys
    acc_t* heads;
    acc_t* tails;
  };

  scalar_t* grad_weight(const FeTable& table) const {
    return static_cast<scalar_t*>(args_.grad_weight) + table.weight_offset;
  }
  const scalar_t* grad_output(int64_t row, int64_t column) const {
    return static_cast<const scalar_t*>(args_.grad_output) + row * args_.grad_output_stride + column;
  }

  // The first column of what follows `count` columns from `column`: a sum's gradient is every table's.
  int64_t column_after(int64_t column, int64_t count) const {
    return args_.combination == FE_SUM ? column : column + count;
  }

  // ---- Plans -----------------------------------------------------------------------------------------------------

  template <typename Visit>
  void for_each_group(const Visit& visit) const {
    const bool in_place = sizeof(acc_t) == sizeof(scalar_t) && args_.num_rows * total_columns_ <= kInPlaceElements;
    Group group{0, 0, 0, 0, 0, Strategy::kInPlace};
    while (group.last_table < args_.num_tables) {
      group.first_table = group.last_table;
      group.first_column = column_after(group.first_column, group.columns);
      group.columns = group.numel = 0;
      for (; group.last_table < args_.num_tables; ++group.last_table) {
        const FeTable& table = args_.tables[group.last_table];
        const bool first = group.last_table == group.first_table;
        const Strategy strategy = is_scaled() && table.embedding_dim > 0          ? Strategy::kSorted
                                  : in_place                                      ? Strategy::kInPlace
                                  : suits_private(table, first ? 0 : group.numel) ? Strategy::kPrivate
                                                                                  : Strategy::kSorted;
        if (!first && (strategy == Strategy::kSorted || strategy != group.strategy)) break;
        group.strategy = strategy;
        group.columns += table.embedding_dim;
        group.numel += numel_of(table);
      }
      visit(group);
    }
  }

  Group only_table() const {
    return {0, 1, 0, args_.tables[0].embedding_dim, numel_of(args_.tables[0]), Strategy::kSorted};
  }

  bool is_scaled() const { return args_.scale_grad_by_freq != 0; }

  // Beside tables of `other_numel` elements in the same group.
  bool suits_private(const FeTable& table, int64_t other_numel) const {
    const bool fits = (other_numel + numel_of(table)) * static_cast<int64_t>(sizeof(acc_t)) <= kPrivateBytes;
    return fits && numel_of(table) <= args_.num_rows * kPrivateElementsPerIndex;
  }

  int64_t partial_bytes(int64_t columns) const {
    return kPartialBytes + args_.num_rows * columns * static_cast<int64_t>(sizeof(scalar_t)) / 16;
  }

  PrivatePlan plan_private(const Group& group) const {
    PrivatePlan plan{};
    const int64_t numel = std::max<int64_t>(group.numel, 1);
    const int64_t work = args_.num_rows * group.columns;
    plan.copies = 1;
    while (plan.copies < kMaxCopies && 2 * plan.copies * numel * static_cast<int64_t>(sizeof(acc_t)) <= kCopiesBytes) {
      plan.copies *= 2;
    }
    plan.copy_stride = round_up(numel, kAlignment / static_cast<int64_t>(sizeof(acc_t)));
    plan.block_stride = plan.copies * plan.copy_stride;
    int64_t blocks =
        std::max(work / (numel * kPrivateReuse), std::min(kPrivateMinBlocks, work / (numel * kPrivateMinReuse)));
    blocks = std::min(blocks, work / kPrivateBlockElements);
    blocks = std::min(blocks, partial_bytes(group.columns) / (plan.block_stride * static_cast<int64_t>(sizeof(acc_t))));
    plan.num_blocks = std::clamp<int64_t>(blocks, 1, kPrivateMaxBlocks);
    plan.block_rows = divide_up(args_.num_rows, plan.num_blocks);
    return plan;
  }

  SortedPlan plan_sorted(const Group& group) const {
    const int64_t num_embeddings = args_.tables[group.first_table].num_embeddings;
    return plan_sorted(num_embeddings, num_embeddings, group.columns);
  }

  // The same before the rows are counted and after: both programs of a sparse gradient find the workspace alike.
  SortedPlan plan_sparse(int64_t num_embeddings) const {
    return plan_sorted(num_embeddings, std::min(num_embeddings, args_.num_rows), only_table().columns);
  }

  // For indices below num_embeddings, and a gradient of gradient_rows.
  SortedPlan plan_sorted(int64_t num_embeddings, int64_t gradient_rows, int64_t columns) const {
    SortedPlan plan{};
    plan.partition = plan_partition(args_.num_rows, num_embeddings);
    const int64_t dim = std::max<int64_t>(columns, 1);
    const int64_t segment_items = std::max<int64_t>(kSegmentElements / dim, 1);
    int64_t segments = (args_.num_rows + gradient_rows) / segment_items;
    segments = std::min(segments, partial_bytes(dim) / (2 * dim * static_cast<int64_t>(sizeof(acc_t))));
    plan.num_segments = std::clamp<int64_t>(segments, 1, kMaxSegments);
    return plan;
  }

  // ---- Zeros -----------------------------------------------------------------------------------------------------

  void zero_holes(int64_t* order) const {
    for (int64_t t = 0; t < args_.num_tables; ++t) order[t] = t;
    std::sort(order, order + args_.num_tables,
              [&](int64_t a, int64_t b) { return args_.tables[a].weight_offset < args_.tables[b].weight_offset; });
    auto* grad_weight = static_cast<scalar_t*>(args_.grad_weight);
    int64_t covered = 0;
    for (int64_t i = 0; i < args_.num_tables; ++i) {
      const FeTable& table = args_.tables[order[i]];
      if (numel_of(table) == 0) continue;
      zero(grad_weight + covered, table.weight_offset - covered);
      covered = table.weight_offset + numel_of(table);
    }
    zero(grad_weight + covered, args_.grad_weight_numel - covered);
  }

  static void zero(scalar_t* begin, int64_t count) {
    if (count > 0) std::memset(static_cast<void*>(begin), 0, static_cast<size_t>(count) * sizeof(scalar_t));
  }

  // ---- In place --------------------------------------------------------------------------------------------------

  // One thread alone reads the gradient in its order and needs no sorted list: 1.0-2.1 times as fast at every shape
  // measured. Its sums differ in their last bits, so not where the bits must be the same at every thread count.
  bool may_add_in_place(const Team::Member& member) const {
    return sizeof(acc_t) == sizeof(scalar_t) && is_alone(member);
  }

  bool is_alone(const Team::Member& member) const { return member.team_size() == 1 && args_.deterministic == 0; }

  // 16-bit sums: into one float32 copy, where it is cheaper than sorting and there is room for it. 81,324 lookups took
  // in 3000 x 300 4.2 ms in place of 11.5 (all of one row: 2.7, 5.2), in 50257 x 16 0.4 ms in place of 1.4.
  bool may_add_to_one_copy(const Group& group) const {
    return group.numel <= args_.num_rows * kPrivateElementsPerIndex &&
           group.numel * static_cast<int64_t>(sizeof(acc_t)) <= partial_bytes(group.columns);
  }

  void run_in_place(const Group& group, Team::Member& member) const {
    int64_t column = group.first_column;
    for (int64_t t = group.first_table; t < group.last_table; ++t) {
      const FeTable& table = args_.tables[t];
      scalar_t* target = grad_weight(table);
      member.for_ranges(numel_of(table), task_items(numel_of(table), sizeof(scalar_t), member.team_size()),
                        [&](int64_t begin, int64_t end) { zero(target + begin, end - begin); });
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        member.once([&] { accumulate(table, t, column, 0, args_.num_rows, target, 1, 0); });
      }
      column = column_after(column, table.embedding_dim);
    }
  }

  // Adds the rows [begin, end) of one table's slice of the gradient to acc.
  void accumulate(const FeTable& table, int64_t t, int64_t column, int64_t begin, int64_t end, acc_t* acc,
                  int64_t copies, int64_t copy_stride) const {
    const int64_t dim = table.embedding_dim;
    if (dim == 0) return;
    const auto kernels = grad_kernels(row_kernels_, dim, scalar_t{});
    int64_t rows[kTile];
    for (int64_t row = begin; row < end; row += kTile) {
      const int64_t count = std::min(kTile, end - row);
      indices_.read(row, count, t, rows);
      kernels.accumulate(acc, copies, copy_stride, rows, count, grad_output(row, column), args_.grad_output_stride, dim,
                         table.padding_idx);
    }
  }

  // ---- Private ---------------------------------------------------------------------------------------------------

  void run_private(const Group& group, void* workspace, Team::Member& member) const {
    PrivatePlan plan = plan_private(group);
    if (is_alone(member)) {
      plan.num_blocks = 1;
      plan.block_rows = args_.num_rows;
    }
    auto* sums = static_cast<acc_t*>(workspace);
    member.for_each(plan.num_blocks,
                    [&](int64_t block) { sum_block(group, plan, block, sums + block * plan.block_stride); });
    // Element i of the packed tables is the sum of the copies' element i.
    const int64_t grain =
        task_items(group.numel, plan.num_blocks * static_cast<int64_t>(sizeof(acc_t)), member.team_size());
    member.for_ranges(group.numel, grain, [&](int64_t begin, int64_t end) {
      int64_t table_begin = 0;
      for (int64_t t = group.first_table; t < group.last_table; ++t) {
        const FeTable& table = args_.tables[t];
        const int64_t first = std::max(begin, table_begin);
        const int64_t last = std::min(end, table_begin + numel_of(table));
        if (first < last) {
          const auto kernels = grad_kernels(row_kernels_, table.embedding_dim, scalar_t{});
          kernels.combine(grad_weight(table) + (first - table_begin), sums + first, sums + plan.block_stride + first,
                          plan.block_stride, plan.num_blocks - 1, last - first);
        }
        table_begin += numel_of(table);
      }
    });
  }

  void sum_block(const Group& group, const PrivatePlan& plan, int64_t block, acc_t* sums) const {
    std::fill(sums, sums + plan.block_stride, acc_t{0});
    const int64_t end = std::min((block + 1) * plan.block_rows, args_.num_rows);
    // A tile of rows through all tables: tables that share a cache line of the gradient read it from L1.
    for (int64_t row = block * plan.block_rows; row < end; row += kTile) {
      int64_t column = group.first_column;
      acc_t* acc = sums;
      for (int64_t t = group.first_table; t < group.last_table; ++t) {
        const FeTable& table = args_.tables[t];
        accumulate(table, t, column, row, std::min(row + kTile, end), acc, plan.copies, plan.copy_stride);
        column = column_after(column, table.embedding_dim);
        acc += numel_of(table);
      }
    }
    for (int64_t copy = 1; copy < plan.copies; ++copy) {
      const acc_t* other = sums + copy * plan.copy_stride;
      for (int64_t i = 0; i < group.numel; ++i) sums[i] += other[i];
    }
  }

  // ---- Sorted ----------------------------------------------------------------------------------------------------

  // Where each segment of the merged list begins.
  struct Segments {
    Segments(const SortedPlan& plan, const FeTable& table, const Partition& partition)
        : length(*partition.count + table.num_embeddings), segment_length(divide_up(length, plan.num_segments)) {}
    int64_t begin(int64_t segment) const { return std::min(segment * segment_length, length); }
    int64_t length;
    int64_t segment_length;
  };

  // The merged list has for each row its keys and then the row's end. Key j of row r stands at j + r: before it are j
  // keys and the ends of r rows. Returns how many keys are among the first `length` of the list; the others are ends.
  static int64_t keys_before(const PartitionPlan& plan, const Partition& partition, int64_t length) {
    int64_t low = 0, high = std::min(*partition.count, length);
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (middle + plan.row_of(partition.keys[middle]) < length) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  void run_sorted(const Group& group, void* workspace, Team::Member& member) const {
    const FeTable& table = args_.tables[group.first_table];
    const SortedPlan plan = plan_sorted(group);
    const SortedWorkspace space(plan, group.columns, static_cast<char*>(workspace));
    const Partition partition =
        partition_by_row(plan.partition, indices_, group.first_table, table.padding_idx, space.partition, member);
    sum_sorted(group, plan, space, partition, member);
  }

  // Writes every row of the table from keys that are there.
  void sum_sorted(const Group& group, const SortedPlan& plan, const SortedWorkspace& space, const Partition& partition,
                  Team::Member& member) const {
    const FeTable& table = args_.tables[group.first_table];
    member.for_each(plan.num_segments, [&](int64_t segment) {
      const Segments segments(plan, table, partition);
      const int64_t begin = segments.begin(segment), end = segments.begin(segment + 1);
      const int64_t first_key = keys_before(plan.partition, partition, begin);
      const int64_t last_key = keys_before(plan.partition, partition, end);
      space.starts[segment] = first_key;
      if (segment + 1 == plan.num_segments) space.starts[segment + 1] = last_key;
      sum_segment(group, plan, space, partition, segment, begin - first_key, first_key, end - last_key, last_key);
    });
    if (plan.num_segments == 1) return;
    const int64_t dim_bytes = group.columns * static_cast<int64_t>(sizeof(acc_t));
    member.for_ranges(plan.num_segments - 1, task_items(plan.num_segments - 1, 2 * dim_bytes, member.team_size()),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t s = begin; s < end; ++s) finish_run(group, plan, space, partition, s + 1);
                      });
  }

  // Keys [first_key, last_key) and the ends of the rows [first_row, last_row).
  void sum_segment(const Group& group, const SortedPlan& plan, const SortedWorkspace& space, const Partition& partition,
                   int64_t segment, int64_t first_row, int64_t first_key, int64_t last_row, int64_t last_key) const {
    const FeTable& table = args_.tables[group.first_table];
    const int64_t dim = table.embedding_dim;
    const auto kernels = grad_kernels(row_kernels_, dim, scalar_t{});
    const PartitionPlan& keys_plan = plan.partition;
    const uint64_t* keys = partition.keys;
    const scalar_t* grad = grad_output(0, group.first_column);
    scalar_t* target = grad_weight(table);
    acc_t* head = space.heads + segment * dim;
    acc_t* tail = space.tails + segment * dim;
    const auto sum = [&](acc_t* output, int64_t key, int64_t count) {
      kernels.sum_rows(output, grad, args_.grad_output_stride, keys + key, count, keys_plan.position_mask(), dim);
    };

    int64_t row = first_row;  // whose end is the next to write
    int64_t key = first_key;
    if (key > 0 && keys_plan.row_of(keys[key - 1]) == row) {
      const int64_t run = run_length(keys_plan, partition, key, last_key, row);
      if (run > 0) sum(head, key, run);
      key += run;
      ++row;  // finish_run() writes it, here or in a later segment
    }
    while (key < last_key) {
      const int64_t next_row = keys_plan.row_of(keys[key]);
      const int64_t run = run_length(keys_plan, partition, key, last_key, next_row);
      if (row < next_row) zero(target + row * dim, (next_row - row) * dim);
      if (next_row == last_row) {  // its end is in a later segment
        sum(tail, key, run);
      } else if constexpr (std::is_same_v<scalar_t, acc_t>) {
        sum(target + next_row * dim, key, run);
        if (is_scaled()) divide(target + next_row * dim, run, dim);
      } else {
        sum(tail, key, run);  // scratch until the last run
        if (is_scaled()) divide(tail, run, dim);
        kernels.combine(target + next_row * dim, tail, nullptr, 0, 0, dim);
      }
      key += run;
      row = next_row + 1;
    }
    if (row < last_row) zero(target + row * dim, (last_row - row) * dim);
  }

  static int64_t run_length(const PartitionPlan& plan, const Partition& partition, int64_t key, int64_t last_key,
                            int64_t row) {
    int64_t end = key;
    while (end < last_key && plan.row_of(partition.keys[end]) == row) ++end;
    return end - key;
  }

  // Adds up and writes the run that began before `segment` and whose row ends in it.
  void finish_run(const Group& group, const SortedPlan& plan, const SortedWorkspace& space, const Partition& partition,
                  int64_t segment) const {
    const PartitionPlan& keys_plan = plan.partition;
    const FeTable& table = args_.tables[group.first_table];
    const Segments segments(plan, table, partition);
    const int64_t first_key = space.starts[segment];
    const int64_t row = segments.begin(segment) - first_key;
    const int64_t end_row = segments.begin(segment + 1) - space.starts[segment + 1];
    if (first_key == 0 || keys_plan.row_of(partition.keys[first_key - 1]) != row || end_row == row) return;
    int64_t begin = segment - 1;
    while (space.starts[begin] > 0 && segments.begin(begin) - space.starts[begin] == row &&
           keys_plan.row_of(partition.keys[space.starts[begin] - 1]) == row) {
      --begin;
    }
    const bool has_head = first_key < *partition.count && keys_plan.row_of(partition.keys[first_key]) == row;
    const int64_t dim = table.embedding_dim;
    const auto kernels = grad_kernels(row_kernels_, dim, scalar_t{});
    acc_t* first = space.tails + begin * dim;
    const acc_t* rest = space.heads + (begin + 1) * dim;
    int64_t rest_count = segment - begin - 1 + (has_head ? 1 : 0);
    if (is_scaled()) {
      for (int64_t i = 0; i < rest_count * dim; ++i) first[i % dim] += rest[i];
      rest_count = 0;
      divide(first, keys_of(keys_plan, partition, row), dim);
    }
    kernels.combine(grad_weight(table) + row * dim, first, rest, dim, rest_count, dim);
  }

  static int64_t keys_of(const PartitionPlan& plan, const Partition& partition, int64_t row) {
    const uint64_t* keys = partition.keys;
    const auto first_from = [&](int64_t wanted) {
      return std::lower_bound(keys, keys + *partition.count, static_cast<uint64_t>(wanted) << plan.position_bits);
    };
    return first_from(row + 1) - first_from(row);
  }

  static void divide(acc_t* sum, int64_t count, int64_t dim) {
    for (int64_t c = 0; c < dim; ++c) sum[c] /= static_cast<acc_t>(count);
  }

  const FeBackwardArgs& args_;
  Indices indices_;
  const RowKernels& row_kernels_ = row_kernels();
  int64_t total_columns_ = 0;
  int64_t total_numel_ = 0;  // less than grad_weight_numel where there are holes
};

template <typename scalar_t>
FeStatus run_backward(const FeBackwardArgs& args, void* workspace, size_t* workspace_bytes,
                      const FeCpuContext* context) {
  const Backward<scalar_t> backward(args);
  size_t needed = 0;
  FeStatus status = backward.workspace_bytes(&needed);
  if (status != FE_OK) return status;
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;
  expect_whole_write(args.grad_weight, args.grad_weight_numel * static_cast<int64_t>(sizeof(scalar_t)));
  std::atomic<bool> bad_index{false};
  Team::run(*context, threads_for(backward.traffic_bytes()),
            [&](Team::Member& member) { backward.run(workspace, member, &bad_index); });
  if (bad_index.load()) {
    return report_index(Indices(args), args.num_rows, args.tables, args.num_tables, context->index_error);
  }
  return FE_OK;
}

template <typename scalar_t>
FeStatus run_sparse_count(const FeBackwardArgs& args, int64_t* count, void* workspace, size_t* workspace_bytes,
                          const FeCpuContext* context) {
  const Backward<scalar_t> backward(args);
  size_t needed = 0;
  const FeStatus status = backward.sparse_workspace_bytes(args.tables[0].num_embeddings, &needed);
  if (status != FE_OK) return status;
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;
  std::atomic<bool> bad_index{false};
  Team::run(*context, threads_for(args.num_rows * static_cast<int64_t>(sizeof(int64_t))),
            [&](Team::Member& member) { backward.run_sparse_count(count, workspace, member, &bad_index); });
  if (bad_index.load()) return report_index(Indices(args), args.num_rows, args.tables, 1, context->index_error);
  return FE_OK;
}

template <typename scalar_t>
FeStatus run_sparse(const FeBackwardArgs& args, int64_t num_embeddings, int64_t* rows, void* workspace,
                    size_t workspace_bytes, const FeCpuContext* context) {
  const Backward<scalar_t> backward(args);
  size_t needed = 0;
  const FeStatus status = backward.sparse_workspace_bytes(num_embeddings, &needed);
  if (status != FE_OK) return status;
  if (workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;
  expect_whole_write(args.grad_weight, args.grad_weight_numel * static_cast<int64_t>(sizeof(scalar_t)));
  Team::run(*context, threads_for(backward.traffic_bytes()),
            [&](Team::Member& member) { backward.run_sparse(num_embeddings, rows, workspace, member); });
  return FE_OK;
}

// The call as that of a dense gradient of `rows` rows.
struct NumberedCall {
  NumberedCall(const FeBackwardArgs& source, int64_t rows) : args(source), table(source.tables[0]) {
    table.num_embeddings = rows;
    table.weight_offset = 0;
    args.tables = &table;
  }
  NumberedCall(const NumberedCall&) = delete;
  FeBackwardArgs args;
  FeTable table;
};

FeStatus check_sparse_arguments(const FeBackwardArgs* args, int64_t rows, bool running, const FeCpuContext* context) {
  if (args == nullptr || args->num_tables != 1 || args->tables == nullptr) return FE_INVALID_ARGUMENT;
  const FeTable& table = args->tables[0];
  int64_t numel;
  if (table.num_embeddings < 0 || __builtin_mul_overflow(table.num_embeddings, table.embedding_dim, &numel) ||
      rows < 0 || rows > std::min(table.num_embeddings, args->num_rows)) {
    return FE_INVALID_ARGUMENT;
  }
  const NumberedCall call(*args, rows);
  return check_arguments(&call.args, running, context);
}

}  // namespace
}  // namespace fast_embedding::cpu

FeStatus fe_cpu_embedding_backward(const FeBackwardArgs* args, void* workspace, size_t* workspace_bytes,
                                   const FeCpuContext* context) {
  using namespace fast_embedding::cpu;
  if (workspace_bytes == nullptr) return FE_INVALID_ARGUMENT;
  const FeStatus status = check_arguments(args, workspace != nullptr, context);
  if (status != FE_OK) return status;
  return dispatch_scalar(args->scalar_type, [&](auto scalar) {
    return run_backward<decltype(scalar)>(*args, workspace, workspace_bytes, context);
  });
}

FeStatus fe_cpu_embedding_sparse_count(const FeBackwardArgs* args, int64_t* count, void* workspace,
                                       size_t* workspace_bytes, const FeCpuContext* context) {
  using namespace fast_embedding::cpu;
  const bool running = workspace != nullptr;
  if (workspace_bytes == nullptr || (running && count == nullptr)) return FE_INVALID_ARGUMENT;
  const FeStatus status = check_sparse_arguments(args, 0, running, context);
  if (status != FE_OK) return status;
  return dispatch_scalar(args->scalar_type, [&](auto scalar) {
    return run_sparse_count<decltype(scalar)>(*args, count, workspace, workspace_bytes, context);
  });
}

FeStatus fe_cpu_embedding_sparse_backward(const FeBackwardArgs* args, int64_t count, int64_t* rows, void* workspace,
                                          size_t* workspace_bytes, const FeCpuContext* context) {
  using namespace fast_embedding::cpu;
  const FeStatus status = check_sparse_arguments(args, count, /*running=*/true, context);
  if (status != FE_OK) return status;
  if (count == 0) return FE_OK;
  if (rows == nullptr || workspace == nullptr || workspace_bytes == nullptr) return FE_INVALID_ARGUMENT;
  const NumberedCall call(*args, count);
  return dispatch_scalar(args->scalar_type, [&](auto scalar) {
    return run_sparse<decltype(scalar)>(call.args, args->tables[0].num_embeddings, rows, workspace, *workspace_bytes,
                                        context);
  });
}
