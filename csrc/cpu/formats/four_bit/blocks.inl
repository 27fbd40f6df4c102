// Steps of blocks in the 4-bit format, in vectors.
//
// A signed state is divided by roots of the second moments as they are stored, whose codes need the
// scale of their block, which needs all of its new values. So a block takes three passes over a
// buffer in the first-level cache: the new values; the unsigned codes, the quotients and the
// parameters; the signed codes. Between two of them the extreme element of a whole block is
// awaited. Several neighbouring blocks share each pass, so that there is work in the meantime.
//
// A block with an element that is not usable is found after the first pass, when nothing has been
// written, and left to the scalar code (scalar.inl, the definition).
#pragma once

#include "cpu/formats/four_bit/codec.inl"
#include "cpu/step/memory.inl"

namespace torchao8::TORCHAO8_ISA::four_bit {

constexpr int kGroup = 512;  // elements of neighbouring blocks that share a pass, or one block
constexpr int kMostBlocks = kGroup / 64;

template <class Rule, class T>
TORCHAO8_COLD void scalar_block(const Rule& rule, const Block<Rule, T, 4>& block, BlockRun run) {
  run.param = block.param;
  run.grad = block.grad;
  for (int s = 0; s < Rule::kStates; s++) {
    run.codes[s] = block.codes[s];
    run.scales[s] = block.scales[s];
  }
  run.blocks = 1;
  run.first_element = block.first_element;
  const auto& step = block_kernels<Rule>(scalar_kernels<FourBitFormat>()).step;
  (std::is_same_v<T, float> ? step.float32 : step.bfloat16)(rule, run);
}

// Whether a signed state is divided by roots of another one.
template <class Rule>
constexpr bool has_root(int s) {
  return Rule::kSigned[s] && Rule::kRootOf[s] >= 0;
}
template <class Rule>
constexpr bool has_roots() {
  for (int s = 0; s < Rule::kStates; s++) {
    if (has_root<Rule>(s)) return true;
  }
  return false;
}

// FourBitLevels::scale_of() of ordinary numbers without a branch on what is random, their signs:
// a wrong guess of it is found out after the whole block, and costs as much as half of one.
TORCHAO8_HD float scale_of_levels(const Ends& quotients, float unit) {
  const float highest = quotients.highest(), lowest = quotients.lowest(), below = -lowest;
  const uint32_t is_below = 0u - uint32_t(highest < below);
  const uint32_t swapped = (float_bits(highest) ^ float_bits(below)) & is_below;
  const float extreme = bits_float(float_bits(highest) ^ swapped);
  const float other = bits_float(float_bits(below) ^ swapped);
  if (!(extreme > 0x1p-80f && extreme < 0x1p120f && unit > 0x1p-40f && unit <= 1.0f))
    return FourBitLevels::scale_of(highest, lowest, unit);
  const float needed = other * (8.0f / 7.0f);
  const uint32_t rounded = (float_bits(needed * unit) + 4u) & ~7u;
  const uint32_t is_needed = 0u - uint32_t(needed > extreme * FourBitLevels::kRoundings);
  return bits_float((rounded & is_needed) | (float_bits(extreme * unit) & ~is_needed) |
                    (is_below & 0x80000000u));
}

// What is known of a block between its passes.
template <class Rule>
struct Plan {
  Rule rule;                                           // with the block's scales
  float scale[Rule::kStates], inverse[Rule::kStates];  // of the new states
  bool good;

  TORCHAO8_HD void set_squares(int s, float largest) {
    scale[s] = FourBitSquares::scale_of(largest, rule.unit[s]);
    inverse[s] = FourBitSquares::inverse_of(scale[s], rule.unit[s]);
  }
  TORCHAO8_HD void set_levels(int s, const Ends& quotients) {
    scale[s] = scale_of_levels(quotients, rule.unit[s]);
    inverse[s] = FourBitLevels::inverse_of(scale[s], rule.unit[s]);
  }
};

// The values of a group of blocks: new ones, in units, and then quotients in their place.
template <class Rule>
struct Values {
  alignas(64) float of[Rule::kValues][kMaxBlock];
};

// First pass: the new values of the block, which begin at this place.
template <class Rule, class T>
TORCHAO8_HD void make_values(Plan<Rule>& plan, Values<Rule>& values, int place, const Rule& r,
                             const Block<Rule, T, 4>& block, int length) {
  constexpr int N = Rule::kStates, kValues = Rule::kValues;
  float old_scale[N];
  plan.good = true;
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    old_scale[s] = *block.scales[s];
    plan.good = plan.good && usable<Rule::kSigned[s]>(old_scale[s]);
    prefetch(block.codes[s] + kAhead / 2);
  });
  const Rule rule = r.with_scales(old_scale);
  const BlockDecoder<Rule> decode(old_scale);
  Ends of_signed[N];
  Extreme<false> of_unsigned[N];
  LargestOf<float> largest[N];  // which NaN is, too
  for (int i = 0; i < length; i += kWidth) {
    prefetch(block.grad + i + kAhead);
    prefetch(block.param + i + kAhead);
    F now[kValues], p(0.0f);
    decode(block.codes, i, now);
    if constexpr (Rule::kMomentsNeedParam) p = load(block.param + i);
    rule.template moments<true>(p, load(block.grad + i), now);
    for (int v = 0; v < kValues; v++) store(values.of[v] + place + i, now[v]);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (Rule::kSigned[s]) {
        largest[s].add(now[s]);
        if constexpr (!has_root<Rule>(s)) of_signed[s].add(now[s]);
      } else {
        of_unsigned[s].add(now[s]);
      }
    });
  }
  plan.rule = rule;
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    if constexpr (!Rule::kSigned[s]) {
      const float extreme = of_unsigned[s].result();
      plan.good = plan.good && usable<false>(extreme);
      plan.set_squares(s, extreme);
    } else {
      plan.good = plan.good && usable<false>(largest[s].result());
      if constexpr (!has_root<Rule>(s)) plan.set_levels(s, of_signed[s]);
    }
  });
}

