// What CUDA does with a checked call of a family's ops: makes tables of tensors of it and launches
// the kernels.
//
// One launch updates a bucket; longer lists take more. The host waits for nothing, and reads
// nothing from the device, so that a step can be captured in a CUDA graph. A step count, a learning
// rate or a gradient scale that is out of range on the device is therefore not refused.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/count.h"
#include "cuda/device_codec.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.h"
#include "op/family_ops.h"

namespace torchao8::cuda {

// Kernels read dense memory in row-major order. What is not like that is copied, and back.
class Dense {
 public:
  Dense(const TensorView& t, Access access) {
    if (!t.is_contiguous()) {
      original_ = t.tensor();
      copy_ = torch::stable::contiguous(*original_);
      data_ = copy_->mutable_data_ptr();
    } else if (access == Access::kWrite) {
      data_ = t.mutable_data_ptr();
    } else {
      data_ = const_cast<void*>(t.const_data_ptr());
    }
  }
  void* data() const { return data_; }
  void write_back() {
    if (copy_) torch::stable::copy_(*original_, *copy_);
  }

 private:
  std::optional<Tensor> original_, copy_;
  void* data_;
};

// The numbers of a call. Those on the CPU are read and checked; for those on the device the kernels
// get the address.
template <class Options>
struct CudaNumbers {
  Options options;
  Scalar lr, grad_scale, found_inf;
  const double* rest;  // where the other numbers lie, if the host has not read them

  explicit CudaNumbers(const StepCall& call)
      : lr(scalar_argument({call.op, "lr"}, call.lr, 1, call.device)),
        grad_scale(scalar_argument({call.op, "grad_scale"}, call.grad_scale, 1, call.device)),
        found_inf(scalar_argument({call.op, "found_inf"}, call.found_inf, 0, call.device)) {
    const RuleNumbers numbers =
        rule_numbers({call.op, "numbers"}, *call.numbers, kNumberCount<Options>, call.device);
    rest = numbers.on_device;
    const CommonOptions common = {lr.address ? 0 : lr.value,
                                  grad_scale.address ? 1 : grad_scale.value};
    options = make_options<Options>(common, numbers.known, call.flags);
    check_options(call.op, options, numbers.known != nullptr);
  }
  bool skips() const { return false; }  // the kernels read found_inf

  // As the kernels take them.
  template <class Rule>
  cuda::Numbers<Rule> of(const StepCall& call) const {
    return {options, lr, grad_scale, found_inf, uint64_t(call.seed), call.quantized, rest};
  }
};

// A call on its way to the kernels, and the copies that must live until the launches are made.
template <class Rule>
struct Step {
  const StepCall& call;
  const Launcher launcher;
  const Numbers<Rule> numbers;
  std::vector<Dense> params, grads;
  const bool rounds_params;  // whether some parameters are rounded stochastically

