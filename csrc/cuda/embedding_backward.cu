// The backward's front door: checks, the plan, and the call of the strategy that it names.
#include "common.cuh"

namespace fast_embedding {
namespace {

FeStatus check_arguments(const FeBackwardArgs* args) {
  if (args == nullptr || args->num_rows < 0 || args->num_tables < 0 || args->grad_weight_numel < 0) {
    return FE_INVALID_ARGUMENT;
  }
  if (args->num_tables > 0 && args->tables == nullptr) return FE_INVALID_ARGUMENT;
  if (args->combination != FE_CONCAT && args->combination != FE_SUM) return FE_INVALID_ARGUMENT;
  for (int64_t t = 0; t < args->num_tables; ++t) {
    const FeTable& table = args->tables[t];
    if (table.num_embeddings < 0 || table.embedding_dim < 0 || table.weight_offset < 0 ||
        table.weight_stride != table.embedding_dim ||
        (args->combination == FE_SUM && table.embedding_dim != args->tables[0].embedding_dim) ||
        table.weight_offset + table.num_embeddings * table.embedding_dim > args->grad_weight_numel) {
      return FE_INVALID_ARGUMENT;
    }
  }
  return FE_OK;
}

// The tables side by side in grad_output, or all in its first columns.
BackwardCall combined(const FeBackwardArgs& args) {
  BackwardCall call{args, {}};
  call.tables.reserve(args.num_tables);
  int64_t first_column = 0;
  for (int64_t t = 0; t < args.num_tables; ++t) {
    call.tables.push_back({args.tables[t], t, first_column});
    if (args.combination == FE_CONCAT) first_column += args.tables[t].embedding_dim;
  }
  return call;
}

FePlanQuery plan_query(const BackwardCall& call, const DeviceInfo& device) {
  const FeBackwardArgs& args = call.args;
  FePlanQuery query{};
  query.scalar_type = args.scalar_type;
  query.num_tables = static_cast<int64_t>(call.tables.size());
  for (const TableSlice& table : call.tables) {
    query.num_embeddings += table.num_embeddings;
    query.embedding_dim += table.embedding_dim;
  }
  query.num_indices = args.num_rows;
  query.grad_weight_numel = args.grad_weight_numel;
  query.deterministic = args.deterministic;
  query.scale_grad_by_freq = args.scale_grad_by_freq;
  query.device = device.properties;
  return query;
}

FeStatus run_by(const FePlan& plan, const BackwardCall& call, const DeviceInfo& device, void* workspace,
                size_t* workspace_bytes, cudaStream_t stream) {
  const bool knows_runs = plan.strategy == FE_STRATEGY_OWN || plan.strategy == FE_STRATEGY_SORT;
  if (call.args.scale_grad_by_freq && !knows_runs) return FE_INVALID_ARGUMENT;
  switch (plan.strategy) {
    case FE_STRATEGY_OWN:
      return backward_own(plan, call, device, workspace, workspace_bytes, stream);
    case FE_STRATEGY_PRIVATE:
      return backward_private(plan, call, device, workspace, workspace_bytes, stream);
    case FE_STRATEGY_TILE:
      return backward_tile(plan, call, device, workspace, workspace_bytes, stream);
    case FE_STRATEGY_SORT:
      return backward_sort(plan, call, device, workspace, workspace_bytes, stream);
  }
  return FE_INVALID_ARGUMENT;
}

// Small tables by PRIVATE, the others by the plan for them. Those go first: they write all of grad_weight, and one
// workspace serves both.
FeStatus run_planned(const BackwardCall& call, const DeviceInfo& device, void* workspace, size_t* workspace_bytes,
                     cudaStream_t stream) {
  std::vector<uint8_t> chosen(call.tables.size());
  FePlan small_plan;
  FeStatus status = fe_plan_private_tables(&call.args, &device.properties, chosen.data(), &small_plan);
  if (status != FE_OK) return status;
  BackwardCall small{call.args, {}};
  BackwardCall others{call.args, {}};
  for (size_t t = 0; t < call.tables.size(); ++t) (chosen[t] ? small : others).tables.push_back(call.tables[t]);

  size_t needed = 0;
  const auto run_part = [&](const FePlan& plan, const BackwardCall& part) {
    size_t bytes = workspace == nullptr ? 0 : *workspace_bytes;
    const FeStatus ran = run_by(plan, part, device, workspace, &bytes, stream);
    needed = std::max(needed, bytes);
    return ran;
  };
  if (!others.tables.empty()) {
    FePlan plan;
    const FePlanQuery query = plan_query(others, device);
    status = fe_plan_embedding_backward(&query, &plan);
    if (status == FE_OK) status = run_part(plan, others);
    small.zeroed = true;
    small.begin = Begin::EARLY;
  }
  if (status == FE_OK && !small.tables.empty()) status = run_part(small_plan, small);
  if (status == FE_OK && workspace == nullptr) *workspace_bytes = needed;
  return status;
}

FeStatus run(const FePlan* given, const FeBackwardArgs* args, void* workspace, size_t* workspace_bytes, void* stream) {
  const FeStatus checked = check_arguments(args);
  if (checked != FE_OK || workspace_bytes == nullptr) return FE_INVALID_ARGUMENT;
  const DeviceInfo* device = nullptr;
  FeStatus status = device_info(&device);
  if (status != FE_OK) return status;
  if (!device->cooperative) return FE_UNSUPPORTED;

  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  const bool no_lookups = args->num_rows == 0 || args->num_tables == 0;
  if (args->grad_weight_numel == 0 || no_lookups) {
    *workspace_bytes = 0;
    if (workspace == nullptr || args->grad_weight_numel == 0) return FE_OK;
    const size_t bytes = args->grad_weight_numel * scalar_bytes(args->scalar_type);
    return check_cuda(cudaMemsetAsync(args->grad_weight, 0, bytes, cuda_stream), "embedding_backward");
  }

  const BackwardCall call = combined(*args);
  if (given != nullptr) {
    FePlan planned;  // what no plan can do
    const FePlanQuery query = plan_query(call, *device);
    status = fe_plan_embedding_backward(&query, &planned);
    if (status != FE_OK) return status;
    return run_by(*given, call, *device, workspace, workspace_bytes, cuda_stream);
  }
  return run_planned(call, *device, workspace, workspace_bytes, cuda_stream);
}

}  // namespace
}  // namespace fast_embedding

extern "C" {

FeStatus fe_cuda_embedding_backward(const FeBackwardArgs* args, void* workspace, size_t* workspace_bytes,
                                    void* stream) {
  return fast_embedding::run(nullptr, args, workspace, workspace_bytes, stream);
}

FeStatus fe_cuda_embedding_backward_by(const FePlan* plan, const FeBackwardArgs* args, void* workspace,
                                       size_t* workspace_bytes, void* stream) {
  if (plan == nullptr) return FE_INVALID_ARGUMENT;
  return fast_embedding::run(plan, args, workspace, workspace_bytes, stream);
}

}  // extern "C"
