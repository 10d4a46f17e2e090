// What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include "row_kernels.h"

#define FE_ISA baseline
#define FE_VECTOR_BYTES 16
#define FE_HAS_F16C 0
#include "row_kernels_body.h"

namespace fast_embedding::cpu {
const RowKernels& row_kernels_baseline() { return baseline::kRowKernels; }
}  // namespace fast_embedding::cpu
