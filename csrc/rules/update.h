// The update of a parameter by any rule. Not in rule.h: like a rule's own functions, it must be
// compiled for the instruction set that it is inlined in, and rule.h is included before that.
#pragma once

#include "macros.h"

namespace torchao8 {

template <bool kScaledState, class Rule, class F>
TORCHAO8_HD F update(const Rule& rule, F p, const F* values) {
  return rule.apply(p, rule.step(values, rule.template root<kScaledState>(values)));
}

}  // namespace torchao8
