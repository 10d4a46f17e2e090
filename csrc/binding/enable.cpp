// enable(): aten::embedding and aten::embedding_dense_backward themselves on our kernels, while someone wants it.
//
// Both operators' CPU and CUDA kernels are replaced at the first enable(), once and for ever: a kernel cannot be taken
// away while other threads call it. From then on an atomic count decides each call. Autograd keys stay as they are, for
// torch.compile's caches on disk know torch's version, not who overrode its derivatives.
#include <ATen/ops/embedding_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/embedding_dense_backward_cpu_dispatch.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "embedding.h"
#include "launch.h"
#include "library.h"

namespace fast_embedding {
namespace {

using at::Tensor;
using DenseBackward = Tensor (*)(const Tensor&, const Tensor&, int64_t, int64_t, bool);

std::atomic<int64_t> enabled_count{0};
// at::cuda::embedding_dense_backward; set before it can be called.
DenseBackward aten_cuda_backward = nullptr;

bool is_enabled() { return enabled_count.load(std::memory_order_relaxed) > 0; }

/// True where the kernels take the indices as they are; for all else ATen has its own answer or its own error.
bool has_plain_indices(const Tensor& indices, const Tensor& other) {
  return (indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt) &&
         indices.device() == other.device();
}

// The signatures are those of the kernels replaced, SymInt where theirs is: the dispatcher keeps the two kinds in
// different members, and another thread's call must find one of them during the replacement.

Tensor embedding(const Tensor& weight, const Tensor& indices, c10::SymInt padding_idx, bool scale_grad_by_freq,
                 bool sparse) {
  if (is_enabled() && weight.dim() == 2 && has_plain_indices(indices, weight)) {
    Tensor output = lookup(weight, indices);
    if (output.defined()) {
      return output;
    }
  }
  return at::compositeexplicitautograd::embedding_symint(weight, indices, std::move(padding_idx), scale_grad_by_freq,
                                                         sparse);
}

Tensor embedding_dense_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_weights,
                                int64_t padding_idx, bool scale_grad_by_freq) {
  if (is_enabled() && num_weights >= 0 && has_plain_indices(indices, grad_output) &&
      grad_output.dim() == indices.dim() + 1 && grad_output.sizes().slice(0, indices.dim()) == indices.sizes()) {
    // ATen lets any number be padding_idx; one that is no row is never met.
    const bool has_padding = padding_idx >= 0 && padding_idx < num_weights;
    Tensor grad_weight =
        lookup_backward(grad_output, indices, num_weights, has_padding ? padding_idx : -1, scale_grad_by_freq);
    if (grad_weight.defined()) {
      return grad_weight;
    }
  }
  const DenseBackward aten = grad_output.is_cuda() ? aten_cuda_backward : at::cpu::embedding_dense_backward;
  return aten(grad_output, indices, num_weights, padding_idx, scale_grad_by_freq);
}

/// By name, because this file is compiled without CUDA and one binding serves torch with and without it.
DenseBackward find_aten_cuda_backward() {
  constexpr const char* kName = "_ZN2at4cuda24embedding_dense_backwardERKNS_6TensorES3_llb";
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* address = library == nullptr ? nullptr : dlsym(library, kName);
  if (address == nullptr) {
    throw std::runtime_error(c10::str("libtorch_cuda.so lacks at::cuda::embedding_dense_backward: ", dlerror()));
  }
  return reinterpret_cast<DenseBackward>(address);
}

/// "Overriding a previously registered kernel" is what this file is for.
struct Silence : c10::WarningHandler {
  void process(const c10::Warning& /*warning*/) override {}
};

void replace_kernels(c10::DispatchKey key) {
  // Never destroyed: its destructor would take the kernels away.
  auto* library = new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  library->impl("embedding", TORCH_FN(embedding));
  library->impl("embedding_dense_backward", TORCH_FN(embedding_dense_backward));
}

void enable(bool with_cuda) {
  static std::mutex mutex;
  static bool replaced = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!replaced) {
    if (with_cuda) {
      aten_cuda_backward = find_aten_cuda_backward();
    }
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    replace_kernels(c10::DispatchKey::CPU);
    if (with_cuda) {
      replace_kernels(c10::DispatchKey::CUDA);
    }
    replaced = true;
  }
  ++enabled_count;
}

}  // namespace
}  // namespace fast_embedding

const char* fe_binding_enable(int32_t with_cuda) {
  thread_local std::string message;
  try {
    fast_embedding::enable(with_cuda != 0);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void fe_binding_disable() { --fast_embedding::enabled_count; }
