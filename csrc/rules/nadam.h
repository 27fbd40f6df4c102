// NAdam ("Incorporating Nesterov Momentum into Adam", Dozat, 2016), as torch.optim.NAdam has it:
// the momentum of step t is mu_t = beta1 * (1 - 0.5 * 0.96^(t * momentum_decay)), and
//     p = p - lr * ((1 - mu_t) / (1 - mu_1 ... mu_t) * g + mu_(t+1) / (1 - mu_1 ... mu_(t+1)) * m)
//             / (sqrt(v / (1 - beta2^t)) + eps)
#pragma once

#include "rules/rule.h"
#include "rules/series.h"

namespace torchao8 {

struct NadamOptions : CommonOptions {
  double beta1, beta2, eps, weight_decay, momentum_decay;
  bool decoupled, maximize;

  static constexpr NumberArgument<NadamOptions> kNumbers[] = {
      {"beta1", &NadamOptions::beta1, Range::kDecayRate},
      {"beta2", &NadamOptions::beta2, Range::kDecayRate},
      {"eps", &NadamOptions::eps, Range::kNotNegative},
      {"weight_decay", &NadamOptions::weight_decay, Range::kNotNegative},
      {"momentum_decay", &NadamOptions::momentum_decay, Range::kNotNegative}};
  static constexpr FlagArgument<NadamOptions> kFlags[] = {
      {"decoupled_weight_decay", &NadamOptions::decoupled}, {"maximize", &NadamOptions::maximize}};

  static constexpr double kLogOf096 = -0.040821994520255166;
  // mu of step t.
  TORCHAO8_HD double momentum(int64_t t) const {
    return beta1 * (1 - 0.5 * series_exp(double(t) * momentum_decay * kLogOf096));
  }
};

struct NadamRule {
  using Options = NadamOptions;
  static constexpr int kStates = 2, kValues = 3;  // both averages; the gradient
  static constexpr int kScalars = 1;              // the product of all momenta
  static constexpr bool kSigned[3] = {true, false, true};
  static constexpr bool kStochastic[2] = {false, true};
  static constexpr bool kMomentsNeedParam = true;

  float unit[2], gain[2], decay[2];
  float of_average, of_gradient;  // what the step takes of each
  float root_factor, eps_term;    // of the denominator
  float shrink, coupled, grad_gain;

  TORCHAO8_HD static NadamRule at_step(const NadamOptions& o, int64_t t, bool scaled_state,
                                       float* scalars) {
    NadamRule r;
    const double gains[2] = {1 - o.beta1, 1 - o.beta2}, betas[2] = {o.beta1, o.beta2};
    double units[2];
    for (int s = 0; s < 2; s++) {
      units[s] = scaled_state ? gains[s] : 1;
      r.unit[s] = float(units[s]);
      r.gain[s] = float(gains[s] / units[s]);
      r.decay[s] = float(betas[s] / units[s]);
    }
    // A stored product, as the numbers of earlier steps may have been others.
    const double now = o.momentum(t), next = o.momentum(t + 1);
    const double product = double(scalars[0]) * now;
    scalars[0] = float(product);
    r.of_average = float(units[0] * next / (1 - product * next));
    r.of_gradient = float((1 - now) / (1 - product));
    // All over -lr: a learning rate of zero makes the denominator infinite, and the step zero.
    const double inverse_root = 1.0 / std::sqrt(1 - integer_power(o.beta2, t));
    r.root_factor = float(inverse_root * std::sqrt(units[1]) / -o.lr);
    r.eps_term = o.eps > 0 ? float(o.eps / -o.lr) : 0.0f;
    r.shrink = o.decoupled ? float(1 - o.lr * o.weight_decay) : 1.0f;
    r.coupled = o.decoupled ? 0.0f : float(o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return denominator_is_bounded(root_factor, eps_term); }

  TORCHAO8_HD NadamRule with_scales(const float* scale) const {
    NadamRule r = *this;
    for (int s = 0; s < kStates; s++) r.decay[s] = decay[s] * scale[s];
    return r;
  }

  TORCHAO8_HD NadamRule magnitudes() const {
    NadamRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F p, F g, F* values) const {
    g = fma(p, F(coupled), g * F(grad_gain));
    values[0] = fma(values[0], F(decay[0]), g * F(gain[0]));        // m = beta1 m + (1 - beta1) g
    values[1] = fma(values[1], F(decay[1]), (g * F(gain[1])) * g);  // v = beta2 v + (1 - beta2) g^2
    values[2] = g;
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return sqrt(max(values[1], F(root_floor<kScaledState>())));
  }
  template <class F>
  TORCHAO8_HD F step(const F* values, F root) const {
    const F mixed = fma(values[0], F(of_average), values[2] * F(of_gradient));
    return mixed * reciprocal(fma(root, F(root_factor), F(eps_term)));
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return fma(p, F(shrink), step);
  }
};

struct NadamFamily {
  static constexpr const char* kName = "nadam";
  static constexpr State kStates[] = {
      {"exp_avg"}, {"exp_avg_sq"}, {"mu_product", Presence::kScalar}};
  using Options = NadamOptions;
  using Rules = Types<NadamRule>;

  template <class Visit>
  static void choose(const Options&, const bool*, bool, Visit visit) {
    visit(Type<NadamRule>());
  }
};

}  // namespace torchao8
