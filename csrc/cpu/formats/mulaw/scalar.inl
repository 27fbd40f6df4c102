// Steps of blocks in the mu-law format, in plain C++. It is the definition: blocks.inl gives the
// same bits, and leaves blocks with an element that is not usable to this.
#pragma once

#include "cpu/kernel_tables.h"
#include "cpu/step/memory.inl"
#include "cpu/step/states.inl"

namespace torchao8::scalar::mulaw {

template <bool kSigned>
using Codec = MulawFormat::Codec<kSigned>;

// The stored numbers of all states of a rule.
template <class Rule>
struct StateDecoder {
  template <class Codes>
  TORCHAO8_HD void operator()(const Codes& codes, int64_t i, F* values) const {
    for_each_state<Rule::kStates>(
        [&](auto s) TORCHAO8_LAMBDA { values[s] = Codec<Rule::kSigned[s]>::decode(codes[s][i]); });
  }
  static TORCHAO8_HD float scale(float stored) { return mulaw_scale(stored); }
  static TORCHAO8_HD float kept(float old) { return clamp_to_usable(old); }
};

// One block, in two passes: the first finds what its new states cannot exceed, the second makes and
// encodes them.
template <class Rule, class T, bool kStochastic, bool kRounds>
struct BlockStep {
  static constexpr int N = Rule::kStates, kValues = Rule::kValues;
  const Block<Rule, T>& block;
  const BlockRun& run;
  StateDecoder<Rule> decode;
  float scale[N];
  Rule rule;

  // An element: the new values, or, where they are not usable, the states as they are.
  struct Element {
    F values[kValues], p;
    Mask good;
  };

  TORCHAO8_HD BlockStep(const Rule& r, const Block<Rule, T>& b, const BlockRun& all)
      : block(b), run(all) {
    for (int s = 0; s < N; s++) scale[s] = mulaw_scale(*block.scales[s]);
    rule = r.with_scales(scale);
  }

  TORCHAO8_HD float kept(int s, F old) const { return kept_value(old, scale[s], rule.unit[s]); }

  TORCHAO8_HD Element make(int i) const {
    Element e;
    F old[N];
    decode(block.codes, i, old);
    for (int s = 0; s < N; s++) e.values[s] = old[s];
    e.p = load(block.param + i);
    rule.template moments<true>(e.p, load(block.grad + i), e.values);
    e.good = all_in_range<Rule>(e.values);
    for (int s = 0; s < N && !e.good; s++) e.values[s] = kept(s, old[s]);
    return e;
  }

  // What the magnitudes of the new states do not exceed: of a rule that is monotone bounds, else
  // the largest ones.
  TORCHAO8_HD void find_extremes(float* extremes) const {
    bool any_good = false, any_bad = false;
    float param = 0.0f, grad = 0.0f, largest_new[N] = {}, largest_old[N] = {};
    for (int i = 0; i < run.length; i++) {
      const Element e = make(i);
      (e.good ? any_good : any_bad) = true;
      if (e.good) {
        param = max(std::fabs(e.p), param);
        grad = max(std::fabs(load(block.grad + i)), grad);
      }
      F old[N];
      decode(block.codes, i, old);
      for (int s = 0; s < N; s++) {
        largest_old[s] = max(std::fabs(old[s]), largest_old[s]);
        largest_new[s] = max(std::fabs(e.values[s]), largest_new[s]);
      }
    }
    if constexpr (kMonotoneOf<Rule>) {
      mulaw_bounds(rule, param, grad, largest_old, extremes);
      for (int s = 0; s < N; s++) {
        // No element that is good has more, and without one the bound is of none.
        if (!usable<false>(extremes[s])) extremes[s] = kLargestUsable;
        if (!any_good) extremes[s] = 0.0f;
        if (any_bad) extremes[s] = max(kept(s, largest_old[s]), extremes[s]);
      }
    } else {
      for (int s = 0; s < N; s++) extremes[s] = largest_new[s];
    }
  }

  TORCHAO8_HD void operator()() const {
    float extremes[N];
    find_extremes(extremes);
    MulawScale scales[N];
    RandomStream stream[N];
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      constexpr bool kSigned = Rule::kSigned[s], kStill = Rule::kStochastic[s];
      float extreme = run.extremes ? run.extremes[s] : extremes[s];
      if (!usable<false>(scale[s])) extreme = scale[s];
      scales[s].template set<kSigned, kStill>(extreme, rule.unit[s]);
      BlockRandom random;
      random.start(run.keys[s], block.first_element);
      stream[s].start(random);
    });
    ParamWriter<kRounds> write;
    write.start(block.param_key, block.first_element);
    for (int i = 0; i < run.length; i++) {
      const Element e = make(i);
      if (e.good) {
        write(block.param + i, update<true>(rule, e.p, e.values));
      } else {
        write.skip();
      }
      for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
        using Code = Codec<Rule::kSigned[s]>;
        uint32_t added = Code::kHalf;
        if constexpr (kStochastic && Rule::kStochastic[s]) {
          added = Code::draw(stream[s].next_hashes());
        }
        const MulawScale& to = scales[s];
        // Without a scale that is a number there are no states.
        block.codes[s][i] = uint8_t(
            std::isnan(to.scale) ? 0 : Code::encode(e.values[s], to.inverse, added, to.least_code));
      });
    }
    for (int s = 0; s < N; s++) *block.scales[s] = scales[s].scale;
  }
};

template <class Rule, class T, bool kStochastic, bool kRounds>
void step_blocks(const Rule& rule, const BlockRun& run) {
  Block<Rule, T> block(run);
  for (int64_t k = 0; k < run.blocks; k++) {
    BlockStep<Rule, T, kStochastic, kRounds>(rule, block, run)();
    block.advance(run.length);
  }
}

template <bool kSigned>
TORCHAO8_HD uint8_t nearest_code(F x, const MulawScale& to) {
  using Code = Codec<kSigned>;
  return uint8_t(Code::encode(x, to.inverse, Code::kHalf, to.least_code));
}

template <class Rule, class T>
void step_blocks_of(const Rule& rule, const BlockRun& run) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (run.rounds_param) {
      run.stochastic ? step_blocks<Rule, T, true, true>(rule, run)
                     : step_blocks<Rule, T, false, true>(rule, run);
      return;
    }
  }
  run.stochastic ? step_blocks<Rule, T, true, false>(rule, run)
                 : step_blocks<Rule, T, false, false>(rule, run);
}

template <bool kSigned>
float quantize_block(const float* x, int n, uint8_t* codes) {
  const MulawScale to = mulaw_scale_of_block<kSigned>(x, n);
  for (int i = 0; i < n; i++)
    codes[i] = std::isnan(to.scale) ? uint8_t(0) : nearest_code<kSigned>(x[i], to);
  return to.scale;
}

template <bool kSigned>
void dequantize_block(const uint8_t* codes, int n, float scale, float* x) {
  for (int i = 0; i < n; i++) x[i] = Codec<kSigned>::decode(codes[i]) * scale;
}

}  // namespace torchao8::scalar::mulaw
