// The zeros of a large gradient, in a launch of their own.
#include "common.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 512;

// A store a thread and no loop: 5% faster than a grid that strides over memory, 2 to 5% faster than cudaMemsetAsync. A
// word is 16 bytes and aligned; the first block writes the bytes around them.
__global__ void __launch_bounds__(kThreads) fill_with_zeros(uint4* words, int64_t num_words, int head, int tail) {
  let_next_launch_begin();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < num_words) words[i] = make_uint4(0, 0, 0, 0);
  if (blockIdx.x == 0) {
    if (i < head) reinterpret_cast<char*>(words)[-1 - i] = 0;
    if (i < tail) reinterpret_cast<char*>(words + num_words)[i] = 0;
  }
  // What follows this launch follows the one before it, too.
  if (blockIdx.x == gridDim.x - 1) wait_for_last_launch();
}

}  // namespace

FeStatus write_zeros(void* begin_address, int64_t bytes, Begin begin, const DeviceInfo& device, cudaStream_t stream) {
  char* address = static_cast<char*>(begin_address);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(address) % 16;
  const int64_t head = std::min<int64_t>(misaligned == 0 ? 0 : 16 - misaligned, bytes);
  const int64_t num_words = (bytes - head) / 16;
  const int64_t blocks = std::max<int64_t>(ceil_div(num_words, kThreads), 1);
  if (blocks > INT32_MAX) return check_cuda(cudaMemsetAsync(address, 0, bytes, stream), "write_zeros");
  return launch(fill_with_zeros, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), begin, device, stream,
                "write_zeros", reinterpret_cast<uint4*>(address + head), num_words, static_cast<int>(head),
                static_cast<int>(bytes - head - num_words * 16));
}

}  // namespace fast_embedding
