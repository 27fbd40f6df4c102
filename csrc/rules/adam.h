// Adam and AdamW ("Adam: A Method for Stochastic Optimization", Kingma and Ba, 2015, algorithm 1;
// "Decoupled Weight Decay Regularization", Loshchilov and Hutter, 2019, algorithm 2; AMSGrad: "On
// the Convergence of Adam and Beyond", Reddi et al., 2018), with eps added to the bias-corrected
// root as torch.optim does.
#pragma once

#include "rules/rule.h"

namespace torchao8 {

struct AdamOptions : CommonOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled;  // of weight decay: AdamW's kind
  bool maximize;

  static constexpr NumberArgument<AdamOptions> kNumbers[] = {
      {"beta1", &AdamOptions::beta1, Range::kDecayRate},
      {"beta2", &AdamOptions::beta2, Range::kDecayRate},
      {"eps", &AdamOptions::eps, Range::kNotNegative},
      {"weight_decay", &AdamOptions::weight_decay, Range::kNotNegative}};
  static constexpr FlagArgument<AdamOptions> kFlags[] = {
      {"decoupled_weight_decay", &AdamOptions::decoupled}, {"maximize", &AdamOptions::maximize}};
};

// kPlainGradient: the gradient goes into the moments as it comes. Else it is scaled, negated or has
// the parameter added to it (coupled decay) before.
template <bool kAmsgrad, bool kPlainGradient>
struct AdamRule {
  using Options = AdamOptions;
  static constexpr int kStates = kAmsgrad ? 3 : 2, kValues = kStates;
  static constexpr bool kSigned[3] = {true, false, false};
  static constexpr bool kStochastic[3] = {false, true, true};
  static constexpr int kRootOf[3] = {1, -1, -1};
  static constexpr bool kMomentsNeedParam = !kPlainGradient;

  // Moments of 8-bit state are computed divided by this, 1 - beta; for 32-bit state it is 1.
  float unit[3];
  float gain[2];   // what g and g^2 are multiplied by
  float decay[3];  // what a stored moment is multiplied by, to be in units
  // Of the denominator, both divided by -lr / (1 - beta1^t).
  float root_factor, eps_term;
  float shrink;     // 1 - lr * weight_decay where it is decoupled, else 1
  float coupled;    // weight_decay where it is coupled, else 0
  float grad_gain;  // 1 / grad_scale times the clipping factor, negative to maximize

  TORCHAO8_HD static AdamRule at_step(const AdamOptions& o, int64_t t, bool scaled_state) {
    AdamRule r;
    const double gain1 = 1 - o.beta1, gain2 = 1 - o.beta2;
    const double unit1 = scaled_state ? gain1 : 1, unit2 = scaled_state ? gain2 : 1;
    r.unit[0] = float(unit1);
    r.unit[1] = r.unit[2] = float(unit2);
    r.gain[0] = float(gain1);
    r.gain[1] = float(gain2);
    r.decay[0] = float(o.beta1 / unit1);
    r.decay[1] = float(o.beta2 / unit2);
    r.decay[2] = float(1 / unit2);
    // p - lr / bc1 * m / (sqrt(v / bc2) + eps) = p + m / (sqrt(v) * root_factor + eps_term). A step
    // size of zero makes both infinite, and the reciprocal zero.
    const double step_size = -(o.lr / (1 - integer_power(o.beta1, t))) * unit1;
    const double inverse_root = 1.0 / std::sqrt(1 - integer_power(o.beta2, t));
    r.root_factor = float(inverse_root * std::sqrt(unit2) / step_size);
    r.eps_term = o.eps > 0 ? float(o.eps / step_size) : 0.0f;
    r.shrink = o.decoupled ? float(1 - o.lr * o.weight_decay) : 1.0f;
    r.coupled = o.decoupled ? 0.0f : float(o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    return r;
  }

  TORCHAO8_HD bool is_bounded() const { return denominator_is_bounded(root_factor, eps_term); }

  // Folding the scale into the decay saves a multiplication.
  TORCHAO8_HD AdamRule with_scales(const float* scale) const {
    AdamRule r = *this;
    for (int s = 0; s < kStates; s++) r.decay[s] = decay[s] * scale[s];
    return r;
  }

  TORCHAO8_HD AdamRule magnitudes() const {
    AdamRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F p, F g, F* state) const {
    if constexpr (!kPlainGradient) g = fma(p, F(coupled), g * F(grad_gain));
    const F m = kScaledState ? g : g * F(gain[0]);
    const F v = kScaledState ? g * g : (g * F(gain[1])) * g;
    state[0] = fma(state[0], F(decay[0]), m);
    state[1] = fma(state[1], F(decay[1]), v);
    if constexpr (kAmsgrad) state[2] = max(state[1], state[2] * F(decay[2]));
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* state) const {
    return sqrt(max(state[kStates - 1], F(root_floor<kScaledState>())));
  }
  template <class F>
  TORCHAO8_HD F step(const F* state, F root) const {
    return state[0] * reciprocal(fma(root, F(root_factor), F(eps_term)));
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return fma(p, F(shrink), step);
  }
};

struct AdamFamily {
  static constexpr const char* kName = "adam";
  static constexpr State kStates[] = {
      {"exp_avg"}, {"exp_avg_sq"}, {"max_exp_avg_sq", Presence::kOptional}};
  using Options = AdamOptions;
  using Rules = Types<AdamRule<false, false>, AdamRule<false, true>, AdamRule<true, false>,
                      AdamRule<true, true>>;

  template <class Visit>
  static void choose(const Options& o, const bool* has, bool scaled_gradient, Visit visit) {
    // A scale or a factor of 1 takes the path of any other: on a GPU the host does not know it.
    if (!scaled_gradient && !o.maximize && (o.decoupled || o.weight_decay == 0)) {
      has[2] ? visit(Type<AdamRule<true, true>>()) : visit(Type<AdamRule<false, true>>());
    } else {
      has[2] ? visit(Type<AdamRule<true, false>>()) : visit(Type<AdamRule<false, false>>());
    }
  }
};

}  // namespace torchao8
