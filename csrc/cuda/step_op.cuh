// A step op on CUDA, for any family of rules: its checks, and what the kernels need of its
// arguments.
//
// One launch updates a bucket; longer lists take more. The host waits for nothing, and reads
// nothing from the device, so that a step can be captured in a CUDA graph. A step count, a learning
// rate or a gradient scale that is out of range on the device is therefore not refused.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/extremes_call.h"
#include "cuda/launch.h"
#include "cuda/one_scale.cuh"
#include "cuda/tables.cuh"

namespace torchao8::cuda {

// Kernels read dense memory in row-major order. What is not like that is copied, and back.
class Dense {
 public:
  explicit Dense(const Tensor& t)
      : original_(t), dense_(t.is_contiguous() ? t : torch::stable::contiguous(t)) {}
  void* data() const { return dense_.mutable_data_ptr(); }
  const void* const_data() const { return dense_.const_data_ptr(); }
  void write_back() {
    if (!original_.is_contiguous()) torch::stable::copy_(original_, dense_);
  }

 private:
  Tensor original_, dense_;
};

// Arguments of a call after the checks, and the copies that must live until the launches are made.
template <class Rule>
struct Step {
  const StepCall& call;
  const Launcher& launcher;
  Numbers<Rule> numbers;
  std::vector<Dense>&params, &grads;
  bool rounds_params = false;  // some of them, stochastically
};

template <class Rule>
Places places_of(const Step<Rule>& step, size_t i) {
  Places places;
  places.param = step.params[i].data();
  places.grad = step.grads[i].const_data();
  places.step = step.call.steps[i].template const_data_ptr<float>();
  places.factors =
      step.call.factors.empty() ? nullptr : step.call.factors[i].template const_data_ptr<double>();
  places.param_type = check_float_type({step.call.op, "params", int64_t(i)}, step.call.params[i]);
  places.grad_type = check_float_type({step.call.op, "grads", int64_t(i)}, step.call.grads[i]);
  return places;
}

// Whether there is a parameter that is rounded stochastically.
inline bool rounds_params(const StepCall& call) {
  return call.stochastic_params &&
         std::any_of(call.params.begin(), call.params.end(),
                     [](const Tensor& p) { return p.scalar_type() == ScalarType::BFloat16; });
}

// The type that fast entries have: that of the first parameter, or what is rounded stochastically.
template <class Rule>
FloatType type_of(const Step<Rule>& step) {
  if (step.rounds_params) return FloatType::kBFloat16;
  return check_float_type({step.call.op, "params", 0}, step.call.params[0]);
}

// An entry of 8-bit state, but for what follows from the rest of it.
template <class Rule>
BlockEntry<Rule::kStates> block_entry(const Step<Rule>& step, size_t i) {
  constexpr int N = Rule::kStates;
  const StepCall& call = step.call;
  const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
  TORCHAO8_CHECK(layout.rows * layout.blocks_per_row <= kMostUnits,
                 Argument{call.op, "params", int64_t(i)}.text(), " has more than 2^31 blocks");
  BlockEntry<N> entry = {};
  static_cast<Places&>(entry) = places_of(step, i);
  for (int s = 0; s < N; s++) {
    entry.codes[s] = (*call.states[s].values)[i].template mutable_data_ptr<uint8_t>();
    entry.scales[s] = (*call.states[s].scales)[i].template mutable_data_ptr<float>();
  }
  entry.rows = layout.rows;
  entry.row_length = entry.row_stride = layout.row_length;
  entry.blocks_per_row = uint32_t(layout.blocks_per_row);
  if (!call.shard_offsets.empty()) {
    entry.shard_offset = uint64_t(call.shard_offsets[i]);
    entry.row_stride = call.shard_row_strides[i];
  }
  entry.finish(type_of(step), int(call.block_size));
  return entry;
}

// The same of 32-bit state.
template <class Rule>
ElementEntry<Rule::kStates> element_entry(const Step<Rule>& step, size_t i) {
  const StepCall& call = step.call;
  ElementEntry<Rule::kStates> entry = {};
  static_cast<Places&>(entry) = places_of(step, i);
  for (int s = 0; s < Rule::kStates; s++)
    entry.states[s] = (*call.states[s].values)[i].template mutable_data_ptr<float>();
  entry.count = call.params[i].numel();
  entry.finish(type_of(step));
  return entry;
}

// The same with the place of a shard.
template <class Rule>
PlacedEntry<Rule::kStates> placed_entry(const Step<Rule>& step, size_t i) {
  const StepCall& call = step.call;
  const Tensor& param = call.params[i];
  PlacedEntry<Rule::kStates> entry = {};
  static_cast<ElementEntry<Rule::kStates>&>(entry) = element_entry(step, i);
  entry.row_length = entry.count;
  if (!call.shard_offsets.empty()) {
    entry.shard_offset = uint64_t(call.shard_offsets[i]);
    if (param.dim() > 1 && call.shard_row_strides[i] != param.sizes().back()) {
      entry.row_length = param.sizes().back();
      entry.row_stride = call.shard_row_strides[i];
    }
  }
  entry.finish(type_of(step));
  return entry;
}

template <class Rule, class T, bool kRounds>
void step_blocks_of(const Step<Rule>& step) {
  constexpr int N = Rule::kStates;
  using Entry = BlockEntry<N>;
  const StepCall& call = step.call;
  const Tables* tables = tables_on(step.launcher);
  const auto kernel = call.block_size > kSpan    ? step_blocks<Rule, T, Blocks::kLong, kRounds>
                      : call.block_size == kSpan ? step_blocks<Rule, T, Blocks::kSpan, kRounds>
                                                 : step_blocks<Rule, T, Blocks::kShort, kRounds>;
  const auto launch = [&](const Table<Rule, Entry>& table) {
    step.launcher.launch_over(table.units, kernel, sizeof(SharedOfBlocks<Rule, kRounds>), table,
                              tables);
  };
  Filler<Rule, Entry, decltype(launch)> filler(step.numbers, int(call.block_size), call.stochastic,
                                               launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    filler.add(block_entry(step, i));
  }
  filler.flush();
}

template <class Rule, class T, bool kRounds>
void step_elements_of(const Step<Rule>& step) {
  constexpr int N = Rule::kStates;
  using Entry = ElementEntryOf<N, kRounds>;
  const StepCall& call = step.call;
  const auto launch = [&](const Table<Rule, Entry>& table) {
    step.launcher.launch_over(table.units, step_elements<Rule, T, kRounds>,
                              sizeof(SharedOfElements<Rule>), table);
  };
  Filler<Rule, Entry, decltype(launch)> filler(step.numbers, int(call.block_size), call.stochastic,
                                               launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    if constexpr (kRounds) {
      filler.add(placed_entry(step, i));
    } else {
      filler.add(element_entry(step, i));
    }
  }
  filler.flush();
}

// Fills a table with an entry for each parameter, and launches it.
template <class Entry, class Rule, class Launch, class MakeEntry>
void launch_tables(const Step<Rule>& step, Launch launch, MakeEntry make_entry) {
  Filler<Rule, Entry, Launch> filler(step.numbers, int(step.call.block_size), step.call.stochastic,
                                     launch);
  for (size_t i = 0; i < step.call.params.size(); i++) filler.add(make_entry(i));
  filler.flush();
}

template <class Rule, class T, bool kRounds>
void step_one_scale_of(const Step<Rule>& step) {
  constexpr int N = Rule::kStates;
  using Blocks = OneScaleEntry<N>;
  using Scales = ScalesEntry<N>;
  const StepCall& call = step.call;
  const Tables* tables = tables_on(step.launcher);
  launch_tables<Blocks>(
      step,
      [&](const Table<Rule, Blocks>& table) {
        step.launcher.launch_over(table.units, step_one_scale<Rule, T, kRounds>,
                                  sizeof(SharedOfBlocks<Rule, kRounds>), table, tables);
      },
      [&](size_t i) {
        Blocks entry = {};
        static_cast<BlockEntry<N>&>(entry) = block_entry(step, i);
        entry.extremes = call.extremes[i].template const_data_ptr<int64_t>();
        return entry;
      });
  launch_tables<Scales>(
      step,
      [&](const Table<Rule, Scales>& table) {
        step.launcher.launch(write_scales<Rule>, blocks_of_rows(call.op, table.count), 0, table);
      },
      [&](size_t i) {
        Scales entry = {};
        static_cast<Places&>(entry) = places_of(step, i);
        for (int s = 0; s < N; s++)
          entry.scales[s] = (*call.states[s].scales)[i].template mutable_data_ptr<float>();
        entry.extremes = call.extremes[i].template const_data_ptr<int64_t>();
        return entry;
      });
}

template <class Rule, class T>
void find_extremes_of(const Step<Rule>& step, int64_t* keys) {
  constexpr int N = Rule::kStates;
  using Entry = ExtremesEntry<N>;
  const Tables* tables = tables_on(step.launcher);
  launch_tables<Entry>(
      step,
      [&](const Table<Rule, Entry>& table) {
        step.launcher.launch_over(table.units, find_extremes<Rule, T>,
                                  sizeof(SharedOfExtremes<Rule>), table, tables);
      },
      [&](size_t i) {
        Entry entry = {};
        static_cast<Places&>(entry) = places_of(step, i);
        for (int s = 0; s < N; s++) {
          entry.codes[s] = (*step.call.states[s].values)[i].template mutable_data_ptr<uint8_t>();
          entry.scales[s] = (*step.call.states[s].scales)[i].template mutable_data_ptr<float>();
        }
        entry.keys = keys + i * step.call.states.size();
        entry.count = step.call.params[i].numel();
        entry.finish(type_of(step));
        return entry;
      });
}

template <class Rule>
void find_extremes_of(const Step<Rule>& step, int64_t* keys) {
  switch (type_of(step)) {
    case FloatType::kFloat32:
      return find_extremes_of<Rule, float>(step, keys);
    case FloatType::kBFloat16:
      return find_extremes_of<Rule, BFloat16>(step, keys);
    case FloatType::kFloat16:
      return find_extremes_of<Rule, Half>(step, keys);
  }
}

template <class Rule, class T, bool kRounds = false>
void step_all_of(const Step<Rule>& step) {
  if constexpr (Rule::kStates > 0) {
    if (step.call.one_scale) return step_one_scale_of<Rule, T, kRounds>(step);
    if (step.call.quantized()) return step_blocks_of<Rule, T, kRounds>(step);
  }
  step_elements_of<Rule, T, kRounds>(step);
}

template <class Rule>
void step_all(const Step<Rule>& step) {
  switch (type_of(step)) {
    case FloatType::kFloat32:
      step_all_of<Rule, float>(step);
      break;
    case FloatType::kBFloat16:
      if (step.rounds_params) {
        step_all_of<Rule, BFloat16, true>(step);
      } else {
        step_all_of<Rule, BFloat16>(step);
      }
      break;
    case FloatType::kFloat16:
      step_all_of<Rule, Half>(step);
      break;
  }
  for (Dense& param : step.params) param.write_back();
}

// The op's function. Its lists of states and its own arguments are those of the family.
template <class Family, class States, class Flags>
struct StepOpOf;
template <class Family, size_t... S, size_t... F>
struct StepOpOf<Family, std::index_sequence<S...>, std::index_sequence<F...>> {
  template <size_t>
  using List = TensorList;
  template <size_t>
  using Flag = bool;
  using Options = typename Family::Options;