// Second pass: the parameters, and all codes but those of quotients, which are made.
template <class Rule, class T, bool kStochastic, bool kRounds>
TORCHAO8_HD void encode(Plan<Rule>& plan, Values<Rule>& values, int place,
                        const Block<Rule, T, 4>& block, const BlockRun& run) {
  constexpr int N = Rule::kStates, kValues = Rule::kValues;
  const Rule rule = plan.rule;
  float scale[N], inverse[N];
  RandomStream stream[N];
  Ends quotients[N];
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    scale[s] = plan.scale[s];
    inverse[s] = plan.inverse[s];
    if constexpr (kStochastic && FourBitFormat::draws<Rule>(s)) {
      BlockRandom random;
      random.start(run.keys[s], block.first_element);
      stream[s].start(random);
    }
  });
  ParamWriter<kRounds> write;
  write.start(block.param_key, block.first_element);
  for (int i = 0; i < run.length; i += 2 * kWidth) {
    // Between a root, the division by it and the new parameter lie the codes, which wait for
    // neither.
    F now[2][kValues], roots[2], steps[2];
    U codes[N][2];
    for_each_state<2>([&](auto half) TORCHAO8_LAMBDA {
      const int at = place + i + half * kWidth;
      for (int v = 0; v < kValues; v++) now[half][v] = load(values.of[v] + at);
      roots[half] = rule.template root<true>(now[half]);
    });
    for_each_state<2>([&](auto half) TORCHAO8_LAMBDA {
      steps[half] = rule.step(now[half], roots[half]);
      for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
        constexpr bool kDraws = kStochastic && FourBitFormat::draws<Rule>(s);
        const F x = now[half][s];
        U& code = codes[s][half];
        if constexpr (!Rule::kSigned[s]) {
          U added = lanes_of(FourBitSquares::kHalf);
          if constexpr (kDraws)
            added = lanes_of(stream[s].next_hashes()) >> (32 - FourBitSquares::kShift);
          code = encode_squares(x, F(inverse[s]), added);
        } else if constexpr (!has_root<Rule>(s)) {
          if constexpr (kDraws) {
            code = encode_levels(x, F(inverse[s]), lanes_of(stream[s].next_hashes()) >> 16);
          } else {
            code = encode_levels(x, F(inverse[s]));
          }
        }
      });
      for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
        if constexpr (has_root<Rule>(s)) {
          constexpr int kRoot = Rule::kRootOf[s];
          const F quotient = now[half][s] * RootReciprocals(scale[kRoot])(codes[kRoot][half]);
          quotients[s].add(quotient);
          store(values.of[s] + place + i + half * kWidth, quotient);
        }
      });
    });
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (!has_root<Rule>(s))
        store_codes(block.codes[s] + i / 2, codes[s][0], codes[s][1]);
    });
    for_each_state<2>([&](auto half) TORCHAO8_LAMBDA {
      T* const at = block.param + i + half * kWidth;
      write.quiet(at, rule.apply(load(at), steps[half]));
    });
  }
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    if constexpr (has_root<Rule>(s)) plan.set_levels(s, quotients[s]);
    *block.scales[s] = plan.scale[s];
  });
}

// Third pass: the codes of quotients.
template <class Rule, class T>
TORCHAO8_HD void encode_quotients(const Plan<Rule>& plan, const Values<Rule>& values, int place,
                                  const Block<Rule, T, 4>& block, int length) {
  for_each_state<Rule::kStates>([&](auto s) TORCHAO8_LAMBDA {
    if constexpr (has_root<Rule>(s)) {
      if (std::isnan(plan.scale[s])) {  // a quotient is infinite, or close to it
        std::memset(block.codes[s], FourBitFormat::zero_byte<true>(), size_t(length) / 2);
        return;
      }
      const F inverse(plan.inverse[s]);
      const float* from = values.of[s] + place;
      for (int i = 0; i < length; i += 2 * kWidth)
        store_codes(block.codes[s] + i / 2, encode_levels(load(from + i), inverse),
                    encode_levels(load(from + i + kWidth), inverse));
    }
  });
}

template <class Rule, class T, bool kStochastic, bool kRounds>
void step_blocks(const Rule& rule, const BlockRun& run) {
  Values<Rule> values;
  Plan<Rule> plans[kMostBlocks];
  const int length = run.length, most = length < kGroup ? kGroup / length : 1;
  Block<Rule, T, 4> block(run);
  for (int64_t first = 0; first < run.blocks; first += most) {
    const int count = run.blocks - first < most ? int(run.blocks - first) : most;
    const Block<Rule, T, 4> group = block;
    for (int k = 0; k < count; k++) {
      make_values(plans[k], values, k * length, rule, block, length);
      block.advance(length);
    }
    block = group;
    for (int k = 0; k < count; k++) {
      if (plans[k].good) {
        encode<Rule, T, kStochastic, kRounds>(plans[k], values, k * length, block, run);
      } else {
        scalar_block(rule, block, run);
      }
      block.advance(length);
    }
    if constexpr (!has_roots<Rule>()) continue;
    block = group;
    for (int k = 0; k < count; k++) {
      if (plans[k].good) encode_quotients(plans[k], values, k * length, block, length);
      block.advance(length);
    }
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

}  // namespace torchao8::TORCHAO8_ISA::four_bit
