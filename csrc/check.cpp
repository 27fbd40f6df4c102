// The checks of the ops by themselves, for tensors of any device: torchao8/portable makes a step
// out of PyTorch's operators and calls check_adam_step_ and the like before. What is refused, and
// what the message says, is so the same with kernels and without.
#include <torch/csrc/stable/library.h>

#include "op/boxed.h"
#include "op/codec_call.h"
#include "op/count_call.h"
#include "op/family_ops.h"
#include "op/schema.h"
#include "op/sums_call.h"
#include "rules/families.h"

namespace torchao8 {
namespace {

std::optional<double> number_on_cpu(const Argument& a, const std::optional<Tensor>& tensor,
                                    const Device& device) {
  if (!tensor) return std::nullopt;
  const TensorView t(*tensor);
  check_number(a, t);
  if (t.is_cpu()) return read_number(t);
  check_device(a, t, device);
  return std::nullopt;
}

// The numbers of a call: those on the CPU are checked, those on the device are not read.
template <class Options>
struct PortableNumbers {
  Options options;

  explicit PortableNumbers(const StepCall& call) {
    const Argument argument{call.op, "numbers"};
    const TensorView numbers(*call.numbers);
    check_numbers(argument, numbers, kNumberCount<Options>, call.device);
    if (!numbers.is_cpu()) check_device(argument, numbers, call.device);
    const CommonOptions common = {
        number_on_cpu({call.op, "lr"}, call.lr, call.device).value_or(1),
        number_on_cpu({call.op, "grad_scale"}, call.grad_scale, call.device).value_or(1)};
    number_on_cpu({call.op, "found_inf"}, call.found_inf, call.device);
    const double* known = numbers.is_cpu() ? numbers.const_data_ptr<double>() : nullptr;
    options = make_options<Options>(common, known, call.flags);
    check_options(call.op, options, known != nullptr);
  }
  bool skips() const { return false; }
};

Device device_of(const TensorView& first) {
  return {first.is_cuda(), first.get_device_index(), true, first.get_device_type()};
}

// See FamilyOps. Makes nothing of a call that has been checked.
struct PortableChecks {
  using Formats = torchao8::Formats;  // torchao8/portable/formats has them all
  static constexpr bool kNeedsTensors = true;
  struct Guard {
    Guard() {}
  };
  template <class Options>
  using Numbers = PortableNumbers<Options>;

  static Device device_of(const StepCall& call) { return torchao8::device_of(call.params[0]); }
  static void check_values(const StepCall& call) {
    if (!call.params[0].is_cpu()) return;
    for (size_t i = 0; i < call.steps.size(); i++)
      check_count({call.op, "steps", int64_t(i)}, call.steps[i]);
    for (size_t i = 0; i < call.factors.size(); i++)
      check_factor_values({call.op, "factors", int64_t(i)}, call.factors[i]);
    for (size_t i = 0; i < call.extremes.size(); i++)
      check_extreme_values({call.op, "extremes", int64_t(i)}, call.extremes[i]);
  }
  template <class Rule, class AnyNumbers>
  static void step(const StepCall&, const AnyNumbers&) {}
  template <class AnyNumbers>
  static void count_steps(const StepCall&, const AnyNumbers&) {}
  template <class Rule, class AnyNumbers>
  static void find_extremes(const StepCall&, const AnyNumbers&, int64_t*) {}
};

Tensor check_lamb(LambCall& call) {
  call.device = PortableChecks::device_of(call);
  check_block_size(call.op, call.block_size);
  const PortableNumbers<AdamOptions> numbers(call);
  check_call(call);
  PortableChecks::check_values(call);
  return new_sums(call.params);
}

void check_counts(const TensorList& steps, const std::optional<Tensor>& found_inf) {
  if (steps.empty()) return;
  const Device device = device_of(steps[0]);
  check_count_call(steps, device);
  number_on_cpu({kCountOp, "found_inf"}, found_inf, device);
  for (size_t i = 0; i < steps.size() && steps[i].is_cpu(); i++)
    check_count({kCountOp, "steps", int64_t(i)}, steps[i]);
}

void check_summands(const TensorList& tensors) {
  for (size_t i = 0; i < tensors.size(); i++) check_summand(tensors, i, device_of(tensors[0]));
}

void check_norms_call(Tensor sums) {
  check_norms(sums);
}

void check_quantize(Tensor input, int64_t block_size, int64_t state_format) {
  const char* op = "quantize_blockwise";
  check_float_type({op, "input"}, input);
  check_block_size(op, block_size);
  check_state_format(op, state_format, FormatsOf<PortableChecks>::type());
}

void check_dequantize_call(Tensor codes, Tensor scale, int64_t block_size, ScalarType dtype,
                           int64_t state_format) {
  const char* op = "dequantize_blockwise";
  check_state_format(op, state_format, FormatsOf<PortableChecks>::type());
  const int bits = format_info(state_format).bits;
  check_dequantize(op, codes, scale, sizes_of_codes(op, codes, bits), block_size, dtype,
                   device_of(codes));
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CompositeExplicitAutograd, m) {
  using namespace torchao8;
  for_each_type(Families(), [&](auto type) {
    using Ops = FamilyOps<PortableChecks, typename decltype(type)::type>;
    m.impl((std::string(kCheck) + step_op<typename decltype(type)::type>()).c_str(), &Ops::step);
    m.impl((std::string(kCheck) + extremes_op<typename decltype(type)::type>()).c_str(),
           &Ops::extremes);
  });
  m.impl((std::string(kCheck) + kLambOp).c_str(), &lamb_update_sums<check_lamb, MeasuredFormats>);
  m.impl("check_count_step_", boxed<check_counts>);
  m.impl("check_sum_squares", boxed<check_summands>);
  m.impl("check_norms", TORCH_BOX(&check_norms_call));
  m.impl("check_quantize_blockwise", TORCH_BOX(&check_quantize));
  m.impl("check_dequantize_blockwise", TORCH_BOX(&check_dequantize_call));
}
