// The call of lamb_update_sums: the arguments of a step of Adam that is only looked at.
#pragma once

#include <iterator>
#include <utility>

#include "op/step_call.h"
#include "rules/lamb.h"

namespace torchao8 {

constexpr const char* kLambOp = "lamb_update_sums";

struct LambCall : StepCall {
  bool maximize = false, block_wise = true;

  LambCall() : StepCall(kLambOp) {
    for (int s = 0; s < LambRule::kStates; s++) lists[list_count++].state = AdamFamily::kStates[s];
  }

  template <class Visitor>
  void visit_arguments(Visitor& visit) {
    visit.list("params", params);
    visit.list("grads", grads);
    visit_states(visit, *this, Access::kRead);
    visit.list("steps", steps);
    visit.list("factors", factors);
    visit.tensor("numbers", numbers);
    visit.optional_tensor("grad_scale", grad_scale);
    visit.keywords();
    visit.flag("maximize", maximize);
    visit.option("block_size", block_size);
    visit.option("block_wise", block_wise);
    visit.option("state_format", state_format);
  }

  // When all arguments have been read.
  void prepare() {
    TORCHAO8_CHECK(!params.empty(), op, ": params must not be empty");
    inspect();
    find_states();
    one_scale = !block_wise;
    for (size_t f = 0; f < std::size(AdamOptions::kFlags); f++) {
      if (AdamOptions::kFlags[f].value == &AdamOptions::decoupled) flags[f] = true;
      if (AdamOptions::kFlags[f].value == &AdamOptions::maximize) flags[f] = maximize;
    }
  }
};

// What torch calls: measure(call) gives the result. Those: the formats of state that it knows.
template <Tensor (*measure)(LambCall&), class Those = Types<DynamicFormat>>
void lamb_update_sums(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  Held<LambCall> held(std::in_place);
  LambCall& call = *held;
  StackReader reader(stack, inputs);
  call.visit_arguments(reader);
  STD_TORCH_CHECK(reader.done() && outputs == 1, kLambOp, ": the schema is not the kernel's");
  call.prepare();
  check_state_format(call, Those());
  stack[0] = torch::stable::detail::from(measure(call));
}

}  // namespace torchao8
