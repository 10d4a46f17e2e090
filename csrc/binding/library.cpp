#include "library.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace fast_embedding {
namespace {

/// What is known of one device's library. Both pointees are made once and live as long as the process: a kernel may
/// still run while the interpreter shuts down.
template <typename Kernels>
struct Slot {
  std::atomic<const Kernels*> kernels{nullptr};
  std::atomic<const std::string*> reason{nullptr};

  const Kernels& get(const char* device_type) const {
    const Kernels* loaded = kernels.load(std::memory_order_acquire);
    if (C10_LIKELY(loaded != nullptr)) {
      return *loaded;
    }
    const std::string* why = reason.load(std::memory_order_acquire);
    TORCH_CHECK(false, why != nullptr ? *why : c10::str("fast_embedding: no kernels loaded for ", device_type));
  }
};

Slot<CpuKernels> cpu_slot;
Slot<CudaKernels> cuda_slot;

template <typename Function>
Function symbol(void* library, const char* name) {
  void* address = dlsym(library, name);
  if (address == nullptr) {
    throw std::runtime_error(c10::str("it lacks ", name));
  }
  return reinterpret_cast<Function>(address);
}

void* open(const char* path, const char* version_symbol) {
  void* library = dlopen(path, RTLD_LOCAL | RTLD_NOW);
  if (library == nullptr) {
    throw std::runtime_error(dlerror());
  }
  const int32_t version = symbol<int32_t (*)()>(library, version_symbol)();
  if (version != FE_ABI_VERSION) {
    throw std::runtime_error(c10::str(path, " has interface version ", version, ", needed is ", FE_ABI_VERSION));
  }
  return library;
}

void load(const std::string& device_type, const char* path) {
  if (device_type == "cpu" && cpu_slot.kernels == nullptr) {
    void* library = open(path, "fe_cpu_abi_version");
    cpu_slot.kernels =
        new CpuKernels{symbol<decltype(CpuKernels::forward)>(library, "fe_cpu_embedding_forward"),
                       symbol<decltype(CpuKernels::backward)>(library, "fe_cpu_embedding_backward"),
                       symbol<decltype(CpuKernels::sparse_count)>(library, "fe_cpu_embedding_sparse_count"),
                       symbol<decltype(CpuKernels::sparse_backward)>(library, "fe_cpu_embedding_sparse_backward")};
  } else if (device_type == "cuda" && cuda_slot.kernels == nullptr) {
    void* library = open(path, "fe_cuda_abi_version");
    cuda_slot.kernels =
        new CudaKernels{symbol<decltype(CudaKernels::forward)>(library, "fe_cuda_embedding_forward"),
                        symbol<decltype(CudaKernels::backward)>(library, "fe_cuda_embedding_backward"),
                        symbol<decltype(CudaKernels::sparse_count)>(library, "fe_cuda_embedding_sparse_count"),
                        symbol<decltype(CudaKernels::sparse_backward)>(library, "fe_cuda_embedding_sparse_backward"),
                        symbol<decltype(CudaKernels::last_error)>(library, "fe_cuda_last_error")};
  }
}

}  // namespace

const CpuKernels& cpu_kernels() { return cpu_slot.get("cpu"); }

const CudaKernels& cuda_kernels() { return cuda_slot.get("cuda"); }

}  // namespace fast_embedding

const char* fe_binding_load(const char* device_type, const char* path) {
  thread_local std::string message;
  try {
    fast_embedding::load(device_type, path);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void fe_binding_refuse(const char* device_type, const char* reason) {
  auto& slot = std::string(device_type) == "cuda" ? fast_embedding::cuda_slot.reason : fast_embedding::cpu_slot.reason;
  slot = new std::string(reason);
}
