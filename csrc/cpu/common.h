// What the forward and the backward share: index access, argument checks, sizes of tasks.
//
// Nothing here allocates or throws, and there is no global state: any number of threads may call at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "fast_embedding.h"
#include "row_kernels.h"
#include "team.h"

namespace fast_embedding::cpu {

// Indices are widened to int64 this many at a time: 2 KB, so that they are still in L1 when they are used.
constexpr int64_t kTile = 256;

// A second thread costs 2-5 us to wake: each is to have this many bytes to read and write at least, 5-10 us.
constexpr int64_t kThreadBytes = 256 << 10;
// Tasks of a phase: small enough to share out evenly, large enough for the counter not to matter, and up to a huge page
// where there is much to do, so that two threads seldom wait for the same page.
constexpr int64_t kMinTaskBytes = 32 << 10;
constexpr int64_t kMaxTaskBytes = 2 << 20;
constexpr int64_t kTasksPerThread = 8;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return divide_up(a, multiple) * multiple; }

// How many threads are worth their waking for this much traffic.
inline int64_t threads_for(int64_t bytes) { return bytes / kThreadBytes; }

// How many items of `item_bytes` make a task, of `count` that `threads` share.
inline int64_t task_items(int64_t count, int64_t item_bytes, int64_t threads) {
  if (threads <= 1) return std::max<int64_t>(count, 1);
  item_bytes = std::max<int64_t>(item_bytes, 1);
  const int64_t even = divide_up(count, threads * kTasksPerThread);
  return std::max<int64_t>(std::clamp(even, divide_up(kMinTaskBytes, item_bytes), divide_up(kMaxTaskBytes, item_bytes)),
                           1);
}

inline int64_t scalar_bytes(FeScalarType type) {
  switch (type) {
    case FE_FLOAT32:
      return 4;
    case FE_FLOAT64:
      return 8;
    case FE_FLOAT16:
    case FE_BFLOAT16:
      return 2;
  }
  return 0;
}

// Calls f with a value of the C++ type that stands for `type`.
template <typename Function>
FeStatus dispatch_scalar(FeScalarType type, const Function& f) {
  switch (type) {
    case FE_FLOAT32:
      return f(float{});
    case FE_FLOAT64:
      return f(double{});
    case FE_FLOAT16:
      return f(Float16{});
    case FE_BFLOAT16:
      return f(BFloat16{});
  }
  return FE_INVALID_ARGUMENT;
}

// The [num_rows, num_tables] indices of a lookup, int32 or int64, any strides.
class Indices {
 public:
  template <typename Args>
  explicit Indices(const Args& args)
      : data_(args.indices),
        is_int32_(args.index_type == FE_INT32),
        row_stride_(args.index_row_stride),
        table_stride_(args.index_table_stride) {}

  int64_t at(int64_t row, int64_t table) const {
    const int64_t offset = row * row_stride_ + table * table_stride_;
    return is_int32_ ? load<int32_t>(offset) : load<int64_t>(offset);
  }

  // tile[i] = index of row `row + i` in `table`, for i < count <= kTile.
  void read(int64_t row, int64_t count, int64_t table, int64_t* tile) const {
    const int64_t offset = row * row_stride_ + table * table_stride_;
    is_int32_ ? read_as<int32_t>(offset, count, tile) : read_as<int64_t>(offset, count, tile);
  }

  // Whether the indices of rows [row, row + count) in `table` are all in [0, num_embeddings).
  bool in_range(int64_t row, int64_t count, int64_t table, int64_t num_embeddings, const RowKernels& kernels) const {
    const int64_t offset = row * row_stride_ + table * table_stride_;
    return is_int32_
               ? kernels.int32_in_range(static_cast<const int32_t*>(data_) + offset, row_stride_, count, num_embeddings)
               : kernels.int64_in_range(static_cast<const int64_t*>(data_) + offset, row_stride_, count,
                                        num_embeddings);
  }

 private:
  // memcpy because an int64 index may stand at any element-aligned address of a foreign buffer.
  template <typename index_t>
  int64_t load(int64_t offset) const {
    index_t value;
    std::memcpy(&value, static_cast<const index_t*>(data_) + offset, sizeof(value));
    return value;
  }

  template <typename index_t>
  void read_as(int64_t offset, int64_t count, int64_t* tile) const {
    if (row_stride_ == 1) {  // a stride known to the compiler makes this loop vectorise
      for (int64_t i = 0; i < count; ++i) tile[i] = load<index_t>(offset + i);
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] = load<index_t>(offset + i * row_stride_);
    }
  }

  const void* data_;
  bool is_int32_;
  int64_t row_stride_;
  int64_t table_stride_;
};

// Says that all of [begin, begin + bytes) is about to be written. A large tensor comes fresh from the kernel in every
// step, and its page faults cost several times what filling it does: 187 ms for 154 MB in pages of 4 KB, 28 ms in huge
// pages, which Linux gives to those who ask.
constexpr int64_t kHugePageBytes = 8 << 20;
void expect_whole_write(void* begin, int64_t bytes);

// Columns of output and grad_output.
int64_t count_columns(const FeTable* tables, int64_t num_tables, FeCombination combination);

// Sizes, types and pointers of a call. The data pointers are required only where `running` (not a size query) and
// something would be read or written through them.
FeStatus check_arguments(const FeForwardArgs* args, bool running, const FeCpuContext* context);
FeStatus check_arguments(const FeBackwardArgs* args, bool running, const FeCpuContext* context);

// A step of a team's program: sets *found where an index is out of range, before any member returns.
void check_indices(const Indices& indices, int64_t num_rows, const FeTable* tables, int64_t num_tables,
                   Team::Member& member, std::atomic<bool>* found);

// FE_INDEX_OUT_OF_RANGE with the first bad index in row-major order, for indices among which one was found.
FeStatus report_index(const Indices& indices, int64_t num_rows, const FeTable* tables, int64_t num_tables,
                      FeIndexError* error);

}  // namespace fast_embedding::cpu
