// The ops sum_squares and norms on CUDA.
#include "cuda/sums.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/launch.h"
#include "op/boxed.h"
#include "op/sums_call.h"

namespace torchao8::cuda {
namespace {

Tensor sum_squares_cuda(const TensorList& tensors) {
  TORCHAO8_CHECK(!tensors.empty(), kSumOp, ": tensors must not be empty");
  const Device device = device_of({kSumOp, "tensors", 0}, tensors[0]);
  std::vector<SumEntry> entries;
  for (size_t i = 0; i < tensors.size(); i++) {
    SumEntry entry = {nullptr, tensors[i].numel(), int64_t(i), 0,
                      check_summand(tensors, i, device)};
    TORCHAO8_CHECK(entry.units() < kMostUnits, kSumOp, ": tensors[", i,
                   "] has more than 2^41 elements");
    entries.push_back(entry);
  }
  const Launcher launcher(kSumOp, device.index);
  Tensor sums = new_sums(tensors);
  const auto launch = [&](const SumTable& table) {
    launcher.launch_over(table.units, sum_squares, sizeof(BlockSum), table);
  };
  SumFiller<decltype(launch)> filler(sums.mutable_data_ptr<int64_t>(), launch);
  std::vector<Tensor> copies;  // kept until the launches that read them
  for (size_t i = 0; i < tensors.size(); i++) {
    if (entries[i].count == 0) continue;
    const bool packed = is_packed(tensors[i]);
    if (!packed) copies.push_back(torch::stable::contiguous(tensors[i].tensor()));
    entries[i].data = packed ? tensors[i].const_data_ptr() : copies.back().const_data_ptr();
    filler.add(entries[i]);
  }
  filler.flush();
  const int64_t rows = int64_t(tensors.size());
  launcher.launch(canonicalize<int64_t>, blocks_of_rows(kSumOp, rows), 0,
                  sums.mutable_data_ptr<int64_t>(), rows);
  return sums;
}

Tensor norms_cuda(Tensor sums) {
  const Device device = device_of({kNormOp, "sums"}, sums);
  const int64_t rows = check_norms(sums);
  const Launcher launcher(kNormOp, device.index);
  const Tensor dense = torch::stable::contiguous(sums);
  Tensor norms = new_norms(sums);
  launcher.launch(round_norms, blocks_of_rows(kNormOp, rows), 0, dense.const_data_ptr<int64_t>(),
                  norms.mutable_data_ptr<double>(), rows);
  return norms;
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("sum_squares", torchao8::boxed<torchao8::cuda::sum_squares_cuda>);
  m.impl("norms", TORCH_BOX(&torchao8::cuda::norms_cuda));
}
