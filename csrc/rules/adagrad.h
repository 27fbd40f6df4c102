// Adagrad ("Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", Duchi et
// al., 2011), with L2 weight decay, a decaying learning rate and eps beside the root, as
// torch.optim.Adagrad has them.
#pragma once

#include "rules/rule.h"

namespace torchao8 {

struct AdagradOptions : CommonOptions {
  double lr_decay, eps, weight_decay;
  bool maximize;

  static constexpr NumberArgument<AdagradOptions> kNumbers[] = {
      {"lr_decay", &AdagradOptions::lr_decay, Range::kNotNegative},
      {"eps", &AdagradOptions::eps, Range::kNotNegative},
      {"weight_decay", &AdagradOptions::weight_decay, Range::kNotNegative}};
  static constexpr FlagArgument<AdagradOptions> kFlags[] = {
      {"maximize", &AdagradOptions::maximize}};
};

struct AdagradRule {
  using Options = AdagradOptions;
  static constexpr int kStates = 1, kValues = 2;  // the sum of squares; the gradient
  static constexpr bool kSigned[2] = {false, true};
  static constexpr bool kStochastic[1] = {true};
  static constexpr bool kMomentsNeedParam = true;

  float unit[1], decay[1];
  float coupled, grad_gain;
  float root_factor, eps_term;  // of the denominator, both divided by minus the learning rate

  TORCHAO8_HD static AdagradRule at_step(const AdagradOptions& o, int64_t t, bool) {
    AdagradRule r;
    r.unit[0] = r.decay[0] = 1.0f;
    r.coupled = float(o.weight_decay);
    r.grad_gain = float(o.gradient_gain(o.maximize));
    const double step_size = -(o.lr / (1 + double(t - 1) * o.lr_decay));
    r.root_factor = float(1 / step_size);
    r.eps_term = o.eps > 0 ? float(o.eps / step_size) : 0.0f;
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return denominator_is_bounded(root_factor, eps_term); }

  TORCHAO8_HD AdagradRule with_scales(const float* scale) const {
    AdagradRule r = *this;
    r.decay[0] = decay[0] * scale[0];
    return r;
  }

  TORCHAO8_HD AdagradRule magnitudes() const {
    AdagradRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F p, F g, F* values) const {
    g = fma(p, F(coupled), g * F(grad_gain));
    values[0] = fma(values[0], F(decay[0]), g * g);
    values[1] = g;
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return sqrt(max(values[0], F(root_floor<kScaledState>())));
  }
  template <class F>
  TORCHAO8_HD F step(const F* values, F root) const {
    return values[1] * reciprocal(fma(root, F(root_factor), F(eps_term)));
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return p + step;
  }
};

struct AdagradFamily {
  static constexpr const char* kName = "adagrad";
  static constexpr State kStates[] = {{"sum"}};
  using Options = AdagradOptions;
  using Rules = Types<AdagradRule>;

  template <class Visit>
  static void choose(const Options&, const bool*, bool, Visit visit) {
    visit(Type<AdagradRule>());
  }
};

}  // namespace torchao8
