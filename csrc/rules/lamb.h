// What LAMB's trust ratio divides by ("Large Batch Optimization for Deep Learning: Training BERT in
// 76 minutes", You et al., 2020, algorithm 2): the update before it is multiplied by a learning
// rate, m / (sqrt(v) + eps) + weight_decay * p with both moments bias-corrected. The step itself is
// AdamW's, its learning rate multiplied by the ratio.
#pragma once

#include "rules/adam.h"

namespace torchao8 {

struct LambRule : AdamRule<false, false> {
  using Adam = AdamRule<false, false>;
  float decay_of_param;

  TORCHAO8_HD static LambRule at_step(AdamOptions o, int64_t t, bool scaled_state) {
    LambRule r;
    o.lr = 1;
    static_cast<Adam&>(r) = Adam::at_step(o, t, scaled_state);
    r.decay_of_param = float(o.weight_decay);
    return r;
  }
  TORCHAO8_HD LambRule with_scales(const float* scale) const {
    LambRule r = *this;
    static_cast<Adam&>(r) = Adam::with_scales(scale);
    return r;
  }

  // The update, with the sign of a step: downwards.
  template <bool kScaledState, class F>
  TORCHAO8_HD F update_of(F p, const F* values) const {
    return fma(p, F(-decay_of_param), step(values, root<kScaledState>(values)));
  }
};

}  // namespace torchao8
