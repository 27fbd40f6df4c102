// Paged state on CUDA: managed memory, and its way back to the GPU ahead of a kernel.
//
// Why managed memory: a kernel reads and writes it as any other, so that there is one step for
// paged state and for all other, and while the GPU has room nothing moves at all. Pinned host
// memory would be copied both ways at every step, whether memory is short or not. A captured graph
// would keep the addresses of copy buffers that a changed optimizer frees.
#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>

#include "cuda/launch.h"
#include "op/boxed.h"

namespace torchao8::cuda {
namespace {

constexpr const char* kAllocate = "allocate_managed";
constexpr const char* kFree = "free_managed";
constexpr const char* kPrefetch = "prefetch_pages_";

int attribute(const char* op, cudaDeviceAttr name, int32_t device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), op, device);
  return value;
}

int64_t allocate_managed_cuda(Tensor like, int64_t size) {
  const int32_t device = like.get_device_index();
  TORCHAO8_CHECK(size > 0, kAllocate, ": size must be above 0, got ", size);
  TORCHAO8_CHECK(
      attribute(kAllocate, cudaDevAttrConcurrentManagedAccess, device), kAllocate,
      ": cuda:", device,
      " cannot page (concurrentManagedAccess is 0, as under Windows), so that paged state "
      "would not leave it; use is_paged=False");
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* memory = nullptr;
  const cudaError_t error = cudaMallocManaged(&memory, size_t(size), cudaMemAttachGlobal);
  if (error != cudaSuccess)
    cudaGetLastError();  // clears the error, which the next launch would report again
  TORCHAO8_CHECK(error == cudaSuccess, kAllocate, ": no ", size,
                 " bytes of managed memory for paged state on cuda:", device, ": ",
                 cudaGetErrorString(error));
  return int64_t(reinterpret_cast<uintptr_t>(memory));
}

// The GPU may still be at work on it, on whatever stream.
void free_managed_cuda(Tensor like, int64_t address) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(cudaDeviceSynchronize(), kFree, device);
  check_cuda(cudaFree(reinterpret_cast<void*>(uintptr_t(address))), kFree, device);
}

// What brings pages to one GPU. They live as long as the process.
struct Carrier {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, done = nullptr;
  bool is_under_way = false;
};

Carrier& carrier_of(int32_t device) {
  static std::map<int32_t, Carrier> carriers;
  Carrier& c = carriers[device];
  if (c.done != nullptr) return c;
  const auto check = [&](cudaError_t error) { check_cuda(error, kPrefetch, device); };
  if (c.stream == nullptr) check(cudaStreamCreateWithFlags(&c.stream, cudaStreamNonBlocking));
  if (c.begin == nullptr) check(cudaEventCreateWithFlags(&c.begin, cudaEventDisableTiming));
  check(cudaEventCreateWithFlags(&c.done, cudaEventDisableTiming));
  return c;
}

cudaError_t prefetch(const void* data, size_t bytes, int32_t device, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  cudaMemLocation where = {};
  where.type = cudaMemLocationTypeDevice;
  where.id = device;
  return cudaMemPrefetchAsync(data, bytes, where, 0, stream);
#else
  return cudaMemPrefetchAsync(data, bytes, device, stream);
#endif
}

bool is_managed(const void* data, int32_t device) {
  cudaPointerAttributes attributes = {};
  check_cuda(cudaPointerGetAttributes(&attributes, data), kPrefetch, device);
  return attributes.type == cudaMemoryTypeManaged;
}

void prefetch_pages_cuda(const TensorList& pages, const Tensor& now) {
  const Device where = device_of({kPrefetch, "now"}, now);
  for (size_t i = 0; i < pages.size(); i++) {
    const Argument a = {kPrefetch, "pages", int64_t(i)};
    check_device(a, pages[i], where);
    check_contiguous(a, pages[i]);
  }
  const int32_t device = where.index;
  const Launcher launcher(kPrefetch, device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  launcher.check(cudaStreamIsCapturing(launcher.stream(), &status));
  // A graph cannot hold a prefetch. Its kernels fetch what they touch, which is right, and slower.
  if (status != cudaStreamCaptureStatusNone) return;

  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Carrier& c = carrier_of(device);
  if (c.is_under_way) launcher.check(cudaStreamWaitEvent(launcher.stream(), c.done, 0));
  c.is_under_way = false;
  if (pages.empty()) return;
  // Not before what is queued by now is done: else all pages would come at once, and push out
  // those that are wanted first.
  launcher.check(cudaEventRecord(c.begin, launcher.stream()));
  launcher.check(cudaStreamWaitEvent(c.stream, c.begin, 0));
  for (const TensorView& t : pages) {
    const void* data = t.const_data_ptr();
    const size_t bytes = size_t(t.numel()) * t.element_size();
    if (bytes > 0 && is_managed(data, device))
      launcher.check(prefetch(data, bytes, device, c.stream));
  }
  launcher.check(cudaEventRecord(c.done, c.stream));
  c.is_under_way = true;
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("allocate_managed", TORCH_BOX(&torchao8::cuda::allocate_managed_cuda));
  m.impl("free_managed", TORCH_BOX(&torchao8::cuda::free_managed_cuda));
  m.impl("prefetch_pages_", torchao8::boxed<torchao8::cuda::prefetch_pages_cuda>);
}
