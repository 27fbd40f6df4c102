// The ops sum_squares and norms on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "cpu/engine.h"
#include "cpu/memory.h"
#include "op/boxed.h"
#include "op/sums_call.h"

namespace torchao8 {
namespace {

constexpr int64_t kGrainElements = 32768;  // fewer are not worth a thread
constexpr int64_t kWidened = 4096;         // elements that are widened to float32 at a time

struct Summand {
  FloatArray values;
  int64_t count, first;  // first: elements of the tensors before it
  int64_t row;
};

void add_elements(const FloatArray& values, int64_t begin, int64_t end, SquareSum& sum) {
  AddSquares* const add_squares = add_squares_kernel();
  if (values.dense() && values.type() == FloatType::kFloat32)
    return add_squares(reinterpret_cast<const float*>(values.at(begin)), end - begin, sum);
  const ConvertKernels& convert = convert_kernels();
  alignas(64) float widened[kWidened];
  for (; begin < end; begin += kWidened) {
    const int64_t count = std::min(kWidened, end - begin);
    values.read(convert, begin, count, widened);
    add_squares(widened, count, sum);
  }
}

Tensor sum_squares_cpu(const TensorList& tensors) {
  TORCHAO8_CHECK(!tensors.empty(), kSumOp, ": tensors must not be empty");
  std::vector<Summand> summands;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors.size(); i++) {
    const TensorView& t = tensors[i];
    const FloatType type = check_summand(tensors, i, kCpu);
    if (t.numel() == 0) continue;
    const void* data = t.const_data_ptr();
    summands.push_back({is_packed(t) ? FloatArray(type, data) : FloatArray(t, type, data),
                        t.numel(), elements, int64_t(i)});
    elements += t.numel();
  }
  Tensor sums = new_sums(tensors);
  int64_t* const limbs = sums.mutable_data_ptr<int64_t>();
  std::mutex adding;
  torch::stable::parallel_for(0, elements, kGrainElements, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint guard;
    const auto after = [](int64_t element, const Summand& s) { return element < s.first; };
    auto s = std::upper_bound(summands.begin(), summands.end(), begin, after) - 1;
    SquareSum sum;
    for (; s != summands.end() && s->first < end; ++s) {
      add_elements(s->values, std::max(begin, s->first) - s->first,
                   std::min(end - s->first, s->count), sum);
      sum.finish();
      const std::lock_guard<std::mutex> lock(adding);
      for (int k = 0; k < kLimbs; k++) limbs[s->row * kLimbs + k] += sum.limbs[k];
      std::fill_n(sum.limbs, kLimbs, 0);
    }
  });
  for (size_t i = 0; i < tensors.size(); i++) make_canonical(limbs + int64_t(i) * kLimbs);
  return sums;
}

Tensor norms_cpu(Tensor sums) {
  check_device({kNormOp, "sums"}, sums, kCpu);
  const int64_t rows = check_norms(sums);
  const Tensor dense = torch::stable::contiguous(sums);
  Tensor norms = new_norms(sums);
  const int64_t* limbs = dense.const_data_ptr<int64_t>();
  double* norm = norms.mutable_data_ptr<double>();
  for (int64_t i = 0; i < rows; i++) norm[i] = std::sqrt(round_sum(limbs + i * kLimbs));
  return norms;
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("sum_squares", torchao8::boxed<torchao8::sum_squares_cpu>);
  m.impl("norms", TORCH_BOX(&torchao8::norms_cpu));
}
