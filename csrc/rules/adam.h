// Adam and AdamW ("Adam: A Method for Stochastic Optimization", Kingma and Ba, 2015, algorithm 1;
// "Decoupled Weight Decay Regularization", Loshchilov and Hutter, 2019, algorithm 2; AMSGrad: "On
// the Convergence of Adam and Beyond", Reddi et al., 2018), with eps added to the bias-corrected
// root as torch.optim does.
//
// A rule sees values, never memory: F is float, or a vector of floats with the same operations.
// Each operation is one IEEE operation in the order written, which is what makes every engine agree
// to the bit.
#pragma once

#include "common/macros.h"

namespace torchao8 {

struct AdamOptions {
  double beta1, beta2, eps, weight_decay, lr;
  double grad_scale;  // gradients are divided by it
  bool maximize;
  bool decoupled;  // of weight decay: AdamW's kind
};

// beta^t by repeated squaring: libm's pow may differ between machines.
TORCHAO8_HD double integer_power(double base, int64_t t) {
  double r = 1;
  for (; t > 0; t >>= 1, base *= base) {
    if (t & 1) r *= base;
  }
  return r;
}

// Under the root, so that 0 / 0 cannot happen with eps = 0. With 8-bit state v is in units of about
// the squared gradient, and 2^-101 (a gradient of 6e-16) is where a GPU's branch-free root is
// exact.
constexpr float kRootFloor8bit = 3.9443045e-31f;
constexpr float kRootFloor32bit = 1.17549435e-38f;  // smallest normal

// kPlainGradient: the gradient goes into the moments as it comes. Else it is scaled, negated or has
// the parameter added to it (coupled decay) before.
template <bool kAmsgrad, bool kPlainGradient>
struct AdamRule {
  using Options = AdamOptions;
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool kSigned[3] = {true, false, false};
  static constexpr bool kMomentsNeedParam = !kPlainGradient;

  // Scaled (8-bit) state is computed in units of what a gradient adds to it, which saves
  // multiplying the gradient by it; the unit disappears in the scale. With 32-bit state it is 1.
  float unit[3];
  float gain[2];   // what g and g^2 are multiplied by
  float decay[3];  // what a stored moment is multiplied by, to be in units
  // Of the denominator, both divided by -lr / (1 - beta1^t).
  float root_factor, eps_term;
  float shrink;              // 1 - lr * weight_decay where it is decoupled, else 1
  float coupled, grad_gain;  // weight_decay where it is coupled, else 0; +-1 / grad_scale

  TORCHAO8_HD static bool gradient_is_plain(const AdamOptions& o) {
    return o.grad_scale == 1 && !o.maximize && (o.decoupled || o.weight_decay == 0);
  }

  // t: the step being taken, from 1.
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
    r.grad_gain = float((o.maximize ? -1.0 : 1.0) / o.grad_scale);
    return r;
  }

  // Whether no denominator leaves [2^-126, 2^126), whatever v below 2^126 there is. So it is but
  // for learning rates that are zero or out of all proportion.
  TORCHAO8_HD bool is_bounded() const {
    const float factor = std::fabs(root_factor), eps = std::fabs(eps_term);
    return factor >= 0x1p-75f && factor < 0x1p62f && eps < 0x1p124f;
  }

  // A stored moment is state * scale; folding the scale into the decay saves a multiplication.
  TORCHAO8_HD AdamRule with_scales(const float* scale) const {
    AdamRule r = *this;
    for (int s = 0; s < kStates; s++) r.decay[s] = decay[s] * scale[s];
    return r;
  }

  // state: the stored values on entry, the new moments (in units) on exit.
  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F p, F g, F* state) const {
    if constexpr (!kPlainGradient) g = fma(p, F(coupled), g * F(grad_gain));
    const F m = kScaledState ? g : g * F(gain[0]);
    const F v = kScaledState ? g * g : (g * F(gain[1])) * g;
    state[0] = fma(state[0], F(decay[0]), m);
    state[1] = fma(state[1], F(decay[1]), v);
    if constexpr (kAmsgrad) state[2] = max(state[1], state[2] * F(decay[2]));
  }

  // The new parameter is apply(p, step(state, root(state))): in three parts, so that a loop can
  // start the two long operations ahead.
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* state) const {
    return sqrt(max(state[kStates - 1], F(kScaledState ? kRootFloor8bit : kRootFloor32bit)));
  }
  template <class F>
  TORCHAO8_HD F step(const F* state, F root) const {
    return state[0] * reciprocal(fma(root, F(root_factor), F(eps_term)));
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return fma(p, F(shrink), step);
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F update(F p, const F* state) const {
    return apply(p, step(state, root<kScaledState>(state)));
  }
};

}  // namespace torchao8
