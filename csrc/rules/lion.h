// Lion ("Symbolic Discovery of Optimization Algorithms", Chen et al., 2023, algorithm 2), with its
// decoupled weight decay. The sign of zero is zero: what has no gradient and no momentum moves by
// the decay alone.
#pragma once

#include "rules/rule.h"

namespace torchao8 {

struct LionOptions : CommonOptions {
  double beta1, beta2, weight_decay;
  bool maximize;

  static constexpr NumberArgument<LionOptions> kNumbers[] = {
      {"beta1", &LionOptions::beta1, Range::kDecayRate},
      {"beta2", &LionOptions::beta2, Range::kDecayRate},
      {"weight_decay", &LionOptions::weight_decay, Range::kNotNegative}};
  static constexpr FlagArgument<LionOptions> kFlags[] = {{"maximize", &LionOptions::maximize}};
};

struct LionRule {
  using Options = LionOptions;
  static constexpr int kStates = 1, kValues = 2;  // the momentum; the interpolation
  static constexpr bool kSigned[2] = {true, true};
  static constexpr bool kStochastic[1] = {false};
  static constexpr int kRootOf[1] = {-1};
  static constexpr bool kMomentsNeedParam = false;

  float unit[1], decay[1], gain;
  float interpolation;  // beta1 / (1 - beta1): the sign of the interpolation is all that counts
  float step_size, shrink, grad_gain;

  TORCHAO8_HD static LionRule at_step(const LionOptions& o, int64_t, bool scaled_state) {
    LionRule r;
    const double gain = 1 - o.beta2, unit = scaled_state ? gain : 1;
    r.unit[0] = float(unit);
    r.decay[0] = float(o.beta2 / unit);
    r.gain = float(gain / unit);
    r.interpolation = float(o.beta1 / (1 - o.beta1));
    r.step_size = float(-o.lr);
    r.shrink = float(1 - o.lr * o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return true; }

  TORCHAO8_HD LionRule with_scales(const float* scale) const {
    LionRule r = *this;
    r.decay[0] = decay[0] * scale[0];
    r.interpolation = interpolation * scale[0];
    return r;
  }

  TORCHAO8_HD LionRule magnitudes() const {
    LionRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F, F g, F* values) const {
    g = g * F(grad_gain);
    values[1] = fma(values[0], F(interpolation), g);
    values[0] = fma(values[0], F(decay[0]), g * F(gain));
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return values[1];
  }
  template <class F>
  TORCHAO8_HD F step(const F*, F root) const {
    return sign(root) * F(step_size);
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return fma(p, F(shrink), step);
  }
};

struct LionFamily {
  static constexpr const char* kName = "lion";
  static constexpr State kStates[] = {{"exp_avg"}};
  using Options = LionOptions;
  using Rules = Types<LionRule>;

  template <class Visit>
  static void choose(const Options&, const bool*, bool, Visit visit) {
    visit(Type<LionRule>());
  }
};

}  // namespace torchao8
