// Stochastic gradient descent with momentum, dampening and Nesterov's momentum as torch.optim.SGD
// has them ("On the importance of initialization and momentum in deep learning", Sutskever et al.,
// 2013, with the learning rate outside of the momentum). The first gradient is not dampened. As
// there, a momentum of 0 leaves the buffer as it is, for the steps that have a momentum again.
//
// LARS ("Large Batch Training of Convolutional Networks", You et al., 2017, algorithm 1) is the
// same with the learning rate, multiplied by a trust ratio, inside of the momentum.
#pragma once

#include "rules/rule.h"

namespace torchao8 {

struct SgdOptions : CommonOptions {
  double momentum, dampening, weight_decay;
  bool nesterov, rate_in_buffer, maximize;

  static constexpr NumberArgument<SgdOptions> kNumbers[] = {
      {"momentum", &SgdOptions::momentum, Range::kNotNegative},
      {"dampening", &SgdOptions::dampening, Range::kFinite},
      {"weight_decay", &SgdOptions::weight_decay, Range::kNotNegative}};
  static constexpr FlagArgument<SgdOptions> kFlags[] = {
      {"nesterov", &SgdOptions::nesterov},
      {"rate_in_buffer", &SgdOptions::rate_in_buffer},
      {"maximize", &SgdOptions::maximize}};
};

// Without a buffer there is no state, and the gradient is the only value. kOfGradient: a step also
// takes something of the gradient itself.
template <bool kBuffer, bool kOfGradient>
struct SgdRule {
  using Options = SgdOptions;
  static constexpr int kStates = kBuffer ? 1 : 0;
  static constexpr bool kKeepsGradient = kOfGradient || !kBuffer;
  static constexpr int kValues = kStates + (kKeepsGradient ? 1 : 0);
  static constexpr bool kSigned[2] = {true, true};
  static constexpr bool kStochastic[1] = {false};
  static constexpr int kRootOf[1] = {-1};
  static constexpr bool kMomentsNeedParam = true;

  float unit[1], decay[1], gain;
  float coupled, grad_gain;      // weight_decay; of the gradient, with its sign
  float of_buffer, of_gradient;  // what the parameter moves by, of each

  TORCHAO8_HD static SgdRule at_step(const SgdOptions& o, int64_t t, bool) {
    SgdRule r;
    r.unit[0] = 1.0f;
    const bool rests = kBuffer && o.momentum == 0;
    r.decay[0] = rests ? 1.0f : float(o.momentum);
    const double inside = o.rate_in_buffer ? o.lr : 1, outside = o.rate_in_buffer ? 1 : o.lr;
    r.gain = rests ? 0.0f : float((t == 1 ? 1 : 1 - o.dampening) * inside);
    r.coupled = float(o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    r.of_buffer = rests ? 0.0f : float(-outside * (o.nesterov ? o.momentum : 1));
    r.of_gradient = !kBuffer || rests || o.nesterov ? float(-o.lr) : 0.0f;
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return true; }

  TORCHAO8_HD SgdRule with_scales(const float* scale) const {
    SgdRule r = *this;
    if constexpr (kBuffer) r.decay[0] = decay[0] * scale[0];
    return r;
  }

  TORCHAO8_HD SgdRule magnitudes() const {
    SgdRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    r.gain = std::fabs(gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F p, F g, F* values) const {
    g = fma(p, F(coupled), g * F(grad_gain));
    if constexpr (kBuffer) values[0] = fma(values[0], F(decay[0]), g * F(gain));
    if constexpr (kKeepsGradient) values[kValues - 1] = g;
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return values[0];
  }
  template <class F>
  TORCHAO8_HD F step(const F* values, F root) const {
    if constexpr (!kBuffer) return root * F(of_gradient);
    if constexpr (kOfGradient) return fma(root, F(of_buffer), values[kValues - 1] * F(of_gradient));
    return root * F(of_buffer);
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return p + step;
  }
};

struct SgdFamily {
  static constexpr const char* kName = "sgd";
  static constexpr State kStates[] = {{"momentum_buffer", Presence::kOptional}};
  using Options = SgdOptions;
  using Rules = Types<SgdRule<false, false>, SgdRule<true, false>, SgdRule<true, true>>;

  template <class Visit>
  static void choose(const Options& o, const bool* has, bool, Visit visit) {
    if (!has[0]) {
      visit(Type<SgdRule<false, false>>());
    } else {
      const bool of_gradient = o.nesterov || !(o.momentum > 0);
      of_gradient ? visit(Type<SgdRule<true, true>>()) : visit(Type<SgdRule<true, false>>());
    }
  }
};

}  // namespace torchao8
