// What the loops over memory do with all states of a rule: judge, find extreme elements.
#pragma once

namespace torchao8::TORCHAO8_ISA {

// Applies f to 0, 1, ... N-1 as constants, so that each state's sign is known when compiling.
template <int N, class Function>
TORCHAO8_HD void for_each_state(Function f) {
  if constexpr (N > 0) f(std::integral_constant<int, 0>());
  if constexpr (N > 1) f(std::integral_constant<int, 1>());
  if constexpr (N > 2) f(std::integral_constant<int, 2>());
}

// One of two objects.
template <bool kFirst, class A, class B>
TORCHAO8_HD auto& choose(A& a, B& b) {
  if constexpr (kFirst) {
    return a;
  } else {
    return b;
  }
}

// Where all states are usable: neither NaN nor infinite nor close to it, nor negative if unsigned.
// Without states, where the first value is.
template <class Rule>
TORCHAO8_HD Mask all_in_range(const F* values) {
  Mask good = in_range<Rule::kSigned[0]>(values[0]);
  for_each_state<Rule::kStates>(
      [&](auto s) TORCHAO8_LAMBDA { good = both(good, in_range<Rule::kSigned[s]>(values[s])); });
  return good;
}

// Whether a rule has an unsigned state, whose extreme element tells of NaN. If not, all elements of
// a signed one go into a sum of zeros.
template <class Rule>
constexpr bool has_unsigned() {
  for (int s = 0; s < Rule::kStates; s++) {
    if (!Rule::kSigned[s]) return true;
  }
  return false;
}
struct NanFinder {
  F sum;
  TORCHAO8_HD NanFinder() : sum(0.0f) {}
  TORCHAO8_HD void add(F v) { sum = fma(v, F(0.0f), sum); }
  TORCHAO8_HD bool found() const { return !all(in_range<true>(sum)); }
};

// The extreme elements of all states.
template <class Rule>
struct StateExtremes {
  Extreme<true> of_signed[Rule::kStates];
  Extreme<false> of_unsigned[Rule::kStates];
  TORCHAO8_HD StateExtremes() {}

  template <class S>
  TORCHAO8_HD void add(S s, F v) {
    if constexpr (Rule::kSigned[s]) {
      of_signed[s].add(v);
    } else {
      of_unsigned[s].add(v);
    }
  }
  template <class S>
  TORCHAO8_HD float result(S s) const {
    if constexpr (Rule::kSigned[s]) {
      return of_signed[s].result();
    } else {
      return of_unsigned[s].result();
    }
  }
};

// Elements ahead of the ones at work that are asked for from memory. The hardware's own prefetchers
// stop at pages of 4 KiB, and a block spends its time in four arrays at once.
constexpr int kAhead = 768;
template <class T>
constexpr int kLineOf = 64 / int(sizeof(T));  // elements in a line of the cache

TORCHAO8_HD void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#endif
}

}  // namespace torchao8::TORCHAO8_ISA