  Step(const StepCall& c, const CudaNumbers<typename Rule::Options>& n)
      : call(c),
        launcher(c.op, c.device.index),
        numbers(n.template of<Rule>(c)),
        rounds_params(c.stochastic_params &&
                      std::any_of(c.params.begin(), c.params.end(), [](const TensorView& p) {
                        return p.scalar_type() == ScalarType::BFloat16;
                      })) {
    params.reserve(c.params.size());
    grads.reserve(c.grads.size());
    for (const TensorView& param : c.params) params.emplace_back(param, Access::kWrite);
    for (const TensorView& grad : c.grads) grads.emplace_back(grad, Access::kRead);
  }
};

// Sets what all entries have.
template <class Rule, class Entry>
void set_addresses(Entry& entry, const Step<Rule>& step, size_t i) {
  const StepCall& call = step.call;
  entry.param = step.params[i].data();
  entry.grad = step.grads[i].data();
  entry.step = call.steps[i].template const_data_ptr<float>();
  entry.factors =
      call.factors.empty() ? nullptr : call.factors[i].template const_data_ptr<double>();
  entry.param_type = check_float_type({call.op, "params", int64_t(i)}, call.params[i]);
  entry.grad_type = check_float_type({call.op, "grads", int64_t(i)}, call.grads[i]);
  if constexpr (kScalarsOf<Rule> > 0) {
    for (int s = 0; s < kScalarsOf<Rule>; s++)
      entry.scalars[s] = call.scalars[s]->values[i].template mutable_data_ptr<float>();
  }
}
template <class Rule, class Entry>
void set_codes(Entry& entry, const Step<Rule>& step, size_t i) {
  for (int s = 0; s < Rule::kStates; s++) {
    entry.codes[s] = step.call.values(s, i).template mutable_data_ptr<uint8_t>();
    entry.scales[s] = step.call.scales(s, i).template mutable_data_ptr<float>();
  }
}

// The type that fast entries have: that of the first parameter, or what is rounded stochastically.
template <class Rule>
FloatType type_of(const Step<Rule>& step) {
  if (step.rounds_params) return FloatType::kBFloat16;
  return check_float_type({step.call.op, "params", 0}, step.call.params[0]);
}

// Fills an entry of 8-bit state.
template <class Rule, class Entry>
void set_blocks(Entry& entry, const Step<Rule>& step, size_t i) {
  const StepCall& call = step.call;
  const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
  TORCHAO8_CHECK(layout.rows * layout.blocks_per_row <= kMostUnits,
                 Argument{call.op, "params", int64_t(i)}.text(), " has more than 2^31 blocks");
  set_addresses(entry, step, i);
  set_codes(entry, step, i);
  entry.rows = layout.rows;
  entry.row_length = entry.row_stride = layout.row_length;
  entry.blocks_per_row = uint32_t(layout.blocks_per_row);
  if (!call.shard_offsets.empty()) {
    entry.shard_offset = uint64_t(call.shard_offsets[i]);
    entry.row_stride = call.shard_row_strides[i];
  }
  entry.finish(type_of(step), int(call.block_size));
}

// The same of 32-bit state.
template <class Rule, class Entry>
void set_elements(Entry& entry, const Step<Rule>& step, size_t i) {
  set_addresses(entry, step, i);
  for (int s = 0; s < Rule::kStates; s++)
    entry.states[s] = step.call.values(s, i).template mutable_data_ptr<float>();
  entry.count = step.call.params[i].numel();
  entry.finish(type_of(step));
}

// The same with the place of a shard.
template <class Rule, class Entry>
void set_placed_elements(Entry& entry, const Step<Rule>& step, size_t i) {
  const StepCall& call = step.call;
  const TensorView& param = call.params[i];
  set_elements(entry, step, i);
  entry.row_length = entry.count;
  if (!call.shard_offsets.empty()) {
    entry.shard_offset = uint64_t(call.shard_offsets[i]);
    if (param.dim() > 1 && call.shard_row_strides[i] != param.sizes().back()) {
      entry.row_length = param.sizes().back();
      entry.row_stride = call.shard_row_strides[i];
    }
  }
  entry.finish(type_of(step));
}

// Fills a table with an entry for each parameter, set(entry, i), and launches it when it is full.
template <class Entry, class Rule, class Launch, class Set>
void launch_tables(const Step<Rule>& step, Launch launch, Set set) {
  Filler<Rule, Entry, Launch> filler(step.numbers, int(step.call.block_size),
                                     step.call.stochastic_rounding, launch);
  for (size_t i = 0; i < step.call.params.size(); i++) {
    Entry entry = {};
    set(entry, i);
    filler.add(entry);
  }
  filler.flush();
}

// Launches a kernel over the units of each table, with more arguments behind the table.
template <class Entry, class Rule, class... Parameters, class Set, class... More>
void launch_over_tables(const Step<Rule>& step,
                        const Kernel<Table<Rule, Entry>, Parameters...>& kernel, Set set,
                        const More&... more) {
  launch_tables<Entry>(
      step,
      [&](const Table<Rule, Entry>& table) {
        step.launcher.launch_over(table.units, kernel.function, kernel.shared_bytes, table,
                                  more...);
      },
      set);
}

// The same of a kernel that gives a thread to each entry.
template <class Entry, class Rule, class Set>
void launch_by_entries(const Step<Rule>& step, const Kernel<Table<Rule, Entry>>& kernel, Set set) {
  launch_tables<Entry>(
      step,
      [&](const Table<Rule, Entry>& table) {
        step.launcher.launch(kernel.function, blocks_of_rows(step.call.op, table.count),
                             kernel.shared_bytes, table);
      },
      set);
}

template <class Rule, class Format>
void step_blocks_of(const Step<Rule>& step,
                    const typename BlockKernels<Rule, Format>::Step& kernels) {
  const int64_t size = step.call.block_size;
  launch_over_tables<BlockEntryOf<Rule>>(
      step,
      size > kSpan    ? kernels.long_blocks
      : size == kSpan ? kernels.spans
                      : kernels.short_blocks,
      [&](BlockEntryOf<Rule>& entry, size_t i) { set_blocks(entry, step, i); },
      tables_on<Format>(step.launcher));
}

template <class Rule, class Format>
void step_one_scale_of(const Step<Rule>& step,
                       const typename BlockKernels<Rule, Format>::Step& kernels) {
  using Entry = OneScaleEntryOf<Rule>;
  using Scales = ScalesEntryOf<Rule>;
  const StepCall& call = step.call;
  launch_over_tables<Entry>(
      step, kernels.one_scale,
      [&](Entry& entry, size_t i) {
        set_blocks(entry, step, i);
        entry.extremes = call.extremes[i].template const_data_ptr<int64_t>();
      },
      tables_on<Format>(step.launcher));
  const auto& write_scales = BlockKernels<Rule, Format>::all.write_scales;
  launch_by_entries<Scales>(step, write_scales, [&](Scales& entry, size_t i) {
    set_addresses(entry, step, i);
    for (int s = 0; s < Rule::kStates; s++)
      entry.scales[s] = call.scales(s, i).template mutable_data_ptr<float>();
    entry.extremes = call.extremes[i].template const_data_ptr<int64_t>();
  });
}

// State of a format: one scale a block, or one a tensor.
template <class Rule, class Format>
void step_format_of(const Step<Rule>& step) {
  const auto& all = BlockKernels<Rule, Format>::all;
  const auto& kernels = step.rounds_params ? all.rounded : all.step[int(type_of(step))];
  if (step.call.one_scale) {
    step_one_scale_of<Rule, Format>(step, kernels);
  } else {
    step_blocks_of<Rule, Format>(step, kernels);
  }
}

template <class Rule>
void step_elements_of(const Step<Rule>& step) {
  const auto& all = ElementKernels<Rule>::all;
  if (step.rounds_params) {
    using Entry = ElementEntryOf<Rule, true>;
    launch_over_tables<Entry>(step, all.rounded,
                              [&](Entry& entry, size_t i) { set_placed_elements(entry, step, i); });
  } else {
    using Entry = ElementEntryOf<Rule, false>;
    launch_over_tables<Entry>(step, all.step[int(type_of(step))],
                              [&](Entry& entry, size_t i) { set_elements(entry, step, i); });
  }
}

// When all kernels that read the old ones have been launched.
template <class Rule>
void write_scalars_of(const Step<Rule>& step) {
  using Entry = ScalarsEntryOf<Rule>;
  launch_by_entries<Entry>(step, ElementKernels<Rule>::all.write_scalars,
                           [&](Entry& entry, size_t i) { set_addresses(entry, step, i); });
}

template <class Rule, class Format>
void find_extremes_of(const Step<Rule>& step, int64_t* keys) {
  using Entry = ExtremesEntryOf<Rule>;
  launch_over_tables<Entry>(
      step, BlockKernels<Rule, Format>::all.extremes[int(type_of(step))],
      [&](Entry& entry, size_t i) {
        set_addresses(entry, step, i);
        set_codes(entry, step, i);
        entry.keys = keys + i * size_t(step.call.state_count);
        entry.count = step.call.params[i].numel();
        entry.finish(type_of(step));
      },
      tables_on<Format>(step.launcher));
}

// Calls visit(Type<Format>()) for the format of the call's state.
template <class Visit>
void visit_format_of(const StepCall& call, Visit visit) {
  visit_format(Formats(), call.state_format, visit);
}

template <class Rule>
void step_all_of(const Step<Rule>& step) {
  if constexpr (Rule::kStates > 0) {
    if (step.call.quantized) {
      return visit_format_of(
          step.call, [&](auto type) { step_format_of<Rule, typename decltype(type)::type>(step); });
    }
  }
  step_elements_of(step);
}

// See FamilyOps.
struct CudaStep {
  using Formats = cuda::Formats;
  static constexpr bool kNeedsTensors = true;
  struct Guard {
    Guard() {}
  };
  template <class Options>
  using Numbers = CudaNumbers<Options>;

  static Device device_of(const StepCall& call) {
    return cuda::device_of({call.op, "params", 0}, call.params[0]);
  }
  static void check_values(const StepCall&) {}

  template <class Rule>
  static void step(const StepCall& call, const Numbers<typename Rule::Options>& numbers) {
    Step<Rule> step(call, numbers);
    step_all_of(step);
    if constexpr (kScalarsOf<Rule> > 0) write_scalars_of(step);
    for (Dense& param : step.params) param.write_back();
  }

  template <class Options>
  static void count_steps(const StepCall& call, const Numbers<Options>& numbers) {
    cuda::count_steps(Launcher(call.op, call.device.index), call.steps, numbers.found_inf);
  }

  template <class Rule>
  static void find_extremes(const StepCall& call, const Numbers<typename Rule::Options>& numbers,
                            int64_t* keys) {
    const Step<Rule> step(call, numbers);
    visit_format_of(call, [&](auto type) {
      find_extremes_of<Rule, typename decltype(type)::type>(step, keys);
    });
  }
};

}  // namespace torchao8::cuda
