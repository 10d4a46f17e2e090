// The forward of a sum: output[b] = table_0[x[b, 0]] + table_1[x[b, 1]] + ..., in this order, in float32 (float64 for
// float64), rounded once. One launch for up to kMaxTables tables; more of them carry their sums from launch to launch.
//
// A block takes a few rows of the output. It first works out where the rows of all tables begin, once for all words of
// a row: done for each word, addresses and checks would take twice the instructions of the sum itself. Then a thread
// keeps one word of the row, of 16, 8, 4 or 2 bytes, and walks over rows, with the words of four tables in flight.
// Small tables are read from the L1, whose rate bounds this kernel: n rows are read for each that is written.
#include <algorithm>

#include "forward.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 384;     // at most; a block has as many as its part of a row allows. 5 x 75 for 300 float32
constexpr int kMaxTables = 64;    // in one launch: the parameters of a kernel end at 4 KB
constexpr int kMaxStarts = 4096;  // of a block's table rows, 16 KB
constexpr int kIndexUnroll = 4;   // index loads in flight in a thread
constexpr int kMaxRowsOfThread = 4;
static_assert(kMaxTables * kMaxTables <= kMaxStarts);  // so a block has a thread a table

struct SumTable {
  uint32_t start;  // where it begins, in words from params.weight
  uint32_t num_embeddings;
  uint32_t row_words;  // from a row to the next
};

// A kernel that starts finds its parameters in no cache: few bytes of them, and those used together side by side.
struct SumParams {
  Divisor chunks_divisor;
  int32_t chunks;  // of a row, each with a block of its own
  int32_t rows_of_block;
  uint32_t num_tables;
  Divisor tables_divisor;
  FeIndexType index_type;
  int64_t num_rows;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  int32_t words_of_row;
  int32_t words_of_chunk;  // of the last one: up to this many
  uint32_t rows_of_step;   // which a block writes at a time
  Divisor words_divisor;   // by words_of_chunk
  const char* weight;      // where the first of the tables begins
  int32_t is_first;
  int32_t is_last;
  void* output;
  int64_t output_stride;
  void* carried;  // accumulators: the sums of the tables of earlier launches
  int64_t carried_stride;
  SumTable table[kMaxTables];

  // How many starts a row takes: they are read in fours.
  __host__ __device__ uint32_t starts_of_row() const { return (num_tables + 3) / 4 * 4; }
};

// Fills starts[row * starts_of_row() + t]: where, in words, the row of table t begins that is read for output row
// first_row + row.
__device__ inline void find_rows(const SumParams& params, int64_t first_row, int num_rows, uint32_t* starts) {
  // A thread keeps to one table, whose parameters it then reads once: different ones cost a warp an access each.
  const int first = static_cast<int>(params.tables_divisor.quotient(threadIdx.x));
  const int t = threadIdx.x - first * params.num_tables;
  const int step = static_cast<int>(params.tables_divisor.quotient(blockDim.x));
  if (first >= step) return;
  const SumTable table = params.table[t];
  const int64_t position = first_row * params.index_row_stride + t * params.index_table_stride;
  for (int begin = first; begin < num_rows; begin += kIndexUnroll * step) {
    int64_t index[kIndexUnroll];
#pragma unroll
    for (int k = 0; k < kIndexUnroll; ++k) {
      const int row = begin + k * step;
      if (row < num_rows) {
        index[k] = load_index(params.indices, params.index_type, position + row * params.index_row_stride);
      }
    }
    // Only now: a check behind each load would make the next load wait for it.
    bool in_range = true;
#pragma unroll
    for (int k = 0; k < kIndexUnroll; ++k) {
      const int row = begin + k * step;
      if (row < num_rows) {
        index[k] = signed_index(index[k], params.index_type);
        in_range = in_range && is_in_range(index[k], table.num_embeddings);
      }
    }
    if (!in_range) {
      // Read again: the way to the printing should take no registers from the other.
#pragma unroll 1
      for (int row = begin; row < num_rows; row += step) {
        const int64_t at = position + row * params.index_row_stride;
        check_index(signed_index(load_index(params.indices, params.index_type, at), params.index_type),
                    table.num_embeddings);
      }
      __trap();  // reached only if somebody wrote to the indices meanwhile
    }
#pragma unroll
    for (int k = 0; k < kIndexUnroll; ++k) {
      const int row = begin + k * step;
      if (row < num_rows) {
        starts[row * params.starts_of_row() + t] = table.start + static_cast<uint32_t>(index[k]) * table.row_words;
      }
    }
  }
}

