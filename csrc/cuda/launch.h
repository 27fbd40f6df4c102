// What every CUDA op needs of the host: the device and stream of a call, and errors that say where.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <optional>

#include "cuda/table.cuh"
#include "op/numbers.h"

namespace torchao8::cuda {

inline void check_cuda(cudaError_t error, const char* op, int32_t device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next launch would report again
  refuse(op, ": CUDA error on cuda:", device, ": ", cudaGetErrorString(error));
}

// Where a call takes place: where the first tensor of its arguments is.
inline Device device_of(const Argument& a, const TensorView& first) {
  TORCHAO8_CHECK(first.is_cuda(), a.text(),
                 " must be on a GPU, as another argument is; it is on the CPU");
  return {true, first.get_device_index()};
}

// A number on the device of the call, or on the CPU, where it is read now.
inline Scalar scalar_argument(const Argument& a, const std::optional<Tensor>& tensor,
                              double otherwise, const Device& device) {
  if (!tensor) return {nullptr, otherwise, false};
  const TensorView t(*tensor);
  check_number(a, t);
  if (t.is_cpu()) return {nullptr, read_number(t), false};
  check_device(a, t, device);
  return {t.const_data_ptr(), 0, t.scalar_type() == ScalarType::Double};
}

// The numbers of a rule: on the CPU, where they are read now, or on the device of the call.
struct RuleNumbers {
  const double *known, *on_device;  // one of them is null
};
inline RuleNumbers rule_numbers(const Argument& a, const TensorView& t, int count,
                                const Device& device) {
  check_numbers(a, t, count, device);
  const double* data = t.const_data_ptr<double>();
  if (t.is_cpu()) return {data, nullptr};
  check_device(a, t, device);
  return {nullptr, data};
}

// The thread blocks of a kernel that gives a thread to each row.
inline unsigned blocks_of_rows(const char* op, int64_t rows) {
  const int64_t blocks = (rows + kThreads - 1) / kThreads;
  TORCHAO8_CHECK(blocks < int64_t(1) << 31, op, ": more than 2^39 rows");
  return unsigned(blocks);
}

// Makes the device of the call the current one, and launches on its current stream.
class Launcher {
 public:
  Launcher(const char* op, int32_t device) : op_(op), device_(device), guard_(device) {
    void* stream = nullptr;
    TORCHAO8_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, op,
                   ": no current stream on cuda:", device);
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), unsigned blocks, size_t shared_bytes,
              const Arguments&... arguments) const {
    if (blocks == 0) return;
    kernel<<<blocks, kThreads, shared_bytes, stream_>>>(arguments...);
    check_cuda(cudaGetLastError(), op_, device_);
  }

  // For a kernel that shares out units of work evenly, a warp's at a time: as many thread blocks as
  // the device holds at a time, and no more than there is work for.
  template <class... Parameters, class... Arguments>
  void launch_over(uint64_t units, void (*kernel)(Parameters...), size_t shared_bytes,
                   const Arguments&... arguments) const {
    int processors = 0, resident = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, shared_bytes));
    const uint64_t held = uint64_t(processors) * uint64_t(resident);
    const uint64_t wanted = (units + kWarps - 1) / kWarps;
    launch(kernel, unsigned(std::min(wanted, held)), shared_bytes, arguments...);
  }

  cudaStream_t stream() const { return stream_; }

  void check(cudaError_t error) const { check_cuda(error, op_, device_); }

 private:
  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace torchao8::cuda
