// Loops over rows of one table, compiled once for each instruction set and chosen at run time.
//
// row_kernels_body.h has the code, row_kernels_<isa>.cpp compile it, row_kernels() picks the best that the CPU has.
// A kernel may be specialised for the row's width, so callers fetch a struct of pointers per table, not per row.
#pragma once

#include <cstdint>

namespace fast_embedding::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename scalar_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename scalar_t>
using accumulator_t = typename Accumulator<scalar_t>::type;

// How many rows ahead the row kernels prefetch. Rows of a large table, or of a gradient read in sorted order, come from
// anywhere in memory: a dependent miss each without it.
constexpr int64_t kPrefetchRows = 12;

// Copies row rows[i] of `source` to row i of `output`, i < count. Strides in bytes.
// prefetch_bytes: how much of each source row to ask for ahead, 0 where the table is cached anyway.
using GatherFn = void (*)(void* output, int64_t output_stride, const void* source, int64_t source_stride,
                          const int64_t* rows, int64_t count, int64_t row_bytes, int64_t prefetch_bytes);

template <typename scalar_t>
struct GradKernels {
  using acc_t = accumulator_t<scalar_t>;

  // acc[(i % copies) * copy_stride + rows[i] * dim + c] += grad[i * grad_stride + c], for all i < count whose row is
  // not padding_idx. copies is a power of two.
  void (*accumulate)(acc_t* acc, int64_t copies, int64_t copy_stride, const int64_t* rows, int64_t count,
                     const scalar_t* grad, int64_t grad_stride, int64_t dim, int64_t padding_idx);

  // sum[c] = grad[p(0) * grad_stride + c] + grad[p(1) * grad_stride + c] + ..., in this order, where
  // p(i) = keys[i] & position_mask and count >= 1. keys[count .. count + kPrefetchRows) must be readable.
  void (*sum_rows)(acc_t* sum, const scalar_t* grad, int64_t grad_stride, const uint64_t* keys, int64_t count,
                   uint64_t position_mask, int64_t dim);

  // Row i < count of output, output_stride elements after the one before: the sum of the `terms` rows that begin at
  // source + starts[i * terms], source + starts[i * terms + 1], ..., in this order, rounded once.
  // prefetch_bytes as for GatherFn; starts[count * terms .. count * terms + kPrefetchRows) must be valid places.
  void (*sum_terms)(scalar_t* output, int64_t output_stride, const scalar_t* source, const int64_t* starts,
                    int64_t terms, int64_t count, int64_t dim, int64_t prefetch_bytes);

  // output[c] = first[c] + rest[c] + rest[stride + c] + ... (`count` of them), rounded once.
  void (*combine)(scalar_t* output, const acc_t* first, const acc_t* rest, int64_t stride, int64_t count, int64_t dim);
};

struct RowKernels {
  // Whether indices[i * stride] is in [0, num_embeddings) for all i < count.
  bool (*int32_in_range)(const int32_t* indices, int64_t stride, int64_t count, int64_t num_embeddings);
  bool (*int64_in_range)(const int64_t* indices, int64_t stride, int64_t count, int64_t num_embeddings);
  GatherFn (*gather)(int64_t row_bytes);
  GradKernels<float> (*grad_float32)(int64_t dim);
  GradKernels<double> (*grad_float64)(int64_t dim);
  GradKernels<Float16> (*grad_float16)(int64_t dim);
  GradKernels<BFloat16> (*grad_bfloat16)(int64_t dim);
};

const RowKernels& row_kernels_baseline();
#if defined(__x86_64__)
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

// The best for this CPU; FAST_EMBEDDING_CPU_CAPABILITY=default, avx2 or avx512 lowers it. Decided once.
const RowKernels& row_kernels();

inline GradKernels<float> grad_kernels(const RowKernels& kernels, int64_t dim, float) {
  return kernels.grad_float32(dim);
}
inline GradKernels<double> grad_kernels(const RowKernels& kernels, int64_t dim, double) {
  return kernels.grad_float64(dim);
}
inline GradKernels<Float16> grad_kernels(const RowKernels& kernels, int64_t dim, Float16) {
  return kernels.grad_float16(dim);
}
inline GradKernels<BFloat16> grad_kernels(const RowKernels& kernels, int64_t dim, BFloat16) {
  return kernels.grad_bfloat16(dim);
}

}  // namespace fast_embedding::cpu