template <typename scalar_t, int kSize, typename word_t>
__device__ inline void add_word(const word_t& word, acc_t<scalar_t> (&sum)[kSize]) {
  static_assert(sizeof(word_t) == sizeof(scalar_t) * kSize);
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16> && kSize % 2 == 0) {
    // An instruction an element: the conversion of one bfloat16 takes two for the upper of a pair.
    uint32_t pair[kSize / 2];
    memcpy(pair, &word, sizeof(word));
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
      sum[j] += __uint_as_float(pair[j / 2] << 16);
      sum[j + 1] += __uint_as_float(pair[j / 2] & 0xffff0000u);
    }
  } else {
    scalar_t value[kSize];
    memcpy(value, &word, sizeof(word));
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] += widen(value[j]);
  }
}

// sum += the words at the first kCount of four starts, in order; all are in flight before the first is used.
template <int kCount, typename word_t, typename scalar_t, int kSize>
__device__ inline void add_words(uintptr_t column, const uint4* starts, acc_t<scalar_t> (&sum)[kSize]) {
  const uint4 four = *starts;
  const uint32_t start[] = {four.x, four.y, four.z, four.w};
  word_t word[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    // One instruction, a multiplication and addition; a pointer and an index would take four.
    word[k] = __ldg(reinterpret_cast<const word_t*>(column + uint64_t{start[k]} * sizeof(word_t)));
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) add_word<scalar_t>(word[k], sum);
}

template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads) sum_tables(const __grid_constant__ SumParams params) {
  using sum_t = acc_t<scalar_t>;
  using word_t = typename Word<sizeof(scalar_t) * kSize>::type;
  extern __shared__ __align__(16) uint32_t starts[];

  const uint32_t group = params.chunks_divisor.quotient(blockIdx.x);
  const int first_word = static_cast<int>(blockIdx.x - group * params.chunks) * params.words_of_chunk;
  const int64_t first_row = static_cast<int64_t>(group) * params.rows_of_block;
  const int num_rows = min(static_cast<int64_t>(params.rows_of_block), params.num_rows - first_row);
  find_rows(params, first_row, num_rows, starts);
  __syncthreads();

  const uint32_t local_row = params.words_divisor.quotient(threadIdx.x);
  const int word = first_word + static_cast<int>(threadIdx.x - local_row * params.words_of_chunk);
  if (local_row >= params.rows_of_step || word >= params.words_of_row) return;
  const uintptr_t column = reinterpret_cast<uintptr_t>(params.weight) + word * sizeof(word_t);
  const int64_t first_element = static_cast<int64_t>(word) * kSize;
  scalar_t* output =
      static_cast<scalar_t*>(params.output) + (first_row + local_row) * params.output_stride + first_element;
  sum_t* carried =
      static_cast<sum_t*>(params.carried) + (first_row + local_row) * params.carried_stride + first_element;
  const int64_t output_step = params.rows_of_step * params.output_stride;
  const uint32_t fours_of_row = params.starts_of_row() / 4;
  const uint4* start = reinterpret_cast<const uint4*>(starts) + local_row * fours_of_row;

#pragma unroll 1
  for (int row = static_cast<int>(local_row); row < num_rows; row += static_cast<int>(params.rows_of_step)) {
    sum_t sum[kSize] = {};
    if (!params.is_first) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] = carried[j];
    }
    uint32_t four = 0;
#pragma unroll 1
    for (; four < params.num_tables / 4; ++four) add_words<4, word_t, scalar_t>(column, start + four, sum);
    switch (params.num_tables % 4) {
      case 1:
        add_words<1, word_t, scalar_t>(column, start + four, sum);
        break;
      case 2:
        add_words<2, word_t, scalar_t>(column, start + four, sum);
        break;
      case 3:
        add_words<3, word_t, scalar_t>(column, start + four, sum);
        break;
    }
    if (params.is_last) {
      Pack<scalar_t, kSize> pack;
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.value[j] = narrow<scalar_t>(sum[j]);
      word_t rounded;
      memcpy(&rounded, &pack, sizeof(rounded));
      __stcs(reinterpret_cast<word_t*>(output), rounded);  // evict first: the output must not push out the tables
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) carried[j] = sum[j];
    }
    start += params.rows_of_step * fours_of_row;
    output += output_step;
    carried += params.rows_of_step * params.carried_stride;
  }
}

