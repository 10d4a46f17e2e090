// output[b] = [table_0[x[b, 0]], table_1[x[b, 1]], ...], or the sum of these rows in float32, rounded once.
//
// All indices are checked before the first store. Then each thread takes a range of rows, and in it a tile of rows at a
// time through all tables, so that a line of the output that several narrow tables share is written while it is in L1.

#include <algorithm>

#include "common.h"
#include "row_kernels.h"

namespace fast_embedding::cpu {
namespace {

// Output of one tile: half of a usual L1.
constexpr int64_t kTileBytes = 16 << 10;

// Rows of a table below this are in L2 after their first use: prefetching them only costs instructions.
constexpr int64_t kCachedTableBytes = 256 << 10;
constexpr int64_t kPrefetchBytes = 256;

void gather_rows(const FeForwardArgs& args, const Indices& indices, const RowKernels& kernels, int64_t columns,
                 int64_t begin, int64_t end) {
  const int64_t bytes = scalar_bytes(args.scalar_type);
  const int64_t output_stride = args.output_stride * bytes;
  // With one table a row is written once whatever the tile.
  const int64_t tile_rows =
      args.num_tables == 1 ? kTile : std::clamp<int64_t>(kTileBytes / (columns * bytes), 16, kTile);
  int64_t rows[kTile];
  for (int64_t row = begin; row < end; row += tile_rows) {
    const int64_t count = std::min(tile_rows, end - row);
    char* output = static_cast<char*>(args.output) + row * output_stride;
    for (int64_t t = 0; t < args.num_tables; ++t) {
      const FeTable& table = args.tables[t];
      const int64_t row_bytes = table.embedding_dim * bytes;
      if (row_bytes == 0) continue;
      const bool cached = table.num_embeddings * row_bytes <= kCachedTableBytes;
      indices.read(row, count, t, rows);
      kernels.gather(row_bytes)(
          output, output_stride, static_cast<const char*>(args.weight) + table.weight_offset * bytes,
          table.weight_stride * bytes, rows, count, row_bytes, cached ? 0 : std::min(row_bytes, kPrefetchBytes));
      output += row_bytes;
    }
  }
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

// Row addresses worked out ahead: 16 KB, half of a usual L1. More tables than this are left to the caller.
constexpr int64_t kMaxAddresses = 2048;

template <typename scalar_t>
void sum_rows(const FeForwardArgs& args, const Indices& indices, const RowKernels& row_kernels, int64_t begin,
              int64_t end) {
  const int64_t dim = args.tables[0].embedding_dim;
  const auto kernels = grad_kernels(row_kernels, dim, scalar_t{});
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(scalar_t));
  int64_t num_rows = 0;
  for (int64_t t = 0; t < args.num_tables; ++t) num_rows += args.tables[t].num_embeddings;
  const int64_t prefetch_bytes = num_rows * row_bytes <= kCachedTableBytes ? 0 : std::min(row_bytes, kPrefetchBytes);
  const int64_t tile_rows = std::min(kTile, kMaxAddresses / args.num_tables);
  int64_t rows[kTile];
  int64_t starts[kMaxAddresses + kPrefetchRows] = {};
  for (int64_t row = begin; row < end; row += tile_rows) {
    const int64_t count = std::min(tile_rows, end - row);
    for (int64_t t = 0; t < args.num_tables; ++t) {
      const FeTable& table = args.tables[t];
      indices.read(row, count, t, rows);
      for (int64_t i = 0; i < count; ++i) {
        starts[i * args.num_tables + t] = table.weight_offset + rows[i] * table.weight_stride;
      }
    }
    kernels.sum_terms(static_cast<scalar_t*>(args.output) + row * args.output_stride, args.output_stride,
                      static_cast<const scalar_t*>(args.weight), starts, args.num_tables, count, dim, prefetch_bytes);
  }
}

void sum_rows_of(const FeForwardArgs& args, const Indices& indices, const RowKernels& kernels, int64_t begin,
                 int64_t end) {
  dispatch_scalar(args.scalar_type, [&](auto scalar) {
    sum_rows<decltype(scalar)>(args, indices, kernels, begin, end);
    return FE_OK;
  });
}

}  // namespace
}  // namespace fast_embedding::cpu

FeStatus fe_cpu_embedding_forward(const FeForwardArgs* args, void* workspace, size_t* workspace_bytes,
                                  const FeCpuContext* context) {
  using namespace fast_embedding::cpu;
  if (workspace_bytes == nullptr) return FE_INVALID_ARGUMENT;
  const bool running = workspace != nullptr;
  const FeStatus status = check_arguments(args, running, context);
  if (status != FE_OK) return status;
  const bool sums = args->combination == FE_SUM && args->num_tables > 1;
  if (sums && args->num_tables > kMaxAddresses) return FE_UNSUPPORTED;
  if (!running) {
    *workspace_bytes = 0;
    return FE_OK;
  }
  const Indices indices(*args);
  const int64_t columns = count_columns(args->tables, args->num_tables, args->combination);
  const int64_t row_bytes = columns * scalar_bytes(args->scalar_type);
  const int64_t read_bytes = sums ? args->num_tables * row_bytes : row_bytes;
  const RowKernels& kernels = row_kernels();
  if (args->output_stride == columns) expect_whole_write(args->output, args->num_rows * row_bytes);
  std::atomic<bool> found{false};
  const int64_t index_bytes = args->num_tables * static_cast<int64_t>(sizeof(int64_t));
  Team::run(*context, threads_for(args->num_rows * (read_bytes + row_bytes + index_bytes)), [&](Team::Member& member) {
    check_indices(indices, args->num_rows, args->tables, args->num_tables, member, &found);
    if (found.load(std::memory_order_relaxed) || columns == 0) return;
    member.for_ranges(args->num_rows, task_items(args->num_rows, read_bytes, member.team_size()),
                      [&](int64_t begin, int64_t end) {
                        sums ? sum_rows_of(*args, indices, kernels, begin, end)
                             : gather_rows(*args, indices, kernels, columns, begin, end);
                      });
  });
  if (found.load()) return report_index(indices, args->num_rows, args->tables, args->num_tables, context->index_error);
  return FE_OK;
}
