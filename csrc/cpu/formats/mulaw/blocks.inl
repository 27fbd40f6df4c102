// Steps of blocks in the mu-law format, in vectors.
//
// A look at a block's gradients, codes and, if the rule wants them, parameters bounds its new
// states before any of them is computed, and tells whether all elements are usable: then the block
// is decoded, stepped and encoded in one pass, without a buffer. Else nothing has been written, and
// the scalar code takes it (scalar.inl, the definition). The look at a block comes before the pass
// over the one in front of it, which hides how long it takes to get from maxima to scales.
#pragma once

#include "cpu/formats/mulaw/codec.inl"
#include "cpu/step/memory.inl"

namespace torchao8::TORCHAO8_ISA::mulaw {

template <class Rule>
struct Plan {
  Rule rule;  // with the block's scales
  MulawScale scales[Rule::kStates];
  bool good;
};

// What the new states of a monotone rule cannot exceed.
template <class Rule, class T>
TORCHAO8_HD void find_bounds(const Rule& rule, const Block<Rule, T>& block, int length,
                             float* extremes) {
  constexpr int N = Rule::kStates;
  LargestOf<T> grad, param;
  LargestByte code[N];
  const auto look = [&](int i) TORCHAO8_LAMBDA {
    for (int j = 0; j < kStep; j += kLineOf<T>) {
      prefetch(block.grad + i + j + kAhead);
      if constexpr (Rule::kMomentsNeedParam) prefetch(block.param + i + j + kAhead);
    }
    grad.add(block.grad + i);
    if constexpr (Rule::kMomentsNeedParam) param.add(block.param + i);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      code[s].template add<uint8_t(Codec<Rule::kSigned[s]>::kLast)>(block.codes[s] + i);
    });
  };
  // Two steps at a time: their codes fill a line of the cache.
  for (int i = 0; i < length; i += 2 * kStep) {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA { prefetch(block.codes[s] + i + kAhead); });
    look(i);
    if (i + kStep < length) look(i + kStep);
  }
  float values[N];
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    values[s] = Codec<Rule::kSigned[s]>::decode(code[s].result());
  });
  mulaw_bounds(rule, param.result(), grad.result(), values, extremes);
}

// The largest magnitudes of the new states, NaN where one of them is.
template <class Rule, class T>
TORCHAO8_HD void find_largest(const Rule& rule, const Block<Rule, T>& block, int length,
                              float* extremes) {
  constexpr int N = Rule::kStates;
  const StateDecoder<Rule> decode;
  LargestOf<float> largest[N];
  for (int i = 0; i < length; i += kWidth) {
    prefetch(block.grad + i + kAhead);
    prefetch(block.param + i + kAhead);
    F values[Rule::kValues];
    decode(block.codes, i, values);
    rule.template moments<true>(load(block.param + i), load(block.grad + i), values);
    for (int s = 0; s < N; s++) largest[s].add(values[s]);
  }
  for (int s = 0; s < N; s++) extremes[s] = largest[s].result();
}

template <class Rule, class T>
TORCHAO8_HD void make_plan(Plan<Rule>& plan, const Rule& r, const Block<Rule, T>& block,
                           const BlockRun& run) {
  constexpr int N = Rule::kStates;
  float scale[N], extremes[N];
  for (int s = 0; s < N; s++) scale[s] = *block.scales[s];
  plan.rule = r.with_scales(scale);
  if constexpr (kMonotoneOf<Rule>) {
    find_bounds(plan.rule, block, run.length, extremes);
  } else {
    find_largest(plan.rule, block, run.length, extremes);
  }
  plan.good = true;
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    plan.good = plan.good && usable<false>(scale[s]) && usable<false>(extremes[s]);
    if (run.extremes) extremes[s] = run.extremes[s];
    plan.good = plan.good && usable<true>(extremes[s]);
    plan.scales[s].template set<Rule::kSigned[s], Rule::kStochastic[s]>(extremes[s],
                                                                        plan.rule.unit[s]);
  });
}

// An encoder for each state of a rule, of its own type.
template <class Rule, class T, bool kStochastic, int s>
struct NumberedEncoder : EncoderOf<Rule::kSigned[s], kStochastic && Rule::kStochastic[s], T> {
  TORCHAO8_HD NumberedEncoder() {}
};

template <class Rule, class T, bool kStochastic,
          class States = std::make_integer_sequence<int, Rule::kStates>>
struct Encoders;
template <class Rule, class T, bool kStochastic, int... s>
struct Encoders<Rule, T, kStochastic, std::integer_sequence<int, s...>>
    : NumberedEncoder<Rule, T, kStochastic, s>... {
  TORCHAO8_HD Encoders() {}
  template <class State>
  TORCHAO8_HD NumberedEncoder<Rule, T, kStochastic, State::value>& of(State) {
    return *this;
  }
};

