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

constexpr int kThreads = 128;          // measured: 256 is 4% slower on rows of 512 bytes
constexpr int kUnroll = 4;             // independent index and row loads in flight in a thread
constexpr int kMaxTables = 64;         // in one launch: the parameters of a kernel end at 4 KB
constexpr int kMaxTableOfWord = 4096;  // output rows up to this many words find their table by a look-up

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

// Several tables, or strides.
struct Source {
  const char* weight;
  int64_t row_bytes;  // from a row to the next
  int64_t num_embeddings;
  int32_t first_word;  // of this table's slice of an output row
};

struct TableParams {
  Source source[kMaxTables];
  int32_t num_tables;
  FeIndexType index_type;
  const void* indices;
  int64_t index_row_stride;
  int64_t index_table_stride;
  char* output;
  int64_t output_row_bytes;
  int64_t num_words;  // of the whole output
  int32_t words_per_row;
  Divisor words_divisor;
};

__device__ inline int search_table(const TableParams& params, int word) {
  int low = 0, high = params.num_tables - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (params.source[middle].first_word <= word) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename word_t>
__global__ void __launch_bounds__(kThreads)
    gather_tables(const __grid_constant__ TableParams params, int words_per_thread) {
  __shared__ uint8_t table_of_word[kMaxTableOfWord];
  const bool look_up = params.words_per_row <= kMaxTableOfWord;
  if (look_up) {
    for (int word = threadIdx.x; word < params.words_per_row; word += kThreads) {
      table_of_word[word] = search_table(params, word);
    }
    __syncthreads();
  }

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * words_per_thread;
  const int64_t first_row = first / params.words_per_row;
  const uint32_t first_word = first - first_row * params.words_per_row;
  const uint32_t num_words = min(params.num_words - first, static_cast<int64_t>(kThreads) * words_per_thread);

  for (int step = 0; step < words_per_thread; step += kUnroll) {
    int64_t index[kUnroll];
    int64_t row[kUnroll];
    int word[kUnroll];
    int table[kUnroll];
    bool in_range = true;
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const uint32_t offset = (step + k) * kThreads + threadIdx.x;
      const uint32_t local_row = params.words_divisor.quotient(first_word + offset);
      row[k] = first_row + local_row;
      word[k] = first_word + offset - local_row * params.words_per_row;
      table[k] = -1;
      if (offset < num_words) {
        table[k] = look_up ? table_of_word[word[k]] : search_table(params, word[k]);
        index[k] = load_index(params.indices, params.index_type,
                              row[k] * params.index_row_stride + table[k] * params.index_table_stride);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      index[k] = signed_index(index[k], params.index_type);
      in_range = in_range && (table[k] < 0 || is_in_range(index[k], params.source[table[k]].num_embeddings));
    }
    if (!in_range) {
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (table[k] >= 0) check_index(index[k], params.source[table[k]].num_embeddings);
      }
    }
    word_t value[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (table[k] >= 0) {
        const Source& source = params.source[table[k]];
        value[k] = __ldg(reinterpret_cast<const word_t*>(source.weight + index[k] * source.row_bytes) +
                         (word[k] - source.first_word));
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (table[k] >= 0) {
        __stcs(reinterpret_cast<word_t*>(params.output + row[k] * params.output_row_bytes) + word[k], value[k]);
      }
    }
  }
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
    params.source[t] = {static_cast<const char*>(args.weight) + table.weight_offset * scalar,
                        table.weight_stride * scalar, table.num_embeddings, static_cast<int32_t>(words)};
    words += table.embedding_dim * scalar / word;
    if (words > INT32_MAX / 2) return FE_UNSUPPORTED;
  }
  if (words == 0) return FE_OK;
  params.num_tables = num_tables;
  params.index_type = args.index_type;
  params.indices = static_cast<const char*>(args.indices) +
                   first_table * args.index_table_stride * (args.index_type == FE_INT64 ? 8 : 4);
  params.index_row_stride = args.index_row_stride;
  params.index_table_stride = args.index_table_stride;
  params.output = static_cast<char*>(args.output) + first_column * scalar;
  params.output_row_bytes = args.output_stride * scalar;
  params.words_per_row = words;
  params.words_divisor = Divisor(words);
  params.num_words = words * args.num_rows;
  int words_per_thread = 2 * kUnroll;  // more than for one table: a block first lays out the tables
  unsigned blocks = 0;
  const FeStatus status = count_blocks(params.num_words, &words_per_thread, num_sms, &blocks);
  if (status != FE_OK) return status;
  return dispatch_word(word, [&](auto value) {
    gather_tables<decltype(value)><<<blocks, kThreads, 0, stream>>>(params, words_per_thread);
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
