// What the two forwards, of a concatenation and of a sum, share on the host.
#pragma once

#include "common.cuh"

namespace fast_embedding {

// The widest word that divides every address and row of the tables [first_table, first_table + num_tables) and of their
// columns of the output: 16, 8, 4 or 2 bytes, and at least an element.
inline int word_bytes(const FeForwardArgs& args, int64_t first_table, int64_t num_tables, int64_t first_column) {
  const int64_t scalar = scalar_bytes(args.scalar_type);
  uint64_t bits = (reinterpret_cast<uintptr_t>(args.output) + first_column * scalar) | args.output_stride * scalar;
  for (int64_t t = first_table; t < first_table + num_tables; ++t) {
    const FeTable& table = args.tables[t];
    bits |= reinterpret_cast<uintptr_t>(args.weight) + table.weight_offset * scalar;
    bits |= table.weight_stride * scalar | table.embedding_dim * scalar;
  }
  for (int bytes = 16; bytes > 2; bytes /= 2) {
    if (bits % bytes == 0) return bytes;
  }
  return 2;
}

// Which words and rows a block of several tables' output takes: whole rows where they are short, else a chunk of the
// words of each, and more of them where that leaves no SM idle. Fills fields of these names, in each kernel's own
// order.

// For blocks of up to max_threads threads, a thread a word, that hold up to max_rows rows.
template <typename Params>
void split_row(int64_t words, int64_t max_threads, int64_t max_rows, Params* params) {
  params->chunks = static_cast<int32_t>(ceil_div(words, max_threads));
  params->words_of_row = static_cast<int32_t>(words);
  params->words_of_chunk = static_cast<int32_t>(ceil_div(words, params->chunks));
  params->rows_of_step = static_cast<uint32_t>(std::min(max_threads / params->words_of_chunk, max_rows));
  params->chunks_divisor = Divisor(params->chunks);
  params->words_divisor = Divisor(params->words_of_chunk);
}

// How many words each thread of a device full of them would write.
inline int64_t words_of_thread(int64_t words_of_row, int64_t num_rows, int num_sms) {
  constexpr int64_t kThreadsOfSm = 2048;
  return words_of_row * num_rows / (num_sms * kThreadsOfSm);
}

template <typename Params>
FeStatus split_rows(int64_t rows_of_thread, Params* params, unsigned* threads, unsigned* blocks) {
  params->rows_of_block = static_cast<int32_t>(params->rows_of_step * rows_of_thread);
  const int64_t count = ceil_div(params->num_rows, params->rows_of_block) * params->chunks;
  if (count > INT32_MAX) return FE_UNSUPPORTED;
  *threads = static_cast<unsigned>(round_up(int64_t{params->rows_of_step} * params->words_of_chunk, 32));
  *blocks = static_cast<unsigned>(count);
  return FE_OK;
}

// The forward of a sum of two tables or more; embedding_forward.cu has checked the arguments.
FeStatus sum_forward(const FeForwardArgs& args, void* workspace, size_t* workspace_bytes, cudaStream_t stream);

}  // namespace fast_embedding
