// What surrounds the matrix products of Muon ("Muon: An optimizer for hidden layers in neural
// networks", Jordan et al., 2024; "Muon is Scalable for LLM Training", arXiv 2502.16982), as
// torch.optim.Muon has it. One op, called twice for a step:
//
//     with momentum buffers    adds the direction to the parameters. The caller gives zeros as
//                              parameters, and orthogonalizes what it gets. lr, weight_decay and
//                              rate_scale do not count
//     without                  moves parameters against gradients, which are orthogonal matrices
//                              here, and decays them. momentum and nesterov do not count
#pragma once

#include "rules/rule.h"

namespace torchao8 {

struct MuonOptions : CommonOptions {
  double momentum, weight_decay;
  double rate_scale;  // of the step and not of the decay: it follows from the shape of a matrix
  bool nesterov, maximize;

  static constexpr NumberArgument<MuonOptions> kNumbers[] = {
      {"momentum", &MuonOptions::momentum, Range::kDecayRate},
      {"weight_decay", &MuonOptions::weight_decay, Range::kNotNegative},
      {"rate_scale", &MuonOptions::rate_scale, Range::kNotNegative}};
  static constexpr FlagArgument<MuonOptions> kFlags[] = {{"nesterov", &MuonOptions::nesterov},
                                                         {"maximize", &MuonOptions::maximize}};
};

// b = momentum * b + (1 - momentum) * g. The direction is b, or with Nesterov's momentum
// momentum * b + (1 - momentum) * g.
struct MuonRule {
  using Options = MuonOptions;
  static constexpr int kStates = 1, kValues = 2;  // the buffer; the gradient
  static constexpr bool kSigned[2] = {true, true};
  static constexpr bool kStochastic[1] = {false};
  static constexpr bool kMomentsNeedParam = false;

  float unit[1], decay[1], gain, grad_gain;
  float of_buffer, of_gradient;  // what the direction has of each

  TORCHAO8_HD static MuonRule at_step(const MuonOptions& o, int64_t, bool scaled_state) {
    MuonRule r;
    const double rest = 1 - o.momentum, unit = scaled_state ? rest : 1;
    r.unit[0] = float(unit);
    r.decay[0] = float(o.momentum / unit);
    r.gain = float(rest / unit);
    r.of_buffer = float((o.nesterov ? o.momentum : 1) * unit);
    r.of_gradient = o.nesterov ? float(rest) : 0.0f;
    r.grad_gain = float(o.gradient_gain(o.maximize));
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return true; }

  TORCHAO8_HD MuonRule with_scales(const float* scale) const {
    MuonRule r = *this;
    r.decay[0] = decay[0] * scale[0];
    return r;
  }

  TORCHAO8_HD MuonRule magnitudes() const {
    MuonRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F, F g, F* values) const {
    g = g * F(grad_gain);
    values[0] = fma(values[0], F(decay[0]), g * F(gain));  // buf.lerp_(grad, 1 - momentum)
    values[1] = g;
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return values[0];
  }
  template <class F>
  TORCHAO8_HD F step(const F* values, F root) const {
    return fma(root, F(of_buffer), values[1] * F(of_gradient));  // grad.lerp(buf, momentum)
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return p + step;
  }
};

// p = p * (1 - lr * weight_decay) - lr * rate_scale * g
struct MuonUpdateRule {
  using Options = MuonOptions;
  static constexpr int kStates = 0, kValues = 1;  // the gradient
  static constexpr bool kSigned[1] = {true};
  static constexpr bool kStochastic[1] = {false};
  static constexpr bool kMomentsNeedParam = false;

  float unit[1], decay[1];  // of no state
  float grad_gain, step_size, shrink;

  TORCHAO8_HD static MuonUpdateRule at_step(const MuonOptions& o, int64_t, bool) {
    MuonUpdateRule r;
    r.unit[0] = r.decay[0] = 1.0f;
    r.grad_gain = float(o.gradient_gain(o.maximize));
    r.step_size = float(-o.lr * o.rate_scale);
    r.shrink = float(1 - o.lr * o.weight_decay);
    return r;
  }
  TORCHAO8_HD bool is_bounded() const { return true; }
  TORCHAO8_HD MuonUpdateRule with_scales(const float*) const { return *this; }
  TORCHAO8_HD MuonUpdateRule magnitudes() const {
    MuonUpdateRule r = *this;
    r.grad_gain = std::fabs(grad_gain);
    return r;
  }

  template <bool kScaledState, class F>
  TORCHAO8_HD void moments(F, F g, F* values) const {
    values[0] = g * F(grad_gain);
  }
  template <bool kScaledState, class F>
  TORCHAO8_HD F root(const F* values) const {
    return values[0];
  }
  template <class F>
  TORCHAO8_HD F step(const F*, F root) const {
    return root * F(step_size);
  }
  template <class F>
  TORCHAO8_HD F apply(F p, F step) const {
    return fma(p, F(shrink), step);
  }
};

struct MuonFamily {
  static constexpr const char* kName = "muon";
  static constexpr State kStates[] = {{"momentum_buffer", Presence::kOptional}};
  using Options = MuonOptions;
  using Rules = Types<MuonUpdateRule, MuonRule>;

  template <class Visit>
  static void choose(const Options&, const bool* has, bool, Visit visit) {
    has[0] ? visit(Type<MuonRule>()) : visit(Type<MuonUpdateRule>());
  }
};

}  // namespace torchao8
