#include "dispatch.h"

#include <ATen/FuncTorchTLS.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "launch.h"

namespace fast_embedding {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

/// True where a kernel may read the tensor's memory: dense, on the CPU or a GPU, and nothing wrapped around it.
bool is_plain(const Tensor& tensor) {
  constexpr DispatchKeySet wrapped({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchBatched,
                                    DispatchKey::FuncTorchGradWrapper, DispatchKey::ZeroTensor, DispatchKey::Conjugate,
                                    DispatchKey::Negative});
  const DispatchKeySet keys = tensor.key_set();
  return (keys.has(DispatchKey::CPU) || keys.has(DispatchKey::CUDA)) && !keys.has_any(wrapped);
}

bool is_transformed(const Tensor& tensor) {
  if (tensor._fw_grad(/*level=*/0).defined()) {
    return true;
  }
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms == nullptr) {
    return false;
  }
  try {
    // Throws exactly while a transform is active. The header that would say so does not compile from torch's wheels.
    transforms->checkSupportsCppAutogradFunction();
    return false;
  } catch (const c10::Error&) {
    return true;
  }
}

}  // namespace

bool is_left_to_aten(const Tensor& tensor) {
  const bool has_kernels = tensor.is_cpu() || tensor.is_cuda() || tensor.is_meta();  // meta: traced
  return !has_kernels || !scalar_type(tensor.scalar_type()) || is_transformed(tensor);
}

bool is_traced(const Tensor& first, const Tensor& second) {
  constexpr DispatchKeySet recorders({DispatchKey::Python, DispatchKey::Functionalize});
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_local_dispatch_key_set().included_.has_any(recorders) || !is_plain(first) || !is_plain(second);
}

bool needs_graph(const Tensor& tensor) { return c10::GradMode::is_enabled() && tensor.requires_grad(); }

}  // namespace fast_embedding
