// The forward: a gather of rows, one launch whatever the number of tables (up to kMaxTables a launch). Sums of rows are
// in embedding_sum_forward.cu.
//
// A row is copied as words of the widest size that all addresses allow, so the element type plays no part. The grid
// is laid over the words of the output, not over rows: every thread has the same work at D = 1 and at D = 4096, and
// consecutive threads write consecutive words. ATen spends 0.6 ns a row whatever the row's size.
#include <algorithm>

#include "forward.cuh"

namespace fast_embedding {
namespace {

constexpr int kThreads = 128;         // measured: 256 is 4% slower on rows of 512 bytes
constexpr int kUnroll = 4;            // independent index and row loads in flight in a thread
constexpr int kMaxTables = 64;        // in one launch: the parameters of a kernel end at 4 KB
constexpr int kTableThreads = 256;    // several tables: at most; a block has as many as its part of a row allows
constexpr int kTableBlocksPerSm = 4;  // at least: unbounded, the compiler keeps one load in flight to save registers

// Several tables: rows in flight in a thread, which takes up to twice as many. Measured: eight short words are 1.2
// times as fast as four, eight of 16 bytes 1.2 times as slow.
__host__ __device__ constexpr int rows_in_flight(int word_bytes) { return word_bytes <= 4 ? 8 : 4; }

// One table, indices and output without gaps: what nn.Embedding does. Kept lean, because at 16 bytes a row the
// address arithmetic is as long as the transfer.
struct RowParams {
  const char* weight;
  int64_t row_bytes;  // from a row of the table to the next
  int64_t num_embeddings;
  const void* indices;
  FeIndexType index_type;
  int64_t num_words;  // of the whole output
  int32_t words_per_row;
  Divisor words_divisor;
};

template <typename word_t>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const __grid_constant__ RowParams params, word_t* __restrict__ output, int words_per_thread) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * words_per_thread;
  const int64_t first_row = first / params.words_per_row;
  const uint32_t first_word = first - first_row * params.words_per_row;
  const uint32_t num_words = min(params.num_words - first, static_cast<int64_t>(kThreads) * words_per_thread);

  int64_t index[kUnroll];
  uint32_t word[kUnroll];
  bool in_range = true;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const uint32_t offset = k * kThreads + threadIdx.x;
    const uint32_t row = params.words_divisor.quotient(first_word + offset);
    word[k] = first_word + offset - row * params.words_per_row;
    index[k] = offset < num_words ? load_signed_index(params.indices, params.index_type, first_row + row) : 0;
  }
  // Checked together: a branch behind each load would make the next load wait for it (measured: 1.4x).
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    in_range = in_range && (k * kThreads + threadIdx.x >= num_words || is_in_range(index[k], params.num_embeddings));
  }
  if (!in_range) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (k * kThreads + threadIdx.x < num_words) check_index(index[k], params.num_embeddings);
    }
  }
  word_t value[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    if (k * kThreads + threadIdx.x < num_words) {
      value[k] = __ldg(reinterpret_cast<const word_t*>(params.weight + index[k] * params.row_bytes) + word[k]);
    }
  }
  // Evict first: the output must not push the table out of the L2.
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const uint32_t offset = k * kThreads + threadIdx.x;
    if (offset < num_words) __stcs(output + first + offset, value[k]);
  }
}

// Several tables, or strides. A thread keeps one word of the output row and walks over rows: it finds its table once,
// and per word there remain two loads, a check, a multiplication and a store. The tables' parameters go to shared
// memory first: a warp reads those of several tables, which the constant cache would give it one after the other.
struct Source {
  const char* weight;
  uint32_t num_embeddings;
  uint32_t row_bytes;  // from a row to the next
};

struct TableParams {
  int32_t num_tables;
  int32_t chunks;  // of an output row, each with blocks of its own
  int32_t words_of_row;
  int32_t words_of_chunk;  // of the last one: up to this many
  uint32_t rows_of_step;   // which a block writes at a time
  int32_t rows_of_block;
  Divisor chunks_divisor;
  Divisor words_divisor;  // by words_of_chunk
  int64_t num_rows;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  char* output;
  int64_t output_row_bytes;
  int32_t first_word[kMaxTables];  // of a table's slice of an output row
  Source source[kMaxTables];
};

// What a thread reads and writes: one word of a row of the output, and of the rows after it that are its own.
template <typename index_t>
struct Column {
  const index_t* index;
  int64_t index_step;  // to the next of its rows
  uint32_t num_embeddings;
  uint32_t row_bytes;
  uintptr_t weight;  // the address of its word in row 0 of its table
  char* output;
  int64_t output_step;
};

