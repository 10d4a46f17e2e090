// The kernel libraries: loaded by path, reached through function pointers, so that one binding serves every device.
#pragma once

#include "fast_embedding.h"

namespace fast_embedding {

/// Entry points of libfast_embedding_cpu.so.
struct CpuKernels {
  decltype(&fe_cpu_embedding_forward) forward;
  decltype(&fe_cpu_embedding_backward) backward;
  decltype(&fe_cpu_embedding_sparse_count) sparse_count;
  decltype(&fe_cpu_embedding_sparse_backward) sparse_backward;
};

/// Entry points of libfast_embedding_cuda.so.
struct CudaKernels {
  decltype(&fe_cuda_embedding_forward) forward;
  decltype(&fe_cuda_embedding_backward) backward;
  decltype(&fe_cuda_embedding_sparse_count) sparse_count;
  decltype(&fe_cuda_embedding_sparse_backward) sparse_backward;
  decltype(&fe_cuda_last_error) last_error;
};

/// The loaded kernels. RuntimeError, with the loader's reason, where there are none.
const CpuKernels& cpu_kernels();
const CudaKernels& cuda_kernels();

}  // namespace fast_embedding

// The loader's side (fast_embedding/_loader.py calls these through ctypes). `device_type` is "cpu" or "cuda".
extern "C" {

/// Loads the kernel library at `path`: dlopen alone, no device is touched. Null, or why not (valid until this thread's
/// next call). A library already loaded stays.
FE_EXPORT const char* fe_binding_load(const char* device_type, const char* path);

/// Tells why there are no kernels for this device: the message of the RuntimeError at first use.
FE_EXPORT void fe_binding_refuse(const char* device_type, const char* reason);

/// One more, or one fewer, who wants aten::embedding and its dense backward on our kernels, in the whole process. The
/// first call replaces those of the CPU and, `with_cuda`, of CUDA; none is ever put back. Null, or why not.
FE_EXPORT const char* fe_binding_enable(int32_t with_cuda);
FE_EXPORT void fe_binding_disable();
}
