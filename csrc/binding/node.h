// Nodes of the autograd graph, built by hand where nothing records the call.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/version.h>

#include <memory>

namespace fast_embedding {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR <= 15
/// Function::apply(weight, indices, options...) where nothing records the call: the same node for the same backward.
/// Without what serves any Function's outputs (views, inputs returned, tensors changed in place) a small lookup takes
/// 0.4 us of 3.7 less. Function::backward() must take an undefined gradient.
template <typename Function, typename... Options>
at::Tensor apply_untraced(const at::Tensor& weight, const at::Tensor& indices, const Options&... options) {
  using Node = torch::autograd::CppNode<Function>;
#if TORCH_VERSION_MINOR >= 13
  const auto node = c10::make_intrusive<Node>();
#else
  const std::shared_ptr<Node> node(new Node, torch::autograd::deleteNode);
#endif
  node->is_variable_input_ = {true, true, (static_cast<void>(options), false)...};
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(weight, indices));
  node->ctx_.set_materialize_grads(false);  // no output_info_, then
  at::Tensor output;
  {
    const torch::autograd::AutoGradMode no_grad(false);
    output = Function::forward(&node->ctx_, weight, indices, options...);
  }
  torch::autograd::set_history(output, node);
  node->save_variables_to_ctx();
  return output;
}
#else  // a torch whose nodes may be built otherwise
template <typename Function, typename... Options>
at::Tensor apply_untraced(const at::Tensor& weight, const at::Tensor& indices, const Options&... options) {
  return Function::apply(weight, indices, options...);
}
#endif

}  // namespace fast_embedding
