// Makes a kernel that torch can call of a function, as TORCH_BOX does, for functions that take
// lists of tensors. The arguments are moved into a tuple and passed by reference, where TORCH_BOX
// copies each list once more.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "op/arguments.h"

namespace torchao8 {

template <auto function>
struct Boxer;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxer<function> {
  using Arguments = std::tuple<std::decay_t<Parameters>...>;

  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    call(stack, inputs, outputs, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... I>
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs,
                   std::index_sequence<I...>) {
    constexpr uint64_t kOutputs = std::is_void_v<Result> ? 0 : 1;
    STD_TORCH_CHECK(inputs == sizeof...(I) && outputs == kOutputs, "the schema has ", inputs,
                    " arguments and ", outputs, " results, the kernel ", sizeof...(I), " and ",
                    kOutputs);
    Held<Arguments> arguments(std::in_place, unbox<std::decay_t<Parameters>>(stack[I])...);
    (inspect(std::get<I>(*arguments)), ...);
    if constexpr (std::is_void_v<Result>) {
      function(std::get<I>(*arguments)...);
    } else {
      stack[0] = torch::stable::detail::from<Result>(function(std::get<I>(*arguments)...));
    }
  }

  template <class T>
  static T unbox(StableIValue value) {
    if constexpr (std::is_same_v<T, TensorList>) {
      return TensorList(torch::stable::detail::to<StableListHandle>(value));
    } else {
      return torch::stable::detail::to<T>(value);
    }
  }
  static void inspect(TensorList& list) { list.inspect(); }
  template <class T>
  static void inspect(T&) {}
};

// What an op's implementation is registered with: m.impl("name", boxed<function>).
template <auto function>
constexpr auto boxed =
    static_cast<void (*)(StableIValue*, uint64_t, uint64_t)>(Boxer<function>::call);

}  // namespace torchao8