// Copies the words of kRows rows, all in flight together, and goes on to the next.
template <int kRows, typename word_t, typename index_t>
__device__ inline void gather_words(Column<index_t>* column) {
  index_t index[kRows];
  bool in_range = true;
#pragma unroll
  for (int k = 0; k < kRows; ++k) index[k] = __ldg(column->index + k * column->index_step);
#pragma unroll
  for (int k = 0; k < kRows; ++k) in_range = in_range && is_in_range(index[k], column->num_embeddings);
  if (!in_range) {
    // Read again: the way to the printing should take no registers from the other.
#pragma unroll 1
    for (int k = 0; k < kRows; ++k) check_index(column->index[k * column->index_step], column->num_embeddings);
    __trap();  // reached only if somebody wrote to the indices meanwhile
  }
  word_t value[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const uintptr_t start = static_cast<uintptr_t>(static_cast<uint32_t>(index[k])) * column->row_bytes;
    value[k] = __ldg(reinterpret_cast<const word_t*>(column->weight + start));
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    __stcs(reinterpret_cast<word_t*>(column->output + k * column->output_step), value[k]);
  }
  column->index += kRows * column->index_step;
  column->output += kRows * column->output_step;
}

template <typename index_t, typename word_t>
__global__ void __launch_bounds__(kTableThreads, kTableBlocksPerSm)
    gather_tables(const __grid_constant__ TableParams params) {
  __shared__ int32_t first_word[kMaxTables];
  __shared__ Source source[kMaxTables];
  if (static_cast<int>(threadIdx.x) < params.num_tables) {
    first_word[threadIdx.x] = params.first_word[threadIdx.x];
    source[threadIdx.x] = params.source[threadIdx.x];
  }
  __syncthreads();

  const uint32_t group = params.chunks_divisor.quotient(blockIdx.x);
  const int first_word_of_block = static_cast<int>(blockIdx.x - group * params.chunks) * params.words_of_chunk;
  const uint32_t local_row = params.words_divisor.quotient(threadIdx.x);
  const int word = first_word_of_block + static_cast<int>(threadIdx.x - local_row * params.words_of_chunk);
  if (local_row >= params.rows_of_step || word >= params.words_of_row) return;
  const int t = find_last(first_word, params.num_tables, word);
  const Source table = source[t];

  const int64_t block_row = static_cast<int64_t>(group) * params.rows_of_block;
  const index_t* indices = static_cast<const index_t*>(params.indices) + block_row * params.index_row_stride;
  char* output = params.output + block_row * params.output_row_bytes;
  Column<index_t> column;
  column.index = indices + local_row * params.index_row_stride + t * params.index_table_stride;
  column.index_step = params.rows_of_step * params.index_row_stride;
  column.num_embeddings = table.num_embeddings;
  column.row_bytes = table.row_bytes;
  column.weight = reinterpret_cast<uintptr_t>(table.weight) + (word - first_word[t]) * sizeof(word_t);
  column.output = output + local_row * params.output_row_bytes + word * sizeof(word_t);
  column.output_step = params.rows_of_step * params.output_row_bytes;

  constexpr int kRows = rows_in_flight(sizeof(word_t));
  const int step = static_cast<int>(params.rows_of_step);
  const int num_rows = min(static_cast<int64_t>(params.rows_of_block), params.num_rows - block_row);
  int row = static_cast<int>(local_row);
#pragma unroll 1
  for (; row + (kRows - 1) * step < num_rows; row += kRows * step) gather_words<kRows, word_t>(&column);
#pragma unroll 1
  for (; row < num_rows; row += step) gather_words<1, word_t>(&column);
}

// Small outputs go to as many SMs as there are, large ones to threads with several loads in flight.
FeStatus count_blocks(int64_t num_words, int* words_per_thread, int num_sms, unsigned* blocks) {
  if (num_words <= int64_t{num_sms} * kThreads * 4) *words_per_thread = 1;
  const int64_t count = ceil_div(num_words, int64_t{kThreads} * *words_per_thread);
  if (count > INT32_MAX) return FE_UNSUPPORTED;
  *blocks = static_cast<unsigned>(count);
  return FE_OK;
}

// Calls f with a value of the word type of `bytes`.
template <typename Function>
FeStatus dispatch_word(int bytes, Function&& f) {
  switch (bytes) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(static_cast<unsigned int>(0));
    default:
      return f(static_cast<unsigned short>(0));
  }
}