template <typename scalar_t>
FeStatus launch(const SumParams& params, int word, unsigned blocks, unsigned threads, cudaStream_t stream) {
  const size_t shared_bytes = sizeof(uint32_t) * params.rows_of_block * params.starts_of_row();
  const auto run = [&](auto bytes) {
    sum_tables<scalar_t, decltype(bytes)::value / static_cast<int>(sizeof(scalar_t))>
        <<<blocks, threads, shared_bytes, stream>>>(params);
    return check_cuda(cudaGetLastError(), "embedding_sum_forward");
  };
  if (word == 16) return run(std::integral_constant<int, 16>{});
  if constexpr (sizeof(scalar_t) < 8) {
    if (word == 4) return run(std::integral_constant<int, 4>{});
  }
  if constexpr (sizeof(scalar_t) < 4) {
    if (word == 2) return run(std::integral_constant<int, 2>{});
  }
  return run(std::integral_constant<int, 8>{});
}

// The tables [first, last) of a call.
FeStatus add_tables(const FeForwardArgs& args, int64_t first, int64_t last, void* carried, int64_t carried_stride,
                    int num_sms, cudaStream_t stream) {
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const int word = word_bytes(args, 0, args.num_tables, 0);
  int64_t begin = args.tables[first].weight_offset;
  for (int64_t t = first; t < last; ++t) begin = std::min(begin, args.tables[t].weight_offset);
  SumParams params;
  for (int64_t t = first; t < last; ++t) {
    const FeTable& table = args.tables[t];
    const int64_t start = (table.weight_offset - begin) * scalar / word;
    const int64_t row_words = table.weight_stride * scalar / word;
    if (table.num_embeddings > UINT32_MAX || start + table.num_embeddings * row_words > UINT32_MAX) {
      return FE_UNSUPPORTED;
    }
    params.table[t - first] = {static_cast<uint32_t>(start), static_cast<uint32_t>(table.num_embeddings),
                               static_cast<uint32_t>(row_words)};
  }
  params.weight = static_cast<const char*>(args.weight) + begin * scalar;
  params.num_tables = static_cast<uint32_t>(last - first);
  params.tables_divisor = Divisor(params.num_tables);
  params.index_type = args.index_type;
  params.indices =
      static_cast<const char*>(args.indices) + first * args.index_table_stride * index_bytes(args.index_type);
  params.index_row_stride = args.index_row_stride;
  params.index_table_stride = args.index_table_stride;
  params.num_rows = args.num_rows;
  params.output = args.output;
  params.output_stride = args.output_stride;
  params.carried = carried;
  params.carried_stride = carried_stride;
  params.is_first = first == 0;
  params.is_last = last == args.num_tables;
  const int64_t words = args.tables[0].embedding_dim * scalar / word;
  if (words > INT32_MAX / 2) return FE_UNSUPPORTED;
  const int64_t max_rows = kMaxStarts / params.starts_of_row();
  split_row(words, kThreads, max_rows, &params);
  const int64_t rows_of_thread =
      std::clamp<int64_t>(words_of_thread(words, args.num_rows, num_sms), 1,
                          std::min<int64_t>(kMaxRowsOfThread, max_rows / params.rows_of_step));
  unsigned threads = 0;
  unsigned blocks = 0;
  const FeStatus status = split_rows(rows_of_thread, &params, &threads, &blocks);
  if (status != FE_OK) return status;
  return dispatch_scalar(args.scalar_type,
                         [&](auto value) { return launch<decltype(value)>(params, word, blocks, threads, stream); });
}

}  // namespace

FeStatus sum_forward(const FeForwardArgs& args, void* workspace, size_t* workspace_bytes, cudaStream_t stream) {
  const int64_t dim = args.tables[0].embedding_dim;
  for (int64_t t = 1; t < args.num_tables; ++t) {
    if (args.tables[t].embedding_dim != dim) return FE_INVALID_ARGUMENT;
  }
  // Sums that a later launch adds to stand in the output itself, unless that would round them.
  const bool rounds = scalar_bytes(args.scalar_type) < accumulator_bytes(args.scalar_type);
  const size_t needed = rounds && args.num_tables > kMaxTables ? args.num_rows * dim * sizeof(float) : 0;
  if (workspace == nullptr) {
    *workspace_bytes = needed;
    return FE_OK;
  }
  if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;
  if (args.num_rows == 0 || dim == 0) return FE_OK;

  const DeviceInfo* device = nullptr;
  FeStatus status = device_info(&device);
  void* carried = rounds ? workspace : args.output;
  const int64_t carried_stride = rounds ? dim : args.output_stride;
  for (int64_t first = 0; first < args.num_tables && status == FE_OK; first += kMaxTables) {
    const int64_t last = std::min<int64_t>(first + kMaxTables, args.num_tables);
    status = add_tables(args, first, last, carried, carried_stride, device->properties.num_sms, stream);
  }
  return status;
}

}  // namespace fast_embedding