  static void run(TensorList params, TensorList grads, List<S>... values, List<S>... scales,
                  TensorList steps, TensorList factors, TensorList extremes, Tensor lr,
                  Tensor numbers, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                  Flag<F>... flags, int64_t block_size, bool stochastic_rounding,
                  bool stochastic_params, int64_t seed, std::vector<int64_t> shard_offsets,
                  std::vector<int64_t> shard_row_strides) {
    if (params.empty()) return;
    const char* op = Family::kOp;
    const Place place = place_of({op, "params", 0}, params[0]);
    const TensorList *value_lists[] = {&values...}, *scale_lists[] = {&scales...};
    const PresentStates<Family> present(value_lists, scale_lists);
    const StepCall call{op,
                        params,
                        grads,
                        steps,
                        factors,
                        extremes,
                        present.lists,
                        present.states,
                        present.has,
                        block_size,
                        stochastic_rounding,
                        stochastic_params,
                        seed,
                        shard_offsets,
                        shard_row_strides,
                        place,
                        !extremes.empty()};
    check_block_size(op, block_size);
    const Scalar lr_number = scalar_argument({op, "lr"}, lr, 0, place);
    const Scalar scale = scalar_argument({op, "grad_scale"}, grad_scale, 1, place);
    const Scalar found = scalar_argument({op, "found_inf"}, found_inf, 0, place);
    const RuleNumbers rest = rule_numbers({op, "numbers"}, numbers, kNumberCount<Options>, place);
    // What is on the device, nobody looks at here.
    const CommonOptions common = {lr_number.place ? 0 : lr_number.value,
                                  scale.place ? 1 : scale.value};
    const auto options = make_options<Options>(common, rest.known, flags...);
    check_options(op, options, rest.known != nullptr);
    check_call(call);

    const Launcher launcher(op, place.index);
    std::vector<Dense> dense_params, dense_grads;
    for (const Tensor& param : params) dense_params.emplace_back(param);
    for (const Tensor& grad : grads) dense_grads.emplace_back(grad);
    Family::choose(
        options, present.has, grad_scale.has_value() || !factors.empty(), [&](auto type) {
          using Rule = typename decltype(type)::type;
          step_all<Rule>(
              {call,
               launcher,
               {options, lr_number, scale, found, uint64_t(seed), call.quantized(), rest.on_device},
               dense_params,
               dense_grads,
               rounds_params(call)});
        });
  }

