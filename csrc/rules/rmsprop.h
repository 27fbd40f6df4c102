// RMSprop ("Neural Networks for Machine Learning", lecture 6, Tieleman and Hinton, 2012; centered:
// "Generating Sequences With Recurrent Neural Networks", Graves, 2013), with L2 weight decay, a
// momentum of the scaled gradients and eps beside the root, as torch.optim.RMSprop has them.
#pragma once

#include "rules/rule.h"

namespace torchao8 {

struct RmspropOptions : CommonOptions {
  double alpha, eps, weight_decay, momentum;
  bool maximize;

  static constexpr NumberArgument<RmspropOptions> kNumbers[] = {
      {"alpha", &RmspropOptions::alpha, Range::kDecayRate},
      {"eps", &RmspropOptions::eps, Range::kNotNegative},
      {"weight_decay", &RmspropOptions::weight_decay, Range::kNotNegative},
      {"momentum", &RmspropOptions::momentum, Range::kNotNegative}};
  static constexpr FlagArgument<RmspropOptions> kFlags[] = {
      {"maximize", &RmspropOptions::maximize}};
};

template <bool kCentered, bool kMomentum>
struct RmspropRule {
  using Options = RmspropOptions;
  static constexpr int kStates = 1 + (kCentered ? 1 : 0) + (kMomentum ? 1 : 0);
  // The last value is the momentum buffer, or, without one, the gradient.
  static constexpr int kValues = 2 + (kCentered ? 1 : 0), kLast = kValues - 1;
  static constexpr bool kSigned[3] = {false, true, true};
  static constexpr bool kStochastic[3] = {true, false, false};
  static constexpr bool kMomentsNeedParam = true;
  static constexpr bool kMonotone = !kMomentum;  // the buffer adds up quotients

  float unit[3], decay[3], gain;
  float coupled, grad_gain;
  float mean_factor;            // of the squared mean gradient, to be in the units of the squares
  float root_factor, eps_term;  // of the denominator; without momentum, both divided by -lr
  float step_size;

  TORCHAO8_HD static RmspropRule at_step(const RmspropOptions& o, int64_t, bool scaled_state) {
    RmspropRule r;
    const double gain = 1 - o.alpha, unit = scaled_state ? gain : 1;
    for (int s = 0; s < kStates; s++) {
      r.unit[s] = float(unit);
      r.decay[s] = float(o.alpha / unit);
    }
    if constexpr (kMomentum) {
      r.unit[kLast] = 1.0f;
      r.decay[kLast] = float(o.momentum);
    }
    r.gain = float(gain / unit);
    r.mean_factor = float(-unit);
    r.coupled = float(o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    const double divisor = kMomentum ? 1 : -o.lr;
    r.root_factor = float(std::sqrt(unit) / divisor);
    r.eps_term = o.eps > 0 ? float(o.eps / divisor) : 0.0f;
    r.step_size = float(-o.lr);
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return denominator_is_bounded(root_factor, eps_term); }

  TORCHAO8_HD RmspropRule with_scales(const float* scale) const {
    RmspropRule r = *this;
    for (int s = 0; s < kStates; s++) r.decay[s] = decay[s] * scale[s];
    return r;
  }

  // In 8 bits, a variance of less than what rounding the square may add or take is taken for that:
  // a difference of rounding errors must not be a denominator.
  template <bool kScaledState, class F>
  TORCHAO8_HD F root_of(const F* values) const {
    F variance = values[0];
    if constexpr (kCentered) {
      variance = fma(values[1] * F(mean_factor), values[1], values[0]);
      if constexpr (kScaledState) variance = max(variance, values[0] * F(0x1p-6f));
    }
    return sqrt(max(variance, F(root_floor<kScaledState>())));
  }

  TORCHAO8_HD RmspropRule magnitudes() const {
    RmspropRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F p, F g, F* values) const {
    g = fma(p, F(coupled), g * F(grad_gain));
    values[0] = fma(values[0], F(decay[0]), (g * F(gain)) * g);
    if constexpr (kCentered) values[1] = fma(values[1], F(decay[1]), g * F(gain));
    if constexpr (kMomentum) {
      const F scaled =
          g * reciprocal(fma(root_of<kScaledState>(values), F(root_factor), F(eps_term)));
      values[kLast] = fma(values[kLast], F(decay[kLast]), scaled);
    } else {
      values[kLast] = g;
    }
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    if constexpr (kMomentum) return values[kLast];
    return root_of<kScaledState>(values);
  }
  template <class F>
  TORCHAO8_HD F step(const F* values, F root) const {
    if constexpr (kMomentum) return root * F(step_size);
    return values[kLast] * reciprocal(fma(root, F(root_factor), F(eps_term)));
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return p + step;
  }
};

struct RmspropFamily {
  static constexpr const char* kName = "rmsprop";
  static constexpr State kStates[] = {
      {"square_avg"}, {"grad_avg", Presence::kOptional}, {"momentum_buffer", Presence::kOptional}};
  using Options = RmspropOptions;
  using Rules = Types<RmspropRule<false, false>, RmspropRule<false, true>, RmspropRule<true, false>,
                      RmspropRule<true, true>>;

  template <class Visit>
  static void choose(const Options& o, const bool* has, bool, Visit visit) {
    // As in torch.optim, a momentum of 0 leaves the buffer as it is, for steps that have one again.
    const bool momentum = has[2] && o.momentum != 0;
    if (has[1]) {
      momentum ? visit(Type<RmspropRule<true, true>>()) : visit(Type<RmspropRule<true, false>>());
    } else {
      momentum ? visit(Type<RmspropRule<false, true>>()) : visit(Type<RmspropRule<false, false>>());
    }
  }
};

}  // namespace torchao8
