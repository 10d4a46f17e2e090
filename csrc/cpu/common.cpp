#include "common.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fast_embedding::cpu {
namespace {

bool fits_int64(int64_t a, int64_t b, int64_t* product) { return !__builtin_mul_overflow(a, b, product); }

// Sum of D, or -1 where a table is invalid.
int64_t sum_of_columns(const FeTable* tables, int64_t num_tables) {
  int64_t columns = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    const FeTable& table = tables[t];
    int64_t numel;
    if (table.num_embeddings < 0 || table.embedding_dim < 0 || table.weight_offset < 0 || table.padding_idx < -1 ||
        !fits_int64(table.num_embeddings, table.embedding_dim, &numel)) {
      return -1;
    }
    columns += table.embedding_dim;
  }
  return columns;
}

template <typename Args>
FeStatus check_common(const Args* args, bool running, const FeCpuContext* context, int64_t* columns) {
  if (args == nullptr || args->num_tables < 0 || args->num_rows < 0 || scalar_bytes(args->scalar_type) == 0 ||
      (args->index_type != FE_INT32 && args->index_type != FE_INT64) ||
      (args->combination != FE_CONCAT && args->combination != FE_SUM) ||
      (args->tables == nullptr && args->num_tables > 0)) {
    return FE_INVALID_ARGUMENT;
  }
  *columns = sum_of_columns(args->tables, args->num_tables);
  int64_t numel;
  if (*columns < 0 || !fits_int64(args->num_rows, std::max<int64_t>(*columns, 1), &numel)) return FE_INVALID_ARGUMENT;
  if (args->combination == FE_SUM) {
    const int64_t dim = args->num_tables > 0 ? args->tables[0].embedding_dim : 0;
    if (std::any_of(args->tables, args->tables + args->num_tables,
                    [dim](const FeTable& table) { return table.embedding_dim != dim; })) {
      return FE_INVALID_ARGUMENT;
    }
    *columns = dim;
  }
  if (!running) return FE_OK;
  if (args->indices == nullptr && args->num_rows > 0 && args->num_tables > 0) return FE_INVALID_ARGUMENT;
  if (context == nullptr || context->index_error == nullptr ||
      (context->parallel_for == nullptr && context->num_threads > 1)) {
    return FE_INVALID_ARGUMENT;
  }
  return FE_OK;
}

}  // namespace

int64_t count_columns(const FeTable* tables, int64_t num_tables, FeCombination combination) {
  if (combination == FE_SUM) return num_tables > 0 ? tables[0].embedding_dim : 0;
  int64_t columns = 0;
  for (int64_t t = 0; t < num_tables; ++t) columns += tables[t].embedding_dim;
  return columns;
}

FeStatus check_arguments(const FeForwardArgs* args, bool running, const FeCpuContext* context) {
  int64_t columns = 0;
  const FeStatus status = check_common(args, running, context, &columns);
  if (status != FE_OK || !running) return status;
  const bool empty = args->num_rows == 0 || columns == 0;
  // The weight may be null where all tables have no rows: no index is in range then, and the check says so.
  if (!empty && args->output == nullptr) return FE_INVALID_ARGUMENT;
  if (!empty && args->output_stride < columns) return FE_INVALID_ARGUMENT;
  if (!empty && args->weight == nullptr &&
      std::any_of(args->tables, args->tables + args->num_tables,
                  [](const FeTable& table) { return table.num_embeddings > 0 && table.embedding_dim > 0; })) {
    return FE_INVALID_ARGUMENT;
  }
  return FE_OK;
}

FeStatus check_arguments(const FeBackwardArgs* args, bool running, const FeCpuContext* context) {
  int64_t columns = 0;
  const FeStatus status = check_common(args, running, context, &columns);
  if (status != FE_OK) return status;
  if (args->grad_weight_numel < 0) return FE_INVALID_ARGUMENT;
  for (int64_t t = 0; t < args->num_tables; ++t) {
    const FeTable& table = args->tables[t];
    const int64_t numel = table.num_embeddings * table.embedding_dim;
    if (numel > args->grad_weight_numel || table.weight_offset > args->grad_weight_numel - numel ||
        (table.num_embeddings > 1 && table.weight_stride != table.embedding_dim)) {
      return FE_INVALID_ARGUMENT;
    }
  }
  if (!running) return FE_OK;
  if (args->grad_weight == nullptr && args->grad_weight_numel > 0) return FE_INVALID_ARGUMENT;
  if (args->grad_output == nullptr && args->num_rows > 0 && columns > 0) return FE_INVALID_ARGUMENT;
  return FE_OK;
}

void check_indices(const Indices& indices, int64_t num_rows, const FeTable* tables, int64_t num_tables,
                   Team::Member& member, std::atomic<bool>* found) {
  const RowKernels& kernels = row_kernels();
  const int64_t row_bytes = num_tables * static_cast<int64_t>(sizeof(int64_t));
  const int64_t grain = task_items(num_rows, row_bytes, member.team_size());
  const auto check = [&](int64_t begin, int64_t end) {
    // Tables side by side share cache lines of indices: a tile of rows through all of them.
    const int64_t tile_rows = num_tables == 1 ? end - begin : kTile;
    for (int64_t row = begin; row < end; row += tile_rows) {
      const int64_t count = std::min(tile_rows, end - row);
      for (int64_t t = 0; t < num_tables; ++t) {
        if (!indices.in_range(row, count, t, tables[t].num_embeddings, kernels)) {
          found->store(true, std::memory_order_relaxed);
          return;
        }
      }
    }
  };
  // Few indices are looked at sooner by every member than by one while the others wait.
  if (num_rows <= grain) {
    check(0, num_rows);
  } else {
    member.for_ranges(num_rows, grain, check);
  }
}

FeStatus report_index(const Indices& indices, int64_t num_rows, const FeTable* tables, int64_t num_tables,
                      FeIndexError* error) {
  // Which thread saw one first is a matter of chance; a second, serial look makes the answer the same every time.
  for (int64_t b = 0; b < num_rows; ++b) {
    for (int64_t t = 0; t < num_tables; ++t) {
      const int64_t index = indices.at(b, t);
      if (index < 0 || index >= tables[t].num_embeddings) {
        *error = {index, b, t, tables[t].num_embeddings};
        return FE_INDEX_OUT_OF_RANGE;
      }
    }
  }
  return FE_INDEX_OUT_OF_RANGE;  // the caller changed the indices meanwhile; still nothing is written
}

void expect_whole_write(void* begin, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kHugePageBytes) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace fast_embedding::cpu

int32_t fe_cpu_abi_version(void) { return FE_ABI_VERSION; }
