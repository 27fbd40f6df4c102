// What torch calls for the ops of a family. An engine (of the CPU, of CUDA) plugs in what it does
// with a checked call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "op/step_call.h"
#include "rules/families.h"

namespace torchao8 {

// Whether there are kernels of a format for all rules of a family that have states.
template <class Format, class... Rule>
constexpr bool takes_rules(Types<Rule...>) {
  return ((Rule::kStates == 0 || Format::template kTakes<Rule>) && ...);
}

// The format of a call of this family.
template <class Family>
void check_family(const StepCall& call) {
  visit_format(Formats(), call.state_format, [&](auto type) {
    using Format = typename decltype(type)::type;
    if (takes_rules<Format>(typename Family::Rules())) return;
    std::string names;
    for_each_type(Families(), [&](auto other) {
      using Other = typename decltype(other)::type;
      if (!takes_rules<Format>(typename Other::Rules())) return;
      names += (names.empty() ? "" : ", ") + std::string(Other::kName);
    });
    refuse(call.op, ": state_format ", call.state_format, " (", Format::kName,
           ") has no kernels for ", Family::kName, "; it has them for ", names);
  });
}

// Of a call whose tensors have one scale for each state.
inline void check_one_scale(const StepCall& call) {
  const FormatInfo& format = format_info(call.state_format);
  TORCHAO8_CHECK(!format.blocks_only, call.op, ": a state in the format ", format.name,
                 " has a scale for each block, and cannot have one for the tensor");
}

// Of the device of the call; rows of zeros.
inline Tensor new_extremes(const StepCall& call) {
  const int64_t shape[] = {int64_t(call.params.size()), call.state_count};
  return torch::stable::new_zeros(call.params[0].tensor(), Sizes(shape, 2), ScalarType::Long);
}

// The kernels of a family's two ops. An engine has
//     Formats         see FormatsOf
//     kNeedsTensors   whether a call without tensors has no device, and does nothing
//     Guard           lives as long as the call is worked on
//     device_of(call)
//     Numbers<Options>(call)   reads, or finds, the numbers of the call and checks them; has
//                     `options`, and skips(), whether found_inf is known to forbid the step
//     check_values(call)       of numbers that the host can read
//     step<Rule>(call, numbers)
//     count_steps(call, numbers)   adds 1 to each step count, behind the step
//     find_extremes<Rule>(call, numbers, keys)
template <class Engine, class Family>
class FamilyOps {
 public:
  static void step(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    Held<StepCall> held(std::in_place, step_op<Family>());
    StepCall& call = *held;
    call.set_family(Type<Family>());
    StackReader reader(stack, inputs);
    visit_step<Family>(reader, call);
    STD_TORCH_CHECK(reader.done() && outputs == 0, call.op, ": the schema is not the kernel's");
    if (Engine::kNeedsTensors && call.params.empty()) return;
    const typename Engine::Guard guard;
    prepare(call);
    call.one_scale = !call.extremes.empty();
    check_block_size(call.op, call.block_size);
    check_state_format(call, FormatsOfEngine());
    check_family<Family>(call);
    if (call.one_scale) check_one_scale(call);
    const Numbers numbers(call);
    check_call(call);
    Engine::check_values(call);
    if (numbers.skips()) return;
    Family::choose(numbers.options, call.has, call.scales_gradient(), [&](auto type) {
      using Rule = typename decltype(type)::type;
      static_assert(kScalarsOf<Rule> == count_scalars<Family>());
      Engine::template step<Rule>(call, numbers);
    });
    if (call.count_steps) Engine::count_steps(call, numbers);
  }

  static void extremes(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    Held<StepCall> held(std::in_place, extremes_op<Family>());
    StepCall& call = *held;
    call.set_family(Type<Family>());
    StackReader reader(stack, inputs);
    visit_extremes<Family>(reader, call);
    STD_TORCH_CHECK(reader.done() && outputs == 1, call.op, ": the schema is not the kernel's");
    TORCHAO8_CHECK(!call.params.empty(), call.op, ": params must not be empty");
    const typename Engine::Guard guard;
    prepare(call);
    call.one_scale = true;
    check_state_format(call, FormatsOfEngine());
    check_family<Family>(call);
    check_one_scale(call);
    const Numbers numbers(call);
    check_extremes_call(call);
    Engine::check_values(call);
    Tensor keys = new_extremes(call);
    Family::choose(numbers.options, call.has, call.scales_gradient(), [&](auto type) {
      using Rule = typename decltype(type)::type;
      if constexpr (Rule::kStates > 0)
        Engine::template find_extremes<Rule>(call, numbers, keys.mutable_data_ptr<int64_t>());
    });
    stack[0] = torch::stable::detail::from(keys);
  }

 private:
  using Numbers = typename Engine::template Numbers<typename Family::Options>;
  using FormatsOfEngine = typename FormatsOf<Engine>::type;

  static void prepare(StepCall& call) {
    call.inspect();
    call.find_states();
    call.device = Engine::device_of(call);
  }
};

// Registers an engine's kernels of a family.
template <class Engine, class Family, class Library>
void implement(Library& m) {
  m.impl(step_op<Family>(), &FamilyOps<Engine, Family>::step);
  m.impl(extremes_op<Family>(), &FamilyOps<Engine, Family>::extremes);
}

}  // namespace torchao8
