// The zeros of a large gradient, in a launch of their own.
#include "common.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 512;

struct Zeros {
  uint4* words;  // aligned
  int64_t num_words;
  int32_t head;  // bytes in front of the words
  int32_t tail;  // and behind
};

// A store a thread and no loop: 5% faster than a grid that strides over memory, 2 to 5% faster than cudaMemsetAsync.
// The first block writes the bytes around the words.
__global__ void __launch_bounds__(kThreads) fill_with_zeros(const __grid_constant__ Zeros zeros) {
  let_next_launch_begin();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < zeros.num_words) zeros.words[i] = make_uint4(0, 0, 0, 0);
  if (blockIdx.x == 0) {
    if (i < zeros.head) reinterpret_cast<char*>(zeros.words)[-1 - i] = 0;
    if (i < zeros.tail) reinterpret_cast<char*>(zeros.words + zeros.num_words)[i] = 0;
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
  const Zeros zeros = {reinterpret_cast<uint4*>(address + head), num_words, static_cast<int32_t>(head),
                       static_cast<int32_t>(bytes - head - num_words * 16)};
  return launch(fill_with_zeros, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, zeros, false, begin, device,
                stream, "write_zeros");
}

}  // namespace fast_embedding
