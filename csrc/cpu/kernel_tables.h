// The step kernels of every rule, a table per instruction set.
//
// An isa_*.cpp includes this, and with it the rules, where functions are compiled for its set: a
// rule is inlined in the loops there.
#pragma once

#include "cpu/kernels.h"
#include "rules/families.h"
#include "rules/update.h"

namespace torchao8 {

template <class Rule>
struct KernelsOf {
  StepKernels<Rule> kernels;
};
template <class List>
struct KernelTableOf;
template <class... Rule>
struct KernelTableOf<Types<Rule...>> : KernelsOf<Rule>... {};
using KernelTable = KernelTableOf<AllRules>;

const KernelTable& scalar_kernel_table();
const KernelTable& avx2_kernel_table();
const KernelTable& avx512_kernel_table();

// Forced inline, as what is emitted for an instruction set must not serve a processor without it.
template <class Rule>
TORCHAO8_HD const StepKernels<Rule>& kernels_in(const KernelTable& table) {
  return static_cast<const KernelsOf<Rule>&>(table).kernels;
}
template <class Rule>
TORCHAO8_HD const StepKernels<Rule>& scalar_kernels() {
  return kernels_in<Rule>(scalar_kernel_table());
}

// Those of the path in use.
template <class Rule>
const StepKernels<Rule>& step_kernels() {
#if TORCHAO8_X86
  if (cpu_capability() == Capability::kAvx512) return kernels_in<Rule>(avx512_kernel_table());
  if (cpu_capability() == Capability::kAvx2) return kernels_in<Rule>(avx2_kernel_table());
#endif
  return scalar_kernels<Rule>();
}

}  // namespace torchao8
