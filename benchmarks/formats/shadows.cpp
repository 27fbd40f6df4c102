// Steps of Adam with state in formats whose constants can be chosen: those that the library does
// not have, beside those that it has. The arithmetic of the mu-law format is the library's own.
#include "codec/random.h"
#include "formats/mulaw_format.h"
#include "rules/adam.h"
#include "rules/update.h"

using namespace torchao8;

namespace {

using Rule = AdamRule<false, true>;
constexpr int kLongest = 256;  // elements of a block

}  // namespace

// What Python gives (shadows.py).
struct Step {
  int64_t rows, row_length, block, t, seed;
  double beta1, beta2, eps;
  const float* grad;
  float* update;  // of each element, lr = 1; null where nobody looks
};

namespace {

// Calls body(first element, elements) for each block. No block has parts of two rows.
template <class Body>
void for_each_block(const Step& step, Body body) {
  for (int64_t row = 0; row < step.rows; row++) {
    for (int64_t at = 0; at < step.row_length; at += step.block) {
      body(row * step.row_length + at, int(std::min(step.block, step.row_length - at)));
    }
  }
}

Rule rule_of(const Step& step) {
  AdamOptions options = {};
  options.lr = 1;
  options.beta1 = step.beta1;
  options.beta2 = step.beta2;
  options.eps = step.eps;
  options.decoupled = true;
  return Rule::at_step(options, step.t, true);
}

void tell(const Step& step, const Rule& rule, int64_t i, const float* moments) {
  if (step.update) step.update[i] = -update<true>(rule, 0.0f, moments);
}

template <class Codec>
struct MulawState {
  MulawScale to;
  BlockRandom random;

  template <bool kStill>
  void start(float bound, float unit, const Step& step, int stream, int64_t first) {
    to.scale = Codec::template scale_of<kStill>(bound, unit);
    to.inverse = Codec::inverse_of(to.scale, unit);
    to.least_code = Codec::least_code(to.scale);
    random.start(random_key(uint64_t(step.seed), uint64_t(step.t), uint64_t(stream)),
                 uint64_t(first));
  }
};

template <int kSignedBits, int kUnsignedBits>
void mulaw(const Step& step, uint8_t* const* codes, float* const* scales) {
  using First = MulawCodec<true, kSignedBits>;
  using Second = MulawCodec<false, kUnsignedBits>;
  const Rule plain = rule_of(step);
  int64_t block = 0;
  for_each_block(step, [&](int64_t first, int n) {
    const float stored[2] = {scales[0][block], scales[1][block]};
    const Rule rule = plain.with_scales(stored);
    float values[kLongest][2], largest[2] = {0.0f, 0.0f}, grad = 0.0f, bounds[2];
    for (int i = 0; i < n; i++) {
      values[i][0] = First::decode(codes[0][first + i]);
      values[i][1] = Second::decode(codes[1][first + i]);
      for (int s = 0; s < 2; s++) largest[s] = max(std::fabs(values[i][s]), largest[s]);
      grad = max(std::fabs(step.grad[first + i]), grad);
      rule.moments<true>(0.0f, step.grad[first + i], values[i]);
      tell(step, rule, first + i, values[i]);
    }
    mulaw_bounds(rule, 0.0f, grad, largest, bounds);
    MulawState<First> m;
    MulawState<Second> v;
    m.template start<false>(bounds[0], rule.unit[0], step, 0, first);
    v.template start<true>(bounds[1], rule.unit[1], step, 1, first);
    for (int i = 0; i < n; i++) {
      codes[0][first + i] = uint8_t(First::encode(values[i][0], m.to.inverse, First::kHalf, 0));
      codes[1][first + i] = uint8_t(Second::encode(
          values[i][1], v.to.inverse, Second::draw(v.random(uint32_t(i))), v.to.least_code));
    }
    scales[0][block] = m.to.scale;
    scales[1][block] = v.to.scale;
    block++;
  });
}

// ---- 4 bits: what the codes stand for is kept, not the codes ------------------------------------

// Second moments: an exponent of 3 bits, a mantissa of one, no zero, in units of a power of two.
void round_squares(float* v, int n, float unit, const BlockRandom& random) {
  float largest = 0.0f;
  for (int i = 0; i < n; i++) largest = max(v[i], largest);
  const float exact = largest * unit * (1.0f / 1.5f);
  const float scale = exact < kMinScale ? 0.0f : round_up_to_bits<0>(exact);
  const float inverse = scale > 0.0f ? unit / scale : 0.0f;
  for (int i = 0; i < n; i++) {
    const uint32_t u = (float_bits(v[i] * inverse) + (random(uint32_t(i)) >> 10)) >> 22;
    const uint32_t code = u < 240 ? 0 : u > 255 ? 15 : u - 240;
    v[i] = scale * bits_float((code << 22) + (120u << 23));
  }
}

// First moments, to the nearest of some levels of the extreme one: of m, or of m over the root of
// the stored second moment.
struct Levels {
  const float* values;  // ascending
  int count;
  bool with_sign;  // the extreme element's own sign is in the scale; the largest level is 1
  bool fits;       // the scale is such that no number lies below the lowest level; else it is cut
  bool of_roots;
};

void round_firsts(float* m, const float* v, int n, float unit, const Levels& levels) {
  float roots[kLongest], y[kLongest], best[kLongest], highest = 0.0f, lowest = 0.0f;
  for (int i = 0; i < n; i++) {
    roots[i] = levels.of_roots ? std::sqrt(v[i]) : 1.0f;
    y[i] = roots[i] > 0.0f ? m[i] * unit / roots[i] : 0.0f;
    highest = max(y[i], highest);
    lowest = min(y[i], lowest);
  }
  float scale = max(highest, -lowest);
  if (levels.fits) scale = max(scale, min(highest, -lowest) / -levels.values[0]);
  if (levels.with_sign && highest < -lowest) scale = -scale;
  const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; i++) best[i] = levels.values[0];
  for (int k = 1; k < levels.count; k++) {
    const float level = levels.values[k];
    for (int i = 0; i < n; i++) {
      const float x = y[i] * inverse;
      best[i] = std::fabs(x - level) < std::fabs(x - best[i]) ? level : best[i];
    }
  }
  for (int i = 0; i < n; i++) m[i] = best[i] * scale * roots[i];
}

}  // namespace

