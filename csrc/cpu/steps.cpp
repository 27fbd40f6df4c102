// The ops of the families on the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/kernel_tables.h"
#include "cpu/step_engine.h"
#include "op/family_ops.h"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  torchao8::for_each_type(torchao8::Families(), [&](auto type) {
    torchao8::implement<torchao8::CpuStep, typename decltype(type)::type>(m);
  });
}
