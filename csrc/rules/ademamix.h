// AdEMAMix ("The AdEMAMix Optimizer: Better, Faster, Older", Pagliardini et al., 2024, algorithm
// 1): Adam with a second, slow average of the gradients, and decoupled weight decay. Its factor
// alpha and its rate beta3 may be warmed up, by the schedules of section 3.
#pragma once

#include "rules/rule.h"
#include "rules/series.h"

namespace torchao8 {

struct AdemamixOptions : CommonOptions {
  double beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay;
  bool maximize;

  static constexpr NumberArgument<AdemamixOptions> kNumbers[] = {
      {"beta1", &AdemamixOptions::beta1, Range::kDecayRate},
      {"beta2", &AdemamixOptions::beta2, Range::kDecayRate},
      {"beta3", &AdemamixOptions::beta3, Range::kDecayRate},
      {"alpha", &AdemamixOptions::alpha, Range::kNotNegative},
      {"t_alpha", &AdemamixOptions::t_alpha, Range::kNotNegative},
      {"t_beta3", &AdemamixOptions::t_beta3, Range::kNotNegative},
      {"eps", &AdemamixOptions::eps, Range::kNotNegative},
      {"weight_decay", &AdemamixOptions::weight_decay, Range::kNotNegative}};
  static constexpr FlagArgument<AdemamixOptions> kFlags[] = {
      {"maximize", &AdemamixOptions::maximize}};
};

// beta3 at step t: its half-life grows linearly from that of beta1. With
// ratio = log(beta3) / log(beta1), which is 0 for beta1 = 0,
//     beta3^(1 / (s + (1 - s) * ratio)), s = t / t_beta3.
TORCHAO8_HD double warm_beta3(const AdemamixOptions& o, int64_t t) {
  const double s = o.t_beta3 > 0 ? double(t) / o.t_beta3 : 1;
  if (s >= 1 || o.beta3 <= 0) return o.beta3;
  const double log3 = series_log(o.beta3);
  const double ratio = o.beta1 > 0 ? log3 / series_log(o.beta1) : 0;
  const double beta3 = series_exp(log3 / (s + (1 - s) * ratio));
  return beta3 < o.beta3 ? beta3 : o.beta3;
}

struct AdemamixRule {
  using Options = AdemamixOptions;
  static constexpr int kStates = 3, kValues = 3;  // the fast average, the slow one, the squares
  static constexpr bool kSigned[3] = {true, true, false};
  // A step moves the slow average by less than half a code: rounded to nearest, it stays where it
  // is (benchmarks/NOTES.md).
  static constexpr bool kStochastic[3] = {false, true, true};
  static constexpr bool kMomentsNeedParam = false;

  float unit[3], gain[3], decay[3];
  float of_fast, of_slow;       // what the step takes of each, in units
  float root_factor, eps_term;  // of the denominator, both divided by minus the learning rate
  float shrink, grad_gain;

  TORCHAO8_HD static AdemamixRule at_step(const AdemamixOptions& o, int64_t t, bool scaled_state) {
    AdemamixRule r;
    const double beta[3] = {o.beta1, warm_beta3(o, t), o.beta2};
    double units[3];
    for (int s = 0; s < kStates; s++) {
      const double new_gain = 1 - beta[s];
      units[s] = scaled_state ? new_gain : 1;
      r.unit[s] = float(units[s]);
      r.gain[s] = float(new_gain / units[s]);
      r.decay[s] = float(beta[s] / units[s]);
    }
    const double warm = o.t_alpha > 0 && double(t) < o.t_alpha ? double(t) / o.t_alpha : 1;
    r.of_fast = float(units[0] / (1 - integer_power(o.beta1, t)));
    r.of_slow = float(units[1] * o.alpha * warm);
    const double inverse_root = 1.0 / std::sqrt(1 - integer_power(o.beta2, t));
    r.root_factor = float(inverse_root * std::sqrt(units[2]) / -o.lr);
    r.eps_term = o.eps > 0 ? float(o.eps / -o.lr) : 0.0f;
    r.shrink = float(1 - o.lr * o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return denominator_is_bounded(root_factor, eps_term); }

  TORCHAO8_HD AdemamixRule with_scales(const float* scale) const {
    AdemamixRule r = *this;
    for (int s = 0; s < kStates; s++) r.decay[s] = decay[s] * scale[s];
    return r;
  }

  TORCHAO8_HD AdemamixRule magnitudes() const {
    AdemamixRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F, F g, F* values) const {
    g = g * F(grad_gain);
    values[0] = fma(values[0], F(decay[0]), g * F(gain[0]));
    values[1] = fma(values[1], F(decay[1]), g * F(gain[1]));
    values[2] = fma(values[2], F(decay[2]), (g * F(gain[2])) * g);
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return sqrt(max(values[2], F(root_floor<kScaledState>())));
  }
  template <class F>
  TORCHAO8_HD F step(const F* values, F root) const {
    const F mixed = fma(values[0], F(of_fast), values[1] * F(of_slow));
    return mixed * reciprocal(fma(root, F(root_factor), F(eps_term)));
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return fma(p, F(shrink), step);
  }
};

struct AdemamixFamily {
  static constexpr const char* kName = "ademamix";
  static constexpr State kStates[] = {{"exp_avg_fast"}, {"exp_avg_slow"}, {"exp_avg_sq"}};
  using Options = AdemamixOptions;
  using Rules = Types<AdemamixRule>;

  template <class Visit>
  static void choose(const Options&, const bool*, bool, Visit visit) {
    visit(Type<AdemamixRule>());
  }
};

}  // namespace torchao8
