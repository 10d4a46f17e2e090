// The sort of sort_indices.cu by one thread block cluster a table, its lists in the shared memory of the cluster's
// blocks. It touches memory to read the indices and to write the sorted list, so the other SMs can write a large
// gradient's zeros meanwhile: they are a launch of their own, which begins with this one or once it has read its
// indices (programmatic dependent launch) and does not end before it. A pass: rank, barrier, each block adds up where
// its digits go, every entry moves to its place in whichever block's memory, barrier. Barriers are the cluster's, at a
// fifth of a grid-wide one's price.
#include <cooperative_groups.h>

#include "rank.cuh"

namespace fast_embedding {

#if FE_EARLY_LAUNCH
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 16;                    // entries of a thread at the most
constexpr int kMaxChunk = kThreads * kItems;  // entries of a block
constexpr int64_t kSharedBytes = 200 << 10;   // what a chunk and counts of ten bits take, and more than half of an SM's
constexpr int64_t kMaxInlineZeros = 16 << 10;  // not worth a launch
constexpr int kPositionBits = 18;              // of a cluster's lookups; above them a pass keeps ranks in a warp

static_assert(sizeof(Lookup) * kMaxChunk + (1 << kMaxDigitBits) * (4 + 2 + 2 * kWarps) <= kSharedBytes);
static_assert(1 << kMaxDigitBits <= 2 * kThreads);  // two digits a thread
static_assert(kMaxChunk * 16 <= 1 << kPositionBits && kMaxChunk / kWarps <= 1 << (32 - kPositionBits));

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Where `address`, in this block's shared memory, is in that of the cluster's block `rank`.
__device__ inline uint32_t address_in_block(const void* address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(mapped)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address))), "r"(rank));
  return mapped;
}

__device__ inline uint32_t load_from_block(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ inline void store_to_block(uint32_t address, Lookup entry) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(entry.row), "r"(entry.position)
               : "memory");
}
#endif

// Reads and checks the indices of a chunk.
template <typename At>
__device__ inline void read_chunk(const SortParams& params, const SortTable& table, uint32_t begin, uint32_t length,
                                  int items, At at, Lookup* list) {
  constexpr int kReads = 8;  // of indices in flight in a thread
  bool in_range = true;
  for (int first = 0; first < items; first += kReads) {
    int64_t index[kReads];
#pragma unroll
    for (int j = 0; j < kReads; ++j) {
      const bool present = first + j < items && at(first + j) < length;
      index[j] = present ? read_index(params, table, begin + at(first + j)) : 0;
    }
#pragma unroll
    for (int j = 0; j < kReads; ++j) {
      if (first + j >= items || at(first + j) >= length) break;
      in_range = in_range && is_in_range(index[j], table.num_embeddings);  // nor is a negative int32, as V < 2^31
      Lookup& entry = list[at(first + j)];
      entry.row = index[j] == table.padding_idx ? table.num_embeddings : static_cast<uint32_t>(index[j]);
      entry.position = begin + at(first + j);
    }
  }
  for (int k = 0; !in_range && k < items; ++k) {
    if (at(k) >= length) break;
    check_index(signed_index(read_index(params, table, begin + at(k)), params.index_type), table.num_embeddings);
  }
}

