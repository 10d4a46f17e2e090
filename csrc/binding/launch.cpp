#include "launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/version.h>

#include <string>

#include "library.h"

namespace fast_embedding {
namespace {

using at::Tensor;

// What the contract promises the kernels. ATen's CPU allocator aligns to 64 bytes only.
constexpr size_t kWorkspaceAlignment = 256;

/// The torch.* name of a type, for messages. ATen's own names ("Float") are not what a Python user wrote.
std::string type_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    case at::kShort:
      return "torch.int16";
    case at::kChar:
      return "torch.int8";
    case at::kByte:
      return "torch.uint8";
    case at::kBool:
      return "torch.bool";
    default:
      return c10::toString(type);
  }
}

/// The one stride of a row-major walk over these dimensions, `trivial` if there is at most one step to walk; nullopt
/// where no single stride does it.
std::optional<int64_t> walk_stride(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t trivial) {
  std::optional<int64_t> stride;  // of the innermost dimension that has more than one entry
  int64_t expected = 0;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    if (sizes[dim] == 0) {
      return trivial;
    }
    if (sizes[dim] == 1) {
      continue;
    }
    if (!stride) {
      stride = strides[dim];
    } else if (strides[dim] != expected) {
      return std::nullopt;
    }
    expected = strides[dim] * sizes[dim];
  }
  return stride.value_or(trivial);
}

void parallel_for(int64_t begin, int64_t end, int64_t grain_size, FeTask task, void* closure) {
  at::parallel_for(begin, end, grain_size, [&](int64_t first, int64_t last) { task(first, last, closure); });
}

/// "indices[3, 1] = 7 is out of range for table 1 of 5 rows"; a 0-d tensor needs no position.
std::string describe(const FeIndexError& error, int64_t num_tables, at::IntArrayRef sizes) {
  int64_t position = error.row * num_tables + error.table;
  std::string coordinates;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    coordinates = c10::str(position % sizes[dim], coordinates.empty() ? "" : ", ", coordinates);
    position /= sizes[dim];
  }
  return c10::str("indices", sizes.empty() ? "" : c10::str("[", coordinates, "]"), " = ", error.index,
                  " is out of range for ",
                  num_tables > 1 ? c10::str("table ", error.table) : std::string("an embedding"), " of ",
                  error.num_embeddings, " rows");
}

/// The cudaStream_t of the device's current stream.
void* current_stream(c10::Device device) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  return stream.native_handle();
#else
  // c10::cuda::CUDAStream::stream(), by name because this file knows no CUDA header: a CUDAStream is one c10::Stream.
  using StreamMethod = void* (*)(const c10::Stream*);
  static const auto method = [] {
    void* library = dlopen("libc10_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    TORCH_CHECK(library != nullptr, "fast_embedding: libc10_cuda.so is not loaded, but a CUDA tensor came");
    void* address = dlsym(library, "_ZNK3c104cuda10CUDAStream6streamEv");
    TORCH_CHECK(address != nullptr, "fast_embedding: libc10_cuda.so lacks c10::cuda::CUDAStream::stream()");
    return reinterpret_cast<StreamMethod>(address);
  }();
  return method(&stream);
#endif
}

/// Memory for one call of a kernel, given back to the allocator (and so to the stream's later work) afterwards.
class Workspace {
 public:
  Workspace(size_t bytes, const Tensor& like) : bytes_(bytes) {
    if (bytes > 0) {
      const auto padded = static_cast<int64_t>(bytes + kWorkspaceAlignment - 1);
      storage_ = at::empty({padded}, like.options().dtype(at::kByte));
      const auto address = reinterpret_cast<uintptr_t>(storage_.mutable_data_ptr());
      data_ = reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) & ~(kWorkspaceAlignment - 1));
    }
  }
  void* data() const { return data_; }
  size_t* bytes() { return &bytes_; }

 private:
  size_t bytes_;
  Tensor storage_;
  void* data_ = &bytes_;  // never null: that would be a size query
};