  // The op that looks at a step with one scale a tensor before it is made.
  static Tensor extremes(TensorList params, TensorList grads, List<S>... values, List<S>... scales,
                         TensorList steps, TensorList factors, Tensor lr, Tensor numbers,
                         std::optional<Tensor> grad_scale, Flag<F>... flags) {
    const char* op = Family::kExtremesOp;
    TORCHAO8_CHECK(!params.empty(), op, ": params must not be empty");
    const Place place = place_of({op, "params", 0}, params[0]);
    const TensorList *value_lists[] = {&values...}, *scale_lists[] = {&scales...};
    const ExtremesCall<Family> wanted(params, grads, value_lists, scale_lists, steps, factors,
                                      place);
    const StepCall& call = wanted.call;
    const Scalar lr_number = scalar_argument({op, "lr"}, lr, 0, place);
    const Scalar scale = scalar_argument({op, "grad_scale"}, grad_scale, 1, place);
    const RuleNumbers rest = rule_numbers({op, "numbers"}, numbers, kNumberCount<Options>, place);
    const CommonOptions common = {lr_number.place ? 0 : lr_number.value,
                                  scale.place ? 1 : scale.value};
    const auto options = make_options<Options>(common, rest.known, flags...);
    check_options(op, options, rest.known != nullptr);
    wanted.check();

    const Launcher launcher(op, place.index);
    std::vector<Dense> dense_params, dense_grads;
    for (const Tensor& param : params) dense_params.emplace_back(param);
    for (const Tensor& grad : grads) dense_grads.emplace_back(grad);
    Tensor found = new_extremes(call);
    int64_t* const keys = found.mutable_data_ptr<int64_t>();
    Family::choose(
        options, wanted.present.has, grad_scale.has_value() || !factors.empty(), [&](auto type) {
          using Rule = typename decltype(type)::type;
          if constexpr (Rule::kStates > 0) {
            find_extremes_of<Rule>(
                {call,
                 launcher,
                 {options, lr_number, scale, {nullptr, 0, false}, 0, true, rest.on_device},
                 dense_params,
                 dense_grads},
                keys);
          }
        });
    return found;
  }
};
template <class Family>
using StepOp = StepOpOf<Family, std::make_index_sequence<std::size(Family::kStates)>,
                        std::make_index_sequence<std::size(Family::Options::kFlags)>>;

}  // namespace torchao8::cuda
