// What all kernels share: types, wide loads, the range check, and the launch bookkeeping.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fast_embedding.h"

namespace fast_embedding {

// ---- Scalars: 16-bit types accumulate in float32 and round once, to nearest even ----

template <typename scalar_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename Accumulator<scalar_t>::type;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename scalar_t>
__device__ inline scalar_t narrow(acc_t<scalar_t> value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// ---- Wide accesses ----

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];
};

// The columns in an access of 16 bytes, of 8, or in one of a single element.
template <typename scalar_t>
constexpr int kWide = 16 / sizeof(scalar_t);
template <typename scalar_t>
constexpr int kHalf = 8 / sizeof(scalar_t);

// In place of these, for a kernel that serves tables of several widths: each table has its own.
constexpr int kMixed = 0;

// Calls f with the columns in an access as a constant: kSize, or if that is kMixed the one of kWidest, kHalf and 1 that
// `pack` is.
template <typename scalar_t, int kSize, int kWidest, typename Function>
__device__ inline void with_pack(int pack, Function f) {
  if constexpr (kSize != kMixed) {
    f(std::integral_constant<int, kSize>{});
  } else if (pack == 1) {
    f(std::integral_constant<int, 1>{});
  } else if (1 < kHalf<scalar_t> && kHalf<scalar_t> < kWidest && pack == kHalf<scalar_t>) {
    f(std::integral_constant<int, kHalf<scalar_t>>{});
  } else {
    f(std::integral_constant<int, kWidest>{});
  }
}

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

// Reads what is used once past the cache's working set (evict first): the gradient must not push out the table.
template <int kSize, typename T>
__device__ inline Pack<T, kSize> load_once(const T* address) {
  constexpr int kBytes = sizeof(T) * kSize;
  using word_t = typename Word < kBytes<16 ? kBytes : 16>::type;
  word_t words[kBytes / sizeof(word_t)];
#pragma unroll
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(word_t)); ++i) {
    words[i] = __ldcs(reinterpret_cast<const word_t*>(address) + i);
  }
  Pack<T, kSize> pack;
  memcpy(&pack, words, kBytes);
  return pack;
}

template <typename scalar_t, int kSize>
__device__ inline void store(scalar_t* address, const acc_t<scalar_t> (&sum)[kSize]) {
  Pack<scalar_t, kSize> pack;
#pragma unroll
  for (int j = 0; j < kSize; ++j) pack.value[j] = narrow<scalar_t>(sum[j]);
  *reinterpret_cast<Pack<scalar_t, kSize>*>(address) = pack;
}

// Adds to memory that other blocks add to. sm_90 takes four floats in one transaction, or two,
// older chips one.
template <typename T, int kSize>
__device__ inline void add_atomically(T* address, const T (&sum)[kSize]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(FE_SCALAR_ATOMICS)
  constexpr bool kFours = sizeof(T) == 4 && kSize % 4 == 0;
  constexpr bool kTwos = sizeof(T) == 4 && kSize == 2;
#else
  constexpr bool kFours = false;
  constexpr bool kTwos = false;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      atomicAdd(reinterpret_cast<float4*>(address + j), make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]));
    }
  } else if constexpr (kTwos) {
    atomicAdd(reinterpret_cast<float2*>(address), make_float2(sum[0], sum[1]));
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) atomicAdd(address + j, sum[j]);
  }
}

// Writes zeros to [begin, begin + bytes) with all threads of the grid; the address need not be aligned.
__device__ inline void fill_zero(void* begin, int64_t bytes, int64_t thread, int64_t num_threads) {
  char* address = static_cast<char*>(begin);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(address) % 16;
  const int64_t head = misaligned ? min(16 - misaligned, bytes) : 0;
  const int64_t words = (bytes - head) / 16;
  const int64_t tail = bytes - head - words * 16;
  uint4* body = reinterpret_cast<uint4*>(address + head);
  for (int64_t i = thread; i < words; i += num_threads) body[i] = make_uint4(0, 0, 0, 0);
  if (thread < head) address[thread] = 0;
  if (thread < tail) address[bytes - tail + thread] = 0;
}

// ---- Indices ----

// An index, but for the sign of an int32 (see signed_index): taking it would make the next load wait for this one.
__device__ inline int64_t load_index(const void* indices, FeIndexType type, int64_t position) {
  return type == FE_INT64 ? __ldg(static_cast<const long long*>(indices) + position)
                          : __ldg(static_cast<const unsigned int*>(indices) + position);
}

