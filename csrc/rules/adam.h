// Adam and AdamW ("Adam: A Method for Stochastic Optimization", Kingma and Ba, 2015, algorithm 1;
// "Decoupled Weight Decay Regularization", Loshchilov and Hutter, 2019, algorithm 2; AMSGrad: "On
// the Convergence of Adam and Beyond", Reddi et al., 2018), with eps added to the bias-corrected
// root as torch.optim does.
//
// A rule sees values, never memory: F is float, or a vector of floats with the same operations. Each
// operation is one IEEE operation in the order written, which is what makes every engine agree to
// the bit.
#pragma once

#include "common/macros.h"

namespace torchao8 {

struct AdamOptions {
  double beta1, beta2, eps, weight_decay, lr;
  double grad_scale;  // gradients are divided by it
  bool maximize;
};

// beta^t by repeated squaring: libm's pow may differ between machines.
TORCHAO8_HD double integer_power(double base, int64_t t) {
  double r = 1;
  for (; t > 0; t >>= 1, base *= base) {
    if (t & 1) r *= base;
  }
  return r;
}

// Under the root: below 2^-101 the branch-free root of a GPU is inexact. sqrt(2^-101) is 6e-16.
constexpr float kRootFloor = 3.9443045e-31f;

template <bool kAmsgrad, bool kCoupledDecay>
struct AdamRule {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr bool kSigned[3] = {true, false, false};
  // The gradient of coupled (L2) decay contains the parameter.
  static constexpr bool kMomentsNeedParam = kCoupledDecay;

  float decay1, decay2, decay_max;       // what a stored moment is multiplied by
  float gain1, gain2;                    // what g and g^2 are multiplied by
  float inverse_root, eps, step_size;    // 1 / sqrt(1 - beta2^t), eps, -lr / (1 - beta1^t)
  float shrink, coupled, grad_gain;      // 1 - lr * wd (decoupled); wd, 1 / grad_scale (coupled)

  // t: the step being taken, from 1.
  TORCHAO8_HD static AdamRule at_step(const AdamOptions& o, int64_t t) {
    AdamRule r;
    const double gain = (o.maximize ? -1.0 : 1.0) / o.grad_scale;
    // Without coupled decay the gradient only ever appears times a constant: scaling it is free.
    const double folded = kCoupledDecay ? 1.0 : gain;
    r.decay1 = float(o.beta1);
    r.decay2 = float(o.beta2);
    r.decay_max = 1.0f;
    r.gain1 = float((1 - o.beta1) * folded);
    r.gain2 = float((1 - o.beta2) * (folded * folded));
    r.inverse_root = float(1.0 / std::sqrt(1 - integer_power(o.beta2, t)));
    r.eps = float(o.eps);
    r.step_size = float(-(o.lr / (1 - integer_power(o.beta1, t))));
    r.shrink = kCoupledDecay ? 1.0f : float(1 - o.lr * o.weight_decay);
    r.coupled = float(o.weight_decay);
    r.grad_gain = float(gain);
    return r;
  }

  // A stored moment is state * scale; folding the scale into the decay saves a multiplication.
  TORCHAO8_HD AdamRule with_scales(const float* scale) const {
    AdamRule r = *this;
    r.decay1 = decay1 * scale[0];
    r.decay2 = decay2 * scale[1];
    if (kAmsgrad) r.decay_max = scale[2];
    return r;
  }

  // state: the stored values on entry, the new moments on exit.
  template <class F>
  TORCHAO8_HD void moments(F p, F g, F* state) const {
    if constexpr (kCoupledDecay) g = fma(p, F(coupled), g * F(grad_gain));
    state[0] = fma(state[0], F(decay1), g * F(gain1));
    state[1] = fma(state[1], F(decay2), (g * F(gain2)) * g);
    if constexpr (kAmsgrad) state[2] = max(state[1], state[2] * F(decay_max));
  }

  // The new parameter.
  template <class F>
  TORCHAO8_HD F update(F p, const F* state) const {
    const F root = sqrt(max(state[kStates - 1], F(kRootFloor)));
    const F step = (state[0] * F(step_size)) / fma(root, F(inverse_root), F(eps));
    return kCoupledDecay ? p + step : fma(p, F(shrink), step);
  }
};

}  // namespace torchao8