__global__ void __launch_bounds__(kThreads, 1) sort_in_cluster(const __grid_constant__ SortParams params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) char memory[];
  __shared__ uint32_t warp_sum[kWarps];
  // Indices of several tables stand apart: once zeros keep memory busy, a read of 16384 of them takes 200 us.
  const bool reads_first = params.num_tables > 1;
  if (!reads_first) let_next_launch_begin();
  const auto cluster = cooperative_groups::this_cluster();
  const uint32_t own_block = cluster.block_rank();
  const uint32_t blocks = params.chunks;
  const SortTable& table = params.table[blockIdx.x / blocks];
  auto* list = reinterpret_cast<Lookup*>(memory);
  auto* start = reinterpret_cast<uint32_t*>(list + params.rows_of_chunk);  // [bins]
  uint32_t* count = start + params.bins;                                   // [bins / 2]
  uint32_t* warp_count = count + params.bins / 2;                          // [kWarps, bins / 2]

  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  fill_zero(params.flags, params.flags_bytes, thread, num_threads);
  fill_zero(params.zeros, params.zeros_bytes, thread, num_threads);

  const uint32_t begin = min(own_block * params.rows_of_chunk, params.num_rows);
  const uint32_t length = min(params.rows_of_chunk, params.num_rows - begin);
  const int items = static_cast<int>((length + kThreads - 1) / kThreads);
  // Warp w takes the w-th stretch of the list, 32 entries at a time, so that ranks follow the order of entries.
  const auto at = [&](int k) { return (threadIdx.x / 32 * items + k) * 32 + threadIdx.x % 32; };
  read_chunk(params, table, begin, length, items, at, list);
  if (reads_first) let_next_launch_begin();
  for (int pass = 0; pass < table.passes; ++pass) {
    const uint32_t bins = 1u << table.digit_bits;
    const auto digit_of = [&](uint32_t row) { return row >> pass * table.digit_bits & (bins - 1); };
    uint32_t* earlier = clear_warp_count(warp_count, bins / 2);
#pragma unroll 1  // unrolled it is twice the code and as fast
    for (int k = 0; k < items; ++k) {
      const bool present = at(k) < length;
      const uint32_t digit = present ? digit_of(list[at(k)].row) : 0;
      const uint32_t rank = rank_in_warp(digit, present, earlier);
      if (present) list[at(k)].position |= rank << kPositionBits;
    }
    Lookup entry[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k < items && at(k) < length) entry[k] = list[at(k)];
    }
    __syncthreads();
    count_before_warps<kWarps>(warp_count, bins / 2, count);
    cluster.sync();  // all counts are there, and all lists in registers

    const bool owns = 2 * threadIdx.x < bins;
    constexpr uint32_t kLoads = 8;  // of counts in flight
    uint32_t before[2] = {}, all[2] = {};
    for (uint32_t first = 0; owns && first < blocks; first += kLoads) {
      uint32_t word[kLoads];
#pragma unroll
      for (uint32_t j = 0; j < kLoads; ++j) {
        word[j] = first + j < blocks ? load_from_block(address_in_block(count + threadIdx.x, first + j)) : 0;
      }
#pragma unroll
      for (uint32_t j = 0; j < kLoads; ++j) {
        all[0] += low_half(word[j]);
        all[1] += high_half(word[j]);
        if (first + j < own_block) {
          before[0] += low_half(word[j]);
          before[1] += high_half(word[j]);
        }
      }
    }
    const uint32_t lower = scan_threads<kThreads>(all[0] + all[1], warp_sum).before;
    if (owns) {
      start[2 * threadIdx.x] = lower + before[0];
      start[2 * threadIdx.x + 1] = lower + all[0] + before[1];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k >= items || at(k) >= length) break;
      const uint32_t digit = digit_of(entry[k].row);
      const uint32_t place = start[digit] + half_at(earlier, digit) + (entry[k].position >> kPositionBits);
      const uint32_t block = params.chunk_divisor.quotient(place);
      entry[k].position &= (1u << kPositionBits) - 1;
      store_to_block(address_in_block(list + (place - block * params.rows_of_chunk), block), entry[k]);
    }
    cluster.sync();  // all entries have arrived, and all counts are read
  }
  Lookup* sorted = params.lookups[0] + static_cast<int64_t>(blockIdx.x / blocks) * params.num_rows + begin;
  for (uint32_t i = threadIdx.x; i < length; i += kThreads) sorted[i] = list[i];
#endif
}

const void* const kKernel = reinterpret_cast<const void*>(sort_in_cluster);

cudaLaunchConfig_t cluster_config(int64_t tables, int32_t blocks, cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tables * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

}  // namespace

int32_t max_cluster_blocks(int32_t compute_capability) {
  cudaFuncAttributes attributes{};
  if (compute_capability < 90 || cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess ||
      attributes.ptxVersion < 90) {
    return 0;
  }
  cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (const int32_t blocks : {16, 8}) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config(1, blocks, &attribute);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess && clusters > 0) return blocks;
  }
  cudaGetLastError();  // what was asked and refused is nobody else's error
  return 0;
}

FeStatus sort_in_cluster(SortParams params, const DeviceInfo& device, cudaStream_t stream) {
  if (params.chunks > device.properties.max_cluster_blocks || params.rows_of_chunk > kMaxChunk) {
    return FE_INVALID_ARGUMENT;
  }
  const int64_t zeros_bytes = params.zeros_bytes;
  if (zeros_bytes > kMaxInlineZeros) params.zeros_bytes = 0;
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = cluster_config(params.num_tables, params.chunks, &attribute);
  config.stream = stream;
  void* arguments[] = {&params};
  const FeStatus status = check_cuda(cudaLaunchKernelExC(&config, kKernel, arguments), "sort_in_cluster");
  if (status != FE_OK || zeros_bytes <= kMaxInlineZeros) return status;
  return write_zeros(params.zeros, zeros_bytes, Begin::EARLY, device, stream);
}

#else

int32_t max_cluster_blocks(int32_t) { return 0; }
FeStatus sort_in_cluster(SortParams, const DeviceInfo&, cudaStream_t) { return FE_INVALID_ARGUMENT; }

#endif

}  // namespace fast_embedding