__device__ inline int64_t signed_index(int64_t index, FeIndexType type) {
  return type == FE_INT64 ? index : static_cast<int32_t>(index);
}

// With its sign. The gather of one table keeps it: int64 indices, which most people have, are read 6% faster so.
__device__ inline int64_t load_signed_index(const void* indices, FeIndexType type, int64_t position) {
  return type == FE_INT64 ? __ldg(static_cast<const long long*>(indices) + position)
                          : __ldg(static_cast<const int*>(indices) + position);
}

// Out of line: the printing needs a stack frame that the kernels should not carry.
static __noinline__ __device__ void fail_out_of_range(int64_t index, int64_t num_embeddings) {
  printf("fast_embedding: index %lld is out of range for an embedding of %lld rows\n", static_cast<long long>(index),
         static_cast<long long>(num_embeddings));
  assert(false && "embedding index out of range");
}

__device__ inline bool is_in_range(int64_t index, int64_t num_embeddings) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(num_embeddings);
}

// Never returns with an index outside [0, num_embeddings).
__device__ inline void check_index(int64_t index, int64_t num_embeddings) {
  if (!is_in_range(index, num_embeddings)) fail_out_of_range(index, num_embeddings);
}

// a / b for numbers below 2^14: in a third of the instructions of an integer division. The half keeps the quotient of
// floats, which is off by a few units in the last place, from falling below a whole number.
__device__ inline uint32_t small_quotient(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)));
}

// Division of numbers below 2^31 by a divisor fixed at launch: multiply, add, shift (Granlund and Montgomery 1994).
struct Divisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t value) : divisor(value) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __device__ uint32_t quotient(uint32_t value) const { return (__umulhi(value, multiplier) + value) >> shift; }
};

// The last of `count` ascending numbers that is not above `number`: to which table a work item belongs, items being
// counted through the tables. By halves, and in an array of nothing else: a kernel that starts finds its parameters in
// no cache.
__device__ inline int find_last(const int32_t* first, int count, int32_t number) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// ---- Programmatic dependent launch: the next kernel's blocks begin before this one's have ended ----

// Lets a launch that begins EARLY begin once all blocks have come here.
__device__ inline void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// In a launch that began EARLY: what came before has ended, and what it wrote can be read, though not by __ldg, which
// may be read ahead of this. In others it does nothing.
__device__ inline void wait_for_last_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// ---- Host ----

#define FE_EARLY_LAUNCH (CUDART_VERSION >= 12030)  // from here on a captured graph keeps such edges

// Zeros from this size on are left to write_zeros(): faster than beside other work, at the price of a launch.
constexpr int64_t kZeroLaunchBytes = int64_t{64} << 20;

constexpr int kMaxDevices = 64;
constexpr size_t kMaxParamBytes = 4096;  // of a kernel

struct DeviceInfo {
  int index;
  FeDevice properties;
  bool cooperative;
};

// The current device's, read once. FE_CUDA_ERROR without a device.
FeStatus device_info(const DeviceInfo** info);

// The largest cluster that can sort (see FeDevice).
int32_t max_cluster_blocks(int32_t compute_capability);

// Records the CUDA error behind FE_CUDA_ERROR for fe_cuda_last_error().
FeStatus check_cuda(cudaError_t error, const char* what);

// Lets a kernel have up to `bytes` of dynamic shared memory, the same in all of its calls: threads that launch at the
// same time must not lower each other's limit. The driver is asked once a device; `allowed`, the kernel's own,
// remembers.
FeStatus allow_shared_memory(const void* kernel, int64_t bytes, const DeviceInfo& device,
                             std::atomic<uint64_t>* allowed, const char* what);

// When a launch may begin. EARLY: beside the launch before, once that has called let_next_launch_begin(); the kernel
// calls wait_for_last_launch() before it touches what that launch touches. Only behind a launch of our own, which has
// waited for everybody else's.
enum class Begin { AFTER_ALL, EARLY };

// `cooperative`: all blocks must fit the device at once, for the kernel has barriers across the grid. Such a launch
// runs beside no other of its stream: that it begins EARLY spares it no more than its own start.
template <typename Params>
FeStatus launch(void (*kernel)(Params), dim3 grid, dim3 block, int64_t shared_bytes, const Params& params,
                bool cooperative, Begin begin, const DeviceInfo& device, cudaStream_t stream, const char* what) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (FE_EARLY_LAUNCH && begin == Begin::EARLY && device.properties.compute_capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {const_cast<Params*>(&params)};  // which are read only
  return check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), what);
}

