// The first pass over a block: its new states, and their extreme elements.
#pragma once

#include "cpu/formats/dynamic/decode.inl"
#include "cpu/step/memory.inl"
#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA::dynamic {

// The values of two blocks, in units, that follow each other around a ring.
template <int N>
struct Ring {
  alignas(64) float values[N][2 * kMaxBlock];
  int end;  // of the second block, where the first one follows

  TORCHAO8_HD int wrap(int at) const { return at < end ? at : at - end; }
  TORCHAO8_HD void load_at(int at, F* to) const {
    for (int v = 0; v < N; v++) to[v] = load(values[v] + at);
  }
};

// What the second pass needs to know of a block. Not good: an element is not usable.
template <int N>
struct alignas(64) Plan {
  float extreme[N], inverse[N];
  BlockRandom random[N];
  bool good;
};

// First pass: decode, compute the moments into the ring, find the extreme elements. Called for each
// vector of the block in turn, then finish(). On the vector paths it writes nothing but the ring.
template <class Rule, class T, bool kRounds>
struct Moments {
  static constexpr int N = Rule::kStates, kValues = Rule::kValues;
  static constexpr bool kSelect = kWidth == 1;
  StateDecoder<Rule> decode;
  StateExtremes<Rule> extremes;
  NanFinder nan;
  ParamWriter<kSelect && kRounds> write;
  Block<Rule, T> block;
  Ring<kValues>& ring;
  int ring_start;  // of the block
  float scale[N];
  Rule rule;

  TORCHAO8_HD Moments(const Rule& r, const CodecTables& t, const Block<Rule, T>& b,
                      Ring<kValues>& to, int at)
      : decode(t), block(b), ring(to), ring_start(at) {
    for (int s = 0; s < N; s++) scale[s] = *block.scales[s];
    rule = r.with_scales(scale);
    write.start(block.param_key, block.first_element);
  }

  TORCHAO8_HD void operator()(int i) {
    if constexpr (!kSelect) {
      prefetch(block.grad + i + kAhead);
      prefetch(block.param + i + kAhead);
      for (int s = 0; s < N; s++) prefetch(block.codes[s] + i + kAhead);
    }
    F old[N], values[kValues], p(0.0f);
    decode(block.codes, i, old);
    for (int s = 0; s < N; s++) values[s] = old[s];
    if constexpr (Rule::kMomentsNeedParam) p = load(block.param + i);
    rule.template moments<true>(p, load(block.grad + i), values);
    if constexpr (kSelect) {
      const Mask good = all_in_range<Rule>(values);
      if (all(good)) {
        write(block.param + i, update<true>(rule, load(block.param + i), values));
      } else {
        write.skip();
      }
      for (int s = 0; s < N; s++)
        values[s] = select(good, values[s], old[s] * F(scale[s] / rule.unit[s]));
    }
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA { extremes.add(s, values[s]); });
    if constexpr (!has_unsigned<Rule>() && !kSelect) nan.add(values[0]);
    for (int v = 0; v < kValues; v++) store(ring.values[v] + ring_start + i, values[v]);
  }

  template <bool kStochastic>
  TORCHAO8_HD void finish(Plan<N>& plan, const BlockRun& run) const {
    bool good = !nan.found();
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      plan.extreme[s] = extremes.result(s);
      if (run.extremes) {  // the block's own one has told whether its elements are usable
        good = good && usable<Rule::kSigned[s]>(plan.extreme[s]);
        plan.extreme[s] = run.extremes[s];
      }
      plan.inverse[s] = inverse_of<Rule::kSigned[s]>(plan.extreme[s]);
      if constexpr (kStochastic && Rule::kStochastic[s]) {
        plan.random[s].start(run.keys[s], block.first_element);
      }
      // decay: the stored scale may overflow in units, or be none at all
      good = good && usable<Rule::kSigned[s]>(scale[s]) && usable<true>(rule.decay[s]) &&
             usable<Rule::kSigned[s]>(plan.extreme[s]) &&
             usable<true>(plan.extreme[s] * rule.unit[s]);
    });
    plan.good = kSelect || good;
  }
};

}  // namespace torchao8::TORCHAO8_ISA::dynamic
