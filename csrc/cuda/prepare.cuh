// The first launch of a step: turns each tensor's step, and the numbers that all share, into its
// rule, and counts the step. One thread a tensor.
#pragma once

#include "cuda/step.cuh"

namespace torchao8::cuda {

// A number that lies on the device, or is known to the host.
struct Scalar {
  const void* place;  // null: value
  double value;
  bool is_double;
  TORCHAO8_HD double get() const {
    if (!place) return value;
    return is_double ? *static_cast<const double*>(place)
                     : double(*static_cast<const float*>(place));
  }
};

struct StepTable {
  static constexpr int kCapacity = 3968;
  float* steps[kCapacity];
  uint32_t count;
  uint32_t first;  // number of the first one in the call
};

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    prepare(const __grid_constant__ StepTable table, typename Rule::Options options,
            const Scalar lr, const Scalar grad_scale, const Scalar found_inf, uint64_t seed,
            bool scaled_state, Prepared<Rule>* out) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.count) return;
  Prepared<Rule>& mine = out[table.first + i];
  mine.skip = found_inf.get() != 0;
  if (mine.skip) return;
  options.lr = lr.get();
  options.grad_scale = grad_scale.get();
  const int64_t step = int64_t(*table.steps[i]) + 1;
  mine.rule = Rule::at_step(options, step, scaled_state);
  for (int s = 0; s < kMaxStates; s++) mine.keys[s] = random_key(seed, uint64_t(step), uint64_t(s));
  *table.steps[i] = float(step);
}

}  // namespace torchao8::cuda
