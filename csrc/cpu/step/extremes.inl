// The extreme elements of the new states of a tensor with one scale.
#pragma once

#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA {

// An element that is not usable counts with its old state, which it keeps: with what kept() of the
// format makes of it. Decoder: of all states of the rule, in the format at hand.
template <class Decoder, class Rule, class T>
void find_extremes(const Rule& r, const ExtremeRun& run, float* found) {
  constexpr int N = Rule::kStates;
  const Decoder decode;
  const T *param = static_cast<const T*>(run.param), *grad = static_cast<const T*>(run.grad);
  float scale[N];
  for (int s = 0; s < N; s++) scale[s] = Decoder::scale(run.scales[s]);
  const Rule rule = r.with_scales(scale);
  StateExtremes<Rule> extremes;
  NanFinder nan[N];  // of a scale that is none
  for (int64_t i = 0; i < run.count; i += kWidth) {
    if constexpr (kWidth > 1) {
      prefetch(grad + i + kAhead);
      if constexpr (Rule::kMomentsNeedParam) prefetch(param + i + kAhead);
      for (int s = 0; s < N; s++) prefetch(run.codes[s] + i + kAhead);
    }
    F old[N], values[Rule::kValues], p(0.0f);
    decode(run.codes, i, old);
    for (int s = 0; s < N; s++) values[s] = old[s];
    if constexpr (Rule::kMomentsNeedParam) p = load(param + i);
    rule.template moments<true>(p, load(grad + i), values);
    const Mask good = all_in_range<Rule>(values);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      const F v = select(good, values[s], old[s] * F(Decoder::kept(scale[s] / rule.unit[s])));
      extremes.add(s, v);
      if constexpr (Rule::kSigned[s]) nan[s].add(v);
    });
  }
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    found[s] = extremes.result(s);
    if constexpr (Rule::kSigned[s]) {
      if (nan[s].found()) found[s] = bits_float(0x7fc00000u);
    }
    found[s] = Decoder::kept(found[s]);
  });
}

}  // namespace torchao8::TORCHAO8_ISA