FeStatus forward_rows(const FeForwardArgs& args, int num_sms, cudaStream_t stream) {
  const FeTable& table = args.tables[0];
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const int word = word_bytes(args, 0, 1, 0);
  const int64_t words = table.embedding_dim * scalar / word;
  if (words > INT32_MAX / 2) return FE_UNSUPPORTED;
  const RowParams params = {static_cast<const char*>(args.weight) + table.weight_offset * scalar,
                            table.weight_stride * scalar,
                            table.num_embeddings,
                            args.indices,
                            args.index_type,
                            words * args.num_rows,
                            static_cast<int32_t>(words),
                            Divisor(words)};
  int words_per_thread = kUnroll;
  unsigned blocks = 0;
  const FeStatus status = count_blocks(params.num_words, &words_per_thread, num_sms, &blocks);
  if (status != FE_OK) return status;
  return dispatch_word(word, [&](auto value) {
    using word_t = decltype(value);
    gather_rows<word_t><<<blocks, kThreads, 0, stream>>>(params, static_cast<word_t*>(args.output), words_per_thread);
    return check_cuda(cudaGetLastError(), "embedding_forward");
  });
}

FeStatus forward_tables(const FeForwardArgs& args, int64_t first_table, int num_tables, int64_t first_column,
                        int num_sms, cudaStream_t stream) {
  const int64_t scalar = scalar_bytes(args.scalar_type);
  const int word = word_bytes(args, first_table, num_tables, first_column);
  TableParams params;
  int64_t words = 0;
  for (int t = 0; t < num_tables; ++t) {
    const FeTable& table = args.tables[first_table + t];
    const int64_t row_bytes = table.weight_stride * scalar;
    if (table.num_embeddings > UINT32_MAX || row_bytes > UINT32_MAX) return FE_UNSUPPORTED;
    params.first_word[t] = static_cast<int32_t>(words);
    params.source[t] = {static_cast<const char*>(args.weight) + table.weight_offset * scalar,
                        static_cast<uint32_t>(table.num_embeddings), static_cast<uint32_t>(row_bytes)};
    words += table.embedding_dim * scalar / word;
    if (words > INT32_MAX / 2) return FE_UNSUPPORTED;
  }
  if (words == 0) return FE_OK;
  params.num_tables = num_tables;
  params.num_rows = args.num_rows;
  params.indices =
      static_cast<const char*>(args.indices) + first_table * args.index_table_stride * index_bytes(args.index_type);
  params.index_row_stride = args.index_row_stride;
  params.index_table_stride = args.index_table_stride;
  params.output = static_cast<char*>(args.output) + first_column * scalar;
  params.output_row_bytes = args.output_stride * scalar;
  split_row(words, kTableThreads, kTableThreads, &params);
  const int64_t share = words_of_thread(words, args.num_rows, num_sms);
  const int64_t in_flight = rows_in_flight(word);
  const int64_t rows_of_thread = share < 2 ? 1 : share < 2 * in_flight ? in_flight : 2 * in_flight;
  unsigned threads = 0;
  unsigned blocks = 0;
  const FeStatus status = split_rows(rows_of_thread, &params, &threads, &blocks);
  if (status != FE_OK) return status;
  return dispatch_word(word, [&](auto value) {
    using word_t = decltype(value);
    if (args.index_type == FE_INT64) {
      gather_tables<long long, word_t><<<blocks, threads, 0, stream>>>(params);
    } else {
      gather_tables<int, word_t><<<blocks, threads, 0, stream>>>(params);
    }
    return check_cuda(cudaGetLastError(), "embedding_forward");
  });
}

}  // namespace
}  // namespace fast_embedding

extern "C" FeStatus fe_cuda_embedding_forward(const FeForwardArgs* args, void* workspace, size_t* workspace_bytes,
                                              void* stream) {
  using namespace fast_embedding;
  if (args == nullptr || workspace_bytes == nullptr || (args->num_tables > 0 && args->tables == nullptr) ||
      args->num_rows < 0 || (args->combination != FE_CONCAT && args->combination != FE_SUM)) {
    return FE_INVALID_ARGUMENT;
  }
  if (args->combination == FE_SUM && args->num_tables > 1) {
    return sum_forward(*args, workspace, workspace_bytes, static_cast<cudaStream_t>(stream));
  }
  *workspace_bytes = 0;
  if (workspace == nullptr || args->num_rows == 0 || args->num_tables == 0) return FE_OK;

  const DeviceInfo* device = nullptr;
  const FeStatus found = device_info(&device);
  if (found != FE_OK) return found;
  const FeTable& only = args->tables[0];
  if (args->num_tables == 1 && only.embedding_dim > 0 && args->output_stride == only.embedding_dim &&
      args->index_row_stride == 1) {
    return forward_rows(*args, device->properties.num_sms, static_cast<cudaStream_t>(stream));
  }
  int64_t column = 0;
  for (int64_t first = 0; first < args->num_tables; first += kMaxTables) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTables, args->num_tables - first));
    const FeStatus status =
        forward_tables(*args, first, count, column, device->properties.num_sms, static_cast<cudaStream_t>(stream));
    if (status != FE_OK) return status;
    for (int t = 0; t < count; ++t) column += args->tables[first + t].embedding_dim;
  }
  return FE_OK;
}
