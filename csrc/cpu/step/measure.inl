// The loops that look at an update before it is made. They write nothing but the result.
#pragma once

#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA {

// The updates of one block, whose parameters and gradients are float32; 0 where an element is not
// usable. Decoder: of all states of the rule, in the format at hand.
template <class Decoder, class Rule>
void measure_block(const Rule& r, const BlockRun& run, float* updates) {
  constexpr int N = Rule::kStates;
  const Decoder decode;
  const float* param = static_cast<const float*>(run.param);
  const float* grad = static_cast<const float*>(run.grad);
  float scale[N];
  for (int s = 0; s < N; s++) scale[s] = Decoder::scale(*run.scales[s]);
  const Rule rule = r.with_scales(scale);
  for (int i = 0; i < run.length; i += kWidth) {
    F values[Rule::kValues];
    decode(run.codes, i, values);
    const F p = load(param + i);
    rule.template moments<true>(p, load(grad + i), values);
    const F update = rule.template update_of<true>(p, values);
    store(updates + i, select(all_in_range<Rule>(values), update, F(0.0f)));
  }
}

// The same of 32-bit state; the count is a multiple of kWidest.
template <class Rule>
void measure_elements(const Rule& rule, const ElementRun& run, float* updates) {
  const float* param = static_cast<const float*>(run.param);
  const float* grad = static_cast<const float*>(run.grad);
  for (int64_t i = 0; i < run.count; i += kWidth) {
    F values[Rule::kValues];
    for (int s = 0; s < Rule::kStates; s++) values[s] = load(run.states[s] + i);
    const F p = load(param + i);
    rule.template moments<false>(p, load(grad + i), values);
    const F update = rule.template update_of<false>(p, values);
    store(updates + i, select(all_in_range<Rule>(values), update, F(0.0f)));
  }
}

}  // namespace torchao8::TORCHAO8_ISA
