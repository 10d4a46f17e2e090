#if defined(__x86_64__)
#include <immintrin.h>

#include "row_kernels.h"

// A pragma, not a compiler flag, so that any build that compiles all files alike is right. Headers stand above it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define FE_ISA avx2
#define FE_VECTOR_BYTES 32
#define FE_HAS_F16C 1
#include "row_kernels_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fast_embedding::cpu {
const RowKernels& row_kernels_avx2() { return avx2::kRowKernels; }
}  // namespace fast_embedding::cpu
#endif
