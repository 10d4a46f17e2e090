// What both forms of PRIVATE share: tables side by side, and tables whose embeddings were added.
#pragma once

#include "common.cuh"

namespace fast_embedding {

// For tables of a sum.
FeStatus backward_private_sum(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                              size_t* workspace_bytes, cudaStream_t stream);

// The elements of grad_weight behind each table that are no table's, to be zeroed by the kernel that writes the table.
// Empty where that does not do: a gap is large, in front, or behind a table without elements, or tables do not ascend.
inline std::vector<int32_t> find_gaps(const BackwardCall& call) {
  constexpr int64_t kMaxGap = 64;
  std::vector<int32_t> gaps;
  if (call.tables.empty() || call.tables[0].weight_offset > 0) return {};
  for (size_t t = 0; t < call.tables.size(); ++t) {
    const TableSlice& table = call.tables[t];
    const int64_t numel = table.num_embeddings * table.embedding_dim;
    const int64_t end = table.weight_offset + numel;
    const int64_t next = t + 1 < call.tables.size() ? call.tables[t + 1].weight_offset : call.args.grad_weight_numel;
    if (next < end || next - end > (numel > 0 ? kMaxGap : 0)) return {};
    gaps.push_back(static_cast<int32_t>(next - end));
  }
  return gaps;
}

}  // namespace fast_embedding
