// The second pass over a block: the update of the parameter, and the codes of the new states.
#pragma once

#include "cpu/formats/dynamic/codec.inl"
#include "cpu/formats/dynamic/moments.inl"

namespace torchao8::TORCHAO8_ISA::dynamic {

// The rule's two long operations, started before their results are needed: the root two vectors
// ahead, the step one. Around the ring that goes on from block to block.
template <class Rule>
struct Pipeline {
  F root, step;
  bool full;
  TORCHAO8_HD Pipeline() : root(0.0f), step(0.0f), full(false) {}

  TORCHAO8_HD void start_root(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    F values[Rule::kValues];
    ring.load_at(at, values);
    root = rule.template root<true>(values);
  }
  TORCHAO8_HD void start_step(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    F values[Rule::kValues];
    ring.load_at(at, values);
    step = rule.step(values, root);
  }
  TORCHAO8_HD void fill(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    if (full) return;
    start_root(rule, ring, at);
    start_step(rule, ring, at);
    start_root(rule, ring, ring.wrap(at + kWidth));
    full = ring.end >= 4 * kWidth;  // with blocks of one vector, two ahead is not in the ring
  }
  // The step of the vector at this place.
  TORCHAO8_HD F next(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    const F now = step;
    start_step(rule, ring, ring.wrap(at + kWidth));
    start_root(rule, ring, ring.wrap(at + 2 * kWidth));
    return now;
  }
};

// Second pass: update the parameter (the scalar path has done it), encode the states in the ring.
template <class Rule, class T, bool kStochastic, bool kRounds>
struct UpdateAndEncode {
  static constexpr int N = Rule::kStates, kValues = Rule::kValues;
  // Faster with the stochastic encoder in the loop, slower without it (benchmarks/NOTES.md).
  static constexpr bool kPipelined = kStochastic && kWidth > 1;
  NearestEncoder<true> encode_signed;
  NearestEncoder<false> encode_unsigned;
  StochasticEncoder<true> encode_signed_randomly;
  StochasticEncoder<false> encode_unsigned_randomly;
  RandomStream stream[N];
  ParamWriter<(kWidth > 1) && kRounds> write;
  Block<Rule, T> block;
  const Ring<kValues>& ring;
  int ring_start;  // of the block
  const Plan<N>& plan;
  Pipeline<Rule>& pipeline;
  float inverse[N];
  Rule rule;

  TORCHAO8_HD UpdateAndEncode(const Rule& r, const CodecTables& t, const Block<Rule, T>& b,
                              const Ring<kValues>& from, int at, const Plan<N>& p,
                              Pipeline<Rule>& line)
      : encode_signed(t),
        encode_unsigned(t),
        encode_signed_randomly(t),
        encode_unsigned_randomly(t),
        block(b),
        ring(from),
        ring_start(at),
        plan(p),
        pipeline(line),
        rule(r) {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      inverse[s] = p.inverse[s];
      if constexpr (kStochastic && Rule::kStochastic[s]) stream[s].start(p.random[s]);
    });
    write.start(block.param_key, block.first_element);
    if constexpr (kPipelined) pipeline.fill(rule, ring, ring_start);
  }

  TORCHAO8_HD void operator()(int i) {
    F values[kValues];
    ring.load_at(ring_start + i, values);
    if constexpr (kPipelined) {
      const F step = pipeline.next(rule, ring, ring_start + i);
      write.quiet(block.param + i, rule.apply(load(block.param + i), step));
    }
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (kStochastic && Rule::kStochastic[s] && Rule::kSigned[s]) {
        encode_signed_randomly(values[s], inverse[s], stream[s].next(), block.codes[s] + i);
      } else if constexpr (kStochastic && Rule::kStochastic[s]) {
        encode_unsigned_randomly(values[s], inverse[s], stream[s].next(), block.codes[s] + i);
      } else if constexpr (Rule::kSigned[s]) {
        encode_signed(values[s], inverse[s], block.codes[s] + i);
      } else {
        encode_unsigned(values[s], inverse[s], block.codes[s] + i);
      }
    });
    if constexpr (!kPipelined && kWidth > 1)
      write.quiet(block.param + i, update<true>(rule, load(block.param + i), values));
  }

  TORCHAO8_HD void finish(int length) const {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      *block.scales[s] = final_scale<Rule::kSigned[s], true>(plan.extreme[s], rule.unit[s], length,
                                                             block.codes[s]);
    });
  }
};

}  // namespace torchao8::TORCHAO8_ISA::dynamic
