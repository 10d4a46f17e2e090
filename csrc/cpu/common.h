// What the forward and the backward share: index access, argument checks, parallel loops.
//
// Nothing here allocates or throws, and there is no global state: any number of threads may call at once.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "fast_embedding.h"

namespace fast_embedding::cpu {

// Indices are widened to int64 this many at a time: 2 KB, so that they are still in L1 when they are used.
constexpr int64_t kTile = 256;

// Below this many bytes of traffic a second thread costs more to wake than it saves (2-5 us).
constexpr int64_t kGrainBytes = 128 << 10;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return divide_up(a, multiple) * multiple; }

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

// task(begin, end) over [begin, end), on the caller's thread where the work is below one grain.
template <typename Task>
void parallel_for(const FeCpuContext& context, int64_t begin, int64_t end, int64_t grain, const Task& task) {
  if (begin >= end) return;
  if (context.num_threads <= 1 || end - begin <= grain) {
    task(begin, end);
    return;
  }
  context.parallel_for(
      begin, end, grain,
      [](int64_t first, int64_t last, void* closure) { (*static_cast<const Task*>(closure))(first, last); },
      const_cast<Task*>(std::addressof(task)));
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

// Sizes, types and pointers of a call. The data pointers are required only where `running` (not a size query) and
// something would be read or written through them.
FeStatus check_arguments(const FeForwardArgs* args, bool running, const FeCpuContext* context);
FeStatus check_arguments(const FeBackwardArgs* args, bool running, const FeCpuContext* context);

// FE_OK, or FE_INDEX_OUT_OF_RANGE with the first bad index in row-major order in *context.index_error.
FeStatus check_indices(const Indices& indices, int64_t num_rows, const FeTable* tables, int64_t num_tables,
                       const FeCpuContext& context);

}  // namespace fast_embedding::cpu
