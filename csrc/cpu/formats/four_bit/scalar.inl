// Steps of blocks in the 4-bit format, in plain C++. It is the definition: blocks.inl gives the
// same bits, and leaves blocks with an element that is not usable to this.
#pragma once

#include "cpu/kernel_tables.h"
#include "cpu/step/memory.inl"
#include "cpu/step/states.inl"

namespace torchao8::scalar::four_bit {

// Only a format with more than blocks has one: see instances.inl.
template <class Rule>
struct StateDecoder;

// One block. First the new values of all elements are made. Then the unsigned states are encoded,
// whose codes tell the roots that signed states are divided by, and then the signed ones.
template <class Rule, class T, bool kStochastic, bool kRounds>
struct BlockStep {
  static constexpr int N = Rule::kStates, kValues = Rule::kValues;
  const Block<Rule, T, 4>& block;
  const BlockRun& run;
  float scale[N], new_scale[N];
  Rule rule;
  float values[N][kMaxBlock];   // of the new states, in units
  uint8_t codes[N][kMaxBlock];  // of the new states, one a byte

  TORCHAO8_HD BlockStep(const Rule& r, const Block<Rule, T, 4>& b, const BlockRun& all)
      : block(b), run(all) {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      scale[s] = four_bit_scale<Rule::kSigned[s]>(*block.scales[s]);
    });
    rule = r.with_scales(scale);
  }

  // The stored numbers of an element, as multiples of their scales.
  TORCHAO8_HD void decode(int i, float* old) const {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      const uint32_t code = four_bit_code(block.codes[s], i);
      if constexpr (!Rule::kSigned[s]) {
        old[s] = FourBitSquares::decode(code);
      } else if constexpr (Rule::kRootOf[s] < 0) {
        old[s] = FourBitLevels::decode(code);
      } else {
        constexpr int kRoot = Rule::kRootOf[s];
        const FourBitRoots roots(scale[kRoot]);
        old[s] = roots.root(four_bit_code(block.codes[kRoot], i)) * FourBitLevels::decode(code);
      }
    });
  }

  // Makes the new values, and writes the parameters.
  TORCHAO8_HD void make() {
    ParamWriter<kRounds> write;
    write.start(block.param_key, block.first_element);
    for (int i = 0; i < run.length; i++) {
      float old[N], now[kValues];
      decode(i, old);
      for (int s = 0; s < N; s++) now[s] = old[s];
      const float p = load(block.param + i);
      rule.template moments<true>(p, load(block.grad + i), now);
      const bool good = all_in_range<Rule>(now);
      if (good) {
        write(block.param + i, update<true>(rule, p, now));
      } else {
        write.skip();
      }
      for (int s = 0; s < N; s++)
        values[s][i] = good ? now[s] : kept_value(old[s], scale[s], rule.unit[s]);
    }
  }

  template <int s>
  TORCHAO8_HD RandomStream stream_of() const {
    BlockRandom random;
    random.start(run.keys[s], block.first_element);
    RandomStream stream;
    stream.start(random);
    return stream;
  }

  template <int s>
  TORCHAO8_HD void encode_squares() {
    Extreme<false> extreme;
    for (int i = 0; i < run.length; i++) extreme.add(values[s][i]);
    const float largest = usable<false>(scale[s]) ? extreme.result() : scale[s];
    new_scale[s] = FourBitSquares::scale_of(largest, rule.unit[s]);
    const float inverse = FourBitSquares::inverse_of(new_scale[s], rule.unit[s]);
    RandomStream stream = stream_of<s>();
    for (int i = 0; i < run.length; i++) {
      uint32_t added = FourBitSquares::kHalf;
      if constexpr (kStochastic && FourBitFormat::draws<Rule>(s))
        added = FourBitSquares::draw(stream.next_hashes());
      // Without a scale that is a number there are no states.
      codes[s][i] = uint8_t(
          std::isnan(new_scale[s]) ? 0u : FourBitSquares::encode(values[s][i], inverse, added));
    }
  }

  template <int s>
  TORCHAO8_HD void encode_levels() {
    constexpr int kRoot = Rule::kRootOf[s];
    float highest = 0.0f, lowest = 0.0f;
    for (int i = 0; i < run.length; i++) {
      if constexpr (kRoot >= 0) {
        const FourBitRoots roots(new_scale[kRoot]);
        values[s][i] = values[s][i] * roots.reciprocal_of_root(codes[kRoot][i]);
      }
      highest = max(values[s][i], highest);
      lowest = min(values[s][i], lowest);
    }
    new_scale[s] =
        usable<true>(scale[s]) ? FourBitLevels::scale_of(highest, lowest, rule.unit[s]) : scale[s];
    const float inverse = FourBitLevels::inverse_of(new_scale[s], rule.unit[s]);
    RandomStream stream = stream_of<s>();
    for (int i = 0; i < run.length; i++) {
      uint32_t code;
      if constexpr (kStochastic && FourBitFormat::draws<Rule>(s)) {
        const uint32_t drawn = FourBitLevels::draw(stream.next_hashes());
        code = FourBitLevels::encode(values[s][i], inverse, drawn);
      } else {
        code = FourBitLevels::encode(values[s][i], inverse);
      }
      codes[s][i] = uint8_t(std::isnan(new_scale[s]) ? FourBitLevels::kZero : code);
    }
  }

  TORCHAO8_HD void operator()() {
    make();
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (!Rule::kSigned[s]) encode_squares<s>();
    });
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (Rule::kSigned[s]) encode_levels<s>();
    });
    for (int s = 0; s < N; s++) {
      for (int i = 0; i < run.length; i += 2)
        block.codes[s][i / 2] = uint8_t(codes[s][i] | codes[s][i + 1] << 4);
      *block.scales[s] = new_scale[s];
    }
  }
};

template <class Rule, class T, bool kStochastic, bool kRounds>
void step_blocks(const Rule& rule, const BlockRun& run) {
  Block<Rule, T, 4> block(run);
  for (int64_t k = 0; k < run.blocks; k++) {
    BlockStep<Rule, T, kStochastic, kRounds>(rule, block, run)();
    block.advance(run.length);
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

template <bool kSigned>
float quantize_block(const float* x, int n, uint8_t* codes) {
  const FourBitScale to = four_bit_scale_of_block<kSigned>(x, n);
  const auto code = [&](int i) TORCHAO8_LAMBDA {
    if (i >= n || std::isnan(to.scale)) return uint32_t(FourBitFormat::zero_byte<kSigned>() & 15);
    return kSigned ? FourBitLevels::encode(x[i], to.inverse)
                   : FourBitSquares::encode(x[i], to.inverse, FourBitSquares::kHalf);
  };
  for (int i = 0; i < n; i += 2) codes[i / 2] = uint8_t(code(i) | code(i + 1) << 4);
  return to.scale;
}

template <bool kSigned>
void dequantize_block(const uint8_t* codes, int n, float scale, float* x) {
  for (int i = 0; i < n; i++) {
    const uint32_t code = four_bit_code(codes, i);
    x[i] = (kSigned ? FourBitLevels::decode(code) : FourBitSquares::decode(code)) * scale;
  }
}

}  // namespace torchao8::scalar::four_bit