/// Threads and errors of one call of the CPU's kernels.
class CpuCall {
 public:
  const FeCpuContext* context() const { return &context_; }

  /// False where the kernel refuses the sizes.
  bool check(FeStatus status, int64_t num_tables, const Tensor& indices) const {
    TORCH_CHECK_INDEX(status != FE_INDEX_OUT_OF_RANGE, describe(error_, num_tables, indices.sizes()));
    TORCH_CHECK(status == FE_OK || status == FE_UNSUPPORTED, "fast_embedding: the CPU kernel failed, status ",
                static_cast<int>(status));
    return status == FE_OK;
  }

 private:
  FeIndexError error_{};
  const FeCpuContext context_{parallel_for, at::in_parallel_region() ? 1 : at::get_num_threads(), &error_};
};

template <typename Args>
bool run_cpu(FeStatus (*kernel)(const Args*, void*, size_t*, const FeCpuContext*), const Args& args, const Tensor& like,
             const Tensor& indices) {
  CpuCall call;
  size_t bytes = 0;
  FeStatus status = kernel(&args, nullptr, &bytes, call.context());
  if (status == FE_OK) {
    Workspace workspace(bytes, like);
    status = kernel(&args, workspace.data(), workspace.bytes(), call.context());
  }
  return call.check(status, args.num_tables, indices);
}

bool check_cuda(FeStatus status, const CudaKernels& kernels) {
  TORCH_CHECK(status != FE_CUDA_ERROR, "fast_embedding: CUDA error: ", kernels.last_error());
  TORCH_CHECK(status == FE_OK || status == FE_UNSUPPORTED, "fast_embedding: the CUDA kernel failed, status ",
              static_cast<int>(status));
  return status == FE_OK;
}

template <typename Args>
bool run_cuda(FeStatus (*kernel)(const Args*, void*, size_t*, void*), const CudaKernels& kernels, const Args& args,
              const Tensor& like) {
  const c10::DeviceGuard guard(like.device());
  void* stream = current_stream(like.device());
  size_t bytes = 0;
  if (!check_cuda(kernel(&args, nullptr, &bytes, stream), kernels)) {
    return false;
  }
  Workspace workspace(bytes, like);
  return check_cuda(kernel(&args, workspace.data(), workspace.bytes(), stream), kernels);
}

/// Memory for the rows counted. The arguments point to the values.
SparseRows make_sparse_rows(FeBackwardArgs& args, int64_t count, const Tensor& like) {
  const int64_t embedding_dim = args.tables[0].embedding_dim;
  SparseRows made{at::empty({1, count}, like.options().dtype(at::kLong)),
                  at::empty({count, embedding_dim}, like.options())};
  args.grad_weight = made.values.mutable_data_ptr();
  args.grad_weight_numel = count * embedding_dim;
  return made;
}

}  // namespace

std::optional<FeScalarType> scalar_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return FE_FLOAT32;
    case at::kDouble:
      return FE_FLOAT64;
    case at::kHalf:
      return FE_FLOAT16;
    case at::kBFloat16:
      return FE_BFLOAT16;
    default:
      return std::nullopt;
  }
}

void check_indices(const Tensor& indices, const Tensor& other, const char* other_name) {
  TORCH_CHECK(indices.scalar_type() == at::kInt || indices.scalar_type() == at::kLong,
              "indices must be int32 or int64, got ", type_name(indices.scalar_type()));
  TORCH_CHECK(indices.device() == other.device(), "indices must be on the device of ", other_name, ", ", other.device(),
              ", got ", indices.device());
}

