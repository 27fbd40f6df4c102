// Which format of state an op is asked for, and whether the engine has kernels of it.
#pragma once

#include <string>
#include <type_traits>

#include "formats/formats.h"
#include "op/checks.h"

namespace torchao8 {

// "0 (dynamic), 1 (mulaw)": those of a list.
template <class... Format>
std::string format_names(Types<Format...>) {
  std::string names;
  for (int64_t number = 0; number < count_formats(Formats()); number++) {
    visit_format(Formats(), number, [&](auto type) {
      using One = typename decltype(type)::type;
      if (!(std::is_same_v<One, Format> || ...)) return;
      names += (names.empty() ? "" : ", ") + std::to_string(number) + " (" + One::kName + ")";
    });
  }
  return names;
}

// Those: the formats that there are kernels of on the device of the call.
template <class... Format>
void check_state_format(const char* op, int64_t number, Types<Format...> those) {
  TORCHAO8_CHECK(number >= 0 && number < count_formats(Formats()), op,
                 ": state_format must be the number of a format of state: ",
                 format_names(Formats()), "; got ", number);
  visit_format(Formats(), number, [&](auto type) {
    using Asked = typename decltype(type)::type;
    TORCHAO8_CHECK((std::is_same_v<Asked, Format> || ...), op, ": state_format ", number, " (",
                   Asked::kName, ") is not there on this device, which has ", format_names(those));
  });
}

// An engine names the formats that it has kernels of, Formats; if it does not, it has the first.
template <class Engine, class = void>
struct FormatsOf {
  using type = Types<DynamicFormat>;
};
template <class Engine>
struct FormatsOf<Engine, std::void_t<typename Engine::Formats>> {
  using type = typename Engine::Formats;
};

}  // namespace torchao8
