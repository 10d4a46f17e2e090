#include "row_kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fast_embedding::cpu {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports("f16c") came with g++ 11.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

const RowKernels& best_row_kernels() {
  const char* limit = std::getenv("FAST_EMBEDDING_CPU_CAPABILITY");
  if (limit == nullptr) limit = "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(limit, "default") == 0 || !avx2) return row_kernels_baseline();
  if (std::strcmp(limit, "avx2") == 0 || !avx512) return row_kernels_avx2();
  return row_kernels_avx512();
}
#else
const RowKernels& best_row_kernels() { return row_kernels_baseline(); }
#endif

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& kernels = best_row_kernels();  // CPUID traps in a virtual machine: tens of microseconds
  return kernels;
}

}  // namespace fast_embedding::cpu
