// What the shortest kernels take that any lookup must contain; see tools/floors.
#include <cooperative_groups.h>

#include <algorithm>

#include "common.cuh"

namespace {

using fast_embedding::Divisor;

// A forward: a word of the output needs an index, and then a word of the table. kWords of them in flight in a thread.
template <typename Word, int kWords>
__global__ void gather(const long long* indices, const Word* table, Word* output, uint32_t num_words,
                       Divisor row_words) {
  const uint32_t first = (blockIdx.x * blockDim.x) * kWords + threadIdx.x;
  uint32_t at[kWords];
  long long index[kWords];
  Word word[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    at[k] = min(first + k * blockDim.x, num_words - 1);
    index[k] = __ldg(indices + row_words.quotient(at[k]));
  }
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const uint32_t row = row_words.quotient(at[k]);
    word[k] = __ldg(table + index[k] * row_words.divisor + (at[k] - row * row_words.divisor));
  }
#pragma unroll
  for (int k = 0; k < kWords; ++k) output[at[k]] = word[k];
}

__device__ inline uint32_t folded(uint4 word) { return word.x ^ word.y ^ word.z ^ word.w; }

// A backward: everything is read, in order and with nothing done to it but what keeps the loads; after one grid-wide
// barrier the gradient is written, by values that needed what other blocks had read.
template <int kLoads>
__global__ void read_and_write(const uint4* indices, int64_t index_words, const uint4* grad, int64_t grad_words,
                               uint32_t* partials, uint4* output, int64_t output_bytes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t fold = 0;
  const auto read = [&](const uint4* words, int64_t count) {
    for (int64_t first = thread; first < count; first += threads * kLoads) {
      uint4 word[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        word[k] = make_uint4(0, 0, 0, 0);
        if (first + k * threads < count) word[k] = __ldcs(words + first + k * threads);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) fold ^= folded(word[k]);
    }
  };
  read(indices, index_words);
  read(grad, grad_words);
  fold = __reduce_xor_sync(0xffffffffu, fold);
  if (threadIdx.x % 32 == 0) partials[thread / 32] = fold;
  cooperative_groups::this_grid().sync();
  const uint32_t value = __ldcg(partials + thread % (threads / 32));
  const int64_t output_words = output_bytes / 16;
  for (int64_t i = thread; i < output_words; i += threads) output[i] = make_uint4(value, value, value, value);
  if (thread < output_bytes % 16) reinterpret_cast<char*>(output + output_words)[thread] = static_cast<char>(value);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int gather_floor(const void* indices, const void* table, void* output,
                                                        int64_t output_bytes, int row_bytes, int words, void* stream) {
  const auto launch = [&](auto word, auto count) {
    using Word = decltype(word);
    constexpr int kWords = decltype(count)::value;
    const auto num_words = static_cast<uint32_t>(output_bytes / sizeof(Word));
    constexpr int kThreads = 128;
    gather<Word, kWords>
        <<<(num_words + kThreads * kWords - 1) / (kThreads * kWords), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const long long*>(indices), static_cast<const Word*>(table), static_cast<Word*>(output),
            num_words, Divisor(static_cast<uint32_t>(row_bytes / sizeof(Word))));
  };
  const auto by_words = [&](auto word) {
    if (words == 1) return launch(word, std::integral_constant<int, 1>{});
    return launch(word, std::integral_constant<int, 4>{});
  };
  if (row_bytes % 16 == 0) {
    by_words(uint4{});
  } else {
    by_words(uint2{});
  }
  return cudaGetLastError();
}

__attribute__((visibility("default"))) int read_and_write_floor(const void* indices, int64_t index_bytes,
                                                                const void* grad, int64_t grad_bytes, void* partials,
                                                                void* output, int64_t output_bytes, int blocks_per_sm,
                                                                void* stream) {
  constexpr int kLoads = 8;
  constexpr int kThreads = 512;
  int device = 0;
  int sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const auto kernel = reinterpret_cast<const void*>(read_and_write<kLoads>);
  int fitting = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, kernel, kThreads, 0);
  blocks_per_sm = std::min(blocks_per_sm, fitting);
  int64_t index_words = index_bytes / 16;
  int64_t grad_words = grad_bytes / 16;
  void* arguments[] = {&indices, &index_words, &grad, &grad_words, &partials, &output, &output_bytes};
  return cudaLaunchCooperativeKernel(kernel, dim3(sms * blocks_per_sm), dim3(kThreads), arguments, 0,
                                     static_cast<cudaStream_t>(stream));
}

}  // extern "C"