// As ParamWriter, in an order of T's.
template <class T, bool kRounds>
struct QuietWriter {
  typename Lanes<T>::Stream stream;

  TORCHAO8_HD void start(uint64_t key, uint64_t first_element) {
    if constexpr (kRounds) {
      BlockRandom random;
      random.start(key, first_element);
      stream.start(random);
    }
  }
  TORCHAO8_HD void operator()(T* x, F v) {
    if constexpr (kRounds) {
      Lanes<T>::store_quiet(x, v, stream.next_hashes());
    } else {
      Lanes<T>::store_quiet(x, v);
    }
  }
};

template <class Rule, class T, bool kStochastic, bool kRounds>
TORCHAO8_HD void run_block(const Plan<Rule>& plan, const Block<Rule, T>& block,
                           const BlockRun& run) {
  constexpr int N = Rule::kStates;
  const Rule rule = plan.rule;
  const int length = run.length;
  const StateDecoder<Rule, T> decode;
  typename Lanes<T>::Stream stream[N];
  float inverse[N];
  Bytes least[N];
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    inverse[s] = plan.scales[s].inverse;
    least[s] = all_bytes(uint8_t(plan.scales[s].least_code));
    *block.scales[s] = plan.scales[s].scale;
    if constexpr (kStochastic && Rule::kStochastic[s]) {
      BlockRandom random;
      random.start(run.keys[s], block.first_element);
      stream[s].start(random);
    }
  });
  QuietWriter<T, kRounds> write;
  write.start(block.param_key, block.first_element);
  for (int i = 0; i < length; i += kStep) {
    if constexpr (!Rule::kMomentsNeedParam) {
      for (int j = 0; j < kStep; j += kLineOf<T>) prefetch(block.param + i + j + kAhead);
    }
    // A root and a division take long. Between the root, the division by it and the new parameter
    // lie the numbers of the other vector and the codes, which wait for neither.
    Encoders<Rule, T, kStochastic> encoders;
    F values[2][Rule::kValues], roots[2], steps[2];
    for_each_state<2>([&](auto half) TORCHAO8_LAMBDA {
      const int at = i + half * kWidth;
      decode(block.codes, at, values[half]);
      const F p = Lanes<T>::load(block.param + at), g = Lanes<T>::load(block.grad + at);
      rule.template moments<true>(p, g, values[half]);
      roots[half] = rule.template root<true>(values[half]);
    });
    for_each_state<2>([&](auto half) TORCHAO8_LAMBDA {
      steps[half] = rule.step(values[half], roots[half]);
      for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
        auto& encoder = encoders.of(s);
        const F v = values[half][s];
        if constexpr (kStochastic && Rule::kStochastic[s]) {
          encoder.add(half, v, F(inverse[s]), stream[s].next_hashes());
        } else {
          encoder.add(half, v, F(inverse[s]));
        }
      });
    });
    for_each_state<2>([&](auto half) TORCHAO8_LAMBDA {
      T* const at = block.param + i + half * kWidth;
      write(at, rule.apply(Lanes<T>::load(at), steps[half]));
    });
    for_each_state<N>([&](auto s)
                          TORCHAO8_LAMBDA { encoders.of(s).store(block.codes[s] + i, least[s]); });
  }
}

template <class Rule, class T>
TORCHAO8_COLD void scalar_block(const Rule& rule, const Block<Rule, T>& block, BlockRun run) {
  run.param = block.param;
  run.grad = block.grad;
  for (int s = 0; s < Rule::kStates; s++) {
    run.codes[s] = block.codes[s];
    run.scales[s] = block.scales[s];
  }
  run.blocks = 1;
  run.first_element = block.first_element;
  const auto& step = block_kernels<Rule>(scalar_kernels<MulawFormat>()).step;
  (std::is_same_v<T, float> ? step.float32 : step.bfloat16)(rule, run);
}

template <class Rule, class T, bool kStochastic, bool kRounds>
void step_blocks(const Rule& rule, const BlockRun& run) {
  Plan<Rule> plans[2];
  Block<Rule, T> block(run);
  make_plan(plans[0], rule, block, run);
  for (int64_t k = 0; k < run.blocks; k++) {
    const int now = int(k & 1);
    Block<Rule, T> next = block;
    next.advance(run.length);
    if (k + 1 < run.blocks) make_plan(plans[!now], rule, next, run);
    if (plans[now].good) {
      run_block<Rule, T, kStochastic, kRounds>(plans[now], block, run);
    } else {
      scalar_block(rule, block, run);
    }
    block = next;
  }
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

}  // namespace torchao8::TORCHAO8_ISA::mulaw