extern "C" {

// Returns whether there is a format with these mantissa bits.
bool mulaw_step(const Step* step, int signed_bits, int unsigned_bits, uint8_t* m_codes,
                uint8_t* v_codes, float* m_scales, float* v_scales) {
  uint8_t* codes[2] = {m_codes, v_codes};
  float* scales[2] = {m_scales, v_scales};
  switch (10 * signed_bits + unsigned_bits) {
    case 44:
      mulaw<4, 4>(*step, codes, scales);
      return true;
    case 45:
      mulaw<4, 5>(*step, codes, scales);
      return true;
    case 54:
      mulaw<5, 4>(*step, codes, scales);
      return true;
    case 55:
      mulaw<5, 5>(*step, codes, scales);
      return true;
    default:
      return false;
  }
}

void four_bit_step(const Step* step, const float* level_values, int level_count, bool with_sign,
                   bool fits, bool of_roots, float* m, float* v) {
  const Levels levels = {level_values, level_count, with_sign, fits, of_roots};
  const Rule rule = rule_of(*step);
  for_each_block(*step, [&](int64_t first, int n) {
    float firsts[kLongest], squares[kLongest];
    for (int i = 0; i < n; i++) {
      float values[2] = {m[first + i], v[first + i]};
      rule.moments<true>(0.0f, step->grad[first + i], values);
      tell(*step, rule, first + i, values);
      firsts[i] = values[0];
      squares[i] = values[1];
    }
    BlockRandom random;
    random.start(random_key(uint64_t(step->seed), uint64_t(step->t), 1), uint64_t(first));
    round_squares(squares, n, rule.unit[1], random);
    round_firsts(firsts, squares, n, rule.unit[0], levels);
    for (int i = 0; i < n; i++) {
      m[first + i] = firsts[i];
      v[first + i] = squares[i];
    }
  });
}
}