// Enqueues zeros, beside the launch before if EARLY. What comes after waits for both.
FeStatus write_zeros(void* address, int64_t bytes, Begin begin, const DeviceInfo& device, cudaStream_t stream);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t scalar_bytes(FeScalarType type) { return type == FE_FLOAT64 ? 8 : type == FE_FLOAT32 ? 4 : 2; }
inline int64_t accumulator_bytes(FeScalarType type) { return type == FE_FLOAT64 ? 8 : 4; }
__host__ __device__ inline int index_bytes(FeIndexType type) { return type == FE_INT64 ? 8 : 4; }

// A table of a call: which columns of the indices and of grad_output are its own.
struct TableSlice : FeTable {
  int64_t index_column;
  int64_t first_column;
};

// What a strategy is asked to do: the gradient of some of a call's tables, and zeros wherever else grad_weight is.
struct BackwardCall {
  const FeBackwardArgs& args;  // what all tables share; the tables are those below
  std::vector<TableSlice> tables;
  Begin begin = Begin::AFTER_ALL;  // of the first launch
  bool zeroed = false;  // what is not of these tables has been written. Only PRIVATE heeds it: the others go first
};

// Fills what the parameters of a kernel for several tables say of the call, in fields of these names: each kernel's own
// order of fields stays.
template <typename Params>
void set_input(const FeBackwardArgs& args, Params* params) {
  params->index_type = args.index_type;
  params->indices = args.indices;
  params->index_row_stride = args.index_row_stride;
  params->index_table_stride = args.index_table_stride;
  params->grad_output = args.grad_output;
  params->grad_output_stride = args.grad_output_stride;
}

// The widest access that all of a table's rows allow in grad_output and in grad_weight: 16 or 8 bytes or one element.
inline int64_t pack_bytes(const FeBackwardArgs& args, const TableSlice& table) {
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const uint64_t bits = (reinterpret_cast<uintptr_t>(args.grad_output) + table.first_column * scalar) |
                        (reinterpret_cast<uintptr_t>(args.grad_weight) + table.weight_offset * scalar) |
                        args.grad_output_stride * scalar | table.embedding_dim * scalar;
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : scalar;
}

// Calls f with a value of the C++ type that stands for `type`.
template <typename Function>
FeStatus dispatch_scalar(FeScalarType type, Function&& f) {
  switch (type) {
    case FE_FLOAT32:
      return f(float{});
    case FE_FLOAT64:
      return f(double{});
    case FE_FLOAT16:
      return f(__half{});
    case FE_BFLOAT16:
      return f(__nv_bfloat16{});
  }
  return FE_INVALID_ARGUMENT;
}

// Calls f with the columns in an access of `bytes` (see pack_bytes) as a constant.
template <typename scalar_t, typename Function>
FeStatus dispatch_pack(int64_t bytes, Function&& f) {
  if (bytes == 16) return f(std::integral_constant<int, kWide<scalar_t>>{});
  if (bytes == 8) return f(std::integral_constant<int, kHalf<scalar_t>>{});
  return f(std::integral_constant<int, 1>{});
}

// The same where a thread sums at most 16 bytes of accumulators: twice as many of a 16-bit type would not fit into
// registers beside the loads in flight.
inline int64_t narrow_pack_bytes(const FeBackwardArgs& args, const TableSlice& table) {
  return std::min<int64_t>(pack_bytes(args, table), scalar_bytes(args.scalar_type) == 2 ? 8 : 16);
}
template <typename scalar_t, typename Function>
FeStatus dispatch_narrow_pack(int64_t bytes, Function&& f) {
  if constexpr (sizeof(scalar_t) > 2) {
    return dispatch_pack<scalar_t>(bytes, f);
  } else {
    return bytes == 8 ? f(std::integral_constant<int, kHalf<scalar_t>>{}) : f(std::integral_constant<int, 1>{});
  }
}

// The strategies. Each takes workspace == nullptr as the size query; embedding_backward.cu has checked the arguments.
FeStatus backward_own(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                      size_t* workspace_bytes, cudaStream_t stream);
FeStatus backward_private(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                          size_t* workspace_bytes, cudaStream_t stream);
FeStatus backward_tile(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                       size_t* workspace_bytes, cudaStream_t stream);
FeStatus backward_sort(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                       size_t* workspace_bytes, cudaStream_t stream);

}  // namespace fast_embedding