Rows as_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const size_t walked = sizes.size() - 1;
  const auto stride = walk_stride(sizes.slice(0, walked), strides.slice(0, walked), /*trivial=*/sizes.back());
  const bool contiguous_rows = sizes.back() <= 1 || strides.back() == 1;
  if (stride && contiguous_rows) {
    return {tensor, *stride};
  }
  if (stride && *stride == 0 && tensor.numel() > 0) {
    // The gradient of a sum: one row seen everywhere. Copying that row does.
    Tensor row = tensor;
    while (row.dim() > 1) {
      row = row.select(0, 0);
    }
    return {row.contiguous(), 0};
  }
  return {tensor.contiguous(), sizes.back()};
}

IndexRows as_index_rows(const Tensor& indices, bool last_is_table) {
  Tensor storage = indices;
  const size_t walked = indices.dim() - (last_is_table ? 1 : 0);
  const int64_t packed = last_is_table ? indices.size(-1) : 1;
  auto stride = walk_stride(storage.sizes().slice(0, walked), storage.strides().slice(0, walked), packed);
  if (!stride) {
    storage = indices.contiguous();
    stride = packed;
  }
  int64_t num_rows = 1;
  for (size_t dim = 0; dim < walked; ++dim) {
    num_rows *= storage.size(static_cast<int64_t>(dim));
  }
  const FeIndexType type = storage.scalar_type() == at::kInt ? FE_INT32 : FE_INT64;
  const int64_t table_stride = last_is_table ? storage.stride(-1) : 0;
  return {std::move(storage), type, num_rows, *stride, table_stride};
}

bool run_forward(const FeForwardArgs& args, const Tensor& like, const Tensor& indices) {
  if (like.is_cpu()) {
    return run_cpu(cpu_kernels().forward, args, like, indices);
  }
  const CudaKernels& kernels = cuda_kernels();
  return run_cuda(kernels.forward, kernels, args, like);
}

bool run_backward(const FeBackwardArgs& args, const Tensor& like, const Tensor& indices) {
  if (like.is_cpu()) {
    return run_cpu(cpu_kernels().backward, args, like, indices);
  }
  const CudaKernels& kernels = cuda_kernels();
  return run_cuda(kernels.backward, kernels, args, like);
}

std::optional<SparseRows> run_sparse_backward(FeBackwardArgs args, const Tensor& like, const Tensor& indices) {
  size_t bytes = 0;
  if (like.is_cpu()) {
    const CpuKernels& kernels = cpu_kernels();
    CpuCall call;
    if (!call.check(kernels.sparse_count(&args, nullptr, nullptr, &bytes, call.context()), 1, indices)) {
      return std::nullopt;
    }
    Workspace workspace(bytes, like);
    int64_t count = 0;
    call.check(kernels.sparse_count(&args, &count, workspace.data(), workspace.bytes(), call.context()), 1, indices);
    SparseRows made = make_sparse_rows(args, count, like);
    call.check(kernels.sparse_backward(&args, count, made.rows.mutable_data_ptr<int64_t>(), workspace.data(),
                                       workspace.bytes(), call.context()),
               1, indices);
    return made;
  }
  const CudaKernels& kernels = cuda_kernels();
  const c10::DeviceGuard guard(like.device());
  void* stream = current_stream(like.device());
  if (!check_cuda(kernels.sparse_count(nullptr, &args, nullptr, nullptr, &bytes, stream), kernels)) {
    return std::nullopt;
  }
  Workspace workspace(bytes, like);
  const Tensor count = at::empty({1}, like.options().dtype(at::kLong));
  check_cuda(kernels.sparse_count(nullptr, &args, count.mutable_data_ptr<int64_t>(), workspace.data(),
                                  workspace.bytes(), stream),
             kernels);
  const int64_t num_rows = count.item<int64_t>();
  SparseRows made = make_sparse_rows(args, num_rows, like);
  const FeStatus status = kernels.sparse_backward(nullptr, &args, num_rows, made.rows.mutable_data_ptr<int64_t>(),
                                                  workspace.data(), workspace.bytes(), stream);
  return check_cuda(status, kernels) ? std::make_optional(std::move(made)) : std::nullopt;
}

}  // namespace fast_embedding
