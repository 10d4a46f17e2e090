// SORT: the lookups are sorted by row, and each row's sum is written once, over zeros. Reproducible, one rounding for
// 16-bit types, no atomics. sort_indices.cu sorts, and writes the zeros while its blocks wait for each other;
// sum_sorted.cu sums.
#include <algorithm>

#include "sum_sorted.cuh"

namespace fast_embedding {

FeStatus backward_sort(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                       size_t* workspace_bytes, cudaStream_t stream) {
  const FeBackwardArgs& args = call.args;
  const int64_t num_tables = static_cast<int64_t>(call.tables.size());
  size_t needed = 0;
  for (int64_t first = 0; first < num_tables; first += kMaxSortTables) {
    const int64_t last = std::min<int64_t>(first + kMaxSortTables, num_tables);
    IndexSort sort(plan, call, first, last, device);
    if (workspace != nullptr) sort.place(static_cast<char*>(workspace));
    SortedSums sums(plan, args, device);
    if (!sort.fits() || !sums.fits()) return FE_INVALID_ARGUMENT;
    for (int64_t t = first; t < last; ++t) sums.add(call.tables[t], sort.sorted(t - first));
    needed = std::max(needed, static_cast<size_t>(sort.bytes() + sums.flags_bytes() + sums.partials_bytes()));
    if (workspace == nullptr) continue;
    if (*workspace_bytes < needed) return FE_WORKSPACE_TOO_SMALL;

    char* flags = static_cast<char*>(workspace) + sort.bytes();
    const int64_t zero_bytes = first == 0 ? args.grad_weight_numel * scalar_bytes(args.scalar_type) : 0;
    FeStatus status = sort.enqueue(flags, sums.flags_bytes(), args.grad_weight, zero_bytes, stream);
    if (status == FE_OK) status = sums.enqueue(flags, flags + sums.flags_bytes(), stream);
    if (status != FE_OK) return status;
  }
  if (workspace == nullptr) *workspace_bytes = needed;
  return FE_OK;
}

}  // namespace fast_embedding
