// Versions, errors and device properties: what the library says of itself and of the device.
#include <mutex>
#include <string>

#include "common.cuh"

namespace fast_embedding {
namespace {

thread_local std::string last_error;

FeStatus read_device(int device, DeviceInfo* info) {
  struct {
    cudaDeviceAttr attribute;
    int value;
  } rows[] = {{cudaDevAttrComputeCapabilityMajor, 0},
              {cudaDevAttrComputeCapabilityMinor, 0},
              {cudaDevAttrMultiProcessorCount, 0},
              {cudaDevAttrL2CacheSize, 0},
              {cudaDevAttrMaxSharedMemoryPerBlockOptin, 0},
              {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0},
              {cudaDevAttrCooperativeLaunch, 0}};
  for (auto& row : rows) {
    const FeStatus status = check_cuda(cudaDeviceGetAttribute(&row.value, row.attribute, device), "device attribute");
    if (status != FE_OK) return status;
  }
  info->index = device;
  info->properties.compute_capability = rows[0].value * 10 + rows[1].value;
  info->properties.num_sms = rows[2].value;
  info->properties.l2_bytes = rows[3].value;
  info->properties.shared_bytes_per_block = rows[4].value;
  info->properties.shared_bytes_per_sm = rows[5].value;
  info->properties.max_cluster_blocks = max_cluster_blocks(info->properties.compute_capability);
  info->cooperative = rows[6].value != 0;
  return FE_OK;
}

}  // namespace

FeStatus check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return FE_OK;
  last_error = std::string(what) + ": " + cudaGetErrorString(error);
  return FE_CUDA_ERROR;
}

FeStatus allow_shared_memory(const void* kernel, int64_t bytes, const DeviceInfo& device,
                             std::atomic<uint64_t>* allowed, const char* what) {
  static_assert(kMaxDevices <= 64, "a bit a device");
  const uint64_t bit = uint64_t{1} << device.index;
  if ((allowed->load(std::memory_order_acquire) & bit) != 0) return FE_OK;
  const FeStatus status = check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), what);
  if (status == FE_OK) allowed->fetch_or(bit, std::memory_order_release);
  return status;
}

FeStatus device_info(const DeviceInfo** info) {
  static DeviceInfo devices[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  static std::mutex mutex;

  int device = 0;
  const FeStatus status = check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (status != FE_OK) return status;
  if (device >= kMaxDevices) return FE_UNSUPPORTED;
  if (!known[device].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!known[device].load(std::memory_order_relaxed)) {
      const FeStatus read = read_device(device, &devices[device]);
      if (read != FE_OK) return read;
      known[device].store(true, std::memory_order_release);
    }
  }
  *info = &devices[device];
  return FE_OK;
}

}  // namespace fast_embedding

extern "C" {

int32_t fe_cuda_abi_version(void) { return FE_ABI_VERSION; }

int32_t fe_cuda_compiled_version(void) { return CUDART_VERSION; }

int32_t fe_cuda_runtime_version(void) {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

// The build passes the list: the compiler does not tell the host code which architectures it compiles for.
const char* fe_cuda_architectures(void) { return FE_CUDA_ARCHITECTURES; }

const char* fe_cuda_last_error(void) { return fast_embedding::last_error.c_str(); }

}  // extern "C"
