// The op lamb_update_sums on CUDA.
#include "cuda/lamb.cuh"

#include <torch/csrc/stable/library.h>

#include "common/lamb_call.h"
#include "common/sums_call.h"
#include "cuda/step_op.cuh"

namespace torchao8::cuda {
namespace {

void measure_blocks_of(const Step<LambRule>& step, int64_t* sums) {
  using Entry = Measured<BlockEntry<LambRule::kStates>>;
  const StepCall& call = step.call;
  const Tables* tables = tables_on(step.launcher);
  const auto launch = [&](const Table<LambRule, Entry>& table) {
    step.launcher.launch_over(table.units, measure_blocks<LambRule>,
                              sizeof(SharedOfMeasure<LambRule>), table, tables, sums);
  };
  Filler<LambRule, Entry, decltype(launch)> filler(step.numbers, int(call.block_size), false,
                                                   launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    Entry entry = {};
    static_cast<BlockEntry<LambRule::kStates>&>(entry) = block_entry(step, i);
    entry.row = uint32_t(i);
    entry.one_scale = call.one_scale;
    filler.add(entry);
  }
  filler.flush();
}

void measure_elements_of(const Step<LambRule>& step, int64_t* sums) {
  using Entry = Measured<ElementEntry<LambRule::kStates>>;
  const auto launch = [&](const Table<LambRule, Entry>& table) {
    step.launcher.launch_over(table.units, measure_elements<LambRule>,
                              sizeof(SharedOfMeasure<LambRule>), table, sums);
  };
  Filler<LambRule, Entry, decltype(launch)> filler(step.numbers, int(step.call.block_size), false,
                                                   launch);
  for (size_t i = 0; i < step.call.params.size(); i++) {
    Entry entry = {};
    static_cast<ElementEntry<LambRule::kStates>&>(entry) = element_entry(step, i);
    entry.row = uint32_t(i);
    filler.add(entry);
  }
  filler.flush();
}

Tensor lamb_update_sums_cuda(TensorList params, TensorList grads, TensorList exp_avgs,
                             TensorList exp_avg_sqs, TensorList exp_avg_scales,
                             TensorList exp_avg_sq_scales, TensorList steps, TensorList factors,
                             Tensor numbers, std::optional<Tensor> grad_scale, bool maximize,
                             int64_t block_size, bool block_wise) {
  const char* op = LambFamily::kOp;
  TORCHAO8_CHECK(!params.empty(), op, ": params must not be empty");
  const Place place = place_of({op, "params", 0}, params[0]);
  const LambCall lamb(params, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales,
                      steps, factors, block_size, block_wise, place);
  const StepCall& call = lamb.call;
  const Scalar scale = scalar_argument({op, "grad_scale"}, grad_scale, 1, place);
  const RuleNumbers rest = rule_numbers({op, "numbers"}, numbers, kNumberCount<AdamOptions>, place);
  const CommonOptions common = {1, scale.place ? 1 : scale.value};
  const auto options = make_options<AdamOptions>(common, rest.known, true, maximize);
  check_options(op, options, rest.known != nullptr);
  check_call(call);

  const Launcher launcher(op, place.index);
  std::vector<Dense> dense_params, dense_grads;
  for (const Tensor& param : params) dense_params.emplace_back(param);
  for (const Tensor& grad : grads) dense_grads.emplace_back(grad);
  const Step<LambRule> step = {call,
                               launcher,
                               {options,
                                {nullptr, 1, false},
                                scale,
                                {nullptr, 0, false},
                                0,
                                call.quantized(),
                                rest.on_device},
                               dense_params,
                               dense_grads};
  Tensor sums = new_sums(params);
  int64_t* const limbs = sums.mutable_data_ptr<int64_t>();
  call.quantized() ? measure_blocks_of(step, limbs) : measure_elements_of(step, limbs);
  const int64_t rows = int64_t(params.size());
  launcher.launch(canonicalize<int64_t>, blocks_of_rows(op, rows), 0, limbs, rows);
  return sums;
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("lamb_update_sums", TORCH_BOX(&torchao8::cuda::lamb_update_sums_cuda));
}
