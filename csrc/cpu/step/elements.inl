// Elements with 32-bit state.
#pragma once

#include "cpu/step/memory.inl"
#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA {

template <class Rule, class T, class Write>
TORCHAO8_HD void step_vector(const Rule& r, T* param, const T* grad, float* const* states,
                             Write& write) {
  constexpr int N = Rule::kStates;
  F old[N + 1], values[Rule::kValues];
  for (int s = 0; s < N; s++) values[s] = old[s] = load(states[s]);
  const F p = load(param);
  r.template moments<false>(p, load(grad), values);
  const Mask good = all_in_range<Rule>(values);
  for (int s = 0; s < N; s++) store(states[s], select(good, values[s], old[s]));
  write(param, select(good, update<false>(r, p, values), p));
}

// Elements [i, end): as vectors, and at the end what fills none.
template <class Rule, class T, class Write>
TORCHAO8_HD void step_vectors(const Rule& r, const ElementRun& run, int64_t i, int64_t end,
                              Write& write) {
  constexpr int N = Rule::kStates;
  T* param = static_cast<T*>(run.param);
  const T* grad = static_cast<const T*>(run.grad);
  for (; i + kWidth <= end; i += kWidth) {
    float* states[kMaxStates];
    for (int s = 0; s < N; s++) states[s] = run.states[s] + i;
    step_vector(r, param + i, grad + i, states, write);
  }
  const size_t left = size_t(end - i);
  if (left == 0) return;
  T tail_param[kWidth] = {}, tail_grad[kWidth] = {};
  float tail[kMaxStates][kWidth] = {};
  float* states[kMaxStates];
  std::memcpy(tail_param, param + i, left * sizeof(T));
  std::memcpy(tail_grad, grad + i, left * sizeof(T));
  for (int s = 0; s < N; s++) {
    std::memcpy(tail[s], run.states[s] + i, left * sizeof(float));
    states[s] = tail[s];
  }
  step_vector(r, tail_param, tail_grad, states, write);
  std::memcpy(param + i, tail_param, left * sizeof(T));
  for (int s = 0; s < N; s++) std::memcpy(run.states[s] + i, tail[s], left * sizeof(float));
}

// The parameter rounded stochastically: a block of random numbers after the other. What lies before
// the first whole vector of a block takes its numbers one by one.
template <class Rule>
void step_elements_rounded(const Rule& r, const ElementRun& run) {
  struct WriteHead {
    uint32_t hashes[kWidth];
    TORCHAO8_HD void operator()(BFloat16* x, F v) const { store(x, v, load_hashes(hashes)); }
  };
  int64_t i = 0;
  if (const int64_t before = int64_t(run.first_element % kWidth)) {
    const int64_t rest = kWidth - before, count = rest < run.count ? rest : run.count;
    WriteHead write = {};
    ElementRandom random(run.param_key);
    for (int64_t k = 0; k < count; k++) write.hashes[k] = random(run.first_element + uint64_t(k));
    step_vectors<Rule, BFloat16>(r, run, 0, count, write);
    i = count;
  }
  while (i < run.count) {
    const uint64_t element = run.first_element + uint64_t(i);
    const uint32_t inside = uint32_t(element % kRandomBlock);
    const int64_t rest = run.count - i, here = kRandomBlock - inside;
    const int64_t end = i + (here < rest ? here : rest);
    ParamWriter<true> write;
    write.start(run.param_key, element - inside, inside);
    step_vectors<Rule, BFloat16>(r, run, i, end, write);
    i = end;
  }
}

template <class Rule, class T>
void step_elements(const Rule& rule, const ElementRun& run) {
  const Rule r = rule;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (run.rounds_param) return step_elements_rounded(r, run);
  }
  ParamWriter<false> write;
  step_vectors<Rule, T>(r, run, 0, run.count, write);
}

}  // namespace torchao8::TORCHAO8_ISA
